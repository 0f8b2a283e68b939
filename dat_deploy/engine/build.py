"""Exported file -> TensorRT engine, network -> AOTInductor package, each with its passport."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from dat_deploy.engine.backend import Backend, BuildRequest
from dat_deploy.engine.passport import Passport, Profile, passport_path, write_engine
from dat_deploy.errors import EngineBuildError, ShapeError
from dat_deploy.files import check_output
from dat_deploy.networks.family import Network
from dat_deploy.progress import Progress

__all__ = ["BuildReport", "backend_names", "build", "find_backend"]

# What loads torch or a runtime is imported after the checks, so that a wrong argument is told at once.

_FOLDERS = ("tensorrt", "aotinductor")  # each has a module `backend` with a row or two
_GROUP = "dat_deploy.backends"  # of entry points


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What `build` wrote.

    Attributes:
        notes: what the user must know, such as why a lowering was taken.
    """

    path: Path
    passport: Passport
    seconds: float
    notes: tuple[str, ...]


@functools.cache
def _own_backends() -> dict[str, Backend]:
    rows: list[Backend] = []
    for folder in _FOLDERS:
        rows += import_module(f"dat_deploy.engine.{folder}.backend").BACKENDS
    return {row.name: row for row in rows}


def _entry_points() -> dict[str, EntryPoint]:
    """Of backends of other packages; nothing of them is loaded. A name of this package's own stays its own."""
    return {entry.name: entry for entry in entry_points(group=_GROUP) if entry.name not in _own_backends()}


def backend_names() -> tuple[str, ...]:
    """Those of this package and of others that are installed."""
    return (*_own_backends(), *_entry_points())


def find_backend(name: str) -> Backend:
    """The row of a backend.

    Raises:
        EngineBuildError: if there is none of that name, or the package that has it cannot be loaded.
    """
    if name in _own_backends():
        return _own_backends()[name]
    entry = _entry_points().get(name)
    if entry is None:
        raise EngineBuildError(f"no backend '{name}'. Backends: {', '.join(backend_names())}.")
    try:
        row = entry.load()
    except Exception as error:  # whatever a package of somebody else's raises
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise EngineBuildError(f"backend '{name}' cannot be loaded from {entry.value}: {text}") from error
    if not isinstance(row, Backend) or row.name != name:
        raise EngineBuildError(f"{entry.value} is no backend '{name}' of {_GROUP}; it is {row!r:.200}.")
    return row


def build(
    source: Path | None = None,
    output: Path | None = None,
    *,
    backend: str = "tensorrt",
    batches: Sequence[str | int] = (1,),
    lowering: str = "auto",
    plugin_form: str = "auto",
    architectures: Sequence[int] = (),
    timing_cache: Path | None = None,
    workspace_bytes: int | None = None,
    variant: str | Network | None = None,
    checkpoint: Path | None = None,
    image_size: tuple[int, int] | None = None,
    features: Sequence[int] | None = None,
    precision: str | None = None,
    device: str | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> BuildReport:
    """Build an engine and write it with its passport.

    Args:
        source: for TensorRT, an exported file; the precision is the file's own.
        output: by default `source` with the suffix `.engine`, or `VARIANT.pt2`.
        backend: one of `backend_names()`.
        batches: a profile each, see `Profile.parse`; single batches alone for AOTInductor.
        lowering: as in `export`, or `auto`: the fastest that is right on the GPU at hand; without a GPU `plugin`
            where the plugins can be used, else `gather`. A file whose operators are inlined keeps its own.
        plugin_form: `IPluginV3`, `ahead-of-time`, or `auto`, which takes the latter where TensorRT knows it.
        architectures: compute capabilities times ten that it is to run on; by default that of the GPU at hand, and with
            TensorRT-RTX all that it knows.
        timing_cache, workspace_bytes: see `serialized_engine`.
        variant, checkpoint, features, precision: for AOTInductor alone, which builds from PyTorch; see `export`. What
            does not concern the backend is refused, not ignored.
        image_size: (height, width) in pixels, for AOTInductor and for a file of dynamic size.
        device: `cpu` or `cuda`, for AOTInductor; by default cuda where there is one.
        progress: called with what is being done.

    Raises:
        DatDeployError: one of its subclasses for each thing that can be wrong with the arguments or the build.
    """
    start = time.monotonic()
    row = find_backend(backend)
    profiles = tuple(dict.fromkeys(Profile.parse(str(batch)) for batch in batches))
    if not profiles:
        raise ShapeError("no batch to build for; give at least one, such as `batches=[1]`.")
    name = variant.name if isinstance(variant, Network) else variant or "tiny"
    if "source" in row.parameters and source is None:
        raise EngineBuildError(
            f"backend {backend} builds from an exported file. Make one with: "
            f'`export(variant="{name}", precision="fp16", output="{name}.onnx")`'
        )
    if "source" not in row.parameters and (source is not None or variant is None):
        raise EngineBuildError(
            f"{row.title} builds from PyTorch, not from a file. Build with: "
            f'`build(variant="tiny", backend="{backend}")`'
        )
    target = output or (Path(f"{name}{row.suffix}") if source is None else source.with_suffix(row.suffix))
    if target.suffix != row.suffix:
        raise EngineBuildError(
            f"`output` got '{target}'; what {backend} makes ends in {row.suffix}, by which the other commands know it."
        )
    request = BuildRequest(
        backend=backend,
        source=source,
        variant=variant,
        checkpoint=checkpoint,
        features=features,
        precision=precision,
        device=device,
        lowering=lowering,
        plugin_form=plugin_form,
        architectures=architectures,
        timing_cache=timing_cache,
        workspace_bytes=workspace_bytes,
        image_size=image_size,
        profiles=profiles,
        progress=progress,
    )
    _check_parameters(row, request)
    request = dataclasses.replace(request, command=_command(request, target, batches))
    check_output(target, force=force)
    check_output(passport_path(target), force=force)
    content, passport, notes = row.build(request)
    progress("writing")
    write_engine(target, content, passport, force=force)
    return BuildReport(target, passport, time.monotonic() - start, notes)


def _check_parameters(row: Backend, request: BuildRequest) -> None:
    """Raises EngineBuildError for what the backend would ignore."""
    own = _own_backends().values()
    foreign = frozenset[str]().union(*(other.parameters for other in own)) - row.parameters
    values = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    names = {name for name, value in values.items() if name in foreign and value and value != "auto"}
    if not names:
        return
    listing = ", ".join(f"`{name}`" for name in values if name in names)
    takers = " and ".join(other.name for other in own if other.parameters >= names) or "none"
    if "source" in row.parameters:
        raise EngineBuildError(
            f"{listing} is for backend {takers}; {row.name} builds what a file holds. Give it to: `export()`"
        )
    raise EngineBuildError(f"{listing} is for backend {takers}, not for {row.name}; leave it out.")


def _command(request: BuildRequest, target: Path, batches: Sequence[str | int]) -> tuple[str, ...]:
    """The words that make the same engine again."""
    variant, size = request.variant, request.image_size
    options = {
        "--backend": request.backend,
        "--config" if str(variant).endswith((".yaml", ".yml")) else "--variant": variant,
        "--checkpoint": request.checkpoint,
        "--features": ",".join(map(str, request.features or ())),
        "--precision": request.precision,
        "--device": request.device,
        "--output": target,
        "--batch": ",".join(map(str, batches)),
        "--lowering": request.lowering,
        "--plugins": request.plugin_form,
        "--arch": ",".join(map(str, request.architectures)),
        "--image-size": "" if size is None else f"{size[0]}x{size[1]}",
        "--timing-cache": request.timing_cache,
        "--workspace-mib": (request.workspace_bytes or 0) >> 20,
    }
    words = ["dat-deploy", "build"] + ([] if request.source is None else [str(request.source)])
    for option, value in options.items():
        if value and value != "auto":
            words += [option, value.name if isinstance(value, Network) else str(value)]
    return tuple(words)
