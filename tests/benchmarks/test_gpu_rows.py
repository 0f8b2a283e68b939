"""Rows of the GPU benchmark as far as a CPU goes: shapes, counts by hand, every peer, every kind of row."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gpu as entry
import gpu_kit
import gpu_networks
import gpu_operators
import gpu_plan
import gpu_report
import gpu_timing
import pytest
import torch
from conftest import SMALL
from gpu_cases import BAR, Case, of_stage
from gpu_record import Row
from torch._subclasses import FakeTensorMode

from dat_deploy.networks.dat import model as model_module
from dat_deploy.networks.dat.checkpoint import load_model
from dat_deploy.networks.dat.model import DAT, REFERENCE, half_network
from dat_deploy.networks.dat.variants import RELEASED, VARIANTS, StageConfig
from dat_deploy.plugins import dispatch
from dat_deploy.plugins.precompiled import key
from dat_deploy.plugins.ptx import compile_launch

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@pytest.fixture
def _uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


# Shapes


@pytest.mark.parametrize("name", RELEASED)
def test_every_block_of_a_network_has_its_case(name):
    operators = {"L": {"window_attention"}, "S": {"window_attention"}, "N": {"neighborhood_attention"}}
    operators |= {"D": {"deformable_attention", "deformable_sample"}}
    for i, stage in enumerate(VARIANTS[name].stages):
        mine = list(of_stage(VARIANTS[name], i, 64))
        assert {case.operator for case in mine} == set().union(*(operators[letter] for letter in stage.blocks))
        assert all((case.height, case.width) == VARIANTS[name].feature_map(i) for case in mine)
        assert {case.shift_size > 0 for case in mine if case.window_size} == {
            x == "S" for x in stage.blocks if x in "LS"
        }


def test_the_shape_of_the_targets_is_the_one_of_the_project():
    assert BAR == ("base-384", 2, 64)
    assert gpu_plan.bar() == Case("deformable_attention", 64, 24, 24, 512, 16, (24, 24), 4, (47, 47), True)


# Counts, by hand


def test_work_of_each_operator():
    deformable = Case("deformable_attention", 2, 3, 5, 8, 2, (2, 2), 1, (5, 9), True)
    assert deformable.flops == 2 * 2 * (
        2 * 2 * 15 * 4 * 4
    )  # products, multiply-add, batch x heads x queries x keys x D
    assert deformable.exponentials == 2 * 2 * 15 * 4
    maps, table, locations = 2 * (2 * 15 * 8) + 2 * (2 * 4 * 8), 2 * 5 * 9, 2 * 4 * 2
    assert deformable.bytes_moved == 2 * maps + 4 * (table + locations)
    window = Case("window_attention", 2, 4, 6, 8, 2, window_size=2)
    assert window.flops == 4 * (2 * 6) * 2 * 4 * 4 * 4  # of 6 windows an image, 2 heads, 4 x 4 pixels, 4 channels
    assert window.bytes_moved == 2 * (2 * 24 * 24 + 2 * 24 * 8) + 4 * 9 * 2
    neighborhood = Case("neighborhood_attention", 2, 4, 6, 8, 2, kernel_size=3)
    assert neighborhood.flops == 4 * 2 * 2 * 24 * 9 * 4
    assert neighborhood.bytes_moved == 2 * (2 * 24 * 24 + 2 * 24 * 8 + 24) + 4 * 2 * 25


def test_work_of_deformable_sample_counts_no_pixel_that_no_point_can_need():
    few = Case("deformable_sample", 2, 10, 10, 8, 0, (2, 2), 2)
    many = Case("deformable_sample", 2, 10, 10, 8, 0, (10, 10), 2)
    assert few.bytes_moved == 2 * (2 * 4 * 4 * 8) + 2 * (2 * 4 * 8) + 4 * (2 * 2 * 4 * 2)
    assert many.bytes_moved == 2 * (2 * 100 * 8) + 2 * (2 * 100 * 8) + 4 * (2 * 2 * 100 * 2)
    assert (few.flops, few.exponentials) == (8 * 2 * 4 * 8, 0)


def test_the_floor_of_the_targets_is_the_exponentials(record):
    """64 · 16 · 576² scores; 16 exponentials a clock on each of 132 multiprocessors at 1755 MHz are 91.7 us."""
    bar, times = gpu_plan.bar(), {"median_us": 183.4, "cold_us": 200.0, "sm_mhz": 1755.0}
    numbers = times | {"flops": bar.flops, "bytes": bar.bytes_moved, "exponentials": bar.exponentials}
    row = Row("operators", "fused", {}, numbers, (), None, 1.0, 0.0)
    assert gpu_report.share_of_floor(record, row) == (None, "–")
    record.add("ceilings", Row("ceilings", "", {}, {"tflop_per_s": 989.0, "tb_per_s": 4.8}, (), None, 1.0, 0.0))
    assert gpu_report.share_of_floor(record, row) == (pytest.approx(0.5, rel=1e-3), "exponentials")
    fewer = replace(row, numbers=numbers | {"exponentials": 0})
    assert gpu_report.share_of_floor(record, fewer) == (pytest.approx(44.0 / 183.4, rel=1e-2), "products")
    memory = replace(row, numbers=numbers | {"exponentials": 0, "flops": 0})
    assert gpu_report.share_of_floor(record, memory) == (pytest.approx(31.5 / 200.0, rel=1e-2), "memory")
    small = replace(row, numbers=numbers | {"exponentials": 0, "flops": 0, "bytes": 4.8e6})
    assert gpu_report.share_of_floor(record, small) == (None, "launches")


# Inputs and what is right


def test_inputs_are_random_seeded_and_of_what_ships(case):
    first, again, other = (gpu_operators.make_inputs(case, seed, torch.device("cpu")) for seed in (0, 0, 1))
    assert {name: tuple(x.shape) for name, x in first.items()} == case.inputs
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    assert all(x.std() > 0 for x in first.values())
    in_float32 = {name for name, x in first.items() if x.dtype == torch.float32}
    assert in_float32 == {"sampling_locations", "relative_position_bias_table"} & first.keys()


def test_stressed_points_lie_on_pixels_between_them_on_the_border_and_in_one_image_outside():
    case = Case("deformable_sample", 3, 9, 9, 8, 0, (10, 10), 2)
    plain, points = (
        gpu_operators.make_inputs(case, 0, torch.device("cpu"), stress=stress)["sampling_locations"].reshape(
            3, 2, 100, 2
        )
        for stress in (False, True)
    )
    assert torch.equal(points[0], plain[0])  # as networks put them
    pixels = (points[1].reshape(2, 25, 4, 2) + 1) / 2 * 8
    assert torch.allclose(pixels[:, :, 1], pixels[:, :, 1].round(), atol=1e-5)
    assert torch.allclose(pixels[:, :, 2] - 0.5, (pixels[:, :, 2] - 0.5).round(), atol=1e-5)
    assert set(points[1].reshape(2, 25, 4, 2)[:, :, 3].abs().flatten().tolist()) == {1.0}
    assert points[1].abs().max() < 1.2 < points[2].abs().max()  # far outside in the last image alone


@pytest.mark.parametrize("what", ["default", "configurations", "unaligned", "graph"])
def test_a_right_kernel_passes_each_check(case, what, gpu, kernels):
    found = gpu_operators.check(case, what, gpu)
    assert found.error is None
    assert 0 < found.numbers["max_error"] <= found.numbers["allowed_error"] < 0.02 * found.numbers["largest_output"]
    every = len(kernels[0].kernel.configurations(kernels[0].problem))
    assert len(kernels) == {"default": 2, "unaligned": 2, "configurations": 1 + every, "graph": 4}[what]
    moved = [x.data_ptr() % 16 for x in kernels[0].inputs.values()]
    assert all(moved) if what == "unaligned" else not any(moved)


@pytest.mark.parametrize(
    ("fault", "what", "said"),
    [
        ("skips an image", "default", "wrong, BLOCK_QUERIES="),
        ("scaled", "default", "wrong, as launched: off by "),
        ("one configuration", "configurations", "wrong, BLOCK_QUERIES="),
        ("stale in a graph", "graph", "wrong, replayed: off by "),
        ("no kernel", "default", "0 kernels were launched where one must be: the reference computed this"),
    ],
)
def test_a_wrong_kernel_fails(fault, what, said, gpu, kernels, monkeypatch):
    right = dispatch.Job.run

    def run(job, configuration, wrap=None):
        before = job.output.clone()
        right(job, configuration)
        if fault == "skips an image" and before[1].isnan().all():
            job.output[1] = before[1]
        if fault == "scaled":
            job.output.mul_(1.01)
        if fault == "one configuration" and len(kernels) == 3:
            job.output[-1, -1, -1, -1] += 0.1

    monkeypatch.setattr(dispatch.Job, "run", run)
    if fault == "stale in a graph":
        monkeypatch.setattr(gpu, "capture", lambda call, kept=[]: (kept.append(call().clone()), lambda: None)[1])
    if fault == "no kernel":
        monkeypatch.setattr(dispatch, "kernel_computes", lambda _: False)
    case = Case("window_attention", 2, 8, 12, 32, 2, window_size=4)
    assert gpu_operators.check(case, what, gpu).error.startswith(said)


# Peers


@pytest.mark.parametrize(
    ("which", "name"),
    [(which, name) for which, case in SMALL.items() for name in gpu_plan.PEERS[case.operator]],
)
@pytest.mark.usefixtures("kernels", "_uncompiled")
def test_every_peer_computes_the_operator(which, name, gpu):
    found = gpu_operators.measure(SMALL[which], name, gpu)
    assert found.error is None
    assert (found.numbers["median_us"], found.numbers["cold_us"], found.numbers["sm_mhz"]) == (10.0, 12.0, 1755.0)
    assert found.numbers["flops"] == SMALL[which].flops
    assert found.numbers.get("tuned") == (0.0 if name == "fused" else None)


@pytest.mark.parametrize("location", [0.0, 1.0, -1.0, 1.7, -2.5])
def test_flex_bias_is_zero_outside_of_its_table_as_the_reference_is(location):
    case = Case("deformable_attention", 1, 6, 5, 32, 4, (6, 5), 2, (11, 9), True)
    inputs = gpu_operators.make_inputs(case, 0, torch.device("cpu"), torch.float32)
    inputs["sampling_locations"][..., 0] = location
    got = gpu_operators.flex_deformable_attention(*inputs.values(), *case.attributes.values())
    torch.testing.assert_close(got, REFERENCE.deformable_attention(**inputs, **case.attributes), rtol=1e-5, atol=1e-5)


def test_a_wrong_peer_says_so(monkeypatch, gpu):
    case = Case("deformable_attention", 2, 8, 8, 48, 3, (4, 4), 1, (13, 13), False)
    monkeypatch.setattr(gpu_operators, "sdpa", lambda query, key, value, *rest: query)
    found = gpu_operators.measure(case, "sdpa", gpu)
    assert found.error.startswith("wrong, sdpa: off by ")
    assert found.numbers["median_us"] == 10.0


# Every kind of row, on networks that are small


@pytest.fixture
def _small_networks(monkeypatch, mini_pp):
    stage = {"window_size": 2, "offset_kernel_size": 3, "offset_range_factor": 2.0}
    mini = replace(
        VARIANTS["tiny"],
        image_size=(64, 64),
        trained_size=64,
        stages=tuple(
            StageConfig(32 << i, blocks, 1 << i, **stage, offset_groups=1)
            for i, blocks in enumerate(("LS", "L", "LD", "LD"))
        ),
    )
    for name in (*gpu_plan.NETWORKS, "small", "base"):
        monkeypatch.setitem(
            VARIANTS, name, mini_pp.with_image_size(64, 64) if name == "pp-tiny" else replace(mini, name=name)
        )
    monkeypatch.setattr(gpu_plan, "DETECTOR", ("pp-tiny", (64, 96)))


@pytest.mark.filterwarnings("ignore:CUDA is not available, disabling CUDA profiling:UserWarning")
@pytest.mark.usefixtures("kernels", "_small_networks", "_uncompiled")
def test_every_kind_of_row_is_measured_on_small_networks(gpu, tmp_path, monkeypatch):
    context = {"gpu": gpu, "path": tmp_path / "2026-11-27.json", "kit": None}
    monkeypatch.setattr(gpu_networks.shutil, "which", lambda name: None)
    errors, kinds = {}, set()
    for job in gpu_plan.first() + gpu_plan.second():
        kind = (job.call, job.kind.removesuffix("base-384"), job.labels.get("operator"))
        if kind in kinds or job.part in ("tests", "engines", "ceilings") or job.kind == "tune":
            continue
        kinds.add(kind)
        smaller = {"case": replace(job.arguments["case"], batch=2)} if "case" in job.arguments else {}
        smaller |= {"batch": min(job.arguments["batch"], 2)} if "batch" in job.arguments else {}
        found = entry.attempt(replace(job, arguments=job.arguments | smaller), context)
        if found.error is not None or not found.numbers:
            errors[job.key] = found.error
    assert errors == {"ncu/bar": None}  # without numbers, for want of the program
    assert len(kinds) > 30
    assert "batch 2" in (tmp_path / "2026-11-27-profile.txt").read_text()


@pytest.mark.usefixtures("kernels", "_small_networks")
def test_a_wrong_slot_of_a_network_is_an_error(gpu, monkeypatch):
    forward = DAT.forward

    def wrong(self, image):
        logits = forward(self, image)
        return torch.cat([logits[:1], logits[:1], logits[2:]]) if self.fused else logits

    monkeypatch.setattr(DAT, "forward", wrong)
    assert gpu_networks.check("tiny", "fp32", gpu).error.startswith("wrong in 1 of 3 slots: a logit is off by ")


@pytest.mark.usefixtures("kernels", "_small_networks", "_uncompiled")
@pytest.mark.parametrize("mode", ["fused", "eager", "fused+compile"])
def test_what_was_recorded_of_launches_does_not_count_as_memory(mode, gpu, monkeypatch):
    recorded, held = [], []

    @contextlib.contextmanager
    def recording():
        with dispatch.recorded_jobs() as jobs:
            recorded.append(jobs)
            yield jobs
            held.append(len(jobs))

    monkeypatch.setattr(gpu_networks, "recorded_jobs", recording)
    monkeypatch.setattr(gpu, "peak_bytes", lambda call: sum(map(len, recorded)))
    found = gpu_networks.measure("tiny", mode, 2, gpu)
    assert (found.numbers["peak_mib"], found.numbers.get("tuned")) == (0.0, 0.0 if mode == "fused" else None)
    assert [count > 0 for count in held] == [True] * (mode == "fused")


def test_the_tests_count_as_far_as_they_came(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_networks.importlib.util, "find_spec", lambda name: None)
    said = (
        "tests/a.py::test_one PASSED [ 10%]\n[gw1] [ 20%] PASSED tests/a.py::test_2[FAILED] \ntests/a.py::test_3 FAILED"
    )

    def run(command, stdout, timeout, **_):
        assert command[command.index("-W") + 1] == "default"  # a warning of an untried version fails no test
        assert "-rN" in command  # a summary would name what failed once more
        stdout.write(said)
        raise gpu_networks.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu_networks.subprocess, "run", run)
    found = gpu_networks.tests(tmp_path / "r.json", mark="gpu", seconds=3.0)
    assert (found.numbers["passed"], found.numbers["failed"]) == (2.0, 1.0)
    assert found.error == "the tests were stopped after 3 s"
    assert (tmp_path / "r-tests.txt").read_text() == said


def test_the_rest_of_the_rows(gpu, monkeypatch):
    """Ceilings and latencies by hand; what was tuned; a package's row with the build and its engine stood in for."""
    found = gpu_operators.ceilings(gpu, size=64, words=1024)
    assert found.numbers["tflop_per_s"] == pytest.approx(2 * 64**3 / 10e-6 / 1e12)
    assert found.numbers["tb_per_s"] == pytest.approx(2 * 4 * 1024 / 10e-6 / 1e12)
    numbers, _ = gpu_networks._timed(lambda: None, 3, gpu)
    assert (numbers["images_per_s"], numbers["p50_ms"], numbers["cold_p99_ms"]) == (pytest.approx(3e5), 0.01, 0.014)
    launches = [SimpleNamespace(microseconds=2.0, default_microseconds=each) for each in (2.0, 5.0, None)]
    monkeypatch.setattr(gpu_networks, "tune_network", lambda *_, **__: SimpleNamespace(launches=launches))
    assert gpu_networks.tune("tiny", [1], gpu).numbers == {"launches": 3, "largest_gain": 2.5}

    model = load_model("demo")
    runner = SimpleNamespace(outputs_on_device=lambda images: {"logits": model(images) + (len(images) == 2)})
    passport = SimpleNamespace(engine_bytes=2**21)
    report = SimpleNamespace(seconds=7.0, path=Path("engine.pt2"), passport=passport, notes=("random weights",))
    rows = [SimpleNamespace(batch=1, p50_ms=3.0)]
    monkeypatch.setattr("dat_deploy.engine.build.build", lambda **_: report)
    monkeypatch.setattr("dat_deploy.runners.open_runner", lambda _: contextlib.nullcontext(runner))
    monkeypatch.setattr("dat_deploy.benchmark.benchmark", lambda *_, **__: SimpleNamespace(rows=rows))
    found = gpu_networks.engine("demo", [1, 2], gpu)
    assert found.error.startswith("batch 2: wrong in 2 of 2 slots: a logit is off by 1 where ")
    assert (found.numbers["engine_mib"], found.numbers["batch 1 host_p50_ms"]) == (2.0, 3.0)
    assert found.numbers["batch 2 images_per_s"] == pytest.approx(2e5)


@pytest.mark.parametrize("captures", [True, False])
def test_times_are_microseconds_and_what_cannot_be_captured_says_so(captures, monkeypatch):
    """`CudaGpu.times` with Triton's clocks stood in for: milliseconds of a call in a graph, and of each of 100."""
    gpu, asked = gpu_timing.CudaGpu.__new__(gpu_timing.CudaGpu), {}
    gpu.failed_capture = False
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1755)
    monkeypatch.setattr(gpu, "capture", lambda call: call)

    def in_graph(call, rep, return_mode):
        if not captures:
            raise RuntimeError("operation not permitted\nmore words")
        asked["graph"] = rep
        return [0.010] * 10

    cold = [0.001 * each for each in range(1, 101)]
    monkeypatch.setattr("triton.testing.do_bench_cudagraph", in_graph)
    monkeypatch.setattr("triton.testing.do_bench", lambda call, rep, return_mode: cold)
    found, how = gpu.times(lambda: None)
    expected = {"cold_median": 50.5, "cold_p90": 90.0, "cold_p99": 99.0, "samples": 100.0, "sm_mhz": 1755.0}
    assert found == pytest.approx(expected | {"median": 10.0 if captures else 50.5})
    assert gpu.failed_capture is not captures
    assert ("it could not be captured: operation not permitted" in how) is not captures


def test_percentiles_are_of_single_calls():
    assert [gpu_timing.percentile([float(i) for i in range(1, 101)], share) for share in (0.9, 0.99)] == [90.0, 99.0]


# The kit


def test_the_kit_has_every_launch_of_the_networks(monkeypatch):
    """What each network launches on a GPU, at a batch of one and of many, in what ships and in float32."""
    has = {key(*each) for each in gpu_kit.needed()}
    assert len(has) > 200
    missing, launched = [], set()

    def run(job, configuration, wrap=None):
        launched.add(job.operator)
        launch = job.kernel.launch(job.problem, configuration)
        tensors = {**job.inputs, "output": job.output}
        if key(launch, {name: x.dtype for name, x in tensors.items()}, ()) not in has:
            missing.append((job.operator, job.problem))

    monkeypatch.setattr(dispatch.Job, "run", run)
    monkeypatch.setattr(dispatch, "kernel_computes", lambda _: True)
    # torch takes the shapes alone of what it traces; these launch
    launching = SimpleNamespace(**{name: call.__wrapped__ for name, call in vars(model_module.FUSED).items()})
    monkeypatch.setattr(model_module, "FUSED", launching)
    for name in gpu_plan.NETWORKS:
        with FakeTensorMode(), torch.no_grad():
            model = DAT(VARIANTS[name], fused=True)
            shipped = half_network(model, torch.float16)
            for network in (model, shipped) if name != "base-384" else (shipped,):
                for batch in (1, 128):
                    network(torch.randn(batch, 3, *VARIANTS[name].image_size))
    assert not missing
    assert launched == set(vars(REFERENCE))


@pytest.mark.slow
@pytest.mark.compiler
def test_what_the_networks_launch_by_default_hardly_spills_registers_on_sm_90(harness):
    """At the shapes of all variants, 224 and 384; batches share what is compiled."""
    compiled = {}
    for case in harness.all_cases():
        for each in gpu_kit.launches(case, "fp16", "default"):
            if key(*each) not in compiled:
                compiled[key(*each)] = compile_launch(*each[:2], 90)
    assert len(compiled) > 50
    assert not [key for key, result in compiled.items() if result.spilled_bytes > 16]  # by Triton 3.9; by 3.6 none
    shared = max(result.shared_memory_bytes + result.static_shared_memory_bytes for result in compiled.values())
    assert shared <= 48 * 1024
