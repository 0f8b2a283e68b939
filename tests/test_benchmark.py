"""benchmark/: turns, statistics, workers that fail, records. Most engines are fakes that the workers find here."""

import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dat_deploy import environment, errors
from dat_deploy.benchmark import Record, benchmark, compare, plot
from dat_deploy.benchmark.measure import row_from_rounds
from dat_deploy.benchmark.record import EngineSettings, RunSettings
from dat_deploy.benchmark.worker import Timings
from dat_deploy.environment import Hardware
from dat_deploy.errors import DatDeployError, OutputError, RecordError, ShapeError, UnsupportedError
from dat_deploy.images.preprocess import Preprocessing
from dat_deploy.networks.dat.variants import VARIANTS
from dat_deploy.runners import EngineDescription, Runner

LOG = "FAKE_ENGINE_LOG"


class FakeRunner(Runner):
    """`pytorch:BEHAVIOUR`; logs its process and the start and end of each call."""

    def __init__(self, engine: str) -> None:
        self.behaviour = engine.partition(":")[2]
        self.description = EngineDescription(
            name=engine,
            runtime="fake",
            runtime_version="1.0",
            device="cpu",
            precision="fp32",
            network=replace(VARIANTS["small" if self.behaviour == "small" else "tiny"], image_size=(8, 8)),
            outputs=("logits",),
            dynamic_image_size=False,
            batch=4 if self.behaviour == "fixed" else None,
            lowering=None,
            threads=1,
            weights_sha256="0" * 64,
            weights_source="none",
            preprocessing=Preprocessing((8, 8), (8, 8)),
        )

    def _run(self, images_nchw: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        started = time.perf_counter_ns()
        match self.behaviour:
            case "slow":
                time.sleep(0.004)
            case "drifting" | "drifting-slow":  # as on one machine: all slow down with every call that anyone makes
                drift = 1 + len(Path(os.environ[LOG]).read_text().splitlines()) / 60
                time.sleep(drift * (0.010 if self.behaviour == "drifting-slow" else 0.005))
            case "bug":
                raise ZeroDivisionError("division\nby zero")
            case "chatty":
                print("chatter", flush=True)
                print("chatter", file=sys.stderr, flush=True)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exits":
                os.write(2, b"terminate called\n\n")
                os._exit(3)
            case "hangs":
                child = subprocess.Popen(["sleep", "60"])  # noqa: S607  # anyone's sleep will do
                _log(child.pid, "child")
                time.sleep(60)
            case _:
                time.sleep(0.002)
        _log(os.getpid(), self.behaviour, len(images_nchw), started, time.perf_counter_ns())
        return {"logits": np.zeros((len(images_nchw), 1000), dtype=np.float32)}

    def close(self) -> None:
        pass


def open_fake(engine: str, **_options: Any) -> FakeRunner:
    _log(os.getpid(), "opened")
    if engine == "pytorch:unsupported":
        raise UnsupportedError("no such device here; take another.")
    return FakeRunner(engine)


def _log(*words: object) -> None:
    with Path(os.environ[LOG]).open("a") as log:
        print(*words, file=log)


Bench = Callable[..., Record]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "calls.log"


@pytest.fixture
def bench(log: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """`benchmark` of fakes, in short turns."""
    monkeypatch.setenv(LOG, str(log))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def run(*behaviours: str, **options: Any) -> Record:
        defaults: dict[str, Any] = {"rounds": 2, "seconds": 0.0, "calls": 3, "warmup_calls": 1}
        engines = [f"pytorch:{behaviour}" for behaviour in behaviours]
        return benchmark(engines, **(defaults | options), _opener="test_benchmark:open_fake")

    return run


def assert_no_process_is_left(log: Path) -> None:
    pids = {int(line.split()[0]) for line in log.read_text().splitlines()}
    assert pids
    for pid in pids:  # a killed child of a killed worker is reaped by init, a little later
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline, f"process {pid} is left"
            time.sleep(0.02)


def timings(*turns_ms: list[float]) -> list[Timings]:
    return [Timings(2, [round(ms * 1e6) for ms in turn], 0.0, 100.0) for turn in turns_ms]


ENGINE = EngineSettings(
    "onnxruntime", "cpu", "fp32", "tiny", (224, 224), False, ("logits",), "function", 2, "ab" * 32, "dat_tiny.pth"
)
SETTINGS = RunSettings(
    engines={"tiny.onnx": ENGINE, "openvino:tiny.onnx": replace(ENGINE, runtime="openvino")},
    baseline="tiny.onnx",
    batches=(1,),
    rounds=3,
    seconds=1.0,
    calls=5,
    warmup_calls=10,
    settle_calls=2,
    settle_seconds=0.1,
    threads=None,
    images="standard normal",
    timed="one call",
)
HARDWARE = Hardware(cpu="Some CPU", cpu_flags=("avx2",), cores=2, memory_gib=24, gpus=())


def record(batches: tuple[int, ...] = (1,), factor: float = 1.0) -> Record:
    """Two engines, the second twice as fast; `factor` scales every latency."""
    rows = []
    for batch in batches:
        first = timings(*([factor * batch * ms for ms in (9.0, 10.0, 11.0)] for _ in range(3)))
        second = timings(*([factor * batch * ms for ms in (4.5, 5.0, 5.5)] for _ in range(3)))
        rows += [row_from_rounds("tiny.onnx", batch, first, first, 1.0)]
        rows += [row_from_rounds("openvino:tiny.onnx", batch, second, first, 2.0)]
    return Record(
        date="2026-11-20T12:00:00+00:00",
        commit="1" * 40,
        settings=replace(SETTINGS, batches=batches),
        hardware=HARDWARE,
        versions={"python": "3.11.7", "dat-deploy": "0.1.0", "onnxruntime": "1.31.1", "openvino": "2026.4.1"},
        rows=tuple(rows),
    )


# turns


def test_turns_are_interleaved_each_engine_in_its_own_process_and_never_two_at_once(bench: Bench, log: Path) -> None:
    bench("fast", "slow", "small", rounds=3)
    calls = [line.split() for line in log.read_text().splitlines() if not line.endswith("opened")]
    order = [calls[0][1], *(b[1] for a, b in pairwise(calls) if a[1] != b[1])]
    assert order == ["fast", "slow", "small"] * 4  # the warm-up and three rounds
    assert all(int(a[4]) <= int(b[3]) for a, b in pairwise(calls)), "a call began before the last one had ended"
    processes = {(pid, name) for pid, name, *_ in calls}
    assert len(processes) == 3
    assert len({pid for pid, _ in processes} | {str(os.getpid())}) == 4
    assert_no_process_is_left(log)


def test_every_batch_is_measured_for_every_engine_and_calls_are_counted(bench: Bench, log: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    found = bench("fast", "slow", batches=(4, 1, 4), warmup_calls=5, progress=lambda *step: steps.append(step))
    keys = [(row.batch, row.engine) for row in found.rows]
    assert keys == [(1, "pytorch:fast"), (1, "pytorch:slow"), (4, "pytorch:fast"), (4, "pytorch:slow")]
    logged = [tuple(line.split()[1:3]) for line in log.read_text().splitlines() if not line.endswith("opened")]
    for row in found.rows:
        assert row.calls == 6  # two rounds of three
        assert row.untimed_calls >= 5 + 2 * 2
        assert logged.count((row.engine.removeprefix("pytorch:"), str(row.batch))) == row.calls + row.untimed_calls
        assert row.peak_memory_mib > 5
        assert row.others_busy_cores >= 0
    assert [step[0] for step in steps] == list(range(2 + 2 * 2 * 3 + 1))
    assert steps[0] == (0, 14, "opening pytorch:fast")
    assert steps[4] == (4, 14, "batch 1, round 1 of 2: pytorch:fast")
    assert steps[-1] == (14, 14, "done")


def test_a_turn_lasts_the_seconds_asked_for(bench: Bench) -> None:
    found = bench("fast", rounds=1, seconds=0.2, calls=1)
    assert 0.2 <= found.rows[0].mean_ms * found.rows[0].calls / 1e3 * 1.01 < 1.0


def test_engines_may_be_of_different_variants_and_settings_say_which(bench: Bench) -> None:
    found = bench("small", "fast", baseline="pytorch:fast")
    assert [e.variant for e in found.settings.engines.values()] == ["small", "tiny"]
    assert found.settings.baseline == "pytorch:fast"
    assert found.rows[1].latency_ratio.lowest == found.rows[1].latency_ratio.highest == 1
    assert found.versions["fake"] == "1.0"


# statistics


def test_percentiles_are_over_all_timed_calls_of_all_rounds() -> None:
    every = np.random.default_rng(1).uniform(1, 9, (5, 20))
    row = row_from_rounds("e", 8, [Timings(3, [], 9.0, 50.0), *timings(*every.tolist())], timings(*every.tolist()), 1.5)
    for name, percentile in (("p50_ms", 50), ("p90_ms", 90), ("p99_ms", 99), ("min_ms", 0)):
        assert getattr(row, name) == pytest.approx(np.percentile(every, percentile), rel=1e-5), name
    assert row.mean_ms == pytest.approx(every.mean(), rel=1e-5)
    assert row.images_per_s == pytest.approx(8000 / np.median(every), rel=1e-5)
    assert row.round_p50_ms == pytest.approx(np.median(every, axis=1), rel=1e-5)
    assert (row.calls, row.untimed_calls, row.load_s, row.peak_memory_mib) == (100, 3 + 5 * 2, 1.5, 100.0)
    assert row.others_busy_cores == 0, "the warm-up counts"


def test_latency_ratio_is_paired_by_round_so_that_drift_cancels() -> None:
    slow, fast = [[8.0] * 3, [16.0] * 2, [32.0]], [[4.0] * 3, [8.0] * 9, [16.0] * 9]
    row = row_from_rounds("fast", 1, timings(*fast), timings(*slow), 0)
    assert (row.latency_ratio.median, row.latency_ratio.lowest, row.latency_ratio.highest) == (0.5, 0.5, 0.5)
    pooled = np.median(np.concatenate(slow)) / np.median(np.concatenate(fast))
    assert pooled == 1.5, "pooled medians would be wrong here"


def test_latency_ratio_says_how_far_the_rounds_differ() -> None:
    row = row_from_rounds("e", 1, timings([4.0], [5.0], [10.0]), timings([8.0], [8.0], [8.0]), 0)
    assert (row.latency_ratio.median, row.latency_ratio.lowest, row.latency_ratio.highest) == (0.625, 0.5, 1.25)


def test_latency_ratio_of_engines_that_really_drift(bench: Bench) -> None:
    found = bench("drifting-slow", "drifting", rounds=4, calls=6)
    slow, fast = found.rows
    for row in (slow, fast):
        assert row.round_p50_ms[-1] > 1.3 * row.round_p50_ms[0]
    assert 0.45 < fast.latency_ratio.median < 0.77


# workers that fail

HANGS = "engine 'pytorch:hangs' gave no answer for 5 s while warming up at batch 1, and was ended. "
FAILURES = [
    ("unsupported", UnsupportedError, "engine 'pytorch:unsupported': no such device here; take another."),
    (
        "bug",
        DatDeployError,
        "engine 'pytorch:bug' failed while warming up at batch 1: ZeroDivisionError: division by zero. Try a smaller "
        "batch, or see whether it runs at all with: `validate(engine='pytorch:bug')`",
    ),
    (
        "killed",
        DatDeployError,
        "engine 'pytorch:killed': its process was killed by SIGKILL while warming up at batch 1. "
        "The memory may have run out: try a smaller batch, or this engine alone.",
    ),
    (
        "exits",
        DatDeployError,
        "engine 'pytorch:exits': its process exited with status 3 while warming up at batch 1; its last words: "
        "terminate called. Try a smaller batch, or this engine alone.",
    ),
    ("hangs", DatDeployError, f"{HANGS}Try a smaller batch, or allow it more time."),
    (
        "fixed",
        ShapeError,
        "engine 'pytorch:fixed' has the fixed batch 4 and cannot run batch 1. "
        "Measure it with `batches=[4]`, or export it again with `batch=None`.",
    ),
]


@pytest.mark.parametrize(("behaviour", "kind", "message"), FAILURES, ids=[f[0] for f in FAILURES])
def test_a_failing_engine_is_named_and_leaves_no_process(
    bench: Bench, log: Path, behaviour: str, kind: type[DatDeployError], message: str
) -> None:
    with pytest.raises(DatDeployError) as raised:
        bench("fast", behaviour, timeout_seconds=5.0 if behaviour == "hangs" else 60.0)
    assert type(raised.value) is kind
    assert str(raised.value) == message
    assert_no_process_is_left(log)


def test_the_traceback_of_a_bug_in_a_worker_is_kept_as_a_note(bench: Bench) -> None:
    with pytest.raises(DatDeployError) as raised:
        bench("bug")
    assert 'raise ZeroDivisionError("division' in raised.value.__notes__[0]


def test_ctrl_c_leaves_no_process(bench: Bench, log: Path) -> None:
    over = threading.Event()
    pressed: list[float] = []

    def interrupt() -> None:
        while not over.wait(0.02):
            if log.exists() and "child" in log.read_text():
                pressed.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGINT)
                return

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            bench("fast", "hangs", timeout_seconds=30.0)
        ended = time.monotonic()
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, handler)
    assert ended - pressed[0] < 20
    assert_no_process_is_left(log)


def test_what_workers_print_stays_out_of_the_callers_output(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench("chatty")
    assert capfd.readouterr() == ("", "")


def test_every_expected_failure_keeps_its_class_and_exit_code_across_the_process() -> None:
    from dat_deploy.benchmark.worker import _failure_from

    class SpecialError(UnsupportedError):
        pass

    for name in errors.__all__:
        assert _failure_from(getattr(errors, name)("text")).kind == name
    assert _failure_from(SpecialError("text")).kind == "UnsupportedError"


# arguments

REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    ([], {}, "no engine to measure; name at least one, such as `engines=['tiny.onnx']` or pytorch:tiny."),
    (["a.onnx"], {"batches": ()}, "no batch to measure; give at least one, such as `batches=[1]`."),
    (["a.onnx"], {"batches": (0, 1)}, "batch is 0; it must be at least 1."),
    (["a.onnx"], {"rounds": 0}, "rounds is 0; it must be at least 1."),
    (["a.onnx"], {"calls": 0}, "calls is 0; it must be at least 1."),
    (["a.onnx"], {"warmup_calls": -1}, "warmup_calls is -1; it must be at least 0."),
    (["a.onnx"], {"threads": 0}, "threads is 0; it must be at least 1."),
    (["a.onnx"], {"seconds": float("nan")}, "seconds is nan; it must be a finite number from 0."),
    (
        ["a.onnx", "pytorch:tiny"],
        {"baseline": "torch:tiny"},
        "baseline 'torch:tiny' is not measured here. Did you mean pytorch:tiny? Engines: a.onnx, pytorch:tiny.",
    ),
]


@pytest.mark.parametrize(("engines", "options", "message"), REFUSED, ids=[f[2].split(";")[0] for f in REFUSED])
def test_arguments_that_do_not_fit_are_refused_at_once(
    engines: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatDeployError) as raised:
        benchmark(engines, **options)
    assert str(raised.value) == message


def test_elsewhere_than_on_linux_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UnsupportedError) as raised:
        benchmark(["pytorch:tiny"])
    assert str(raised.value) == "bench measures on Linux alone, where it reads /proc; this is darwin."


def test_rows_carry_no_folder_of_an_absolute_path_and_an_engine_may_be_repeated(bench: Bench, tmp_path: Path) -> None:
    found = bench(
        f"{tmp_path}/one", "sub/one", f"{tmp_path}/one", calls=1, rounds=1, baseline=f"pytorch:{tmp_path}/one"
    )
    assert [row.engine for row in found.rows] == ["pytorch:one", "pytorch:sub/one", "pytorch:one #2"]
    assert found.settings.baseline == "pytorch:one"
    assert str(tmp_path) not in found.to_json()
    assert platform.node() not in found.to_json()


# real engines


def test_real_engines_from_a_script_without_a_main_guard_and_no_torch_in_the_caller(
    demo_onnx: Path, tmp_path: Path
) -> None:
    path = demo_onnx
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys
            from pathlib import Path
            from dat_deploy.benchmark import benchmark
            engines = ["pytorch:demo", {str(path)!r}]
            found = benchmark(engines, rounds=1, seconds=0, calls=2, warmup_calls=1)
            assert "torch" not in sys.modules
            assert "onnxruntime" not in sys.modules
            found.write(Path({str(tmp_path / "record.json")!r}))
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)  # noqa: S603  # ours
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = Record.read(tmp_path / "record.json")
    assert [row.engine for row in found.rows] == ["pytorch:demo", path.name]
    assert {"python", "numpy", "dat-deploy", "os", "pytorch", "onnxruntime"} <= set(found.versions)
    assert found.settings.engines[path.name].lowering == "function"
    assert found.settings.engines[path.name].image_size == (64, 64)
    assert all(0 < row.min_ms <= row.p50_ms <= row.p90_ms <= row.p99_ms for row in found.rows)
    assert found.hardware == environment.hardware()


# records


def test_a_record_survives_json_and_files(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record((1, 8)).write(path)
    assert Record.read(path) == record((1, 8))
    assert next(iter(json.loads(path.read_text()))) == "schema_version"
    with pytest.raises(OutputError):
        record().write(path)
    record().write(path, force=True)
    assert Record.read(path) == record()


def _edited(**changes: Any) -> str:
    return json.dumps(json.loads(record().to_json()) | changes)


NOT_RECORDS = [
    ("{", "not a benchmark record: Expecting property name enclosed in double quotes: line 1 column 2 (char 1). "),
    ("[]", "not a benchmark record of this version: schema_version is None and must be 2. "),
    (_edited(schema_version=1), "not a benchmark record of this version: schema_version is 1 and must be 2. "),
    (_edited(extra=1), "not a benchmark record: record lacks, or should not have: extra. "),
    (_edited(date=7), "not a benchmark record: record.date is 7 and should be <class 'str'>. "),
    (_edited(rows=[{}]), "not a benchmark record: record.rows[0] lacks, or should not have: batch, "),
    (_edited(commit=[]), "not a benchmark record: record.commit is [] and should be <class 'str'>. "),
]


@pytest.mark.parametrize(("text", "message"), NOT_RECORDS, ids=[n[1][-28:].strip() for n in NOT_RECORDS])
def test_what_is_no_record_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(RecordError) as raised:
        Record.read(path)
    assert str(raised.value).startswith(f"{path}: {message}")


def test_a_record_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError) as raised:
        Record.read(tmp_path / "none.json")
    assert str(raised.value) == f"cannot read {tmp_path / 'none.json'}: No such file or directory. Check the path."


def test_compare_gives_a_ratio_a_row_and_the_versions_that_differ() -> None:
    first, second = record((1, 8)), record((1, 8), factor=0.5)
    second = replace(second, versions=first.versions | {"onnxruntime": "1.32.0", "new": "1"})
    comparison = compare(first, second)
    assert [(c.engine, c.batch) for c in comparison.rows] == [(r.engine, r.batch) for r in first.rows]
    assert [(c.first_ms, c.second_ms) for c in comparison.rows] == [(10, 5), (5, 2.5), (80, 40), (40, 20)]
    ratios = [c.latency_ratio for c in comparison.rows]
    assert all((ratio.lowest, ratio.median, ratio.highest) == (0.5, 0.5, 0.5) for ratio in ratios)
    assert comparison.versions == {"onnxruntime": ("1.31.1", "1.32.0"), "new": (None, "1")}


def test_compare_refuses_what_was_not_measured_alike_and_names_all_of_it() -> None:
    first = record()
    engines = SETTINGS.engines | {"tiny.onnx": replace(ENGINE, threads=4)}
    second = replace(
        first,
        settings=replace(SETTINGS, rounds=7, threads=4, engines=engines),
        hardware=replace(HARDWARE, cpu="Another CPU"),
    )
    with pytest.raises(RecordError) as raised:
        compare(first, second)
    assert str(raised.value) == (
        "the records cannot be compared, for they differ in settings.engines.tiny.onnx.threads (2 and 4), "
        "settings.rounds (3 and 7), settings.threads (None and 4), hardware.cpu (Some CPU and Another CPU); "
        "measure both alike on one machine with: `bench(...).to_json()`"
    )


# plots


@pytest.mark.parametrize("batches", [(1,), (1, 8, 32)], ids=["bars", "sweep"])
def test_plot_writes_a_png_of_a_sensible_size(batches: tuple[int, ...], tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "plot.png"
    plot(record(batches), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1440
        assert 400 <= image.height <= 1000
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50, "nothing is drawn"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError):
        plot(record(batches), path)


def test_plot_says_what_to_install_and_what_to_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError) as wrong:
        plot(record(), tmp_path / "plot.svg")
    expected = f"{tmp_path / 'plot.svg'} does not end in .png, and plots are PNG; write {tmp_path / 'plot.png'}"
    assert str(wrong.value) == expected
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError) as missing:
        plot(record(), tmp_path / "plot.png")
    assert str(missing.value) == "plots need matplotlib: pip install 'dat-deploy[plot]'"
