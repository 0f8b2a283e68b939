"""All of the GPU benchmark that needs no GPU: shapes, counts, competitors, resuming, reports, arguments of launches."""

import ctypes
import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cuda_driver
import gpu as entry
import gpu_networks
import gpu_operators
import gpu_ptx
import gpu_record
import gpu_report
import gpu_timing
import pytest
import torch
from gpu_operators import Case
from gpu_record import Found, Job, Record, Row
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from dat_deploy.errors import RecordError
from dat_deploy.model import DAT, FUSED, REFERENCE
from dat_deploy.plugins import tuning
from dat_deploy.plugins.ahead_of_time import compile_launch
from dat_deploy.plugins.deformable_attention import kernel as deformable_attention_kernel
from dat_deploy.variants import RELEASED, VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

SMALL = {
    "deformable_attention, DAT": Case("deformable_attention", 3, 6, 5, 32, 4, (6, 5), 2, (11, 9), True),
    "deformable_attention, DAT++": Case("deformable_attention", 2, 8, 8, 48, 3, (4, 4), 1, (13, 13), False),
    "deformable_sample": Case("deformable_sample", 2, 7, 5, 24, 0, (3, 4), 2),
    "window_attention": Case("window_attention", 2, 8, 12, 32, 2, window_size=4),
    "window_attention, shifted": Case("window_attention", 2, 8, 12, 32, 2, window_size=4, shift_size=2),
    "neighborhood_attention": Case("neighborhood_attention", 2, 9, 7, 32, 2, kernel_size=5),
}
SMALL_IDS = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
BAR_LABELS = {"operator": "deformable_attention", "shape": "24x24x512", "batch": "64", "bar": "yes"}
BAR_LABELS |= {"for": "base-384 384x384 stage 3"}


def uncompiled(function):
    return function


def row(part: str, labels: dict[str, str], error: str | None = None, **numbers: float) -> Row:
    return Row(part, part, labels, numbers, (), error, 1.0)


# Shapes


def test_cases_cover_every_variant_at_every_size_that_it_takes():
    seen = {" ".join(user.split()[:2]) for users in gpu_operators.cases().values() for user in users}
    dat = {"tiny 224x224", "small 224x224", "base 224x224", "base-384 384x384"}  # windows tile no other
    plus = {
        f"{name} {size}"
        for name in RELEASED
        if name not in ("tiny", "small", "base", "base-384")
        for size in ("224x224", "384x384")
    }
    assert seen == dat | plus | {"pp-tiny 800x1344"}
    assert len(RELEASED) == 9


@pytest.mark.parametrize("name", RELEASED)
def test_every_block_of_a_variant_has_its_case(name):
    variant = VARIANTS[name]
    operators = {"L": {"window_attention"}, "S": {"window_attention"}, "N": {"neighborhood_attention"}}
    operators |= {"D": {"deformable_attention", "deformable_sample"}}
    found = gpu_operators.cases()
    for i, stage in enumerate(variant.stages):
        user = f"{name} {variant.image_size[0]}x{variant.image_size[1]} stage {i + 1}"
        mine = [case for case, users in found.items() if user in users and case.batch == 64]
        assert {case.operator for case in mine} == set().union(*(operators[letter] for letter in stage.blocks))
        assert all((case.height, case.width) == variant.feature_map(i) for case in mine)
        assert {case.shift_size > 0 for case in mine if case.window_size} == {
            x == "S" for x in stage.blocks if x in "LS"
        }


def test_cases_are_unique_by_their_keys_and_windows_tile_their_maps():
    found = list(gpu_operators.cases())
    assert len({case.key for case in found}) == len(found)
    assert all(case.height % (case.window_size or 1) == case.width % (case.window_size or 1) == 0 for case in found)
    assert {case.batch for case in found} == {1, 64}


def test_the_shape_of_the_targets_is_the_one_of_the_project():
    bars = [case for case, users in gpu_operators.cases().items() if gpu_operators.is_bar(case, users)]
    assert bars == [Case("deformable_attention", 64, 24, 24, 512, 16, (24, 24), 4, (47, 47), True)]
    first = gpu_operators.jobs()[:4]
    assert {job.labels["implementation"] for job in first} == set(gpu_operators.IMPLEMENTATIONS)
    assert all(job.labels.get("bar") for job in first)


def test_every_shape_has_a_job_for_each_implementation_that_applies():
    jobs = gpu_operators.jobs()
    found = gpu_operators.cases()
    samples = sum(case.operator == "deformable_sample" for case in found)
    assert len({job.key for job in jobs}) == len(jobs) == 4 * len(found) - samples
    assert len(gpu_operators.tune_jobs()) == len(found)


# Counts, by hand


def test_work_of_deformable_attention():
    case = Case("deformable_attention", 2, 3, 5, 8, 2, (2, 2), 1, (5, 9), True)
    assert case.flops == 2 * 2 * (
        2 * 2 * 15 * 4 * 4
    )  # products x multiply-add x (batch x heads x queries x keys x dim)
    query_and_output, key_and_value = 2 * (2 * 15 * 8), 2 * (2 * 4 * 8)
    assert case.bytes_moved() == 2 * (query_and_output + key_and_value + 2 * 5 * 9) + 4 * (2 * 1 * 4 * 2)
    assert case.bytes_moved(4) - case.bytes_moved(2) == 2 * (query_and_output + key_and_value + 2 * 5 * 9)


def test_work_of_window_attention():
    case = Case("window_attention", 2, 4, 6, 8, 2, window_size=2)
    assert case.flops == 4 * (2 * 6) * 2 * 4 * 4 * 4  # of 6 windows an image, 2 heads, 4 x 4 pixels, 4 channels
    assert case.bytes_moved() == 2 * (2 * 24 * 24 + 2 * 24 * 8 + 9 * 2)


def test_work_of_neighborhood_attention():
    case = Case("neighborhood_attention", 2, 4, 6, 8, 2, kernel_size=3)
    assert case.flops == 4 * 2 * 2 * 24 * 9 * 4
    assert case.bytes_moved() == 2 * (2 * 24 * 24 + 2 * 24 * 8 + 2 * 25 + 24)


def test_work_of_deformable_sample_counts_no_pixel_that_no_point_can_need():
    few = Case("deformable_sample", 2, 10, 10, 8, 0, (2, 2), 2)
    many = Case("deformable_sample", 2, 10, 10, 8, 0, (10, 10), 2)
    assert few.bytes_moved() == 2 * (2 * 4 * 4 * 8) + 2 * (2 * 4 * 8) + 4 * (2 * 2 * 4 * 2)
    assert many.bytes_moved() == 2 * (2 * 100 * 8) + 2 * (2 * 100 * 8) + 4 * (2 * 2 * 100 * 2)
    assert few.flops == 8 * 2 * 4 * 8


def test_the_bytes_of_every_operator_are_those_of_its_tensors():
    for case in SMALL.values():
        inputs = gpu_operators.make_inputs(case, 0, torch.device("cpu"))
        tensors = sum(x.numel() * x.element_size() for x in inputs.values())
        if case.operator == "deformable_sample":
            assert case.bytes_moved() == tensors + 2 * 2 * 12 * 24  # all of its pixels are near some point
        else:
            assert case.bytes_moved() == tensors + 2 * case.batch * case.height * case.width * case.channels


def test_roofline_is_the_slower_of_arithmetic_and_memory():
    case = Case("deformable_attention", 64, 24, 24, 512, 16, (24, 24), 4, (47, 47), True)
    assert case.flops == 4 * 64 * 16 * 576 * 576 * 32
    assert case.roofline_us(989.0, 4.8) == pytest.approx(case.flops / 989e12 * 1e6)
    assert case.roofline_us(1e6, 4.8) == pytest.approx(case.bytes_moved() / 4.8e12 * 1e6)


def test_ceilings_count_both_sides_of_a_copy(gpu):
    found = gpu_operators.ceilings(gpu, size=8, words=16)
    assert found.numbers["tflop_per_s"] == pytest.approx(2 * 8**3 / 10e-6 / 1e12)
    assert found.numbers["tb_per_s"] == pytest.approx(2 * 4 * 16 / 10e-6 / 1e12)
    assert found.numbers["datasheet_tb_per_s"] == 4.8


# Competitors


@SMALL_IDS
@pytest.mark.parametrize("name", ["fused", "eager", "flex"])
def test_every_implementation_computes_the_operator(case, name, gpu, record):
    if name == "flex" and case.operator == "deformable_sample":
        with pytest.raises(ValueError, match="deformable_sample is no attention: FlexAttention does not apply"):
            gpu_operators.implementation(case, name, uncompiled)
        return
    found = gpu_operators.measure(case, name, gpu, record, compile_=uncompiled, dtype=torch.float32)
    assert found.error is None
    assert found.numbers["max_error"] <= 1e-5
    assert found.numbers["median_us"] == 10.0
    assert found.numbers["input_sets"] == gpu_operators.input_sets(case, gpu)
    assert found.numbers["share_of_datasheet_roofline"] == pytest.approx(case.roofline_us(989.0, 4.8) / 10)


@pytest.mark.parametrize("location", [0.0, 1.0, -1.0, 1.7, -2.5])
def test_flex_bias_is_zero_outside_of_its_table_as_the_reference_is(location):
    case = replace(SMALL["deformable_attention, DAT"], batch=1)
    inputs = gpu_operators.make_inputs(case, 0, torch.device("cpu"), torch.float32)
    inputs["sampling_locations"][..., 0] = location
    got = gpu_operators.flex_deformable_attention(**inputs, **case.attributes)
    torch.testing.assert_close(got, REFERENCE.deformable_attention(**inputs, **case.attributes), rtol=1e-5, atol=1e-5)


def test_a_wrong_competitor_says_so(monkeypatch, gpu, record):
    swapped = lambda query, key, value, *rest, **more: REFERENCE.deformable_attention(query, value, key, *rest, **more)  # noqa: E731
    monkeypatch.setattr(gpu_operators, "flex_deformable_attention", swapped)
    case = SMALL["deformable_attention, DAT"]
    found = gpu_operators.measure(case, "flex", gpu, record, compile_=uncompiled, dtype=torch.float32)
    assert found.error.startswith("wrong: off by ")
    assert found.numbers["median_us"] == 10.0


def test_inputs_are_random_seeded_and_rotated_until_no_cache_holds_them(gpu):
    case = SMALL["window_attention"]
    first, again, other = (gpu_operators.make_inputs(case, seed, torch.device("cpu")) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["qkv"], other["qkv"])
    assert all(x.std() > 0 for x in first.values())
    gpu.l2_bytes = 10 * case.bytes_moved()
    assert gpu_operators.input_sets(case, gpu) == 30
    gpu.l2_bytes = case.bytes_moved() // 10
    assert gpu_operators.input_sets(case, gpu) == 1


@SMALL_IDS
def test_problem_and_output_are_those_of_the_torch_operator(case, monkeypatch):
    module = sys.modules[f"dat_deploy.plugins.{case.operator}.torch_op"]
    launched = []
    monkeypatch.setattr(module, "kernel_computes", lambda *_: True)
    monkeypatch.setattr(module, "launch_kernel", lambda *arguments: launched.append(arguments))
    inputs = gpu_operators.make_inputs(case, 0, torch.device("cpu"))
    getattr(FUSED, case.operator)(**inputs, **case.attributes)
    [(operator, kernel, problem, of_operator, output)] = launched
    assert operator == case.operator
    assert dict(problem) == dict(gpu_operators.problem(case, inputs))
    assert tuple(output.shape) == case.output_shape
    launch = kernel.launch(problem, kernel.configurations(problem)[0])
    assert all(torch.equal(inputs[name], of_operator[name]) for name in launch.inputs)


def test_tuning_keeps_the_fastest_configuration_that_works(monkeypatch, gpu, tmp_path):
    monkeypatch.setenv("DAT_DEPLOY_CONFIGURATIONS", str(tmp_path / "configurations.json"))
    case = SMALL["deformable_attention, DAT"]
    inputs = gpu_operators.make_inputs(case, 0, gpu.device)
    problem = gpu_operators.problem(case, inputs)
    broken, best, *_ = candidates = deformable_attention_kernel.configurations(problem)

    def start(launch, inputs, output, *, warmup=False):
        if {name: launch.constants[name] for name, _ in broken.tiles} == dict(broken.tiles):
            raise RuntimeError("out of resources")

    launched = []

    def captured(run):
        run()
        candidate = run.args[0]
        return (lambda: launched.append(candidate)), 10

    monkeypatch.setattr(gpu_operators, "start", start)
    monkeypatch.setattr(tuning, "_captured", captured)
    monkeypatch.setattr(tuning, "_microseconds", lambda replay: replay() or (100.0 if launched[-1] == best else 200.0))
    found = gpu_operators.tune(case, gpu)
    stored = json.loads((tmp_path / "configurations.json").read_text())
    [[entry_of_problem]] = [list(by_key.values()) for by_key in stored["NVIDIA H200"].values()]
    assert entry_of_problem["3"]["tiles"] == dict(best.tiles)
    assert found.numbers["best_us"] == 10.0  # of ten launches a graph
    assert len([name for name in found.numbers if name.startswith("us ")]) == len(candidates) - 1
    assert found.notes[1] == f"{gpu_operators.describe(broken)} does not run here"

    monkeypatch.setattr(gpu_operators, "start", lambda *_, **__: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        gpu_operators.tune(case, gpu)


@pytest.mark.slow
def test_what_the_networks_launch_by_default_spills_no_registers_on_sm_90():
    """At the shapes of all variants, 224 and 384; batches share what is compiled."""
    compiled = {}
    for case in gpu_operators.cases():
        with FakeTensorMode():
            inputs = gpu_operators.make_inputs(case, 0, torch.device("cpu"))
            problem = gpu_operators.problem(case, inputs)
        kernel = importlib.import_module(f"dat_deploy.plugins.{case.operator}.kernel")
        launch = kernel.launch(problem, kernel.configurations(problem)[0])
        key = (case.operator, *launch.constants.items(), launch.num_warps)
        if key not in compiled:
            dtypes = {name: tensor.dtype for name, tensor in inputs.items()} | {"output": torch.float16}
            compiled[key] = compile_launch(launch, dtypes, 90)
    assert len(compiled) > 50
    assert not [key for key, result in compiled.items() if result.spilled_bytes]
    assert max(result.shared_memory_bytes for result in compiled.values()) <= 48 * 1024


# Networks


def test_networks_are_measured_in_every_mode(mini_pp, gpu):
    variant = replace(mini_pp, image_size=(64, 64))
    for mode in gpu_networks.MODES:
        found = gpu_networks.measure(variant, mode, 3, gpu, compile_=uncompiled, dtype=torch.float32)
        assert found.error is None
        assert found.numbers["max_logit_error"] <= 1e-4
        assert found.numbers["images_per_s"] == pytest.approx(3 / 10e-6)
        assert found.numbers["in_graph"] == 1.0
        assert found.notes == ("100 replays of a CUDA graph",)


def test_a_network_that_cannot_be_captured_is_timed_without_a_graph(mini_pp, gpu):
    gpu.captures = False
    variant = replace(mini_pp, image_size=(64, 64))
    found = gpu_networks.measure(variant, "eager", 1, gpu, dtype=torch.float32)
    assert found.numbers["in_graph"] == 0.0
    assert found.notes[1] == "not captured in a CUDA graph: operation not permitted when stream is capturing"


def test_memory_of_a_detector(mini_pp, gpu):
    found = gpu_networks.memory("fused", gpu, variant=replace(mini_pp, image_size=(64, 96)), dtype=torch.float32)
    assert found.error is None
    assert found.numbers["peak_mib"] == 3.0


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize("name", list(RELEASED))
def test_a_forward_copies_nothing_from_the_host(name, fused):
    """Such a copy waits for the GPU, and no CUDA graph can be captured across it."""

    class NoHostTensors(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.Tensor.new_tensor, torch.tensor, torch.Tensor.item, torch.Tensor.tolist)
            return function(*args, **(kwargs or {}))

    with torch.device("meta"):
        model, images = DAT(VARIANTS[name], fused=fused), torch.empty(2, 3, *VARIANTS[name].image_size)
    with torch.no_grad(), NoHostTensors():
        model(images)


def test_the_targets_come_first_among_the_networks():
    keys = [job.key for job in gpu_networks.jobs()]
    assert keys[:5] == [
        *(f"networks/{name}/batch 128/fused" for name in gpu_networks.VARIANTS_BY_DEFAULT),
        "networks/tiny/batch 1/fused",
    ]
    assert keys[5:8] == [f"networks/tiny/batch 128/{mode}" for mode in ("compile", "fused+compile", "eager")]
    assert len(set(keys)) == len(keys) == 4 * 4 * 4
    assert {job.labels["variant"] for job in gpu_networks.jobs(["pp-base", "plus"])} == {"pp-base", "plus"}


def test_only_files_with_marked_tests_are_run(tmp_path):
    assert gpu_networks.run_tests(tmp_path).error == "no test is marked gpu"
    marked = "import pytest\n\n@pytest.mark.slow\ndef test_it(): pass\n\ndef test_other(): assert False\n"
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(marked)
    (tmp_path / "tests" / "test_b.py").write_text("import a_package_that_is_not_here")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow")
    found = gpu_networks.run_tests(tmp_path, mark="slow")
    assert found.error is None
    assert (found.numbers["passed"], found.numbers["failed"]) == (1, 0)


def test_tests_are_counted_from_the_last_words_of_pytest():
    found = gpu_networks.tests_found("...\n3 failed, 120 passed, 2 skipped, 1 error in 4.20s\n", 1, 5.0)
    assert (found.numbers["passed"], found.numbers["failed"], found.numbers["error"]) == (120, 3, 1)
    assert found.error == "pytest ended with 1: 120 passed, 3 failed"
    assert gpu_networks.tests_found("120 passed in 4.20s", 0, 5.0).error is None
    assert gpu_networks.tests_found("no tests ran in 0.01s", 5, 5.0).error == "pytest ended with 5: 0 passed, 0 failed"


# The record, and what is left to be done


def test_a_record_is_read_as_it_was_written(tmp_path, record):
    record.add("a", row("operators", {"operator": "x"}, median_us=1.5))
    record.not_measured["b"] = "out of time"
    record.write(tmp_path / "a" / "r.json")
    assert Record.read(tmp_path / "a" / "r.json") == record


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}'])
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RecordError, match=r"r\.json is no record of the GPU benchmark: .*\. Measure again\."):
        Record.read(tmp_path / "r.json")


def test_the_newest_record_of_the_same_source_is_resumed(tmp_path, record):
    folder = tmp_path / gpu_record.slug("NVIDIA H100 80GB HBM3")
    assert folder.name == "nvidia-h100-80gb-hbm3"
    for name, date, source in [("a", "2026-11-20", "old"), ("b", "2026-11-21", "new"), ("c", "2026-11-22", "old")]:
        replace(record, date=date, source=source).write(folder / f"{name}.json")
    (folder / "configurations.json").write_text("{}")
    assert gpu_record.newest(folder, source="new") == folder / "b.json"
    assert gpu_record.newest(folder, source="other") is None
    assert gpu_record.newest(tmp_path) == folder / "c.json"


def test_no_record_is_replaced_by_another(tmp_path, record):
    day = entry.datetime.date(2026, 11, 21)
    names = []
    for _ in range(3):
        path = gpu_record.new_path(tmp_path, day)
        record.write(path)
        names.append(path.name)
    assert names == ["2026-11-21.json", "2026-11-21-2.json", "2026-11-21-3.json"]


def test_the_source_is_the_measured_code_and_what_measures_it(tmp_path):
    for name in ("dat_deploy/plugins/a/kernel.py", "benchmarks/gpu_operators.py", "benchmarks/gpu_report.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    before = gpu_record.source(tmp_path)
    (tmp_path / "benchmarks/gpu_report.py").write_text("2")
    assert gpu_record.source(tmp_path) == before
    (tmp_path / "dat_deploy/plugins/a/kernel.py").write_text("2")
    assert gpu_record.source(tmp_path) != before


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def timed_job(clock: Clock, key: str, part: str, takes: float, guess: float = 10.0, kind: str = "") -> Job:
    def run(gpu, record, path):
        clock.now += takes
        return Found({"value": 1.0})

    return Job(key, part, kind or key, {}, guess, run)


def run(jobs, record, path, gpu, clock, shares, deadline) -> list[str]:
    started: list[str] = []
    gpu_record.pending(jobs, record)
    done = gpu_record.run_jobs(
        jobs, record, path, gpu, shares=shares, deadline=deadline, starting=lambda job, until: started.append(job.key),
        clock=clock,
    )  # fmt: skip
    assert done
    return started


def test_each_part_gets_its_share_and_then_what_is_left(tmp_path, record, gpu):
    clock = Clock()
    jobs = [timed_job(clock, f"a{i}", "a", 10) for i in range(6)] + [timed_job(clock, "b0", "b", 10)]
    started = run(jobs, record, tmp_path / "r.json", gpu, clock, {"a": 0.5, "b": 0.5}, 60.0)
    assert started == ["a0", "a1", "a2", "b0", "a3", "a4"]
    assert record.not_measured == {"a5": "out of time"}
    assert Record.read(tmp_path / "r.json") == record


def test_the_larger_share_is_the_first_to_get_what_is_left(tmp_path, record, gpu):
    clock = Clock()
    jobs = [timed_job(clock, f"{part}{i}", part, 10) for part in "ab" for i in range(4)]
    started = run(jobs, record, tmp_path / "r.json", gpu, clock, {"c": 0.5, "a": 0.2, "b": 0.3}, 100.0)
    assert started == ["a0", "a1", "b0", "b1", "b2", "b3", "a2", "a3"]


def test_a_row_that_does_not_fit_lets_smaller_ones_pass_in_the_end_alone(tmp_path, record, gpu):
    clock = Clock()
    jobs = [timed_job(clock, "a0", "a", 10), timed_job(clock, "a1", "a", 50, 50), timed_job(clock, "a2", "a", 10)]
    assert run(jobs, record, tmp_path / "r.json", gpu, clock, {"a": 1.0}, 40.0) == ["a0", "a2"]
    assert list(record.not_measured) == ["a1"]


def test_a_guess_gives_way_to_what_was_measured(tmp_path, record, gpu):
    clock = Clock()
    jobs = [timed_job(clock, f"a{i}", "a", 30, 1, kind="slow") for i in range(3)]
    assert run(jobs, record, tmp_path / "r.json", gpu, clock, {"a": 1.0}, 70.0) == ["a0", "a1"]


def test_rows_that_are_there_are_not_measured_again(tmp_path, record, gpu):
    clock = Clock()
    jobs = [timed_job(clock, key, "a", 10) for key in ("a0", "a1")]
    record.add("a0", row("a", {}, error="it failed"))
    record.not_measured["a1"] = f"{gpu_record.STOPPED} 60 s"
    assert [job.key for job in gpu_record.pending(jobs, record, continued=True)] == []
    assert record.not_measured == {"a1": f"{gpu_record.STOPPED} 60 s"}
    assert [job.key for job in gpu_record.pending(jobs, record)] == ["a1"]
    assert record.not_measured == {"a1": "out of time"}


def test_a_row_that_fails_records_its_sentence_and_the_run_goes_on(tmp_path, record, gpu):
    clock = Clock()

    def fail(gpu, record, path):
        raise RuntimeError("CUDA error:\n  out of something\n")

    jobs = [Job("a0", "a", "a", {"x": "y"}, 1.0, fail), timed_job(clock, "a1", "a", 1)]
    assert run(jobs, record, tmp_path / "r.json", gpu, clock, {"a": 1.0}, 100.0) == ["a0", "a1"]
    assert record.rows["a0"] == Row("a", "a", {"x": "y"}, {}, (), "RuntimeError: CUDA error: out of something", 0.0)
    assert record.rows["a1"].error is None


def test_a_row_that_breaks_the_gpu_ends_the_process(tmp_path, record, gpu):
    def fail(gpu, record, path):
        gpu.is_healthy = False
        raise RuntimeError("an illegal memory access was encountered")

    jobs = [Job("a0", "a", "a", {}, 1.0, fail), timed_job(Clock(), "a1", "a", 1)]
    done = gpu_record.run_jobs(
        jobs, record, tmp_path / "r.json", gpu, shares={"a": 1.0}, deadline=1e12, starting=lambda *_: None
    )
    assert not done
    assert list(record.rows) == ["a0"]


def test_what_is_not_finite_is_a_note_and_not_a_number(tmp_path, record, gpu):
    jobs = [Job("a0", "a", "a", {}, 1.0, lambda *_: Found({"x": float("nan"), "y": 1.0}))]
    run(jobs, record, tmp_path / "r.json", gpu, Clock(), {"a": 1.0}, 100.0)
    assert record.rows["a0"].numbers == {"y": 1.0}
    assert record.rows["a0"].notes == ("x is nan",)


# The processes


WORKER = """
import json, os, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {benchmarks!r}]
from gpu_record import Found, Job, Record, pending, run_jobs
state, path, ways = Path(sys.argv[1]), Path({path!r}), {ways!r}
record = Record.read(path)
class Gpu:
    broken = False
    def healthy(self): return not self.broken
def run(way):
    def of(gpu, *_):
        if way == "die": os.abort()
        if way == "hang": time.sleep(60)
        if way == "break":
            gpu.broken = True
            raise RuntimeError("illegal address")
        return Found({{"value": 1.0}})
    return of
jobs = [Job(way, "a", "a", {{}}, 0.1, run(way)) for way in ways]
jobs = pending(jobs, record, continued="--continued" in sys.argv)
def starting(job, until):
    values = {{"record": str(path), "key": job.key, "part": "a", "kind": "a", "labels": {{}}, "began": time.time()}}
    state.write_text(json.dumps(values | {{"until": time.time() - 1 if job.key == "hang" else until}}))
state.write_text(json.dumps({{"record": str(path)}}))
done = run_jobs(jobs, record, path, Gpu(), shares={{"a": 1.0}}, deadline=time.time() + 60, starting=starting)
sys.exit(0 if done else 75)
"""


def test_what_dies_hangs_or_breaks_costs_its_own_row_alone(tmp_path, record, monkeypatch):
    path, script = tmp_path / "r.json", tmp_path / "worker.py"
    record.write(path)
    ways = ["die", "one", "hang", "two", "break", "three"]
    script.write_text(
        WORKER.format(root=str(entry.ROOT), benchmarks=str(entry.ROOT / "benchmarks"), path=str(path), ways=ways)
    )
    watch = entry.watch
    monkeypatch.setattr(
        entry,
        "watch",
        lambda command, state, deadline: watch(
            [sys.executable, str(script), str(state), *command[command.index("--worker") + 2 :]], state, deadline
        ),
    )
    options = entry.argparse.Namespace(
        parts=["operators"], minutes=2.0, output=tmp_path, variant=None, commit=None, fresh=False, retry=False
    )
    assert entry.supervise(options) == (0, path)
    found = Record.read(path)
    assert [key for key, measured in found.rows.items() if measured.error is None] == ["one", "two", "three"]
    assert found.rows["die"].error == "the process ended with SIGABRT while it measured this"
    assert found.rows["break"].error == "RuntimeError: illegal address"
    assert list(found.not_measured) == ["hang"]
    assert found.not_measured["hang"].startswith(gpu_record.STOPPED)


def test_the_measuring_process_starts_a_record_and_resumes_it(tmp_path, monkeypatch, gpu, record, capsys):
    gpu.machine = record.machine
    monkeypatch.delenv("DAT_DEPLOY_CONFIGURATIONS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_grad_enabled", lambda _: None)
    monkeypatch.setattr(gpu_timing, "CudaGpu", lambda: gpu)
    monkeypatch.setattr(entry, "all_jobs", lambda *_: [timed_job(Clock(), "a0", "tune", 1), wrong])
    wrong = Job("a1", "tune", "a", {}, 1.0, lambda *_: Found({"value": 2.0}, error="wrong: off by 1"))
    configurations = tmp_path / "nvidia-h200" / "configurations.json"
    for flags in (["--commit", "abc"], [], ["--retry"], []):
        worker = ["--part", "tune", "--output", str(tmp_path), "--worker", str(tmp_path / "state.json")]
        assert entry.main([*worker, "--deadline", str(time.time() + 100), *flags]) == 0
        configurations.unlink() if flags == ["--retry"] else configurations.write_text("{}")
    path = Path(entry.read_state(tmp_path / "state.json")["record"])
    assert path.parent.name == "nvidia-h200"
    found = Record.read(path)
    assert (found.commit, found.rows["a0"].numbers, found.rows["a1"].error) == (
        "abc",
        {"value": 1.0},
        "wrong: off by 1",
    )
    assert entry.os.environ.pop("DAT_DEPLOY_CONFIGURATIONS") == str(configurations)
    printed = capsys.readouterr().out.splitlines()
    first = ["a0: value 1", "a1: wrong: off by 1"]  # once more where the tuned configurations are gone
    assert [line.split("] ")[1] for line in printed] == [*first, first[1], *first]


def test_without_cuda_there_is_one_sentence_and_exit_code_3(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    command = [sys.executable, entry.__file__, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)  # noqa: S603  # fixed
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr == (
        f"benchmarks/gpu.py needs a CUDA device, and torch {torch.__version__} sees none here. "
        "Elsewhere, --part report makes the tables of an existing record.\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--part", "operator"], "no part operator; parts: ceilings, memory, tune, operators, ptx, tests, networks"),
        (["--variant", "tny"], "no variant 'tny'. Did you mean tiny or pp-tiny?"),
    ],
)
def test_unknown_parts_and_variants_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        entry.main(arguments)
    assert said in capsys.readouterr().err


def test_reporting_needs_no_torch(tmp_path, record):
    record.write(tmp_path / "nvidia-h200" / "2026-11-21.json")
    block = "import sys; sys.modules['torch'] = sys.modules['rich'] = sys.modules['typer'] = None\n"
    code = f"{block}sys.path.insert(0, {str(Path(entry.__file__).parent)!r})\n"
    code += f"import gpu; sys.exit(gpu.main(['--part', 'report', '--output', {str(tmp_path)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)  # noqa: S603  # fixed
    assert (done.returncode, done.stderr) == (0, "")
    assert "| target | wanted | found |  |" in done.stdout


def test_every_part_has_jobs():
    for part in entry.SHARES:
        jobs = entry.all_jobs([part])
        assert jobs
        assert {job.part for job in jobs} == {part}
    assert sum(entry.SHARES.values()) == pytest.approx(1.0)
    keys = [job.key for job in entry.all_jobs(entry.PARTS)]
    assert len(set(keys)) == len(keys)


# The report


def full_record(record: Record) -> Record:
    for name, microseconds in {"eager": 1200.0, "compile": 310.0, "flex": 120.0, "fused": 100.0}.items():
        labels = BAR_LABELS | {"implementation": name}
        record.add(
            f"operators/{name}",
            row("operators", labels, median_us=microseconds, bytes=1.6e8, tb_per_s=1.6, tflop_per_s=435.0,
                share_of_datasheet_roofline=0.44, share_of_measured_roofline=0.55),
        )  # fmt: skip
    for name, latency in {"compile": 10.0, "fused+compile": 6.4, "fused": 7.0, "eager": 20.0}.items():
        labels = {"variant": "tiny", "image": "224x224", "batch": "128", "mode": name}
        numbers = {"p50_ms": latency, "p99_ms": latency, "images_per_s": 128e3 / latency, "peak_mib": 900.0}
        record.add(f"networks/{name}", row("networks", labels, **numbers, in_graph=1.0))
    for mode, peak in {"eager": 6000.0, "fused": 1000.0}.items():
        record.add(f"memory/{mode}", row("memory", {"mode": mode}, peak_mib=peak))
    record.add("ceilings", row("ceilings", {}, tflop_per_s=790.0, tb_per_s=4.3))
    record.add("ptx/a", row("ptx", {"operator": "a"}, identical=1.0))
    record.add("ptx/b", row("ptx", {"operator": "b"}, error="CudaError: no"))
    record.add("tests", row("tests", {}, passed=120.0, failed=0.0))
    record.not_measured["networks/small/batch 128/compile"] = "out of time"
    return record


def test_bars_are_met_missed_or_not_measured(record):
    verdicts = {(bar.what, bar.target): (bar.found, bar.verdict) for bar in gpu_report.bars(full_record(record))}
    operator = "`deformable_attention`, `base-384` stage 3, fp16, batch 64: speed / "
    assert verdicts[f"{operator}eager", "≥ 10×"] == ("12.00×", "met")
    assert verdicts[f"{operator}compile", "≥ 3×"] == ("3.10×", "met")
    assert verdicts[f"{operator}flex", "≥ 1.5×"] == ("1.20×", "missed")
    assert verdicts["the same: share of its roofline (datasheet)", "≥ 50 %"] == ("44 %", "missed")
    memory = "`pp-tiny` 800×1344, batch 1: peak memory of eager / ours"
    assert verdicts[memory, "≥ 5×"] == ("6.00×", "met")
    assert verdicts["`tiny`, fp16, batch 128: speed / compiled reference", "≥ 1.5×"] == ("1.56×", "met")
    assert verdicts["`tiny`, fp16, batch 128", "≥ 19,000 images/s"] == ("20,000 images/s", "met")
    assert verdicts["`small`, fp16, batch 128", "≥ 11,500 images/s"] == ("–", "not measured")
    assert verdicts["`base`, fp16, batch 128: speed / compiled reference", "≥ 1.5×"] == ("–", "not measured")
    assert verdicts["`tiny`, fp16, batch 1: p50", "≤ 0.5 ms"] == ("–", "not measured")


def test_a_wrong_row_meets_no_bar(record):
    full_record(record)
    record.rows["operators/fused"] = replace(record.rows["operators/fused"], error="wrong: off by 1")
    verdicts = [bar.verdict for bar in gpu_report.bars(record)[:4]]
    assert verdicts == ["not measured"] * 4


def test_an_empty_record_has_a_report(record):
    text = gpu_report.markdown(record)
    assert {bar.verdict for bar in gpu_report.bars(record)} == {"not measured"}
    assert "No network was measured." in text
    assert "No operator was measured." in text


def test_the_tables_say_what_was_found(record):
    text = gpu_report.markdown(full_record(record))
    shape = "deformable_attention | base-384 384x384 stage 3: 24x24x512 | 64"
    assert f"| {shape} | 1,200.0 | 310.0 | 120.0 | 100.0 | 12.0 | 3.1 | 1.2 | 160.0 | 1.60 | 435 | 44 | 55 |" in text
    assert "| `tiny` 224x224 | 128 | fused+compile | 20,000 | 6.400 | 6.400 | 900 | 1.56 | yes |" in text
    assert "- This GPU reached 790 TFLOP/s (float16 product) and 4.30 TB/s (copy)." in text
    assert "- PTX launched through the driver: 1 of 2 operators equal the torch operator exactly." in text
    assert "- Tests marked gpu: 120 passed, 0 failed." in text
    assert "- `ptx/b`: CudaError: no" in text
    assert "- Not measured: `networks/small/batch 128/compile` (out of time)." in text
    assert "The targets are for" not in text
    widths = {line.count("|") for line in gpu_report._operators(record)}
    assert len(widths) == 1


def test_another_gpu_is_named_beside_the_targets(record):
    record.machine = replace(record.machine, gpu="NVIDIA A100")
    assert "The targets are for an H200; this is NVIDIA A100." in gpu_report.targets(record)


def test_the_plot_is_a_picture_or_a_sentence(record, tmp_path, monkeypatch):
    path = tmp_path / "r.png"
    assert gpu_report.plot(record, path) == "no plot: nothing that could be drawn was measured"
    assert gpu_report.plot(full_record(record), path) is None
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
    assert gpu_report.plot(record, path).startswith("no plot: matplotlib is not installed")


def test_the_report_command_prints_the_tables_and_writes_them_beside_the_record(record, tmp_path, capsys):
    full_record(record).write(tmp_path / "nvidia-h200" / "2026-11-21.json")
    assert entry.main(["--part", "report", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| target | wanted | found |  |") == 2
    assert sorted(path.name for path in (tmp_path / "nvidia-h200").iterdir()) == [
        "2026-11-21.json",
        "2026-11-21.md",
        "2026-11-21.png",
    ]
    assert entry.main(["--part", "report", "--output", str(tmp_path / "none")]) == 1


# Times


def test_percentiles_are_of_single_calls():
    found = gpu_timing.times([float(i) for i in range(10, 1010, 10)], 10, "how")
    assert (found.median, found.p90, found.p99, found.samples, found.calls) == (50.5, 90.0, 99.0, 100, 10)


def test_datasheet_ceilings_are_found_by_name():
    by_name = {"NVIDIA H200": (989.0, 4.8), "NVIDIA H100 80GB HBM3": (989.0, 3.35), "NVIDIA H100 PCIe": (756.0, 2.0)}
    for name, expected in by_name.items():
        gpu = gpu_timing.CudaGpu.__new__(gpu_timing.CudaGpu)
        gpu.name = name
        assert gpu.ceilings == expected
    gpu.name = "Tesla T4"
    assert gpu.ceilings is None


class GpuWithoutClock(gpu_timing.CudaGpu):
    """`time_calls` itself, on calls that say how long they take."""

    def __init__(self, us: float) -> None:
        self.us, self.captured = us, []

    def synchronize(self) -> None: ...

    def _elapsed(self, call):
        return call() or self.us

    def capture(self, call):
        if self.captured is None:
            raise RuntimeError("no\nmore words")
        taken = len(call()) * self.us
        self.captured.append(taken)
        return lambda: taken

    def samples(self, calls, **_):
        return [calls[0]() or self.us] * 20


def test_short_calls_are_timed_in_a_graph_that_lasts():
    gpu = GpuWithoutClock(us=5.0)
    found = gpu.time_calls([lambda: None, lambda: None])
    assert gpu.captured == [10.0, 480.0]
    assert (found.median, found.calls, found.how) == (5.0, 96, "replays of a CUDA graph of 96 calls")


def test_long_calls_need_no_graph():
    found = GpuWithoutClock(us=50_000.0).time_calls([lambda: None])
    assert (found.median, found.how) == (50_000.0, "CUDA events around each call")


def test_what_cannot_be_captured_is_timed_with_its_launches():
    gpu = GpuWithoutClock(us=5.0)
    gpu.captured = None
    found = gpu.time_calls([lambda: None])
    assert found.how == "CUDA events around each call, launches included, for it could not be captured: no"


# Launches by hand


def test_kernel_parameters_are_the_addresses_of_the_arguments_in_order():
    held = [cuda_driver.pointer(2**63 + 5), cuda_driver.int32(-7), cuda_driver.int32(2**31 - 1), cuda_driver.pointer(9)]
    parameters = cuda_driver.kernel_parameters(held)
    types = [ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32, ctypes.c_uint64]
    read = [kind.from_address(address).value for kind, address in zip(types, parameters, strict=True)]
    assert read == [2**63 + 5, -7, 2**31 - 1, 9]
    with pytest.raises(OverflowError, match="2147483648 is no int32"):
        cuda_driver.int32(2**31)


def test_arguments_stand_in_the_ahead_of_time_order():
    case = SMALL["deformable_attention, DAT"]
    inputs = gpu_operators.make_inputs(case, 0, torch.device("cpu"))
    output = torch.empty(case.output_shape, dtype=torch.float16)
    problem = gpu_operators.problem(case, inputs)
    launch = deformable_attention_kernel.launch(problem, deformable_attention_kernel.configurations(problem)[0])
    found = [argument.value for argument in gpu_ptx.arguments(launch, inputs, output)]
    pointers = [inputs[name].data_ptr() for name in launch.inputs]
    assert found == [*pointers, 6, 5, 30, 11, output.data_ptr()]  # height, width, keys, table height
    by_kernel = [parameter.name for parameter in launch.kernel.params if parameter.name not in launch.constants]
    assert by_kernel == [*launch.inputs, *launch.scalars, "output"]


class FakeCuda:
    """libcuda as far as it is called: remembers what it was told, and fails where it is asked to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, arguments))
            if name == "cuDriverGetVersion":
                arguments[0]._obj.value = 13000
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"a PTX JIT compilation failed"
            if name == "cuModuleLoadDataEx" and self.fails == name:
                ctypes.memmove(arguments[4][0], b"line 3: syntax\0", 15)
            return 218 if name == self.fails else 0

        return call


def test_a_launch_passes_grid_block_memory_stream_and_arguments():
    cuda = FakeCuda()
    driver = cuda_driver.Driver(cuda)
    assert driver.version() == 13000
    function = driver.function(driver.load(".version 8.7"), "kernel")
    held = [cuda_driver.pointer(4096), cuda_driver.int32(3)]
    driver.launch(function, (7, 1, 1), (128, 1, 1), 60_000, 77, held)
    names = [name for name, _ in cuda.calls]
    assert names == [
        "cuDriverGetVersion",
        "cuModuleLoadDataEx",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuLaunchKernel",
    ]
    assert [argument.value for argument in cuda.calls[3][1][1:]] == [8, 60_000]
    launched = cuda.calls[4][1]
    assert [size.value for size in launched[1:8]] == [7, 1, 1, 128, 1, 1, 60_000]
    assert launched[8].value == 77
    assert ctypes.c_int32.from_address(launched[9][1]).value == 3
    assert launched[10].value is None
    driver.launch(function, (1, 1, 1), (32, 1, 1), 1024, 77, held)
    assert [name for name, _ in cuda.calls[5:]] == ["cuLaunchKernel"]


@pytest.mark.parametrize("writes", [True, False], ids=["right", "nothing"])
def test_ptx_is_compiled_launched_and_compared(writes, gpu, monkeypatch):
    case = replace(SMALL["deformable_attention, DAT"], batch=1)
    expected = REFERENCE.deformable_attention(**gpu_operators.make_inputs(case, 0, gpu.device), **case.attributes)

    class Launching(FakeCuda):
        def cuLaunchKernel(self, *arguments):  # noqa: N802  # the driver's name
            self.calls.append(("cuLaunchKernel", arguments))
            if writes:
                output = ctypes.c_uint64.from_address(arguments[9][9]).value  # after 5 inputs and 4 scalars
                ctypes.memmove(output, expected.data_ptr(), expected.numel() * 2)
            return 0

    cuda = Launching()
    monkeypatch.setattr(gpu_ptx, "Driver", lambda: cuda_driver.Driver(cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    found = gpu_ptx.launch_by_hand(case, gpu)
    assert [name for name, _ in cuda.calls][-2:] == ["cuLaunchKernel", "cuModuleUnload"]
    assert found.numbers["identical"] == writes
    assert found.error == (None if writes else "the PTX and the torch operator differ, by up to nan")
    assert found.numbers["registers"] > 0


def test_the_drivers_own_words_are_told():
    driver = cuda_driver.Driver(FakeCuda(fails="cuModuleLoadDataEx"))
    sentence = "cuModuleLoadDataEx: error 218, a PTX JIT compilation failed; line 3: syntax"
    with pytest.raises(cuda_driver.CudaError) as raised:
        driver.load("nonsense")
    assert str(raised.value) == sentence


def test_ptx_jobs_are_one_an_operator():
    assert {job.labels["operator"] for job in gpu_ptx.jobs()} == set(REFERENCE._fields)


def test_what_the_processes_share_is_read_even_when_it_is_missing(tmp_path):
    assert entry.read_state(tmp_path / "none.json") == {}
    entry.write_state(tmp_path / "state.json", {"key": "a", "until": time.time()})
    assert entry.read_state(tmp_path / "state.json")["key"] == "a"
    assert [path.name for path in Path(tmp_path).iterdir()] == ["state.json"]
