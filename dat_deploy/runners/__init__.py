"""Runtimes behind one interface: `open_runner("openvino:tiny.onnx")(images) -> logits`.

A runtime of somebody else's is a row like those of the modules here, found by an entry point of GROUP with its name.
"""

import difflib
import importlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from dat_deploy.engine.passport import read_passport
from dat_deploy.errors import DatDeployError, PassportError
from dat_deploy.metadata import FileMetadata
from dat_deploy.networks.checkpoint_file import check_checkpoint
from dat_deploy.networks.family import find_network
from dat_deploy.runners.base import EngineDescription, EngineOutline, Outputs, Runner
from dat_deploy.runners.runtime import Runtime

__all__ = [
    "GROUP",
    "RUNTIMES",
    "EngineDescription",
    "EngineOutline",
    "Outputs",
    "Runner",
    "Runtime",
    "check_engine",
    "engine_metadata",
    "engine_path",
    "engine_with_path",
    "open_runner",
    "parse_engine",
    "runtimes",
    "short_name",
]

GROUP = "dat_deploy.runtimes"  # of entry points
MODULES = ("pytorch", "onnxruntime", "openvino", "tensorrt", "aotinductor")

RUNTIMES: dict[str, Runtime] = {
    row.name: row
    for module in MODULES
    for row in importlib.import_module(f"dat_deploy.runners.{module}_runner").RUNTIMES
}


def runtimes() -> dict[str, Runtime]:
    """All by name: those of this package, then those of entry points."""
    return RUNTIMES | {
        entry.name: _row_from_entry(entry) for entry in entry_points(group=GROUP) if entry.name not in RUNTIMES
    }


def _row_from_entry(entry: EntryPoint) -> Runtime:
    """One that cannot be loaded cannot run, and says why."""
    try:
        row = entry.load()
        if isinstance(row, Runtime):
            return replace(row, name=entry.name)
        reason = f"is no Runtime but {type(row).__name__}"
    except Exception as error:  # whatever somebody else's module raises
        reason = f"cannot be loaded: {' '.join(str(error).split())}"
    reasons = [f"its entry point {entry.value} {reason}"]
    return Runtime(entry.name, "FILE", "dat_deploy", "", "cannot be loaded", Runner, lambda: reasons)


def parse_engine(engine: str) -> tuple[Runtime, str]:
    """`[RUNTIME:]TARGET` -> the runtime and its target.

    A bare `FILE.onnx` runs on ONNX Runtime, a `FILE.pt2` on AOTInductor, a `FILE.engine` on what its passport says.

    Raises:
        DatDeployError: if there is no such runtime, or no way to tell one.
    """
    name, colon, target = engine.partition(":")
    is_own = name in RUNTIMES if colon else any(row.opens and engine.endswith(row.opens) for row in RUNTIMES.values())
    table = RUNTIMES if is_own else runtimes()  # others' are loaded only where none of these will do
    if not colon:
        rows = [row for row in table.values() if row.opens and engine.endswith(row.opens)]
        if not rows:
            files = ", ".join(dict.fromkeys(f"FILE{row.opens}" for row in table.values() if row.opens))
            raise DatDeployError(
                f"cannot tell what runs '{engine}'; an engine is {files} or RUNTIME:TARGET, such as pytorch:tiny or "
                f"openvino:tiny.onnx. Runtimes: {', '.join(table)}."
            )
        return rows[0] if len(rows) == 1 else _built_for(Path(engine), rows), engine
    if name not in table:
        near = difflib.get_close_matches(name, table, n=2)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise DatDeployError(f"no runtime '{name}' in '{engine}'. {hint}Runtimes: {', '.join(table)}.")
    if not target:
        raise DatDeployError(f"'{engine}' names no target; write {name}:{table[name].target}")
    return table[name], target


def _built_for(engine: Path, rows: Sequence[Runtime]) -> Runtime:
    """What the passport says; the first row where nothing says so, of which the runner then complains."""
    try:
        backend = read_passport(engine).backend
    except PassportError:
        return rows[0]
    return RUNTIMES.get(backend) or runtimes().get(backend, rows[0])


def engine_path(engine: str) -> Path | None:
    """The file that `[RUNTIME:]TARGET` names; None of a network in PyTorch."""
    runtime, target = parse_engine(engine)
    return None if runtime.takes_variant else Path(target)


def engine_with_path(engine: str, path: Path) -> str:
    """Another file on the same runtime."""
    return f"{parse_engine(engine)[0].name}:{path}"


def engine_metadata(engine: str) -> FileMetadata | None:
    """What the file of `[RUNTIME:]TARGET` says of itself, read alone; None if it is no file of this package."""
    runtime, target = parse_engine(engine)
    return runtime.metadata(target)


def short_name(engine: str) -> str:
    """`[RUNTIME:]TARGET` as named, but of an absolute path only the file name."""
    _, target = parse_engine(engine)
    return engine.removesuffix(target) + (Path(target).name if Path(target).is_absolute() else target)


def check_engine(
    engine: str,
    *,
    checkpoint: Path | None = None,
    image_size: tuple[int, int] | None = None,
    features: Sequence[int] | None = None,
) -> EngineOutline:
    """Refuse early what `open_runner` would refuse of the arguments and the file; no runtime of this package is loaded.

    Raises:
        DatDeployError: as `open_runner`, but for what the runtime itself says.
    """
    runtime, target = parse_engine(engine)
    check_checkpoint(checkpoint)
    outline = runtime.outline(target, engine, image_size=image_size, features=features)
    if image_size is not None:
        outline.network_at(*image_size)
    runtime.require_installed()
    return outline


def open_runner(
    engine: str,
    *,
    checkpoint: Path | None = None,
    image_size: tuple[int, int] | None = None,
    features: Sequence[int] | None = None,
    threads: int | None = None,
    sampled_points: bool = False,
) -> Runner:
    """Open `[RUNTIME:]TARGET`.

    Args:
        checkpoint, features: for `pytorch:VARIANT`, where VARIANT is a name or a configuration file; an exported file
            has its own.
        image_size: (height, width) in pixels that `description` is for, where the engine has a choice.
        threads: that one call may use; None for all that this process may run on, or as many as torch takes in this
            process where torch computes.
        sampled_points: let `pytorch:VARIANT` give its sampling locations, too; a file gives them or does not.

    Raises:
        DatDeployError: if the engine cannot be opened; UnsupportedError if this environment lacks its runtime.
    """
    runtime, target = parse_engine(engine)
    if runtime.takes_variant:  # what is wrong with the words is told before a runtime is loaded
        check_checkpoint(checkpoint)
        find_network(target, image_size=image_size, features=features)
    elif not Path(target).is_file():
        runtime.outline(target, engine, image_size=None, features=None)
    if not runtime.has_passport:
        runtime.require(runtime.reasons())
    if not runtime.takes_variant:
        return runtime.open(Path(target), engine, image_size=image_size, threads=threads)
    return runtime.open(
        target,
        engine,
        checkpoint=checkpoint,
        image_size=image_size,
        features=features,
        threads=threads,
        sampled_points=sampled_points,
    )
