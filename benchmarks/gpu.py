"""Everything that a CUDA device says of operators, networks and engines, in a few minutes: `make bench-gpu`.

    python benchmarks/gpu.py [--part tests,ceilings,...] [--variant tiny,...] [--minutes 8] [--output DIR] [--fresh]

Writes DIR/GPU/DATE.json, row by row, then prints the README's tables and draws DATE.png. Called again, it goes on where
it stopped, as long as the measured code and the GPU are the same; what there was no time for is listed. A row is
measured in a process that does not survive it if it breaks the GPU's context, hangs or crashes: then the next row gets
a new one. `--part report` needs no GPU.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a machine with a GPU may have this checkout, but no installation of it

# In order, with their shares of the time; what a part does not need, the others get in the end.
SHARES = {
    "ceilings": 0.02,
    "memory": 0.04,
    "tune": 0.14,
    "operators": 0.15,
    "ptx": 0.04,
    "tests": 0.13,
    "networks": 0.28,
    "engines": 0.17,
    "profile": 0.03,
}
PARTS = (*SHARES, "report")
RESERVE_SECONDS = 12.0  # for the report
START_SECONDS = 20.0  # less is left: no further process is started
MOST_PROCESSES = 25
NO_CUDA, BROKEN = 3, 75  # exit codes


def main(arguments: Sequence[str] | None = None) -> int:
    from dat_deploy.errors import RecordError, VariantError
    from dat_deploy.variants import get_variant

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help=f"one or several of {','.join(PARTS)}")
    parser.add_argument("--variant", help="networks to measure; without it tiny, small, base and pp-tiny")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--fresh", action="store_true", help="resume nothing")
    parser.add_argument("--retry", action="store_true", help="measure again what ended in an error")
    parser.add_argument("--commit", help="what the record calls the code, where this is no checkout of git")
    parser.add_argument("--record", type=Path, help="the record to report; without it the newest")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--continued", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ncu-target", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = options.part.split(",")
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    try:
        for name in options.variant.split(",") if options.variant else ():
            get_variant(name)
    except VariantError as error:
        parser.error(str(error))
    if options.ncu_target:
        return ncu_target()
    if options.worker:
        return work(options)
    if options.parts == ["report"]:
        try:
            return report(options.output, options.record)
        except RecordError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    code, path = supervise(options)
    if path and "report" in options.parts:
        return max(code, report(options.output, path))
    return code


def supervise(options: argparse.Namespace) -> tuple[int, Path | None]:
    """Run processes that measure until all is done or time is up. Returns an exit code and the record's path."""
    from gpu_record import STOPPED, Record, Row

    deadline = time.time() + 60 * options.minutes - RESERVE_SECONDS
    parts = ",".join(part for part in options.parts if part != "report")
    command = [sys.executable, str(Path(__file__).resolve()), "--part", parts, "--deadline", str(deadline)]
    command += ["--output", str(options.output.resolve())]
    command += ["--variant", options.variant] if options.variant else []
    command += ["--commit", options.commit] if options.commit else []
    path = None
    with tempfile.TemporaryDirectory() as folder:
        state_path = Path(folder, "state.json")
        for count in range(MOST_PROCESSES):
            state_path.unlink(missing_ok=True)
            flags = {"--fresh": options.fresh and not count, "--retry": options.retry and not count}
            more = [flag for flag, is_set in (flags | {"--continued": count > 0}).items() if is_set]
            code, late = watch([*command, "--worker", str(state_path), *more], state_path, deadline)
            state = read_state(state_path)
            path = Path(state["record"]) if state.get("record") else path
            if code in (0, NO_CUDA) or path is None:
                return code, path
            record, key = Record.read(path), state.get("key")
            if key and key not in record.rows:
                spent = round(time.time() - state["began"], 1)
                if late:
                    record.not_measured[key] = f"{STOPPED} {spent:.0f} s"
                else:
                    error = f"the process ended with {_ending(code)} while it measured this"
                    record.add(key, Row(state["part"], state["kind"], state["labels"], {}, (), error, spent))
                record.write(path)
            elif not key and not late:  # before its first row, so another would fare no better
                return 1, path
            if deadline - time.time() < START_SECONDS:
                break
    return 0, path


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def watch(command: list[str], state_path: Path, deadline: float) -> tuple[int, bool]:
    """Run a process until it ends, its row takes too long or time is up; it has a session of its own, to end as one.

    Returns its exit code, and whether it was ended.
    """
    process = subprocess.Popen(command, start_new_session=True)  # noqa: S603  # this file
    try:
        while process.poll() is None:
            until = read_state(state_path).get("until", deadline)
            if time.time() > min(until, deadline) + 2:
                return _end(process), True
            time.sleep(0.2)
    except BaseException:
        _end(process)
        raise
    return process.returncode, False


def _end(process: "subprocess.Popen[bytes]") -> int:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def read_state(path: Path) -> dict[str, Any]:
    """What the measuring process is at: the record's path, and the row's key, labels, beginning and latest end."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(state), encoding="utf-8")
    temporary.replace(path)


def work(options: argparse.Namespace) -> int:
    """The process that measures."""
    try:
        import torch
    except ImportError:
        print(
            f"benchmarks/gpu.py needs torch, which {sys.executable} lacks; "
            "name a Python that has it: make bench-gpu GPU_PYTHON=python3.12",
            file=sys.stderr,
        )
        return NO_CUDA

    if not torch.cuda.is_available():
        print(
            f"benchmarks/gpu.py needs a CUDA device, and torch {torch.__version__} sees none here. "
            "Elsewhere, --part report makes the tables of an existing record.",
            file=sys.stderr,
        )
        return NO_CUDA
    import gpu_record
    from gpu_timing import CudaGpu

    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # of the float32 that answers are compared with
    gpu, source = CudaGpu(), gpu_record.source(ROOT)
    folder = options.output / gpu_record.slug(gpu.name)
    path = None if options.fresh else gpu_record.newest(folder, source=source)
    now = datetime.datetime.now(datetime.UTC)
    if path is None:
        path = gpu_record.new_path(folder, now.date())
        commit = options.commit or _commit()
        record = gpu_record.Record(now.isoformat(timespec="seconds"), commit, source, gpu.machine)
    else:
        record = gpu_record.Record.read(path)
    if options.retry:
        record.rows = {key: row for key, row in record.rows.items() if row.error is None}
    os.environ.setdefault("DAT_DEPLOY_CONFIGURATIONS", str(folder / "configurations.json"))
    if not Path(os.environ["DAT_DEPLOY_CONFIGURATIONS"]).exists():  # the record came here alone
        record.rows = {key: row for key, row in record.rows.items() if row.part != "tune"}
    folder.mkdir(parents=True, exist_ok=True)
    state = {"record": str(path)}
    write_state(options.worker, state)
    every = all_jobs(options.parts, options.variant, options.worker.parent)
    jobs = gpu_record.pending(every, record, continued=options.continued)
    record.write(path)
    begin = time.time()

    def starting(job: gpu_record.Job, until: float) -> None:
        gpu.release()
        more = {"key": job.key, "part": job.part, "kind": job.kind, "labels": job.labels}
        write_state(options.worker, state | more | {"began": time.time(), "until": until})

    def finished(job: gpu_record.Job, row: gpu_record.Row) -> None:
        said = row.error or ", ".join(f"{name} {value:.4g}" for name, value in list(row.numbers.items())[:2])
        print(f"[{time.time() - begin:4.0f} s] {job.key}: {said}", flush=True)

    shares = {part: share for part, share in SHARES.items() if part in options.parts}
    ended = gpu_record.run_jobs(
        jobs,
        record,
        path,
        gpu,
        shares=shares,
        deadline=options.deadline,
        starting=starting,
        finished=finished,
    )
    write_state(options.worker, state)
    return 0 if ended else BROKEN


def all_jobs(parts: Sequence[str], variants: str | None = None, folder: Path | None = None) -> list[Any]:
    """Those of these parts, the most valuable of each part first; `folder` keeps what several rows need.

    Raises VariantError for an unknown variant.
    """
    import gpu_engines
    import gpu_networks
    import gpu_operators
    import gpu_ptx

    from dat_deploy.variants import get_variant

    names = [get_variant(name).name for name in variants.split(",")] if variants else gpu_networks.VARIANTS_BY_DEFAULT
    jobs = {
        "ceilings": gpu_operators.ceilings_jobs,
        "memory": gpu_networks.memory_jobs,
        "tune": gpu_operators.tune_jobs,
        "operators": gpu_operators.jobs,
        "ptx": gpu_ptx.jobs,
        "tests": gpu_networks.tests_jobs,
        "networks": lambda: gpu_networks.jobs(names),
        "engines": lambda: gpu_engines.jobs(names, folder),
        "profile": gpu_networks.profile_jobs,
    }
    return [job for part, make in jobs.items() if part in parts for job in make()]


def _commit() -> str | None:
    try:
        from dat_deploy.benchmark.environment import commit
    except ImportError:  # it needs packages that measuring does not
        return None
    return commit()


def ncu_target() -> int:
    """What Nsight Compute looks at: the operator at the shape of the targets, three times and once more."""
    import torch
    from gpu_operators import cases, implementation, is_bar, make_inputs

    torch.set_grad_enabled(False)
    case = next(case for case, users in cases().items() if is_bar(case, users))
    call = implementation(case, "fused", torch.compile)(make_inputs(case, 0, torch.device("cuda")))
    for _ in range(4):
        call()
    torch.cuda.synchronize()
    return 0


def report(folder: Path, path: Path | None) -> int:
    """Print the tables of a record and draw it."""
    import gpu_record
    import gpu_report

    path = path or gpu_record.newest(folder)
    if path is None:
        print(f"{folder} holds no record of the GPU benchmark; make one on a CUDA machine first.", file=sys.stderr)
        return 1
    record = gpu_record.Record.read(path)
    text = gpu_report.markdown(record)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    problem = gpu_report.plot(record, path.with_suffix(".png"))
    print(f"\n{text}\n\n{gpu_report.targets(record)}\n\n{path}; {problem or 'with a plot beside it'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
