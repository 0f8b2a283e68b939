"""The passport of an engine: what it is and what it was made from, in `tiny.engine.json` beside `tiny.engine`.

An engine is native code and says little of itself, so it is opened by its passport alone: nothing is deserialised
before the file's hash, the runtime's version and the device have been compared. That finds mixed-up, stale and damaged
files; it is no signature, since whoever can replace an engine can replace its passport, too.
"""

import dataclasses
import hashlib
import json
import platform
import shlex
import typing
from pathlib import Path

from dat_deploy.environment import installed_version, nvidia_smi, tool_version
from dat_deploy.errors import DatDeployError, EngineBuildError, PassportError, ShapeError, UnsupportedError
from dat_deploy.files import atomic_output, check_output
from dat_deploy.metadata import FileMetadata
from dat_deploy.typed_json import plain, typed

__all__ = [
    "SCHEMA_VERSION",
    "Passport",
    "Profile",
    "Verdict",
    "check_backend",
    "open_engine",
    "passport_path",
    "read_passport",
    "record_verdict",
    "sha256",
    "versions",
    "write_engine",
    "write_passport",
]

SCHEMA_VERSION = 1
_DIGEST = "passport_sha256"


@dataclasses.dataclass(frozen=True)
class Profile:
    """Batch sizes that an engine was optimized for together: `least` to `most`, and best at `best`."""

    least: int
    best: int
    most: int

    def __str__(self) -> str:
        sizes = (self.least, self.best, self.most)
        return "-".join(str(size) for i, size in enumerate(sizes) if size not in sizes[:i])

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """`8` is batch 8 alone, `1-32` any up to 32 and best at 32, `1-8-32` the same but best at 8.

        Raises:
            ShapeError: if it is none of these.
        """
        try:
            sizes = [int(part) for part in text.split("-")]
            least, best, most = {1: sizes * 3, 2: [sizes[0], *sizes[1:] * 2], 3: sizes}[len(sizes)]
        except (ValueError, KeyError):
            least, best, most = 0, 0, 0
        if not 1 <= least <= best <= most:
            raise ShapeError(
                f"`batches` got '{text}'; a profile is a batch such as 8, a range such as 1-32, or a range and its "
                f"commonest batch, 1-8-32. Give several as 1,8,32."
            )
        return cls(least, best, most)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the last `validate` said of the engine.

    Attributes:
        batches: that were tried; tolerance, gates: that the user asked for, None for the usual ones.
        judged_in: the precision that the runtime computed in, where that was wider than the engine's; else None.
    """

    passed: bool
    sentence: str
    date: str
    checks: int
    batches: tuple[int, ...]
    tolerance: float | None
    gates: dict[str, float] | None = dataclasses.field(default=None, metadata={"optional": True})
    judged_in: str | None = dataclasses.field(default=None, metadata={"optional": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passport:
    """What `build` knows of an engine.

    Attributes:
        engine_sha256, engine_bytes: of the engine's file.
        backend: tensorrt, tensorrt-rtx or aotinductor, and its `backend_version`.
        versions: of what it was built with, by name.
        architectures: what it runs on, such as `sm_90` or `cpu`; none if on all that its backend runs on.
        profiles: the batches it takes.
        outputs: names of what it gives, in order.
        layers: how many layers compute in which type, counted in the parsed network; kinds: how many layers of each of
            TensorRT's types.
        engine_layers: the same of the built engine, from its inspector; None where no GPU was at hand.
        plugins: how many layers each plugin has; plugin_form: IPluginV3, ahead-of-time, or None.
        metadata: of the exported file; its lowering is the engine's.
        source: the ONNX file's name and `source_sha256`; None if the engine was made from PyTorch.
        rebuild: the words of the command that makes it again.
        verdict: of the last validation; None before any.
    """

    schema_version: int = SCHEMA_VERSION
    engine_sha256: str
    engine_bytes: int
    backend: str
    backend_version: str
    versions: dict[str, str]
    architectures: tuple[str, ...]
    profiles: tuple[Profile, ...]
    outputs: tuple[str, ...]
    layers: dict[str, int]
    kinds: dict[str, int]
    engine_layers: dict[str, int] | None
    plugins: dict[str, int]
    plugin_form: str | None
    metadata: FileMetadata
    source: str | None
    source_sha256: str | None
    rebuild: tuple[str, ...]
    verdict: Verdict | None = None

    @property
    def rebuild_command(self) -> str:
        return shlex.join(self.rebuild)

    def to_bytes(self) -> bytes:
        """The file: JSON with its own digest, of which no byte can change unseen."""
        fields = plain(self)
        digest = sha256(json.dumps(fields, sort_keys=True).encode())
        return (json.dumps({_DIGEST: digest, **fields}, indent=2) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes, path: Path) -> "Passport":
        """Raises PassportError unless `content` is what `to_bytes` of this version writes."""
        try:
            values = json.loads(content.decode())
            if values["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version is {values['schema_version']!r:.20}, not {SCHEMA_VERSION}")
            values.pop(_DIGEST)
            passport = typing.cast(Passport, typed(cls, values, "passport"))
            whole = passport.to_bytes() == content
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            DatDeployError,
        ) as error:
            raise PassportError(
                f"{path} is not a passport of this version, or it is damaged ({error}). Build the engine "
                f"again, see `build()`."
            ) from error
        if not whole:
            raise PassportError(
                f"{path} was edited or is damaged: its digest does not fit its content. "
                f"Build the engine again, see `build()`."
            )
        return passport


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def versions() -> dict[str, str]:
    """Of what an engine is built with, beside its backend."""
    installed = {name: installed_version(name) for name in ("torch", "triton")}
    own = {"dat-deploy": tool_version()} | {name: version for name, version in installed.items() if version}
    drivers = nvidia_smi("driver_version")
    return own | {"python": platform.python_version()} | ({"nvidia-driver": drivers[0]} if drivers else {})


def passport_path(engine: Path) -> Path:
    """`tiny.engine` -> `tiny.engine.json`."""
    return engine.with_name(engine.name + ".json")


def write_engine(engine: Path, content: bytes, passport: Passport, *, force: bool = False) -> None:
    """Write both files; the passport last, so that there is none without its engine.

    Raises:
        OutputError: as `atomic_output`.
    """
    beside = passport_path(engine)
    check_output(beside, force=force)
    with atomic_output(engine, force=force) as temporary:
        temporary.write_bytes(content)
    write_passport(engine, passport, force=force)


def write_passport(engine: Path, passport: Passport, *, force: bool) -> None:
    """Raises OutputError as `atomic_output`."""
    with atomic_output(passport_path(engine), force=force) as temporary:
        temporary.write_bytes(passport.to_bytes())


def read_passport(engine: Path) -> Passport:
    """The passport beside an engine; the engine itself is not looked at.

    Raises:
        PassportError: if there is none, or it is damaged.
    """
    path = passport_path(engine)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise PassportError(
            f"{engine} has no passport {path.name} beside it, so nothing says what it holds; copy both files, or build "
            f"the engine again, see `build()`."
        ) from None
    except OSError as error:
        raise PassportError(f"cannot read {path}: {error.strerror}. Check the path.") from error
    return Passport.from_bytes(content, path)


def check_backend(engine: Path, passport: Passport, backend: str | None) -> None:
    """Raises UnsupportedError unless the engine was built with `backend`; None for either TensorRT."""
    if passport.backend != backend if backend else passport.backend == "aotinductor":
        raise UnsupportedError(
            f"{engine} was built with backend {passport.backend}, not {backend or 'TensorRT'}. "
            f"Open it as {passport.backend}:{engine}"
        )


def record_verdict(engine: Path, verdict: Verdict, engine_sha256: str) -> None:
    """Write the outcome of a validation into an engine's passport, in place of the last one.

    Args:
        engine_sha256: of the engine that was validated.

    Raises:
        PassportError: if the passport is missing or damaged, or by now that of another engine.
        OutputError: as `atomic_output`.
    """
    passport = read_passport(engine)
    if passport.engine_sha256 != engine_sha256:
        raise PassportError(f"{engine} was built anew while it was validated; validate it again.")
    write_passport(engine, dataclasses.replace(passport, verdict=verdict), force=True)


def open_engine(engine: Path) -> tuple[Passport, bytes]:
    """The passport of an engine, and the engine's bytes, which are what the passport says; nothing is deserialised.

    If the ONNX file that it was built from lies beside it, that must still be the same, too.

    Raises:
        EngineBuildError: if there is no such engine.
        PassportError: if the passport is missing or damaged, or a file is not the one that it names.
    """
    if not engine.is_file():
        raise EngineBuildError(f'there is no file {engine}. Build one with: `build("tiny.onnx")`')
    passport = read_passport(engine)
    try:
        content = engine.read_bytes()
    except OSError as error:
        raise PassportError(f"cannot read {engine}: {error.strerror}. Check the path.") from error
    if (len(content), sha256(content)) != (passport.engine_bytes, passport.engine_sha256):
        raise PassportError(
            f"{engine} is not the engine that {passport_path(engine).name} describes (its SHA-256 differs): it was "
            f"replaced or is damaged. Build it again with: {passport.rebuild_command}"
        )
    if passport.source is not None:
        source = engine.with_name(passport.source)
        if source.is_file() and sha256(source.read_bytes()) != passport.source_sha256:
            raise PassportError(
                f"{source} has changed since {engine.name} was built from it. Build the engine again with: "
                f"{passport.rebuild_command}"
            )
    return passport, content
