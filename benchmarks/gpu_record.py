"""What the GPU benchmark found, as data, and which of its rows are still to be measured. Needs no torch and no CUDA."""

import datetime
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dat_deploy.errors import RecordError
from dat_deploy.files import atomic_output
from dat_deploy.typed_json import typed

__all__ = [
    "STOPPED",
    "Found",
    "Job",
    "Machine",
    "Record",
    "Row",
    "new_path",
    "newest",
    "pending",
    "run_jobs",
    "slug",
    "source",
]

SCHEMA_VERSION = 1
OUT_OF_TIME = "out of time"
STOPPED = "out of time: stopped after"
# What a row depends on: rows of other sources are not resumed.
SOURCES = ("dat_deploy/plugins/**/*.py", "dat_deploy/model.py", "dat_deploy/variants.py", "dat_deploy/checkpoint.py")
SOURCES += ("dat_deploy/engine/*.py", "dat_deploy/export/*.py", "dat_deploy/runners/*.py")
SOURCES += ("benchmarks/cuda_driver.py", "benchmarks/gpu_[!r]*.py")  # neither gpu_record nor gpu_report


@dataclass(frozen=True)
class Machine:
    """Attributes:
    gpu: as CUDA names it; versions: by name, of Python, torch, Triton, CUDA and the driver.
    """

    gpu: str
    memory_gib: int
    multiprocessors: int
    l2_mib: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Found:
    """What a job found; the fields mean what they mean in `Row`."""

    numbers: dict[str, float]
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """One finished measurement.

    Attributes:
        labels: what was measured; numbers: what was found, with the unit in the name.
        notes: what a reader must know, a sentence each.
        error: why there are no numbers, or why they must not be used.
        seconds: that the row took, all in.
    """

    part: str
    kind: str
    labels: dict[str, str]
    numbers: dict[str, float]
    notes: tuple[str, ...]
    error: str | None
    seconds: float


@dataclass
class Record:
    """A whole run, or several that were resumed.

    Attributes:
        date: UTC, ISO 8601, of its beginning.
        commit: of the checkout, `-dirty` if it was edited; None where that is not known.
        source: a hash of the measured and the measuring code; rows of another are not resumed.
        rows: by key. not_measured: why a row is missing, by key.
    """

    date: str
    commit: str | None
    source: str
    machine: Machine
    rows: dict[str, Row] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def add(self, key: str, row: Row) -> None:
        self.rows[key] = row
        self.not_measured.pop(key, None)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(path, force=True) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Raises RecordError if the file is not what `write` of this version makes."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values.get("schema_version") if isinstance(values, dict) else None
            if version != SCHEMA_VERSION:
                raise ValueError(f"schema_version is {version!r} and must be {SCHEMA_VERSION}")
            record: Record = typed(cls, values, "record")
        except (OSError, ValueError) as error:
            raise RecordError(f"{path} is no record of the GPU benchmark: {error}. Measure again.") from None
        return record


class Gpu(Protocol):
    def healthy(self) -> bool: ...


@dataclass(frozen=True)
class Job:
    """A row to be measured.

    Attributes:
        kind: jobs of one kind take about as long as each other.
        seconds: a guess of that, until one of the kind was measured.
        run: takes the GPU, the record so far and the path of its file.
    """

    key: str
    part: str
    kind: str
    labels: dict[str, str]
    seconds: float
    run: Callable[[Any, Record, Path], Found]


def slug(gpu: str) -> str:
    """A folder's name: `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def source(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(found for pattern in SOURCES for found in root.glob(pattern)):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def newest(folder: Path, *, source: str | None = None) -> Path | None:
    """The newest record of this source, or of any, in the folder of a GPU or in the folders of several."""
    found = []
    for path in [*folder.glob("*.json"), *folder.glob("*/*.json")]:
        try:
            record = Record.read(path)
        except RecordError:  # a file of configurations, a record of the CPU
            continue
        if source in (None, record.source):
            found.append((record.date, path))
    return max(found)[1] if found else None


def new_path(folder: Path, date: datetime.date) -> Path:
    """DATE.json, or DATE-2.json and so on: no record is ever replaced by that of another source."""
    path, count = folder / f"{date}.json", 1
    while path.exists():
        count += 1
        path = folder / f"{date}-{count}.json"
    return path


def pending(jobs: Sequence[Job], record: Record, *, continued: bool = False) -> list[Job]:
    """The jobs whose rows are missing; the record lists each as out of time until it is measured.

    Args:
        continued: within one call, where a row that had to be stopped is not tried twice.
    """
    missing = [job for job in jobs if job.key not in record.rows]
    stopped = {key for key, why in record.not_measured.items() if continued and why.startswith(STOPPED)}
    record.not_measured |= {job.key: OUT_OF_TIME for job in missing if job.key not in stopped}
    return [job for job in missing if job.key not in stopped]


def estimate(job: Job, record: Record) -> float:
    """Seconds that the job will take: the most that one of its kind took, else the guess."""
    return max((row.seconds for row in record.rows.values() if row.kind == job.kind), default=job.seconds)


def run_jobs(
    jobs: Sequence[Job],
    record: Record,
    path: Path,
    gpu: Gpu,
    *,
    shares: dict[str, float],
    deadline: float,
    starting: Callable[[Job, float], None],
    finished: Callable[[Job, Row], None] = lambda job, row: None,
    clock: Callable[[], float] = time.time,
) -> bool:
    """Measure what there is time for: each part in its share and strictly in order, then whatever else fits.

    Each row is written at once. A job that raises becomes a row with the error's sentence.

    Args:
        jobs: pending, the most valuable first within each part.
        shares: of the time until the deadline, by part and in the order of the parts. What is left goes to the part
            of the largest share first.
        deadline: on the clock; no job is started that would not be done by then.
        starting: told of each job, and of the time at which something must be wrong with it; finished: of its row.

    Returns:
        False if a row has left the GPU unusable for this process; whoever called starts another process.
    """
    begin, total = clock(), sum(shares.values())
    for in_share in (True, False):
        for part, share in shares.items() if in_share else sorted(shares.items(), key=lambda item: -item[1]):
            mine = [job for job in jobs if job.part == part and job.key not in record.rows]
            end = min(deadline, clock() + share / total * (deadline - begin)) if in_share else deadline
            for index, job in enumerate(mine):
                seconds, now = estimate(job, record), clock()
                if now + seconds > (deadline if index == 0 else end):
                    if in_share:
                        break
                    continue
                starting(job, min(deadline, now + max(3 * seconds, 60.0)))
                found = _attempt(job, gpu, record, path)
                numbers = {name: float(value) for name, value in found.numbers.items() if math.isfinite(value)}
                notes = (*found.notes, *(f"{name} is {found.numbers[name]}" for name in found.numbers.keys() - numbers))
                row = Row(part, job.kind, job.labels, numbers, notes, found.error, round(clock() - now, 2))
                record.add(job.key, row)
                record.write(path)
                finished(job, row)
                if not gpu.healthy():
                    return False
    return True


def _attempt(job: Job, gpu: Gpu, record: Record, path: Path) -> Found:
    try:
        return job.run(gpu, record, path)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        return Found({}, error=f"{type(error).__name__}: {' '.join(lines[:3])[:600]}")
