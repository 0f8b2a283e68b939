"""What a CUDA device says of the kernels and networks, in seven minutes: `make bench-gpu`.

    python benchmarks/gpu.py [--plan] [--second] [--minutes 7] [--kit FOLDER] [--output DIR] [--report]

Writes DIR/GPU/DATE.json, row by row, then its tables and a plot. Whatever cuts it off, what was measured is on disk. A
row that breaks the GPU's context, hangs or crashes costs itself alone, for rows are measured in a process that is
replaced then. Called again it goes on where it stopped, and tries again what failed, as long as the measured code and
the GPU are the same.
"""

import argparse
import contextlib
import datetime
import importlib
import inspect
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # a machine with a GPU may have no installation of this

from gpu_plan import REPORT_SECONDS, START_SECONDS, Job, bar, first, second  # noqa: E402
from gpu_record import Found, Machine, Record, Row, new_path, newest, slug, source_hash  # noqa: E402

from dat_deploy.environment import command_output  # noqa: E402
from dat_deploy.errors import DatDeployError, OutputError, UnsupportedError  # noqa: E402
from dat_deploy.files import atomic_output  # noqa: E402

KIT, RESULTS = ROOT / ".gpu-kit", ROOT / "benchmarks" / "results"
OPENER = "gpu:open_gpu"
START_LIMIT_SECONDS = 120.0
OUT_OF_TIME, NO_ANSWER, CONFIGURATIONS = "out of time", "gave no answer", "configurations.json"
PARTS = {
    "ceilings": "what this card reaches: an addition, a matrix product",
    "correctness": "every kernel against float64",
    "operators": "tuned, then beside their peers",
    "networks": "as they ship, fused and eager",
    "profile": "kernels by time",
    "ncu": "Nsight Compute on the launch of the targets",
    "memory": "the peak at a detector's image size",
    "engines": "AOTInductor's packages",
    "tests": "pytest -m gpu",
}
CLOCKS = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print the parts with their seconds, and measure nothing")
    parser.add_argument("--second", action="store_true", help="what a first call leaves: more batches, tests, engines")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all of it")
    parser.add_argument("--kit", help=f"the folder that make gpu-kit wrote, or none; by default {KIT.name}, if there")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where records go, a folder a GPU")
    parser.add_argument("--commit", help="what the record calls the code, where this is no checkout of git")
    parser.add_argument("--report", action="store_true", help="make the tables again, those in README and docs, too")
    parser.add_argument("--record", type=Path, help="the record to report; without it the newest")
    parser.add_argument("--ncu-target", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not 1 <= options.minutes < math.inf:
        parser.error(f"--minutes is {options.minutes:g}; give at least 1")
    if options.record and not options.report:
        parser.error("--record is for --report")
    try:
        if options.report:
            return report(options, options.record, documents=options.output == RESULTS and not options.record)
        options.kit = kit_folder(options.kit)
        if options.ncu_target:
            return ncu_target(options.kit)
        jobs = second() if options.second else first()
        if options.plan:
            print(plan_text(jobs, 60 * options.minutes))
            return 0
        return report(options, run(jobs, options))
    except DatDeployError as error:
        print(f"benchmarks/gpu.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "stopped; what was measured is on disk, the same command goes on, --report makes its tables",
            file=sys.stderr,
        )
        return 130


def kit_folder(named: str | None) -> Path | None:
    """Raises UnsupportedError if the one that was named is not there."""
    folder = None if named == "none" else Path(named) if named else KIT
    if folder is None or (folder / "index.json").is_file():
        return folder
    if named:
        raise UnsupportedError(f"{folder} holds no kit; make one with make gpu-kit, or compile here: --kit none.")
    return None


class Guesses:
    """In the place of `Workers`, on a clock of its own: every row takes what is guessed."""

    process, kit, now = True, None, START_SECONDS

    def ask(self, job: Job, context: dict[str, Any], seconds: float) -> tuple[Found, bool]:
        self.now += min(job.seconds, seconds)
        return Found({}), True


def plan_text(jobs: Sequence[Job], seconds: float) -> str:
    """The parts in order, with their rows and seconds, as far as the guesses go."""
    guesses, planned = Guesses(), []
    record = Record("", None, "", Machine("", 0, 0, 0, {}))
    for job, row in measured(jobs, record, guesses, RESULTS, seconds - REPORT_SECONDS, lambda: guesses.now):
        record.add(job.key, row)
        planned.append(job)
    lines = [f"{'start':<12}           {START_SECONDS:5.0f} s  a process with its imports"]
    for part in dict.fromkeys(job.part for job in planned):
        mine = [job for job in planned if job.part == part]
        optional = sum(job.optional for job in mine)
        more = f", {optional} rows of it as time is left" if optional else ""
        lines.append(f"{part:<12} {len(mine):4d} rows {sum(job.seconds for job in mine):5.0f} s  {PARTS[part]}{more}")
    lines.append(f"{'report':<12}           {REPORT_SECONDS:5.0f} s  tables and a plot")
    lines.append(f"{'all':<12} {len(planned):4d} rows {guesses.now + REPORT_SECONDS:5.0f} s")
    left = len(jobs) - len(planned)
    return "\n".join([*lines, f"{left} more rows if that goes faster than guessed, or in another call"])


def serve(handle: int, opener: str, kit: str) -> None:
    """The worker: say what GPU this is, then answer each job and its context with what was found, and whether the GPU
    can be used on."""
    from dat_deploy.benchmark.worker import end_with_parent

    end_with_parent()
    module, _, name = opener.partition(":")
    with Connection(handle) as connection, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(EOFError, ConnectionError))
        try:
            gpu = getattr(importlib.import_module(module), name)(Path(kit) if kit else None)
        except UnsupportedError as error:
            connection.send(error)
            return
        import torch  # which is there, if there is a GPU

        from dat_deploy.plugins import cache_key

        connection.recv()  # the question what GPU this is
        kit_used = f"Triton {gpu.kit.triton}, sm_{gpu.kit.architecture}" if gpu.kit is not None else "none"
        connection.send(replace(gpu.machine, versions=gpu.machine.versions | {"kit": kit_used}))
        if gpu.kit is not None:
            stack.enter_context(gpu.kit.launching())
        while True:
            job, context = connection.recv()
            os.environ["DAT_DEPLOY_CONFIGURATIONS"] = str(context["path"].with_name(CONFIGURATIONS))
            torch.compiler.config.cache_key_tag = cache_key()
            gpu.release()
            found = attempt(job, context | {"gpu": gpu})
            if gpu.kit is not None and gpu.kit.missed:
                note = f"compiled here, for the kit lacks it: {', '.join(sorted(gpu.kit.missed))}"
                found = Found(found.numbers, (*found.notes, note), found.error)
                gpu.kit.missed.clear()
            connection.send((found, gpu.healthy()))


def attempt(job: Job, context: dict[str, Any]) -> Found:
    """What the job's function finds; if it raises, the error's sentence."""
    try:
        module, _, name = job.call.partition(":")
        function = getattr(importlib.import_module(module), name)
        wanted = inspect.signature(function).parameters.keys() - job.arguments.keys()
        found: Found = function(**job.arguments, **{name: context[name] for name in wanted & context.keys()})
        return found
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        return Found({}, error=f"{type(error).__name__}: {'; '.join(lines[:3])[:600]}")


def open_gpu(kit: Path | None) -> Any:
    """Raises UnsupportedError if there is no torch, no CUDA device, or another GPU than the kit is for."""
    try:
        import torch
    except ImportError:
        raise UnsupportedError(
            f"{sys.executable} has no torch; name a Python that has it: make bench-gpu GPU_PYTHON=python3.12"
        ) from None
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"torch {torch.__version__} of {sys.executable} sees no CUDA device; where there is one, name a Python "
            f"whose torch is for CUDA: make bench-gpu GPU_PYTHON=python3. --plan and --report need none."
        )
    from gpu_timing import CudaGpu

    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # of what answers are compared with
    gpu = CudaGpu()
    if kit is not None:
        from dat_deploy.plugins.precompiled import Precompiled

        try:
            gpu.kit = Precompiled(kit, gpu.capability)
        except UnsupportedError as error:
            from dat_deploy.plugins.ptx import ARCHITECTURES

            again = f"make gpu-kit ARGUMENTS='--architecture {gpu.capability}', or here " * (
                gpu.capability in ARCHITECTURES
            )
            raise UnsupportedError(f"{error} That is: {again}make bench-gpu ARGUMENTS='--kit none'.") from None
    return gpu


class Workers:
    """One process that measures after another."""

    def __init__(self, kit: Path | None) -> None:
        self.kit, self.process = kit, None

    def start(self, seconds: float) -> Machine:
        """Raises UnsupportedError as `open_gpu`, DatDeployError if the process dies or hangs."""
        try:
            from dat_deploy.benchmark.worker import WorkerProcess
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                f"{sys.executable} has no {error.name}; name a Python that has torch, triton, numpy, onnx, pillow and "
                f"safetensors: make bench-gpu GPU_PYTHON=python3.12"
            ) from None
        self.process = WorkerProcess("the measuring process", "gpu:serve", OPENER, str(self.kit or ""))
        answer = self.process.ask(None, "opening the GPU", seconds)
        if isinstance(answer, UnsupportedError):
            raise answer
        return answer

    def ask(self, job: Job, context: dict[str, Any], seconds: float) -> tuple[Found, bool]:
        """What was found, and whether the GPU can be used on. Raises as `start`."""
        return self.process.ask((job, context), "measuring this", seconds)

    def end(self) -> None:
        if self.process is not None:
            self.process.end(0.0)
        self.process = None


def run(jobs: Sequence[Job], options: argparse.Namespace) -> Path:
    """Measure what there is time for, each row on disk before the next begins. Returns the record's path.

    Raises:
        UnsupportedError: as `open_gpu`. OutputError: if the disk is full; what was measured before is on it.
    """
    deadline = time.time() + 60 * options.minutes - REPORT_SECONDS
    if options.kit is not None:  # with the packages that a machine with a GPU may lack, for what is started here
        sys.path.insert(0, str(options.kit / "site"))
    workers = Workers(options.kit)
    writable(options.output)
    print(f"kit: {options.kit or 'none, so kernels are compiled here'}", flush=True)
    with contextlib.ExitStack() as stack:
        stack.callback(workers.end)
        machine = workers.start(START_LIMIT_SECONDS)
        path, record = opened_record(options, machine)
        jobs = [job for job in jobs if job.key not in record.rows]
        record.not_measured |= {job.key: OUT_OF_TIME for job in jobs}
        record.write(path)
        begin, total = time.time(), len(jobs)
        stack.enter_context(logged_clocks(path, deadline))
        for count, (job, row) in enumerate(measured(jobs, record, workers, path, deadline), start=1):
            record.add(job.key, row)
            record.write(path)
            said = row.error or ", ".join(f"{name} {value:.4g}" for name, value in list(row.numbers.items())[:2])
            print(f"[{time.time() - begin:4.0f} s, {count} of {total}] {job.key}: {said}", flush=True)
        record.write(path)  # with what was stopped
    return path


def writable(folder: Path) -> None:
    """Raises OutputError before the GPU is opened, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another folder with --output.") from None


def opened_record(options: argparse.Namespace, machine: Machine) -> tuple[Path, Record]:
    """The record of this GPU and this code, without what failed, or a new one."""
    folder, source, now = options.output / slug(machine.gpu), source_hash(ROOT), datetime.datetime.now(datetime.UTC)
    path = newest(folder, source=source, machine=machine)
    if path is None:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = options.commit or command_output(git) or None
        record = Record(now.isoformat(timespec="seconds"), commit, source, machine)
        return new_path(folder, now.date()), record
    record = Record.read(path)
    for key, row in list(record.rows.items()):  # without the file that was tuned, the record came here alone
        if row.error or (row.kind == "tune" and not path.with_name(CONFIGURATIONS).exists()):
            del record.rows[key]
    return path, record


@contextlib.contextmanager
def logged_clocks(path: Path, deadline: float) -> Iterator[None]:
    """A line a second beside the record: clocks, power, temperature, what holds the clock back."""
    smi, limit = shutil.which("nvidia-smi"), shutil.which("timeout")
    if not (smi and limit):
        yield
        return
    seconds = f"{max(1.0, deadline - time.time()):.0f}"  # should this process be killed, it ends all the same
    command = [limit, seconds, smi, f"--query-gpu={CLOCKS}", "--format=csv", "--loop=1"]
    with path.with_name(f"{path.stem}-clocks.csv").open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)  # noqa: S603  # fixed
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def measured(
    jobs: Sequence[Job],
    record: Record,
    workers: Any,
    path: Path,
    deadline: float,
    clock: Callable[[], float] = time.time,
) -> Iterator[tuple[Job, Row]]:
    """Rows in order, as there is time: none takes the time of later parts, and an optional one none of rows that are
    not. If there is too little for all, parts share it.

    Args:
        jobs: those of which the record has no row; it must have each row before the next is asked for.
        workers: as `Workers`.
    """

    def seconds(job: Job) -> float:
        mine = [row for row in record.rows.values() if row.kind == job.kind]
        right = [row.seconds for row in mine if not row.error]
        ended = [row.seconds for row in mine if row.error and NO_ANSWER in row.error]  # at least so long
        return max([statistics.median(right) if right else job.seconds, stopped[job.kind], *ended])

    broken: Counter[str] = Counter()
    stopped: dict[str, float] = defaultdict(float)  # the longest that one of a kind took for which time was too short
    needed = sum(seconds(job) for job in jobs if not job.optional)
    share, part = min(1.0, max(0.0, deadline - clock()) / needed) if needed else 1.0, None
    for index, job in enumerate(jobs):
        later = [each for each in jobs[index + 1 :] if not each.optional and (job.optional or each.part != job.part)]
        is_first, part = job.part != part, job.part
        end = deadline if is_first else deadline - share * sum(map(seconds, later))
        if clock() + seconds(job) + (START_SECONDS if workers.process is None else 0.0) > end:
            continue
        if broken[job.kind] > 1 and job.part != "correctness":
            record.not_measured[job.key] = "two rows of its kind ended their process"
            continue
        now, began = clock(), time.time()
        try:
            if workers.process is None:
                workers.start(min(START_LIMIT_SECONDS, deadline - now))
            now, began = clock(), time.time()
            # Should it be ended there, what comes later needs a new process.
            usual = max(3 * seconds(job), job.least_limit_seconds)
            limit = min(end - now - (START_SECONDS if later else 0.0), usual)
            limit = max(limit, min(seconds(job), deadline - now))
            found, healthy = workers.ask(job, {"path": path, "kit": workers.kit}, limit)
        except DatDeployError as error:
            is_cut_off = NO_ANSWER in str(error) and limit < usual
            if clock() >= deadline or is_cut_off:
                record.not_measured[job.key] = f"{OUT_OF_TIME}: stopped after {clock() - now:.0f} s"
                stopped[job.kind] = max(stopped[job.kind], clock() - now)
                workers.end()
                if is_cut_off:
                    continue
                return
            found, healthy = Found({}, error=str(error)), False
        if not healthy:
            broken[job.kind] += 1
            workers.end()
        numbers = {name: float(value) for name, value in found.numbers.items() if math.isfinite(value)}
        notes = (*found.notes, *(f"{name} is {found.numbers[name]}" for name in found.numbers.keys() - numbers))
        yield job, Row(job.part, job.kind, job.labels, numbers, notes, found.error, round(clock() - now, 2), began)


def ncu_target(kit: Path | None) -> int:
    """What Nsight Compute looks at: the operator at the shape of the targets."""
    gpu = open_gpu(kit)
    from gpu_operators import implementation, make_inputs

    inputs = make_inputs(bar(), 0, gpu.device)
    with gpu.kit.launching() if gpu.kit is not None else contextlib.nullcontext():
        implementation(bar(), "fused", gpu)(inputs)()
    gpu.release()
    return 0


def report(options: argparse.Namespace, path: Path | None, *, documents: bool = False) -> int:
    """Print the tables of a record and draw it; with `documents` those of README and docs, too, which say so if there
    is no record. Returns 2 if a row failed, for then something is wrong."""
    import gpu_report

    path = path or newest(options.output)
    record = Record.read(path) if path else None
    if documents:
        for document in gpu_report.write_documents(ROOT, record):
            print(f"{document}: its tables are of {path or 'no record: not measured'}")
    elif record is None:
        raise OutputError(f"{options.output} holds no record; make one with make bench-gpu.")
    if path is None or record is None:
        return 0
    text = gpu_report.markdown(record)
    with atomic_output(path.with_suffix(".md"), force=True) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    problem = gpu_report.plot(record, path.with_suffix(".png"))
    failed = [key for key, row in record.rows.items() if row.error]
    print(f"\n{text}\n\n{path}; {problem or 'with a plot beside it'}")
    print(f"{len(failed)} of {len(record.rows)} rows failed{': ' * bool(failed)}{', '.join(failed[:5])}")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
