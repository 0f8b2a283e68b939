"""What commands print and write."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from dat_deploy.commands.wording import in_shell
from dat_deploy.networks.family import Network

if TYPE_CHECKING:
    from dat_deploy.engine.inspector import OnnxFile
    from dat_deploy.engine.passport import Passport
    from dat_deploy.metadata import FileMetadata

__all__ = [
    "backend_option",
    "check_json",
    "counts_text",
    "err",
    "features_option",
    "option",
    "out",
    "print_file",
    "print_next",
    "print_notes",
    "print_passport",
    "size_text",
    "table_of",
    "words_after",
    "write_json",
]

# Text is printed as it is: in rich's markup, a file called a[b]:x:.onnx would lose its [b] and gain an emoji.
out = Console(
    highlight=False,
    soft_wrap=True,
    markup=False,
    emoji=False,
    width=None if sys.stdout.isatty() else 160,  # tables in a pipe stay whole
)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def print_next(*words: object) -> None:
    out.print(f"next: dat-deploy {shlex.join(str(word) for word in words)}")


def print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        out.print(f"note: {in_shell(note)}")


def table_of(*headings: str) -> Table:
    """An empty table with these columns; numbers are below a heading that begins with `>`, and stand right."""
    table = Table(box=None)
    for heading in headings:
        table.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left")
    return table


def size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def check_json(path: Path | None, *, force: bool) -> None:
    """Refuses what `write_json` would refuse, before long work."""
    if path is None:
        return
    from dat_deploy.files import check_output

    check_output(path, force=force)


def write_json(result: object, path: Path | None, *, force: bool) -> None:
    """`result`, or the fields of it if it is a dataclass, where `path` is given."""
    if path is None:
        return
    from dat_deploy.files import atomic_output

    content = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
    default: Callable[[Any], str] = str
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=default) + "\n", encoding="utf-8")


def print_file(path: Path, metadata: "FileMetadata", file: "OnnxFile") -> None:
    size = "any size" if metadata.dynamic_image_size else size_text(metadata.image_size)
    rule = metadata.preprocessing
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (rule.mean, rule.std))
    names = metadata.class_names
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a hash is of use as a whole
    table.add_row("file", f"{path}, {file.size_bytes / 1e6:.1f} MB, sha256 {file.sha256}")
    table.add_row("written by", f"{file.written_by}; opset {file.opset_version}, IR version {file.ir_version}")
    table.add_row(
        "network", f"{metadata.variant} {size}, {metadata.network.family}, batch {metadata.batch or 'dynamic'}"
    )
    for side, tensors in (("input", file.inputs), ("output", file.outputs)):
        for tensor in tensors:
            table.add_row(side, f"{tensor.name} {tensor.type} [{', '.join(map(str, tensor.shape))}]")
    table.add_row("classes", f"{len(names)}: {names[0]} to {names[-1]}" if names else "none: it is a backbone")
    table.add_row(
        "preprocessing",
        f"{rule.color}, resized to {size_text(rule.resize_size)} ({rule.interpolation}), {rule.crop} crop of "
        f"{size_text(rule.image_size)}, mean {mean}, std {std}",
    )
    operators = ", ".join(f"{count} {name}" for name, count in file.operators.items()) or "none"
    table.add_row("lowering", metadata.lowering)
    table.add_row("operators", f"{operators}; {file.operator_form}")
    table.add_row("precision", _precision(metadata))
    table.add_row("nodes", f"{file.nodes}; that compute: {str(file.census).removeprefix('precision: ')}")
    table.add_row("weights", f"{metadata.weights_source}, sha256 {metadata.weights_sha256}")
    calibration = metadata.calibration
    if calibration is not None:
        table.add_row(
            "calibrated on",
            f"{calibration.images} images of {calibration.folder}, {calibration.method} of {calibration.library} "
            f"{calibration.library_version}",
        )
    out.print(table)


def _precision(metadata: "FileMetadata") -> str:
    kept = f"; kept in fp32: {', '.join(metadata.fp32_added)}" if metadata.fp32_added else ""
    less = f"; no fp32 in: {', '.join(metadata.fp32_removed)}" if metadata.fp32_removed else ""
    return metadata.precision + kept + less


def print_passport(path: Path, passport: "Passport") -> None:
    metadata = passport.metadata
    table = Table(box=None, show_header=False)
    table.add_row("engine", f"{path}, {passport.engine_bytes / 1e6:.0f} MB, sha256 {passport.engine_sha256[:12]}")
    table.add_row(
        "network", f"{metadata.variant} {size_text(metadata.image_size)}, gives {', '.join(passport.outputs)}"
    )
    table.add_row("backend", f"{passport.backend} {passport.backend_version}")
    table.add_row("runs on", ", ".join(passport.architectures) or f"every GPU that {passport.backend} runs on")
    table.add_row("batch", ", ".join(map(str, passport.profiles)))
    forms = {
        "IPluginV3": ", plugins in Python: needs this package where it runs",
        "ahead-of-time": ", plugins baked in",
    }
    table.add_row("lowering", metadata.lowering + forms.get(passport.plugin_form or "", ""))
    table.add_row("precision", _precision(metadata))
    if passport.layers:
        table.add_row("layers", f"{counts_text(passport.layers)} in the network that was parsed")
    if passport.engine_layers is not None:
        table.add_row("", f"{counts_text(passport.engine_layers)} in the engine")
    if passport.plugins:
        table.add_row("plugins", counts_text(passport.plugins))
    table.add_row("weights", f"{metadata.weights_source}, sha256 {metadata.weights_sha256[:12]}")
    if passport.source is not None and passport.source_sha256 is not None:
        table.add_row("built from", f"{passport.source}, sha256 {passport.source_sha256[:12]}")
    table.add_row("built with", ", ".join(f"{name} {version}" for name, version in passport.versions.items()))
    verdict = passport.verdict
    table.add_row("validated", "never" if verdict is None else f"{verdict.date}: {verdict.sentence}")
    out.print(table)


def counts_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def backend_option() -> tuple[str, ...]:
    """Where only TensorRT-RTX is installed, the option that names it."""
    from dat_deploy.engine.tensorrt.library import missing

    return ("--backend", "tensorrt-rtx") if missing("tensorrt") and not missing("tensorrt-rtx") else ()


def words_after(engine: Path, passport: "Passport", elsewhere: str) -> tuple[object, ...]:
    """The next command: to validate the engine, where it can run."""
    from dat_deploy.runners import runtimes

    runtime = runtimes().get(passport.backend)
    if runtime is None or runtime.reasons():
        return (elsewhere, engine) if elsewhere == "inspect" else (elsewhere,)
    if passport.verdict is not None:
        return ("bench", "--engine", engine)
    source = passport.metadata.weights_source
    has_its_own = any(words in source for words in ("random weights", "ship with dat-deploy"))
    return ("validate", "--engine", engine, *(() if has_its_own else ("--checkpoint", source)))


def features_option(network: Network) -> tuple[str, ...]:
    return ("--features", ",".join(map(str, network.features))) if network.features else ()


def option(name: str, value: Path | None) -> tuple[str, ...]:
    return () if value is None else (name, str(value))
