"""What a backend of `build` is: a row, of this package or of another one that is installed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dat_deploy.engine.passport import Passport, Profile
from dat_deploy.networks.family import Network
from dat_deploy.progress import Progress

__all__ = ["Backend", "BuildRequest", "BuiltEngine", "EngineLayer"]


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """The arguments of `build`; those that the backend does not take have their defaults.

    Attributes:
        profiles: of `batches`, at least one.
        command: the words of the command that makes the same engine again, for the passport.
    """

    backend: str
    profiles: tuple[Profile, ...]
    source: Path | None = None
    variant: str | Network | None = None
    checkpoint: Path | None = None
    features: Sequence[int] | None = None
    precision: str | None = None
    device: str | None = None
    lowering: str = "auto"
    plugin_form: str = "auto"
    architectures: Sequence[int] = ()
    timing_cache: Path | None = None
    workspace_bytes: int | None = None
    image_size: tuple[int, int] | None = None
    command: tuple[str, ...] = ()
    progress: Progress = lambda _: None


class BuiltEngine(NamedTuple):
    """The engine's file, its passport, and what the user must know, such as why a lowering was taken."""

    content: bytes
    passport: Passport
    notes: tuple[str, ...]


@dataclass(frozen=True)
class EngineLayer:
    """A layer of a built engine; TensorRT may have made it of many of the network's.

    Attributes:
        kind: TensorRT's type of layer; tactic: the kernel that it chose, if it says so.
        inputs, outputs: the format and type of each tensor, in TensorRT's words.
        precision: the type that its first output has: fp32, fp16, bf16, int8 or integer.
    """

    name: str
    kind: str
    tactic: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: str

    @property
    def is_plugin(self) -> bool:
        return "plugin" in self.kind.lower()


@dataclass(frozen=True)
class Backend:
    """A row of the table of backends; the runtime of the same name opens what it builds.

    Another package adds one by an entry point of the group `dat_deploy.backends` that has the backend's name and leads
    to such a row, in a module that is light to import.

    Attributes:
        name: on the command line and in passports; title: in sentences.
        suffix: of its engines, with the point; other commands know them by it.
        parameters: of `build` that it takes besides `output`, `batches`, `image_size`, `force` and `progress`; it
            builds from an exported file if `source` is one, else from `variant`.
        build: makes an engine. It checks what can be wrong with the request before it loads anything slow, and raises
            DatDeployError.
        layers: (engine's path, passport, content) -> the engine's layers. It raises UnsupportedError where they cannot
            be seen.
    """

    name: str
    title: str
    suffix: str
    parameters: frozenset[str]
    build: Callable[[BuildRequest], BuiltEngine]
    layers: Callable[[Path, Passport, bytes], Sequence[EngineLayer]]
