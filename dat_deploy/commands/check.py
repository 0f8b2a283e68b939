"""Is the answer still the same? Networks, and the preprocessing before them."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dat_deploy.commands.options import (
    CheckpointOption,
    EngineOption,
    ForceOption,
    JsonOption,
    check_pytorch_options,
    parse_image_size,
    parse_numbers,
)
from dat_deploy.commands.output import (
    check_json,
    err,
    features_option,
    option,
    out,
    print_next,
    print_notes,
    size_text,
    table_of,
    write_json,
)
from dat_deploy.commands.stages import Stages
from dat_deploy.commands.wording import in_shell
from dat_deploy.errors import DatDeployError
from dat_deploy.networks.family import find_network
from dat_deploy.precision import PRECISIONS

if TYPE_CHECKING:
    from dat_deploy.validate.accuracy import Accuracy

__all__ = ["bisect", "preprocess", "validate"]

FLIPS_SHOWN = 10


def validate(
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", help="FILE.onnx, FILE.engine, FILE.pt2, or RUNTIME:TARGET such as openvino:FILE.onnx."
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="A folder of images, or one with a folder for each class: accuracy, flips, gates."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Use so many images of --data, evenly spaced. Default: all.")
    ] = None,
    strict_data: Annotated[
        bool, typer.Option("--strict-data", help="Stop at an image that cannot be read, instead of counting it.")
    ] = False,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A photograph; repeat it. Default: scikit-image's.")
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes to try.")] = "1,2,3,8",
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size", help="Sizes to try, such as 224,256x320. Default: its own; a rectangle if dynamic."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Largest error of an output as it stands. Default: in shares of the spread between images.",
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", help="Largest value that passes, such as top1-drop=0.5; repeat it. See the README."),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option("--skip", help="A kind of check to leave out; repeat it.")] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Put known faults into the engine (default: demo); all must be caught.")
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write the report as one page to this file.")] = None,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Compare an engine with PyTorch; exit code 2 if it differs."""
    if self_test:
        alone = (data, limit, image, image_size, tolerance, gate, skip, html)
        if any(value is not None for value in alone) or strict_data or batch != "1,2,3,8":
            raise DatDeployError("--self-test takes no other option than --engine, --checkpoint, --json and --force.")
        _self_test(engine, checkpoint, json_file, force=force)
        return
    if engine is None:
        raise DatDeployError("validate takes --engine ENGINE, such as --engine tiny.onnx, or --self-test.")
    if data is None and (limit is not None or strict_data):
        raise DatDeployError("--limit and --strict-data are about --data; name a folder with it.")
    batches = parse_numbers(batch, "--batch")
    pixels = None if image_size is None else [parse_image_size(size) for size in image_size.split(",")]
    check_json(json_file, force=force)
    check_json(html, force=force)
    if html is not None:
        from dat_deploy.benchmark.plotting import check_matplotlib

        check_matplotlib()
    with Stages("validate", err) as stages:
        from dat_deploy import validate as library

        report = library.validate(
            engine,
            checkpoint=checkpoint,
            images=image,
            data=data,
            limit=limit,
            strict_data=strict_data,
            batches=batches,
            image_sizes=pixels,
            tolerance=tolerance,
            gates=_gates(gate or []),
            skip=skip or (),
            trace=html is not None,
            progress=stages.begin,
            data_progress=lambda done, of: stages.count(done, of, "data"),
        )
    table = table_of("check", ">batch", ">error", ">allowed", "verdict", "", "by")
    bases = list(dict.fromkeys(check.basis for check in report.checks if check.basis))
    for check in report.checks:
        verdict = {True: "ok", False: "FAILED", None: "not run"}[check.passed]
        error = "" if check.error is None else _figure(check.error, check.unit)
        allowed = _figure(check.tolerance, check.unit)
        by = str(bases.index(check.basis) + 1) if check.basis else ""
        table.add_row(check.name, str(check.batch or ""), error, allowed, verdict, in_shell(check.detail), by)
    out.print(table)
    for number, basis in enumerate(bases, 1):
        out.print(f"allowed by {number}: {in_shell(basis)}")
    if report.accuracy is not None:
        _print_accuracy(report.accuracy)
    if json_file is not None:
        report.write(json_file, force=force)
    if html is not None:
        with Stages("validate", err) as stages:
            from dat_deploy.validate.page import write_page

            stages.begin("drawing the page")
            rows = tuple(replace(row, detail=in_shell(row.detail)) for row in report.checks)
            worded = replace(report, checks=rows, notes=tuple(map(in_shell, report.notes)))
            write_page(worded, html, force=force)
        out.print(f"page: {html}")
    print_notes(report.notes)
    if report.differs and report.engine.file_kind == "exported":
        tolerated = () if PRECISIONS[report.engine.answer_precision].is_exported else ("--tolerance", "0.1")
        print_next("bisect", "--engine", engine, *option("--checkpoint", checkpoint), *tolerated)
    report.raise_if_failed()
    out.print(report.verdict)
    network = report.engine.network
    again = ["--engine", engine, *option("--checkpoint", checkpoint)]
    if not network.is_released:
        print_next("bench", "--engine", engine)
    elif len(report.engine.outputs) > max(1, len(network.features)):  # the points, which PyTorch does not give there
        print_next("visualize", "PHOTOGRAPH.jpg", "--engine", f"pytorch:{network.name}", *again)
    else:
        size = (
            ()
            if network.image_size == find_network(network.name).image_size
            else ("--image-size", size_text(network.image_size))
        )
        print_next("bench", "--engine", f"pytorch:{network.name}", *again, *features_option(network), *size)


def _self_test(engine: str | None, checkpoint: Path | None, json_file: Path | None, *, force: bool) -> None:
    check_json(json_file, force=force)
    with Stages("self-test", err) as stages:
        from dat_deploy.validate import self_test as library

        report = library.self_test(engine, checkpoint=checkpoint, progress=stages.begin)
    table = table_of("fault", "caught by", "")
    for row in report.tried:
        table.add_row(row.fault, ", ".join(row.caught_by) or "NOTHING", row.story)
    out.print(table)
    print_notes(report.notes)
    write_json(report, json_file, force=force)
    report.raise_if_failed()
    out.print(report.verdict)
    print_next("validate", "--engine", engine or "demo.onnx")


def _gates(texts: list[str]) -> dict[str, float]:
    gates = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            gates[name] = float(value)
        except ValueError:
            raise DatDeployError(f"--gate got '{text}'; it takes NAME=NUMBER, such as top1-drop=0.5.") from None
    return gates


def _figure(value: float, unit: str) -> str:
    """Small differences in powers of ten, what has a unit as people write it."""
    if not unit or unit == "spread":
        return f"{value:.2e}{'' if not unit else ' spread'}"
    return f"{value:.3g}{'' if unit == '%' else ' '}{unit}"


def _print_accuracy(accuracy: "Accuracy") -> None:
    """The images that flip, and those that could not be read."""
    if accuracy.flips:
        table = table_of("image that flips", "label", "PyTorch", "engine", ">margin", ">engine's")
        for flip in accuracy.flips[:FLIPS_SHOWN]:
            name = str(flip.image.relative_to(accuracy.data.folder))
            margins = (f"{flip.reference_margin:.3g}", f"{flip.engine_margin:.3g}")
            table.add_row(name, flip.label or "", flip.reference, flip.engine, *margins)
        out.print(table)
        if len(accuracy.flips) > FLIPS_SHOWN:
            out.print(f"{len(accuracy.flips) - FLIPS_SHOWN} more flip, with smaller margins; --json lists all")
    for path, reason in accuracy.unreadable[:FLIPS_SHOWN]:
        out.print(f"left out: {path}: {reason}")
    seconds = accuracy.seconds
    out.print(
        f"data: {accuracy.images} images; engine {seconds['engine']:.1f} s, PyTorch {seconds['reference']:.1f} s, "
        f"decoding {seconds['decode']:.1f} s, the comparison itself {seconds['own']:.1f} s"
    )


def bisect(
    engine: EngineOption,
    checkpoint: CheckpointOption = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A photograph; repeat it. Default: scikit-image's, and noise.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="As in validate; inside the network in proportion to the largest element."),
    ] = None,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Name the first block and operator where an ONNX file differs from PyTorch; exit code 2 if there is one."""
    check_json(json_file, force=force)
    with Stages("bisect", err) as stages:
        from dat_deploy.validate import bisect as library

        report = library.bisect(engine, checkpoint=checkpoint, images=image, tolerance=tolerance, progress=stages.begin)
    table = table_of("after", "tensor", ">error", ">allowed", "verdict")
    for run in report.steps:
        verdict = "ok" if run.passed else "WRONG"
        table.add_row(run.place, run.tensor, f"{run.error:.2e}", f"{run.tolerance:.2e}", verdict)
    out.print(table)
    if json_file is not None:
        report.write(json_file, force=force)
    out.print(report.finding)
    again = option("--checkpoint", checkpoint)
    if report.agrees:
        print_next("validate", "--engine", engine, *again)
    else:  # is it the file, or what runs it?
        path = str(report.engine.path)
        other = path if report.engine.runtime == "openvino" else f"openvino:{path}"
        print_next("bisect", "--engine", other, *again)
    report.raise_if_found()


def preprocess(
    image: Annotated[list[Path] | None, typer.Argument(help="Image files.")] = None,
    engine: Annotated[str, typer.Option("--engine", help="As in validate: whose preprocessing.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write what the engine takes for these images: FILE.npy.")
    ] = None,
    golden: Annotated[
        Path | None, typer.Option("--golden", help="Write the golden picture, for your own pipeline: FILE.png.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with PIL, with what the engine's file says, and with each --array.")
    ] = False,
    array: Annotated[
        list[Path] | None,
        typer.Option("--array", help="FILE.npy: what your pipeline made of the images, or of the golden picture."),
    ] = None,
    more: Annotated[list[Path] | None, typer.Option("--image", help="An image file, as IMAGE; repeat it.")] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest difference that --check accepts, in units of 1/255.")
    ] = 2.0,
    checkpoint: CheckpointOption = None,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Write what an engine takes for images, or check that a pipeline gives it that; exit code 2 if it does not."""
    images = [*(image or ()), *(more or ())]
    if [check, output is not None, golden is not None].count(True) != 1:
        raise DatDeployError("preprocess takes one of --check, --output FILE.npy and --golden FILE.png.")
    if golden is None and not engine:
        raise DatDeployError("preprocess needs --engine, which says how; such as --engine tiny.onnx.")
    if output is not None and not images:
        raise DatDeployError("--output is for the arrays of images; name image files.")
    if array and not check:
        raise DatDeployError("--array is what --check compares; add --check, or leave it out.")
    from dat_deploy.validate import preprocessing as library

    check_json(json_file, force=force)
    if golden is not None:
        library.write_golden_picture(golden, force=force)
        out.print(f"{golden}: the golden picture; run your pipeline on it, and save what it gives with numpy.save")
        write_json({"golden": golden}, json_file, force=force)
        print_next("preprocess", "--check", "--engine", engine or "tiny.onnx", "--array", "YOURS.npy")
        return
    image_words = [word for path in images for word in ("--image", path)]
    again = ["--engine", engine, *option("--checkpoint", checkpoint)]
    if output is not None:
        batch = library.preprocess_for_engine(images, engine, output=output, force=force)
        out.print(f"{output}: {batch.dtype} {list(batch.shape)}, from {batch.min():.2f} to {batch.max():.2f}")
        write_json({"output": output, "shape": batch.shape, "images": images}, json_file, force=force)
        print_next("preprocess", "--check", *again, *image_words, "--array", "YOURS.npy")
        return
    check_pytorch_options([engine], checkpoint)
    with err.status("comparing"):
        report = library.check_preprocessing(
            engine, images=images, arrays=array, checkpoint=checkpoint, tolerance_units=tolerance
        )
    golden_says = f", {'as' if report.golden_passed else 'NOT as'} its file says" if report.golden_expected else ""
    out.print(f"golden picture for {engine}: sha256 {report.golden_here[:12]}{golden_says}")
    table = table_of("pipeline", ">images", ">max", ">mean", ">over 1", ">flips", "verdict")
    for row in report.comparisons:
        units = (f"{row.max_units:.2f}", f"{row.mean_units:.3f}", f"{row.over_1:.1%}")
        flips = "" if row.flips is None else str(len(row.flips))
        table.add_row(row.name, str(row.images), *units, flips, "ok" if row.passed else "FAILED")
    out.print(table)
    out.print("max, mean: differences from this package in units of 1/255; over 1: the share of samples above one.")
    for row in report.comparisons:
        if row.looks_like:
            out.print(f"{row.name}: {row.looks_like}{f'; {row.explanation}' if row.explanation else ''}")
        if row.images_elsewhere:
            out.print(f"  made on {row.images_elsewhere} photographs, that flips {len(row.flips_elsewhere)} labels")
        for flip in (*(row.flips or ()), *row.flips_elsewhere):
            out.print(f"  {flip.image}: {flip.expected} -> {flip.found}")
    print_notes(report.notes)
    write_json(report.to_dict(), json_file, force=force)
    report.raise_if_failed()
    out.print(report.verdict)
    print_next(*(("validate", *again) if array else ("preprocess", "--golden", "golden.png", "--engine", engine)))
