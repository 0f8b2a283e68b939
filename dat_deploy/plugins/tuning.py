"""Which configuration of a kernel is the fastest: measured once on a GPU, kept in a file, looked up at each launch.

The file is `$DAT_DEPLOY_CONFIGURATIONS`, else `~/.cache/dat-deploy/configurations.json`:
`{GPU: {operator: {problem without its batch: {batch: configuration}}}}`. Without an entry that was measured with the
kernels as they are the kernels choose by rule.
"""

import functools
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat_deploy.files import atomic_output
from dat_deploy.plugins.launch import Configuration, Problem

__all__ = ["configurations_path", "kernels_hash", "measured", "store", "tuned_configuration"]

ROUNDS = 20
GRAPH_US = 500.0
MOST_RUNS = 64

Stored = dict[str, dict[str, dict[str, dict[str, dict[str, Any]]]]]


def configurations_path() -> Path:
    """The file that `dat-deploy tune` writes and the operators read."""
    named = os.environ.get("DAT_DEPLOY_CONFIGURATIONS")
    return Path(named) if named else Path.home() / ".cache" / "dat-deploy" / "configurations.json"


@functools.cache
def kernels_hash() -> str:
    """Of what machine code is made from."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    shared = [folder / name for name in ("ptx.py", "half2.py", "online_softmax.py")]
    for path in sorted([*folder.glob("*/kernel.py"), *folder.glob("*/*_form.py"), *shared]):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _key(problem: Problem) -> str:
    return " ".join(f"{name}={int(value)}" for name, value in sorted(problem.items()) if name != "batch")


@functools.cache
def _read(path: Path) -> Stored:
    """What the file holds; nothing if there is none, or if it is broken: it only makes things faster."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def tuned_configuration(operator: str, problem: Problem, tensor: Tensor) -> Configuration | None:
    """The configuration measured on this GPU for this problem, at the batch that is nearest; None if there is none."""
    if not torch.cuda.is_available() or any(isinstance(value, torch.SymInt) for value in problem.values()):
        return None
    gpu = torch.cuda.get_device_name(tensor.device)
    try:
        by_batch = _read(configurations_path())[gpu][operator][_key(problem)]
        as_they_are = [batch for batch, stored in by_batch.items() if stored["kernels"] == kernels_hash()]
        nearest = min(as_they_are, key=lambda batch: abs(math.log(int(batch) / problem["batch"])))
        return _configuration(by_batch[nearest])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _configuration(stored: Mapping[str, Any]) -> Configuration:
    tiles = tuple((str(name), int(size)) for name, size in stored["tiles"].items())
    limit = stored.get("max_registers")
    return Configuration(
        tiles, int(stored["num_warps"]), int(stored["num_stages"]), None if limit is None else int(limit)
    )


def store(gpu: str, measured: list[tuple[str, Problem, Configuration, float]]) -> Path:
    """Add (operator, problem, its fastest configuration, microseconds) to the file; earlier entries are replaced."""
    path = configurations_path()
    _read.cache_clear()
    stored = json.loads(json.dumps(_read(path)))
    for operator, problem, configuration, microseconds in measured:
        by_batch = stored.setdefault(gpu, {}).setdefault(operator, {}).setdefault(_key(problem), {})
        by_batch[str(int(problem["batch"]))] = {
            "tiles": dict(configuration.tiles),
            "num_warps": configuration.num_warps,
            "num_stages": configuration.num_stages,
            "max_registers": configuration.max_registers,
            "kernels": kernels_hash(),
            "us": round(microseconds, 2),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(path, force=True) as temporary:
        temporary.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    _read.cache_clear()
    return path


def measured(candidates: list[Configuration], run: Callable[[Configuration], None]) -> dict[Configuration, float]:
    """The median time of one run of each candidate on the current CUDA device, in microseconds, launching excluded.

    Each is replayed from a CUDA graph of many runs, and candidates take turns, so that a clock that drifts meets all
    of them alike. One that cannot run here is left out; if none can, the last one's error is raised.
    """
    replays = {}
    failure: Exception | None = None
    for candidate in candidates:
        try:
            replays[candidate] = _captured(functools.partial(run, candidate))
        except Exception as error:  # more shared memory than this GPU has, for one
            failure = error
    if failure is not None and not replays:
        raise failure
    times: dict[Configuration, list[float]] = {candidate: [] for candidate in replays}
    for _ in range(ROUNDS):
        for candidate, (replay, runs) in replays.items():
            times[candidate].append(_microseconds(replay) / runs)
    return {candidate: statistics.median(spent) for candidate, spent in times.items()}


def _captured(run: Callable[[], None]) -> tuple[Callable[[], None], int]:
    """A CUDA graph of so many runs that its replay can be timed, and how many."""
    run()  # compiles
    runs = max(1, min(MOST_RUNS, int(GRAPH_US / _microseconds(run))))
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(runs):
                run()
    return graph.replay, runs


def _microseconds(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
    start.record()
    run()
    end.record()
    end.synchronize()
    return max(float(start.elapsed_time(end)) * 1000, 1.0)
