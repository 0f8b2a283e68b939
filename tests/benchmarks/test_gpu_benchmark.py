"""The GPU benchmark without a GPU: its plan, processes, record whatever cuts it off, report and refusals."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fake_gpu
import gpu as entry
import gpu_plan
import gpu_record
import gpu_report
import pytest
from gpu_record import Found, Record, Row

from dat_deploy.errors import DatDeployError, OutputError, RecordError, UnsupportedError
from dat_deploy.plugins.precompiled import write_index

ROOT = Path(entry.__file__).resolve().parents[1]
# What a machine with a GPU has of what this environment has, and what those need.
THERE = {"torch", "triton", "numpy", "onnx", "onnx-ir", "onnxscript", "safetensors", "pytest", "jinja2", "markupsafe"}
THERE |= {"pillow", "pyyaml", "sympy", "mpmath", "networkx", "filelock", "fsspec", "typing-extensions", "ml-dtypes"}
THERE |= {"protobuf", "setuptools", "dat-deploy"}


def printed(*arguments: str, code: str = "", **options) -> subprocess.CompletedProcess[str]:
    """What benchmarks/gpu.py prints, in a process of its own, after some code."""
    script = f"{code}\nimport sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
    script += f"import gpu; sys.exit(gpu.main({list(arguments)!r}))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, **options)  # noqa: S603  # fixed


# The plan


def test_the_plan_fits_into_seven_minutes_in_its_order_and_needs_no_torch():
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in ("torch", "triton", "numpy", "onnx", "PIL"))
    done = printed("--plan", code=f"import sys; {hidden}")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if re.search(r"\d s\b", line)]
    parts = [line.split()[0] for line in lines]
    assert parts == ["start", "ceilings", "correctness", "operators", "networks", "profile", "ncu", "report", "all"]
    seconds = [int(re.search(r"(\d+) s\b", line)[1]) for line in lines]
    assert 400 <= seconds[-1] <= 420
    assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=4)  # each is rounded
    second = printed("--plan", "--second").stdout
    assert int(re.search(r"^all.* (\d+) s$", second, re.MULTILINE)[1]) <= 420
    short = printed("--plan", "--minutes", "2").stdout
    assert int(re.search(r"^all.* (\d+) s$", short, re.MULTILINE)[1]) <= 120


def test_every_row_has_a_key_of_its_own_and_a_function_that_is_there():
    for jobs in (gpu_plan.first(), gpu_plan.second()):
        assert len({job.key for job in jobs}) == len(jobs)
        for module, _, function in {job.call.partition(":") for job in jobs}:
            assert f"\ndef {function}(" in (ROOT / "benchmarks" / f"{module}.py").read_text()
    keys = {job.key for job in gpu_plan.second()}
    assert {job.key for job in gpu_plan.first()} <= keys  # a second call also has what the first left
    assert {
        "operators/tune tiny",
        "memory/eager",
        "tests/gpu",
        "engines/tiny aotinductor",
        "networks/tiny batch 64 fused",
    } <= keys


class Ended(list):
    """A worker whose rows take made-up seconds on a clock that is none; it is the list of those it was asked for."""

    kit, process = None, True

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def ask(self, job, context, limit):
        self.append(job.key)
        self.now += min(self.seconds, limit)
        if self.seconds > limit:
            raise DatDeployError(f"it gave no answer for {limit:g} s")
        return Found({"a": 1.0}), True

    def end(self): ...


def job(part: str, name: str, seconds: float, *, optional: bool = False) -> gpu_plan.Job:
    return gpu_plan.Job(part, name, "fake_gpu:row", {}, seconds, name, {}, optional, 20.0)


@pytest.mark.parametrize(
    ("deadline", "seconds", "right", "ended"),
    [
        (100.0, 10.0, ["a/1", "a/2", "a/3", "b/1", "b/2"], []),
        (45.0, 10.0, ["a/1", "a/2", "b/1", "b/2"], []),  # what is optional would take the time of b
        (35.0, 10.0, ["a/1", "b/1", "b/2"], []),  # parts share what there is
        (50.0, 20.0, ["a/1", "b/1"], ["b/2"]),  # a slower row than guessed takes no other part's time
        (70.0, 15.0, ["a/1", "a/2", "b/1", "b/2"], ["a/3"]),  # an optional one is ended where b's time begins
        (10.0, 10.0, ["a/1"], []),
    ],
)
def test_rows_leave_time_for_later_parts(deadline, seconds, right, ended, record, monkeypatch):
    monkeypatch.setattr(entry, "START_SECONDS", 0.0)  # that another process would take
    jobs = [job("a", "1", 10.0), job("a", "2", 10.0), job("a", "3", 10.0, optional=True)]
    jobs += [job("b", "1", 10.0), job("b", "2", 10.0)]
    worker = Ended(seconds)
    for each, row in entry.measured(jobs, record, worker, Path("r.json"), deadline, lambda: worker.now):
        record.add(each.key, row)
    assert list(record.rows) == right
    assert not [key for key, row in record.rows.items() if row.error]  # it is no failure to be out of time
    assert [key for key, why in record.not_measured.items() if "out of time: stopped after" in why] == ended
    assert worker.now <= deadline


# Processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run with made-up times, one row that raises, one that hangs and one that dies."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    keys = [each.key for each in gpu_plan.first() if each.part == "operators"]
    does = {keys[3]: "raises", keys[5]: "hangs", keys[7]: "dies"}
    code = f"import sys; sys.path.insert(0, {str(Path(fake_gpu.__file__).parent)!r}); import fake_gpu\n"
    code += "from pathlib import Path\n"
    code += f"if __name__ == '__main__': sys.exit(fake_gpu.main(Path({str(folder)!r}), 0.002, **{does!r}))"
    script = folder.parent / "run.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)  # noqa: S603  # fixed
    assert (done.returncode, done.stderr) == (2, "")  # for rows failed
    return folder


def begun_rows(folder: Path) -> tuple[list[str], str]:
    """The keys of the rows that were begun, in order, and the process of the last."""
    lines = [line.split("\t") for line in (folder / "begun.txt").read_text().splitlines() if "\t" in line]
    return [key for key, _ in lines], lines[-1][1]


def test_a_whole_run_measures_every_row_and_one_that_fails_costs_itself_alone(whole):
    path = gpu_record.newest(whole)
    assert path is not None
    record, jobs = Record.read(path), gpu_plan.first()
    assert list(record.rows) == [each.key for each in jobs]
    assert not record.not_measured
    errors = [row.error for row in record.rows.values() if row.error]
    assert errors == [
        "RuntimeError: CUDA error: an illegal memory access; more words",
        "the measuring process gave no answer for 1.5 s while measuring this, and was ended.",
        "the measuring process: its process was killed by SIGSEGV while measuring this.",
    ]
    versions = fake_gpu.MACHINE.versions | {"kit": "none"}
    assert (record.commit, record.machine) == ("abc", replace(fake_gpu.MACHINE, versions=versions))
    assert all(row.began > 1.7e9 for row in record.rows.values())
    text = path.with_suffix(".md").read_text()
    shape = (
        "deformable_attention | base-384 384x384 stage 4: 12x12x1024, 32 heads, 12x12 points in 8 groups, table 23x23"
    )
    peers = "10.00 | 3.50 | 2.00 | 1.50 | 2.50 | 40 | exponentials | 2,000 | yes |"
    assert f"| {shape}, half pixel | 64 | 10.0 | 12.0 | {peers}" in text
    assert (
        "| `tiny` | 128 | compile | 2,571 | 49.000 | 50.750 | 52.500 | 56.000 | 3,150 | 2.86 | 1.00 | 3 | 100 |" in text
    )
    assert "This card reached 790 TFLOP/s (float16 product, 1500 MHz) and 4.30 TB/s (addition)" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_another_call_goes_on_with_what_failed_alone(whole, tmp_path, capfd, monkeypatch):
    whole = shutil.copytree(whole, tmp_path / "out")
    again = [key for key, row in Record.read(gpu_record.newest(whole)).rows.items() if row.error]
    (whole / "begun.txt").unlink()
    gpu_record.newest(whole).with_name(entry.CONFIGURATIONS).write_text("{}")  # without it, what tuned would run again
    jobs = [fake_gpu.made_up(each, whole / "begun.txt", 0.001, {}) for each in gpu_plan.first()]
    monkeypatch.setattr(entry, "first", lambda: jobs)
    monkeypatch.setattr(entry, "OPENER", "fake_gpu:open_gpu")
    assert entry.main(["--output", str(whole), "--kit", "none", "--minutes", "2"]) == 0
    assert begun_rows(whole)[0] == again
    assert not [row for row in Record.read(gpu_record.newest(whole)).rows.values() if row.error]
    assert f"] {again[0]}: " in capfd.readouterr().out


def test_a_run_that_is_killed_at_any_second_leaves_a_record_of_every_finished_row(tmp_path):
    """Five at once, killed in different rows; no row begins before the last one is on disk, and no process is left."""
    running, processes = {}, []
    for i in range(5):
        folder = tmp_path / str(i)
        command = [sys.executable, fake_gpu.__file__, str(folder), "0.02"]
        running[folder] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603  # fixed
    lengths, chance = set(), random.Random(0)  # noqa: S311  # no secret
    for (folder, process), row in zip(running.items(), (1, 2, 4, 8, 16), strict=True):
        while not (folder / "begun.txt").exists() or len(begun_rows(folder)[0]) < row:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.1))  # while it runs, or is written down, or the next begins
        process.kill()
        told = re.findall(r"^\[ *\d+ s, \d+ of \d+\] (.*?): ", process.communicate()[0], re.MULTILINE)
        begun, last = begun_rows(folder)
        processes.append(last)
        record = Record.read(gpu_record.newest(folder))
        assert set(told) <= set(record.rows) <= set(begun)
        assert begun[:-1] == list(record.rows)[: len(begun) - 1]
        planned = {each.key for each in gpu_plan.first()}
        assert record.rows.keys() | record.not_measured.keys() == planned
        lengths.add(len(record.rows))
    assert len(lengths) > 2
    time.sleep(0.5)
    states = [
        path.read_text().rpartition(") ")[2][0] for pid in processes if (path := Path(f"/proc/{pid}/stat")).exists()
    ]
    assert set(states) <= {"Z"}  # what nobody has waited for yet


def test_a_row_that_meets_the_end_is_stopped_there_and_on_record(tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "OPENER", "fake_gpu:open_gpu")
    monkeypatch.setattr(entry, "REPORT_SECONDS", 50.0)
    hangs = fake_gpu.made_up(gpu_plan.first()[0], tmp_path / "begun.txt", 0.0, {"ceilings/ceilings": "hangs"})
    monkeypatch.setattr(entry, "first", lambda: [replace(hangs, least_limit_seconds=30.0)])
    assert entry.main(["--output", str(tmp_path), "--kit", "none", "--minutes", "1"]) == 0
    stopped = Record.read(gpu_record.newest(tmp_path)).not_measured
    assert re.fullmatch(r"out of time: stopped after \d+ s", stopped["ceilings/ceilings"])


# What it imports, and what it refuses


def test_rows_import_nothing_that_a_machine_with_a_gpu_lacks():
    """Every module of every row, with all packages hidden but those that are there."""
    code = f"""
import importlib.machinery, importlib.metadata, sys
hidden = set()
for module, names in importlib.metadata.packages_distributions().items():
    if not {THERE!r} & {{name.lower().replace("_", "-") for name in names}}:
        hidden.add(module)
assert {{"rich", "typer", "pydantic", "openvino", "ray", "tensorrt_rtx", "onnxruntime"}} <= hidden, hidden
finder = importlib.machinery.PathFinder
class Hiding:
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in hidden else finder.find_spec(name, path, target)
sys.meta_path = [Hiding if each is finder else each for each in sys.meta_path]
sys.path[:0] = {[str(ROOT), str(ROOT / "benchmarks")]!r}
import gpu, gpu_kit, gpu_networks, gpu_operators, gpu_plan, gpu_report, gpu_timing, gpu_record, triton.testing
import dat_deploy.benchmark, dat_deploy.engine.aotinductor.package, dat_deploy.runners.aotinductor_runner
import dat_deploy.engine.build, dat_deploy.metadata, torch._inductor
print(sorted(hidden & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)  # noqa: S603  # fixed
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a CUDA device")  # noqa: PTH110
def test_without_cuda_or_torch_there_is_one_sentence_and_exit_code_3(tmp_path):
    import torch

    done = printed("--output", str(tmp_path), "--kit", "none")
    said = f"benchmarks/gpu.py: torch {torch.__version__} of {sys.executable} sees no CUDA device; where there is one, "
    said += "name a Python whose torch is for CUDA: make bench-gpu GPU_PYTHON=python3. --plan and --report need none.\n"
    assert (done.returncode, done.stderr) == (3, said)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError")
    done = printed("--output", str(tmp_path), "--kit", "none", env={**os.environ, "PYTHONPATH": str(blocked)})
    said = f"{sys.executable} has no torch; name a Python that has it: make bench-gpu GPU_PYTHON=python3.12"
    assert (done.returncode, done.stderr) == (3, f"benchmarks/gpu.py: {said}\n")
    done = printed("--kit", "none", code="import sys; sys.modules['numpy'] = None")
    said = f"{sys.executable} has no numpy; name a Python that has torch, triton, numpy, onnx, pillow and safetensors: "
    assert (done.returncode, done.stderr) == (3, f"benchmarks/gpu.py: {said}make bench-gpu GPU_PYTHON=python3.12\n")
    assert not list(tmp_path.glob("*.json"))


def test_a_kit_for_another_gpu_is_refused_with_the_next_step(tmp_path, monkeypatch):
    import torch
    from gpu_timing import CudaGpu

    write_index(tmp_path, 90, {}, triton="3.6.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_grad_enabled", lambda _: None)
    monkeypatch.setattr(CudaGpu, "__init__", lambda self: setattr(self, "capability", 80))
    with pytest.raises(UnsupportedError) as raised:
        entry.open_gpu(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path} holds code for sm_90, and this GPU is of sm_80; compile for that one, or launch without it. "
        "That is: make gpu-kit ARGUMENTS='--architecture 80', or here make bench-gpu ARGUMENTS='--kit none'."
    )
    with pytest.raises(
        UnsupportedError, match=r"none holds no kit; make one with make gpu-kit, or compile here: --kit"
    ):
        entry.kit_folder(str(tmp_path / "none"))


def test_a_full_disk_is_one_sentence_and_loses_no_row(tmp_path, record, monkeypatch, capsys):
    path = tmp_path / "r.json"
    record.write(path)
    before, write = path.read_bytes(), Path.write_text

    def full(self, text, **options):
        if self.suffix == ".part":
            write(self, text[:20], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device"):
        record.write(path)
    assert path.read_bytes() == before
    monkeypatch.setattr(entry, "run", lambda jobs, options: record.write(path))
    assert entry.main(["--kit", "none"]) == 1
    assert re.fullmatch(r"benchmarks/gpu.py: .*No space left on device.*\n", capsys.readouterr().err)


# Records and reports


def test_a_record_is_read_as_it_was_written_or_refused(tmp_path, record):
    path = tmp_path / "2026-11-21.json"
    record.add("a/b", Row("a", "b", {"variant": "tiny"}, {"median_us": 1.5}, ("a note",), None, 2.0, 0.0))
    record.write(path)
    assert Record.read(path) == record
    assert gpu_record.newest(tmp_path, source=record.source) == path
    assert gpu_record.newest(tmp_path, source="another") is None
    assert (
        gpu_record.new_path(tmp_path, record_date := __import__("datetime").date(2026, 11, 21)).name
        == f"{record_date}-2.json"
    )
    path.write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(RecordError, match="schema_version is 1 and must be 2"):
        Record.read(path)


def test_a_wrong_row_meets_no_target(record):
    labels = {"operator": "deformable_attention", "implementation": "fused", "bar": "yes", "for": "x", "shape": "y"}
    numbers = fake_gpu.OPERATOR
    record.add("c", Row("ceilings", "c", {}, fake_gpu.CEILINGS, (), None, 1.0, 0.0))
    record.add("o/f", Row("operators", "fused", labels | {"batch": "64"}, numbers, (), None, 1.0, 0.0))
    assert "the same: share of its floor, exponentials included | ≥ 50 % | 40.0 %, missed |" in gpu_report.targets(
        record
    )
    record.rows["o/f"] = replace(record.rows["o/f"], error="wrong: off by 1")
    assert gpu_report.targets(record).count("not measured") == 8
    assert gpu_report.targets(record).count("failed") == 4
    assert "| wrong |" in gpu_report.operators(record)
    record.rows["o/f"] = replace(record.rows["o/f"], error="its process was killed")
    assert "| failed |" in gpu_report.operators(record)
    record.machine = replace(record.machine, gpu="NVIDIA A100")
    assert "the targets are for an H200; this is NVIDIA A100" in gpu_report.targets(record)


def test_readme_and_docs_have_the_tables_of_the_newest_record(tmp_path):
    for name in ("README.md", "docs/kernels.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    path = gpu_record.newest(ROOT / "benchmarks" / "results")
    gpu_report.write_documents(tmp_path, Record.read(path) if path else None)
    for name in ("README.md", "docs/kernels.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()
    gpu_report.write_documents(tmp_path, None)
    assert (tmp_path / "README.md").read_text().count("| not measured |") == 12


def test_the_report_says_what_prevents_its_plot(record, tmp_path, monkeypatch):
    assert gpu_report.plot(record, tmp_path / "r.png") == "no plot: nothing that could be drawn was measured"
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
    assert gpu_report.plot(record, tmp_path / "r.png").startswith("no plot: matplotlib is not installed")
