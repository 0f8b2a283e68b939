"""What a benchmark found, as data: kept in JSON, and compared only with what was measured alike."""

import json
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dat_deploy.environment import Hardware
from dat_deploy.errors import RecordError
from dat_deploy.files import atomic_output
from dat_deploy.typed_json import typed

__all__ = [
    "SCHEMA_VERSION",
    "Change",
    "EngineSettings",
    "LatencyRatio",
    "Record",
    "RecordComparison",
    "Row",
    "RunSettings",
    "compare",
]

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class EngineSettings:
    """What an engine computes and with what; the fields mean what they mean in `EngineDescription`."""

    runtime: str
    device: str
    precision: str
    variant: str
    image_size: tuple[int, int]
    dynamic_image_size: bool
    outputs: tuple[str, ...]
    lowering: str | None
    threads: int
    weights_sha256: str
    weights_source: str


@dataclass(frozen=True)
class RunSettings:
    """All that must be equal for two records to be compared.

    Attributes:
        engines: by the name in the rows, in the order of their turns.
        rounds: each engine has one turn a round, at each batch.
        seconds, calls: a turn's timed calls last at least so long and are at least so many.
        warmup_calls: untimed, of each engine at each batch before the first round.
        settle_calls, settle_seconds: untimed, at the start of each turn, at least so many and so long.
        threads: as asked; None leaves it to the engine.
        images: what is put in; timed: what a latency contains.
    """

    engines: dict[str, EngineSettings]
    baseline: str
    batches: tuple[int, ...]
    rounds: int
    seconds: float
    calls: int
    warmup_calls: int
    settle_calls: int
    settle_seconds: float
    threads: int | None
    images: str
    timed: str


@dataclass(frozen=True)
class LatencyRatio:
    """This engine's latency divided by the baseline's, from medians of the same round: below 1 is faster.

    Attributes:
        median: over the rounds, as are lowest and highest.
    """

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Row:
    """One engine at one batch. Percentiles, mean and minimum are over all timed calls of all rounds.

    Attributes:
        calls: timed; untimed_calls: warm-up of this row, the start of each turn included.
        images_per_s: batch / p50.
        load_s: from the start of importing the runtime to the opened engine; its first call is not in it.
        peak_memory_mib: resident, of the engine's process with its runtime, from its start to the end of this row.
        others_busy_cores: that other processes kept busy during the timed calls, on average. Near 0 on a quiet
            machine; engines differ much in how far they slow down when it is not.
        round_p50_ms: the median of each round, in order.
    """

    engine: str
    batch: int
    calls: int
    untimed_calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float
    images_per_s: float
    latency_ratio: LatencyRatio
    load_s: float
    peak_memory_mib: float
    others_busy_cores: float
    round_p50_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """A whole run.

    Attributes:
        date: UTC, ISO 8601.
        commit: of the checkout of dat-deploy, `-dirty` if it was edited; None outside a checkout.
        versions: by name, the runtimes among them.
    """

    schema_version: int = SCHEMA_VERSION
    date: str
    commit: str | None
    settings: RunSettings
    hardware: Hardware
    versions: dict[str, str]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Raises RecordError if `text` is not what `to_json` of this version writes."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise RecordError(f"not a benchmark record: {error}. Make one with: `bench(...).to_json()`") from None
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise RecordError(
                f"not a benchmark record of this version: schema_version is {version!r} and must be "
                f"{SCHEMA_VERSION}. Measure again with: `bench(...).to_json()`"
            )
        try:
            return typing.cast(Record, typed(cls, values, "record"))
        except ValueError as error:
            raise RecordError(f"not a benchmark record: {error}. Measure again.") from None

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Raises RecordError as `from_json`, and if the file cannot be read; the message names it."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecordError(f"cannot read {path}: {error.strerror}. Check the path.") from error
        except (UnicodeDecodeError, RecordError) as error:
            raise RecordError(f"{path}: {error}") from error

    def write(self, path: Path, *, force: bool = False) -> None:
        """Raises OutputError as `atomic_output`."""
        with atomic_output(path, force=force) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")


@dataclass(frozen=True)
class Change:
    """One engine at one batch in two records, first and second.

    Attributes:
        latency_ratio: second p50 / first p50, below 1 where the second is faster; lowest and highest are from the
            slowest and fastest rounds of either, as nothing pairs the rounds of two runs. A range that holds 1 shows no
            change.
    """

    engine: str
    batch: int
    first_ms: float
    second_ms: float
    latency_ratio: LatencyRatio


@dataclass(frozen=True)
class RecordComparison:
    """Attributes:
    versions: that differ, the commit among them: name -> (first, second).
    """

    rows: list[Change]
    versions: dict[str, tuple[str | None, str | None]]


def compare(first: Record, second: Record) -> RecordComparison:
    """How the same engines changed between two records of the same settings and hardware.

    Raises:
        RecordError: if a setting or the hardware differs; it names each with both values.
    """
    alike = [{"settings": asdict(r.settings), "hardware": asdict(r.hardware)} for r in (first, second)]
    different = [f"{name} ({a} and {b})" for name, a, b in _differences("", *alike)]
    if different:
        raise RecordError(
            f"the records cannot be compared, for they differ in {', '.join(different)}; "
            f"measure both alike on one machine with: `bench(...).to_json()`"
        )
    rows = []
    for a, b in zip(first.rows, second.rows, strict=True):
        lowest = min(b.round_p50_ms) / max(a.round_p50_ms)
        highest = max(b.round_p50_ms) / min(a.round_p50_ms)
        rows.append(Change(a.engine, a.batch, a.p50_ms, b.p50_ms, LatencyRatio(b.p50_ms / a.p50_ms, lowest, highest)))
    versions: list[dict[str, Any]] = [r.versions | {"commit": r.commit} for r in (first, second)]
    return RecordComparison(rows, {name: (a, b) for name, a, b in _differences("", *versions)})


def _differences(prefix: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in a | b:
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(f"{prefix}{key}.", left, right)
        elif left != right:
            yield prefix + key, left, right
