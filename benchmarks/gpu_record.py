"""What the GPU benchmark found, as data. Needs no torch and no CUDA."""

import datetime
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dat_deploy.errors import RecordError
from dat_deploy.files import atomic_output
from dat_deploy.typed_json import typed

__all__ = ["Found", "Machine", "Record", "Row", "new_path", "newest", "slug", "source_hash"]

SCHEMA_VERSION = 2
# What a row depends on: rows of other sources are not resumed.
SOURCES = (
    "dat_deploy/plugins/**/*.py",
    "dat_deploy/networks/dat/model.py",
    "dat_deploy/networks/dat/variants.py",
    "dat_deploy/networks/dat/checkpoint.py",
)
SOURCES += ("dat_deploy/engine/*.py", "dat_deploy/runners/*.py", "benchmarks/gpu_[!r]*.py")


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
    """What a row found; the fields mean what they mean in `Row`."""

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
        seconds: that the row took, all in; began: when, in seconds of UNIX time, as in the log of clocks.
    """

    part: str
    kind: str
    labels: dict[str, str]
    numbers: dict[str, float]
    notes: tuple[str, ...]
    error: str | None
    seconds: float
    began: float


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
        """Raises OutputError if the disk is full; the file is then what it was before."""
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


def slug(gpu: str) -> str:
    """A folder's name: `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def source_hash(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted({found for pattern in SOURCES for found in root.glob(pattern)}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def newest(folder: Path, *, source: str | None = None, machine: Machine | None = None) -> Path | None:
    """The newest record of this source and machine, or of any, in the folder of a GPU or in the folders of several."""
    found = []
    for path in [*folder.glob("*.json"), *folder.glob("*/*.json")]:
        try:
            record = Record.read(path)
        except RecordError:  # a file of configurations, a record of the CPU
            continue
        if source in (None, record.source) and machine in (None, record.machine):
            found.append((record.date, path))
    return max(found)[1] if found else None


def new_path(folder: Path, date: datetime.date) -> Path:
    """DATE.json, or DATE-2.json and so on: no record is ever replaced by that of another source."""
    names = [f"{date}.json", *(f"{date}-{count}.json" for count in range(2, 1000))]
    return next(path for path in map(folder.joinpath, names) if not path.exists())
