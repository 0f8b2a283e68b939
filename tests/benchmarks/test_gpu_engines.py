"""Rows of engines without a GPU: builds and runners are stood in for, but for one engine that is built."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gpu_engines
import gpu_record
import gpu_report
import numpy as np
import pytest
import torch
from gpu_engines import ENGINES, Engine
from gpu_networks import BATCHES, VARIANTS_BY_DEFAULT
from gpu_record import Found, Record, Row

from dat_deploy import runners
from dat_deploy.checkpoint import load_model
from dat_deploy.engine import build as building
from dat_deploy.engine import tensorrt_library
from dat_deploy.engine.passport import read_passport
from dat_deploy.errors import EngineBuildError, UnsupportedError
from dat_deploy.metadata import read_metadata
from dat_deploy.plugins import trt_plugin
from dat_deploy.variants import Variant

AOTINDUCTOR = Engine("aotinductor")
AHEAD_OF_TIME = Engine("tensorrt", "plugin", "ahead-of-time")
PYTHON_PLUGINS = Engine("tensorrt", "plugin", "IPluginV3")
GATHER = Engine("tensorrt", "gather")


class FakeRunner:
    """The logits of the network, changed by `fault`, and launches counted at the first call and at each other one."""

    def __init__(self, variant: Variant) -> None:
        self.model, self.at_capture, self.in_replay = load_model(variant), 0, 0
        self.launched, self.calls, self.host_calls, self.is_closed = 0, 0, 0, False
        self.logits: torch.Tensor | None = None
        self.fault = lambda logits: None

    def outputs_on_device(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.launched += self.in_replay if self.calls else self.at_capture
        self.calls += 1
        if self.logits is None:
            self.logits = self.model(images)
            self.fault(self.logits)
        return {"logits": self.logits}

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        assert images.dtype == np.float32
        self.host_calls += 1
        return {}

    def __enter__(self) -> "FakeRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On shared cores, threads would take most of the time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(mini_pp: Variant) -> Variant:
    return replace(mini_pp, image_size=(64, 64))


@pytest.fixture
def runner(small: Variant, monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    """What `open_runner` gives, on a GPU whose memory it takes 5 MiB of."""
    runner, free = FakeRunner(small), iter([20 * 2**20, 15 * 2**20])
    monkeypatch.setattr(runners, "open_runner", lambda engine: runner)
    monkeypatch.setattr(trt_plugin, "launch_counts", lambda: {"window_attention": runner.launched, "other": 0})
    monkeypatch.setattr(gpu_engines, "free_bytes", lambda device: next(free))
    monkeypatch.setattr(gpu_engines, "HOST_SECONDS", 0.0)
    return runner


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What `build` and `export` were called with; neither does anything else."""
    calls: list[dict[str, object]] = []

    def build(**arguments):
        calls.append(arguments)
        engine_layers = {"fp16": 30, "fp32": 12} if arguments.get("lowering") == "gather" else None
        layers = {} if arguments["backend"] == "aotinductor" else {"fp16": 100, "fp32": 50}
        passport = SimpleNamespace(
            engine_bytes=3 * 2**20, layers=layers, engine_layers=engine_layers, plugins={"window_attention": 2}
        )
        return SimpleNamespace(path=arguments["output"], passport=passport, seconds=7.0, notes=("random weights",))

    def exported(variant, path, *, precision):
        calls.append({"variant": variant.name, "exported": path, "precision": precision})
        path.touch()

    monkeypatch.setattr(building, "build", build)
    monkeypatch.setattr("dat_deploy.export.export", exported)
    return calls


def row(part: str, labels: dict[str, str], error: str | None = None, **numbers: float) -> Row:
    return Row(part, part, labels, numbers, (), error, 1.0)


# Rows


def test_a_row_has_the_numbers_of_building_opening_and_running(small, gpu, runner, asked, tmp_path):
    found = gpu_engines.measure(small, GATHER, 3, gpu, tmp_path)
    assert found.error is None
    assert found.notes == (
        "100 calls on the device, each a copy, a replay of the engine's own CUDA graph and a copy",
        "10 calls from NumPy to NumPy, by the host's clock",
        "random weights",
    )
    numbers = found.numbers
    assert numbers["images_per_s"] == pytest.approx(3 / 10e-6)
    assert [numbers[name] for name in ("p50_ms", "p90_ms", "p99_ms", "samples")] == [0.01, 0.01, 0.01, 100]
    assert [numbers[name] for name in ("build_s", "engine_mib", "device_mib")] == [7.0, 3.0, 5.0]
    assert [numbers[name] for name in ("fp16 layers", "fp32 layers", "plugin_layers")] == [30, 12, 2]
    assert numbers["max_logit_error"] <= 1e-5 < numbers["largest_logit"]
    assert numbers["worst_slot"] in (0, 1, 2)
    assert numbers["python_launches_in_replay"] == 0
    assert numbers["in_graph"] == 1
    assert 0 < numbers["host_p50_ms"] <= numbers["host_p99_ms"]
    assert (numbers["host_samples"], runner.host_calls) == (10, 11)
    assert list(numbers)[:2] == ["images_per_s", "p50_ms"]  # printed while it runs
    assert runner.calls == 1 + gpu_engines.REPLAYS + 1
    assert runner.is_closed


def test_every_engine_is_built_by_the_words_of_a_user(small, gpu, runner, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_engines, "free_bytes", lambda device: 0)
    monkeypatch.setattr(gpu_engines, "eager", lambda variant, images: torch.zeros(2, 1000))  # no answer is looked at
    for engine in ENGINES:
        gpu_engines.measure(small, engine, 2, gpu, tmp_path)
    exports = [call for call in asked if "exported" in call]
    source = tmp_path / "mini-pp.onnx"
    assert exports == [{"variant": "mini-pp", "exported": source, "precision": "fp16"}]
    first, *others = [call for call in asked if "exported" not in call]
    outputs = [call.pop("output") for call in (first, *others)]
    assert first == {"backend": "aotinductor", "batches": [2], "variant": small, "precision": "fp16"}
    assert [(call["backend"], call["lowering"], call["plugin_form"]) for call in others] == [
        ("tensorrt", "plugin", "ahead-of-time"),
        ("tensorrt", "gather", "auto"),
        ("tensorrt", "plugin", "IPluginV3"),
        ("tensorrt", "function", "auto"),
        ("tensorrt-rtx", "plugin", "IPluginV3"),
        ("tensorrt-rtx", "gather", "auto"),
    ]
    assert all((call["source"], call["batches"]) == (source, [2]) for call in others)
    assert {output.suffix for output in outputs[1:]} == {".engine"}
    assert outputs[0].suffix == ".pt2"
    assert [path.name for path in tmp_path.iterdir()] == ["mini-pp.onnx"]  # the engines went with their rows


def test_without_a_folder_nothing_stays(small, gpu, runner, asked):
    gpu_engines.measure(small, GATHER, 1, gpu)
    assert not asked[0]["exported"].parent.exists()


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_one_wrong_slot_is_an_error_that_names_it(slot, small, gpu, runner, asked, tmp_path):
    def fault(logits):
        logits[slot, 5] += 100

    runner.fault = fault
    found = gpu_engines.measure(small, AHEAD_OF_TIME, 3, gpu, tmp_path)
    assert found.numbers["worst_slot"] == slot
    largest = found.numbers["largest_logit"]
    assert found.error == f"wrong: a logit of slot {slot} is off by 100, the largest is {largest:.3g}"
    assert "layers are those of the parsed network, for the engine's own could not be seen" in found.notes


def test_two_slots_that_are_mixed_up_are_an_error(small, gpu, runner, asked, tmp_path):
    runner.fault = lambda logits: logits.copy_(logits[[0, 2, 1]])
    found = gpu_engines.measure(small, GATHER, 3, gpu, tmp_path)
    assert found.error.startswith(("wrong: a logit of slot 1 is", "wrong: a logit of slot 2 is"))


def test_what_is_no_number_is_wrong(small, gpu, runner, asked, tmp_path):
    runner.fault = lambda logits: logits[1].fill_(float("nan"))
    found = gpu_engines.measure(small, GATHER, 3, gpu, tmp_path)
    assert found.error.startswith("wrong: a logit of slot 1 is off by ")


def test_a_launch_from_python_in_a_replay_is_an_error(small, gpu, runner, asked, tmp_path):
    runner.at_capture, runner.in_replay = 8, 2
    found = gpu_engines.measure(small, PYTHON_PLUGINS, 1, gpu, tmp_path)
    assert found.error == "Python launched 40 kernels in 20 replays, where it must launch none"
    assert found.numbers["python_launches_in_replay"] == 40
    assert found.numbers["python_launches_at_capture"] == 8


def test_plugins_in_python_must_have_launched_something(small, gpu, runner, asked, tmp_path):
    found = gpu_engines.measure(small, PYTHON_PLUGINS, 1, gpu, tmp_path)
    assert found.error == "the plugins launched nothing, so the engine does not run through them"


def test_aotinductor_is_captured_or_the_row_says_why_not(small, gpu, runner, asked, monkeypatch):
    monkeypatch.setattr(gpu_engines, "free_bytes", lambda device: 0)
    found = gpu_engines.measure(small, AOTINDUCTOR, 2, gpu)
    assert found.error is None
    assert found.notes[0] == "100 replays of a CUDA graph"
    assert found.numbers["in_graph"] == 1
    assert not [name for name in found.numbers if name.endswith(" layers")]
    gpu.captures = False
    found = gpu_engines.measure(small, AOTINDUCTOR, 2, gpu)
    assert found.notes[0] == "100 calls on the device, launches included"
    assert found.notes[2] == "not captured in a CUDA graph: operation not permitted when stream is capturing"
    assert found.numbers["in_graph"] == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed")
def test_an_engine_is_exported_and_built_for_real(small, gpu, runner, tmp_path, monkeypatch):
    passports = []
    monkeypatch.setattr(runners, "open_runner", lambda engine: passports.append(read_passport(Path(engine))) or runner)
    runner.at_capture = 8
    found = gpu_engines.measure(small, Engine("tensorrt-rtx", "plugin", "IPluginV3"), 2, gpu, tmp_path)
    assert found.error is None
    (passport,) = passports
    assert str(passport.profiles[0]) == "2"
    assert (passport.metadata.lowering, passport.metadata.precision) == ("plugin", "fp16")
    assert found.numbers["plugin_layers"] == sum(passport.plugins.values()) > 0
    assert found.numbers["fp16 layers"] == passport.layers["fp16"] > 0
    assert read_metadata(tmp_path / "mini-pp.onnx").lowering == "function"
    assert gpu_engines.exported(small, tmp_path) == tmp_path / "mini-pp.onnx"


# What is to be measured


def test_the_largest_batch_comes_first_then_one_then_the_others(monkeypatch):
    monkeypatch.setattr(gpu_engines, "reason_against", lambda engine: None)
    jobs = gpu_engines.jobs()
    assert len({job.key for job in jobs}) == len(jobs) == len(BATCHES) * len(VARIANTS_BY_DEFAULT) * len(ENGINES)
    per_batch = len(VARIANTS_BY_DEFAULT) * len(ENGINES)
    assert [job.labels["batch"] for job in jobs[::per_batch]] == ["128", "1", "8", "64"]
    assert [job.key for job in jobs[:3]] == [
        "engines/tiny/batch 128/aotinductor",
        "engines/tiny/batch 128/tensorrt plugin ahead-of-time",
        "engines/tiny/batch 128/tensorrt gather",
    ]
    assert [job.labels["variant"] for job in jobs[: per_batch : len(ENGINES)]] == list(VARIANTS_BY_DEFAULT)
    assert {job.labels["variant"] for job in gpu_engines.jobs(["plus"])} == {"plus"}


def test_a_job_measures_what_its_labels_say(monkeypatch, gpu, record, tmp_path):
    monkeypatch.setattr(gpu_engines, "reason_against", lambda engine: None)
    measured = []
    monkeypatch.setattr(gpu_engines, "measure", lambda *arguments: measured.append(arguments) or Found({}))
    for job in gpu_engines.jobs(["tiny"], tmp_path)[:2]:
        job.run(gpu, record, tmp_path / "r.json")
    assert [(variant.name, engine.name, batch, folder) for variant, engine, batch, _, folder in measured] == [
        ("tiny", "aotinductor", 128, tmp_path),
        ("tiny", "tensorrt plugin ahead-of-time", 128, tmp_path),
    ]


def run(jobs, record, path, gpu, seconds=1000.0) -> None:
    deadline = gpu_record.time.time() + seconds
    gpu_record.pending(jobs, record)
    assert gpu_record.run_jobs(
        jobs, record, path, gpu, shares={"engines": 1.0}, deadline=deadline, starting=lambda *_: None
    )


def test_what_this_machine_lacks_is_a_row_with_the_reason_and_takes_no_time(monkeypatch, gpu, record, tmp_path):
    monkeypatch.setattr("dat_deploy.engine.tensorrt_library.importlib.util.find_spec", lambda name: None)
    tensorrt_library.import_tensorrt.cache_clear()
    jobs = gpu_engines.jobs()
    run(jobs, record, tmp_path / "r.json", gpu, seconds=10.0)  # too little for any other row
    assert {key: row.error for key, row in record.rows.items()} == {
        f"engines/{engine.name}": f"backend {engine.backend} cannot be used here: package {module} is not installed: "
        f"pip install 'dat-deploy[{engine.backend}]'"
        for engine in ENGINES
        for module in [engine.backend.replace("-", "_")]
        if engine != AOTINDUCTOR
    }
    assert {key.rpartition("/")[2] for key in record.not_measured} == {"aotinductor"}
    assert sum(row.seconds for row in record.rows.values()) < 1
    again = gpu_record.pending(jobs, record)
    assert {job.labels["engine"] for job in again} == {"aotinductor"}


def fake_tensorrt(name: str, version: str) -> SimpleNamespace:
    known = dict.fromkeys(("NONE", "CURRENT", "SM89", "SM120"))
    return SimpleNamespace(__name__=name, __version__=version, ComputeCapability=SimpleNamespace(__members__=known))


def test_a_gpu_that_tensorrt_rtx_does_not_know_is_told_without_building(monkeypatch):
    monkeypatch.setattr(gpu_engines, "import_tensorrt", lambda backend: fake_tensorrt("tensorrt_rtx", "1.7.1.116"))
    monkeypatch.setattr(gpu_engines, "gpu_architecture", lambda: 90)
    for engine in ENGINES[-2:]:
        assert gpu_engines.reason_against(engine) == (
            "TensorRT-RTX 1.7.1.116 does not run on sm_90; it knows sm_89, sm_120 and later"
        )
    monkeypatch.setattr(gpu_engines, "gpu_architecture", lambda: 120)
    assert [gpu_engines.reason_against(engine) for engine in ENGINES[-2:]] == [None, None]


def test_a_form_of_the_plugins_that_this_tensorrt_lacks_is_told(monkeypatch):
    monkeypatch.setattr(gpu_engines, "import_tensorrt", lambda backend: fake_tensorrt("tensorrt", "10.14.1"))
    monkeypatch.setattr(gpu_engines, "gpu_architecture", lambda: 90)
    assert gpu_engines.reason_against(AHEAD_OF_TIME) == (
        "TensorRT 10.14.1 cannot build plugins that are compiled ahead of time, no 10.14 can; use 10.16 or later"
    )
    assert [gpu_engines.reason_against(engine) for engine in (AOTINDUCTOR, PYTHON_PLUGINS, GATHER)] == [None] * 3


def test_a_python_without_the_packages_for_building_is_told(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'onnx'")

    monkeypatch.setattr(gpu_engines.importlib, "import_module", fail)
    told = "this Python cannot build engines: No module named 'onnx'"
    assert [gpu_engines.reason_against(engine) for engine in ENGINES] == [told] * len(ENGINES)


@pytest.mark.parametrize("error", [EngineBuildError("no memory"), UnsupportedError("no compiler")], ids=repr)
def test_what_fails_to_build_is_a_row_and_the_next_is_measured(error, monkeypatch, gpu, record, small, tmp_path):
    def fail(**_):
        raise error

    monkeypatch.setattr(building, "build", fail)
    monkeypatch.setattr(gpu_engines, "reason_against", lambda engine: None)
    monkeypatch.setattr(gpu_engines, "ENGINES", (AOTINDUCTOR,))
    monkeypatch.setattr(gpu_engines, "VARIANTS", {"tiny": small})
    monkeypatch.setattr(gpu_engines, "BATCHES", (1, 2))
    run(gpu_engines.jobs(["tiny"]), record, tmp_path / "r.json", gpu)
    assert [row.error for row in record.rows.values()] == [f"{type(error).__name__}: {error}"] * 2


# The report


def full_record(record: Record) -> Record:
    def engine(name: str, p50_ms: float, batch: str = "128", variant: str = "tiny", error: str | None = None, **more):
        labels = {"variant": variant, "image": "224x224", "batch": batch, "engine": name}
        numbers = {"images_per_s": 1000 * int(batch) / p50_ms, "p50_ms": p50_ms, "p90_ms": p50_ms + 0.1}
        numbers |= {"p99_ms": p50_ms + 0.2, "host_p50_ms": p50_ms + 2, "build_s": 61.0}
        numbers |= {"engine_mib": 57.0, "device_mib": 900.0, **more}
        record.add(f"engines/{variant}/{batch}/{name}", row("engines", labels, error, **numbers))

    labels = {"variant": "tiny", "image": "224x224", "batch": "128", "mode": "fused+compile"}
    record.add("networks/fused+compile", row("networks", labels, p50_ms=6.0, p99_ms=6.0, images_per_s=1.0,
                                             peak_mib=1.0, in_graph=1.0))  # fmt: skip
    refused = {"variant": "any", "image": "any", "batch": "any", "engine": "tensorrt-rtx gather"}
    record.add("engines/tensorrt-rtx gather", row("engines", refused, "TensorRT-RTX does not run on sm_90"))
    engine("tensorrt gather", 8.0, error="wrong: off | by 2")
    engine("aotinductor", 6.5)
    engine("tensorrt plugin ahead-of-time", 5.0, **{"fp32 layers": 40.0, "fp16 layers": 90.0, "plugin_layers": 18.0})
    engine("aotinductor", 0.8, batch="1")
    engine("tensorrt function", 10.0, variant="small")
    return record


def test_the_table_has_the_ratios_to_the_compiled_network_and_to_aotinductor(record):
    lines = gpu_report._engines(full_record(record))
    assert lines[0] == (
        "Engines in fp16, with images and logits on the device but for one column; TensorRT must beat aotinductor:"
    )
    assert lines[1] == ""
    assert lines[2] == (
        "| network | batch | engine | images/s | p50 ms | p90 ms | p99 ms | p50 ms from NumPy | build s | engine MiB | "
        "device MiB | layers | × fused+compile | × aotinductor |"
    )
    dashes = " | ".join(["–"] * 10)
    assert lines[4:] == [
        f"| any | any | tensorrt-rtx gather | not here: TensorRT-RTX does not run on sm_90 | {dashes} |",
        "| `tiny` 224x224 | 1 | aotinductor | 1,250 | 0.800 | 0.900 | 1.000 | 2.800 | 61 | 57 | 900 | – | – | 1.00 |",
        "| `tiny` 224x224 | 128 | tensorrt plugin ahead-of-time | 25,600 | 5.000 | 5.100 | 5.200 | 7.000 | 61 | 57 | "
        "900 | 90 fp16, 40 fp32 | 1.20 | 1.30 |",
        "| `tiny` 224x224 | 128 | aotinductor | 19,692 | 6.500 | 6.600 | 6.700 | 8.500 | 61 | 57 | 900 | – | 0.92 | "
        "1.00 |",
        f"| `tiny` 224x224 | 128 | tensorrt gather | error: wrong: off \\| by 2 | {dashes} |",
        "| `small` 224x224 | 128 | tensorrt function | 12,800 | 10.000 | 10.100 | 10.200 | 12.000 | 61 | 57 | 900 | "
        "– | – | – |",
    ]


def test_the_report_has_the_table_and_says_what_is_missing(record):
    assert "No engine was measured." in gpu_report.markdown(record)
    text = gpu_report.markdown(full_record(record))
    assert "\n".join(gpu_report._engines(record)) in text
    assert "- `engines/tensorrt-rtx gather`: TensorRT-RTX does not run on sm_90" in text
    assert "- `engines/tiny/128/tensorrt gather`: wrong: off | by 2" in text


def test_a_wrong_aotinductor_is_nothing_to_be_compared_with(record):
    full_record(record)
    wrong = replace(record.rows["engines/tiny/128/aotinductor"], error="wrong: off by 1")
    record.rows["engines/tiny/128/aotinductor"] = wrong
    (line,) = [line for line in gpu_report._engines(record) if "ahead-of-time" in line]
    assert line.endswith("| 1.20 | – |")
