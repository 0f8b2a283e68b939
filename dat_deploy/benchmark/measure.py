"""Several engines, timed in turns."""

import contextlib
import datetime
import difflib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dat_deploy import environment
from dat_deploy.benchmark.record import EngineSettings, LatencyRatio, Record, Row, RunSettings
from dat_deploy.benchmark.worker import SEED, EngineProcess, Opened, Opening, Timings, Turn, named
from dat_deploy.errors import DatDeployError, ShapeError, UnsupportedError
from dat_deploy.runners import EngineDescription, EngineOutline, check_engine, engine_path, short_name

__all__ = ["benchmark", "row_from_rounds"]

IMAGES = f"standard normal float32, seed {SEED}, the same in every call"
TIMED = "one call: from images in host memory to the outputs as NumPy arrays in host memory"
OPENER = "dat_deploy.runners:open_runner"
SETTLE_CALLS = 2  # at the start of each turn: the caches are cold, and the last engine's threads may still spin
SETTLE_SECONDS = 0.1


def benchmark(
    engines: Sequence[str],
    *,
    batches: Sequence[int] = (1,),
    rounds: int = 5,
    seconds: float = 1.0,
    calls: int = 5,
    warmup_calls: int = 10,
    threads: int | None = None,
    checkpoint: Path | None = None,
    image_size: tuple[int, int] | None = None,
    features: Sequence[int] | None = None,
    baseline: str | None = None,
    timeout_seconds: float = 600.0,
    progress: Callable[[int, int, str], None] | None = None,
    _opener: str = OPENER,
) -> Record:
    """Time engines side by side, each in its own process, one working at a time, in turns: A B C, A B C, ...

    The turns are interleaved so that a machine that drifts slows all engines alike; the ratios, taken round by
    round, are then still right where the latencies are not.

    Args:
        engines: as `open_runner` takes them; their variants and image sizes may differ. An engine named twice is
            measured twice, which shows how much of a ratio is noise.
        batches: each is measured for all engines before the next; ascending, whatever the order here.
        rounds, seconds, calls, warmup_calls: see `RunSettings`.
        threads, checkpoint, image_size, features: see `open_runner`.
        baseline: one of `engines`; by default the first.
        timeout_seconds: that an engine may take to open, to warm up at a batch, or for a turn.
        progress: called with steps done, steps in total, and what comes next.

    Raises:
        DatDeployError: if an argument does not fit, or an engine fails, crashes or hangs; failures of `open_runner`
            keep their class. No process is left.
    """
    if sys.platform != "linux":
        raise UnsupportedError(f"bench measures on Linux alone, where it reads /proc; this is {sys.platform}.")
    batches = sorted(set(batches))
    labels = _labels(engines)
    reference = labels[0] if baseline is None else _baseline_label(baseline, engines, labels)
    _check_counts(batches, rounds=rounds, calls=calls, warmup_calls=warmup_calls, threads=threads, seconds=seconds)
    if _opener == OPENER:
        named_engines = zip(labels, engines, strict=True)
        # files last, which take time to read: what is wrong with another engine's name is told at once
        for label, engine in sorted(named_engines, key=lambda each: (engine_path(each[1]) or Path()).is_file()):
            try:
                outline = check_engine(engine, checkpoint=checkpoint, image_size=image_size, features=features)
            except DatDeployError as error:
                raise named(error, label) from error
            _check_batches(label, outline, batches)

    total = len(labels) * (1 + len(batches) * (1 + rounds))
    count = 0

    def step(doing: str) -> None:
        nonlocal count
        if progress is not None:
            progress(count, total, doing)
        count += 1

    with contextlib.ExitStack() as stack:
        answers: dict[str, Opened] = {}
        workers = []
        options = {
            "checkpoint": checkpoint,
            "image_size": image_size,
            "features": features,
            "threads": threads or environment.available_cores(),  # the same for all: by itself each takes another count
        }
        for label, engine in zip(labels, engines, strict=True):
            step(f"opening {label}")
            worker = stack.enter_context(EngineProcess(label))
            workers.append(worker)
            answers[label] = worker.ask(Opening(engine, _opener, options), "opening", timeout_seconds)
            _check_batches(label, answers[label].description, batches)

        rows: list[Row] = []
        for batch in batches:
            timings: dict[str, list[Timings]] = {label: [] for label in labels}
            warmup = Turn(batch, warmup_calls, 0.0, 0, 0.0)
            turn = Turn(batch, SETTLE_CALLS, SETTLE_SECONDS, calls, seconds)
            for worker in workers:
                step(f"batch {batch}, warm-up: {worker.label}")
                timings[worker.label].append(worker.ask(warmup, f"warming up at batch {batch}", timeout_seconds))
            for number in range(1, rounds + 1):
                for worker in workers:
                    step(f"batch {batch}, round {number} of {rounds}: {worker.label}")
                    timings[worker.label].append(worker.ask(turn, f"being timed at batch {batch}", timeout_seconds))
            rows += [
                row_from_rounds(label, batch, timings[label], timings[reference], answers[label].load_s)
                for label in labels
            ]
    step("done")

    descriptions = {label: answers[label].description for label in labels}
    settings = RunSettings(
        engines={label: _engine_settings(description) for label, description in descriptions.items()},
        baseline=reference,
        batches=tuple(batches),
        rounds=rounds,
        seconds=float(seconds),
        calls=calls,
        warmup_calls=warmup_calls,
        settle_calls=SETTLE_CALLS,
        settle_seconds=SETTLE_SECONDS,
        threads=threads,
        images=IMAGES,
        timed=TIMED,
    )
    return Record(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=environment.commit(),
        settings=settings,
        hardware=environment.hardware(),
        versions=environment.versions() | {d.runtime: d.runtime_version for d in descriptions.values()},
        rows=tuple(rows),
    )


def row_from_rounds(
    engine: str, batch: int, timings: Sequence[Timings], baseline: Sequence[Timings], load_s: float
) -> Row:
    """The statistics of an engine's turns, beside the baseline's turns of the same rounds.

    A turn without timed calls is warm-up; its untimed calls and its memory count.
    """
    turns_ms = [np.array(t.latencies_ns) / 1e6 for t in timings if t.latencies_ns]
    every_ms = np.concatenate(turns_ms)
    medians_ms = np.array([np.median(turn_ms) for turn_ms in turns_ms])
    baseline_ms = np.array([np.median(t.latencies_ns) / 1e6 for t in baseline if t.latencies_ns])
    ratios = medians_ms / baseline_ms
    p50, p90, p99 = np.percentile(every_ms, (50, 90, 99))
    others_busy_s = sum(t.others_busy_s for t in timings if t.latencies_ns)
    return Row(
        engine=engine,
        batch=batch,
        calls=len(every_ms),
        untimed_calls=sum(t.untimed_calls for t in timings),
        p50_ms=_rounded(p50),
        p90_ms=_rounded(p90),
        p99_ms=_rounded(p99),
        mean_ms=_rounded(every_ms.mean()),
        min_ms=_rounded(every_ms.min()),
        images_per_s=_rounded(batch / p50 * 1e3),
        latency_ratio=LatencyRatio(_rounded(np.median(ratios)), _rounded(ratios.min()), _rounded(ratios.max())),
        load_s=_rounded(load_s),
        peak_memory_mib=_rounded(max(t.peak_memory_mib for t in timings)),
        others_busy_cores=_rounded(others_busy_s / every_ms.sum() * 1e3),
        round_p50_ms=tuple(map(_rounded, medians_ms)),
    )


def _rounded(value: float) -> float:
    """Six significant digits: more than any clock gives, and a record that can be read."""
    return float(f"{value:.6g}")


def _labels(engines: Sequence[str]) -> list[str]:
    """Names for rows and messages: as given, but of an absolute path only the file name; a repeated one is numbered."""
    if not engines:
        raise DatDeployError(
            "no engine to measure; name at least one, such as `engines=['tiny.onnx']` or pytorch:tiny."
        )
    counts: Counter[str] = Counter()
    labels = []
    for name in map(short_name, engines):
        counts[name] += 1
        labels.append(name if counts[name] == 1 else f"{name} #{counts[name]}")
    return labels


def _baseline_label(baseline: str, engines: Sequence[str], labels: Sequence[str]) -> str:
    for engine, label in zip(engines, labels, strict=True):
        if baseline in (engine, label):
            return label
    near = difflib.get_close_matches(baseline, labels, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise DatDeployError(f"baseline '{baseline}' is not measured here. {hint}Engines: {', '.join(labels)}.")


def _check_counts(batches: Sequence[int], *, threads: int | None, seconds: float, **counts: int) -> None:
    if not batches:
        raise DatDeployError("no batch to measure; give at least one, such as `batches=[1]`.")
    counts |= {"batch": batches[0], "threads": 1 if threads is None else threads}
    for name, count in counts.items():
        least = 0 if name == "warmup_calls" else 1
        if count < least:
            raise DatDeployError(f"{name} is {count}; it must be at least {least}.")
    if not 0 <= seconds < float("inf"):
        raise DatDeployError(f"seconds is {seconds:g}; it must be a finite number from 0.")


def _check_batches(label: str, description: EngineOutline, batches: Sequence[int]) -> None:
    others = [str(batch) for batch in batches if not description.takes_batch(batch)]
    if others and description.profiles:
        raise ShapeError(
            f"engine '{label}' was built for {description.batches_taken} and cannot run batch {', '.join(others)}. "
            f"Measure it with `batches={[profile.best for profile in description.profiles]}`, or build it again with "
            f"`batches={[*batches]}`."
        )
    if others:
        raise ShapeError(
            f"engine '{label}' has the fixed batch {description.batch} and cannot run batch {', '.join(others)}. "
            f"Measure it with `batches=[{description.batch}]`, or export it again with `batch=None`."
        )


def _engine_settings(description: EngineDescription) -> EngineSettings:
    return EngineSettings(
        runtime=description.runtime,
        device=description.device,
        precision=description.precision,
        variant=description.variant,
        image_size=description.image_size,
        dynamic_image_size=description.dynamic_image_size,
        outputs=description.outputs,
        lowering=description.lowering,
        threads=description.threads,
        weights_sha256=description.weights_sha256,
        weights_source=description.weights_source,
    )
