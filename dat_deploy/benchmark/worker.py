"""One engine in one process: the worker's side and the parent's.

Thread pools that spin make engines in one process slow each other by a third to a half, so each engine has its own.
Not multiprocessing's spawn: that imports the caller's main module again in every worker, which fails for a script
without a `__main__` guard, adds the script's memory to the engine's, and leaves a crashed worker's last words nowhere.
"""

import contextlib
import ctypes
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dat_deploy import errors
from dat_deploy.errors import DatDeployError
from dat_deploy.runners import EngineDescription, Runner

__all__ = [
    "SEED",
    "EngineProcess",
    "Opened",
    "Opening",
    "Timings",
    "Turn",
    "WorkerProcess",
    "end_with_parent",
    "named",
    "serve",
]

SEED = 0  # of the images
_KILL_SECONDS = 10.0  # for a killed worker to be gone; one that a driver holds is left behind
_GRACE_SECONDS = 5.0  # for an idle worker to close its engine; a failed or interrupted run gives none


@dataclass(frozen=True)
class Opening:
    """The first request. `opener` is `MODULE:FUNCTION`, called in the worker with `engine` and `options`."""

    engine: str
    opener: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Opened:
    description: EngineDescription
    load_s: float


@dataclass(frozen=True)
class Turn:
    """Every later request: untimed calls, then timed ones, each until both their count and their time are reached."""

    batch: int
    untimed_calls: int
    untimed_seconds: float
    calls: int
    seconds: float


@dataclass(frozen=True)
class Timings:
    """The answer to a `Turn`.

    Attributes:
        others_busy_s: processor time that all other processes took, and a hypervisor stole, during the timed calls.
        peak_memory_mib: resident, of the worker's whole life so far.
    """

    untimed_calls: int
    latencies_ns: list[int]
    others_busy_s: float
    peak_memory_mib: float


@dataclass(frozen=True)
class _Failure:
    kind: str
    message: str
    traceback: str


def end_with_parent() -> None:
    """From here on this process is killed when its parent ends, however that ends; on Linux."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve(handle: int) -> None:
    """The worker: answer the requests on file descriptor `handle` until the parent closes its end or is gone."""
    with Connection(handle) as connection, contextlib.suppress(EOFError, ConnectionError):
        engine = _Engine()
        while True:
            request = connection.recv()
            try:
                answer = engine.open(request) if isinstance(request, Opening) else engine.take(request)
            except Exception as error:
                connection.send(_failure_from(error))
                return
            connection.send(answer)


class _Engine:
    _runner: Runner
    _images = np.empty((0, 3, 0, 0), dtype=np.float32)

    def open(self, opening: Opening) -> Opened:
        module, _, function = opening.opener.partition(":")
        start = time.perf_counter()
        self._runner = getattr(importlib.import_module(module), function)(opening.engine, **opening.options)
        return Opened(self._runner.description, time.perf_counter() - start)

    def take(self, turn: Turn) -> Timings:
        shape = (turn.batch, 3, *self._runner.description.image_size)
        if self._images.shape != shape:
            self._images = np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)
        untimed = self._latencies_ns(turn.untimed_calls, turn.untimed_seconds)
        before = _machine_busy_s() - time.process_time()
        latencies = self._latencies_ns(turn.calls, turn.seconds)
        others = _machine_busy_s() - time.process_time() - before
        return Timings(len(untimed), latencies, max(0.0, others), _peak_memory_mib())

    def _latencies_ns(self, calls: int, seconds: float) -> list[int]:
        latencies: list[int] = []
        now = time.perf_counter_ns()
        end = now + seconds * 1e9
        while len(latencies) < calls or now < end:
            start = time.perf_counter_ns()
            self._runner.outputs(self._images)
            now = time.perf_counter_ns()
            latencies.append(now - start)
        return latencies


def _machine_busy_s() -> float:
    """Processor time since boot that was not idle, in steps of 10 ms."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _peak_memory_mib() -> float:
    """Resident, of this process. Not getrusage's ru_maxrss: that starts at the parent's size."""
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match.group(1)) / 1024 if match else 0.0


def _failure_from(error: Exception) -> _Failure:
    if isinstance(error, DatDeployError):
        kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in errors.__all__)
        return _Failure(kind, str(error), traceback.format_exc())
    return _Failure("", f"{type(error).__name__}: {' '.join(str(error).split())}", traceback.format_exc())


class WorkerProcess:
    """The parent's side of a worker. A context manager: no process of the worker outlives the block.

    What the worker and its libraries print goes to a temporary file, and from there into the message if it crashes.

    Args:
        name: of what works, in messages.
        serving: MODULE:FUNCTION, called in the worker with a file descriptor, of which it is to make a Connection,
            and with `arguments`.
    """

    timeout_advice = ""  # what to try, at the end of messages

    def __init__(self, name: str, serving: str, *arguments: str) -> None:
        self.name = name
        module, _, function = serving.partition(":")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        self._connection, theirs = Pipe()
        with theirs:
            call = ", ".join(map(repr, (theirs.fileno(), *arguments)))
            self._process = subprocess.Popen(  # noqa: S603  # this interpreter, a module of the caller's
                [sys.executable, "-P", "-c", f"from {module} import {function}; {function}({call})"],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                process_group=0,  # Ctrl-C is the parent's to handle, and the worker's own children end with it
            )

    def ask(self, request: Any, doing: str, timeout_seconds: float) -> Any:
        """Send a request and wait for its answer; `doing` is said in messages.

        Raises:
            DatDeployError: if the worker dies or does not answer in time.
        """
        deadline = time.monotonic() + timeout_seconds
        try:
            self._connection.send(request)
            while not self._connection.poll(max(0.0, min(1.0, deadline - time.monotonic()))):
                if self._process.poll() is not None:  # its end of the pipe may live on in a child of its own
                    raise EOFError
                if time.monotonic() > deadline:
                    raise DatDeployError(
                        f"{self.name} gave no answer for {timeout_seconds:g} s while {doing}, and was ended."
                        f"{self.timeout_advice}"
                    )
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._death(doing) from error

    def _death(self, doing: str) -> DatDeployError:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        last = f"; its last words: {words}" if words else ""
        return DatDeployError(f"{self.name}: its process {cause} while {doing}{last}.{self._death_advice(code)}")

    def _death_advice(self, code: int) -> str:
        return ""

    def end(self, grace_seconds: float) -> None:
        """End the worker and all its children; an idle worker first has `grace_seconds` to leave by itself."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(_GRACE_SECONDS if kind is None else 0.0)


def named(error: DatDeployError, label: str) -> DatDeployError:
    """The error, with the engine before its message unless that has the name already."""
    return error if label in str(error) else type(error)(f"engine '{label}': {error}")


class EngineProcess(WorkerProcess):
    """An engine's worker.

    Attributes:
        label: names the engine in messages.
    """

    timeout_advice = " Try a smaller batch, or allow it more time."

    def __init__(self, label: str) -> None:
        super().__init__(f"engine '{label}'", f"{__name__}:serve")
        self.label = label

    def ask(self, request: Opening | Turn, doing: str, timeout_seconds: float) -> Any:
        """As of any worker; an expected failure of the engine keeps its class, too."""
        answer = super().ask(request, doing, timeout_seconds)
        if not isinstance(answer, _Failure):
            return answer
        if not answer.kind:
            unexpected = DatDeployError(
                f"engine '{self.label}' failed while {doing}: {answer.message}. Try a smaller batch, or see whether "
                f"it runs at all with: `validate(engine={self.label!r})`"
            )
            unexpected.add_note(answer.traceback)
            raise unexpected
        kind: type[DatDeployError] = getattr(errors, answer.kind)
        raise named(kind(answer.message), self.label)

    def _death_advice(self, code: int) -> str:
        hint = "The memory may have run out: try" if code == -signal.SIGKILL else "Try"
        return f" {hint} a smaller batch, or this engine alone."
