"""What engines are for: to classify, draw and serve; and a demonstration of it all."""

import shutil
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dat_deploy.commands.check import validate
from dat_deploy.commands.convert import export
from dat_deploy.commands.measure import bench
from dat_deploy.commands.options import (
    CheckpointOption,
    EngineOption,
    ForceOption,
    ImagesArgument,
    JsonOption,
    check_pytorch_options,
    parse_image_size,
)
from dat_deploy.commands.output import check_json, err, option, out, print_next, table_of, write_json
from dat_deploy.commands.stages import Stages
from dat_deploy.commands.wording import in_shell
from dat_deploy.errors import OutputError

if TYPE_CHECKING:
    from dat_deploy.classify import Classification
    from dat_deploy.serving.client import ServedClassification

__all__ = ["classify", "client", "demo", "serve", "visualize"]


def classify(
    image: ImagesArgument,
    engine: EngineOption,
    checkpoint: CheckpointOption = None,
    top: Annotated[int, typer.Option("--top", help="Classes to show.")] = 5,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Name what is on images."""
    check_pytorch_options([engine], checkpoint)
    from dat_deploy import classify as library

    check_json(json_file, force=force)
    with err.status("classifying"):
        result = library.classify(image, engine, checkpoint=checkpoint, top=top)
    _print_predictions(result)
    if "random weights" in result.engine.weights_source:
        out.print(f"note: the engine holds {result.engine.weights_source}, so these names mean nothing.")
    write_json(result, json_file, force=force)
    print_next("bench", "--engine", engine, *option("--checkpoint", checkpoint))


def client(
    image: ImagesArgument,
    url: Annotated[
        str, typer.Option("--url", help="Of dat-deploy serve or Triton Inference Server.")
    ] = "localhost:8000",
    name: Annotated[str | None, typer.Option("--name", help="Of the model. Default: the only one there is.")] = None,
    top: Annotated[int, typer.Option("--top", help="Classes to show for each image.")] = 5,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Have a server classify images, as `classify` does here."""
    from dat_deploy.serving import client as library

    check_json(json_file, force=force)
    result = library.client(image, url, name=name, top=top)
    _print_predictions(result)
    write_json(result, json_file, force=force)
    print_next("bench", "--help")


def _print_predictions(result: "Classification | ServedClassification") -> None:
    for path, predictions in zip(result.images, result.predictions, strict=True):
        out.print(str(path))
        for prediction in predictions:
            out.print(f"  {prediction.probability:7.2%}  {prediction.name}")


def visualize(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    engine: Annotated[
        list[str],
        typer.Option("--engine", help="pytorch:VARIANT, or a file of export --sampling-locations. Two: their drift."),
    ],
    checkpoint: CheckpointOption = None,
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="Where an engine has the choice: pytorch:VARIANT.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: IMAGE.points.png.")] = None,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Draw where the deformable blocks look, or how far two engines differ in it."""
    pixels = None if image_size is None else parse_image_size(image_size)
    check_pytorch_options(engine, checkpoint)
    check_json(json_file, force=force)
    target = output or Path(f"{image.stem}.points.png")
    with Stages("visualize", err) as stages:
        from dat_deploy import visualize as library

        stages.begin("looking")
        drawing = library.visualize(image, engine, target, checkpoint=checkpoint, image_size=pixels, force=force)
    of_two = (">drift px", ">at most") if len(engine) == 2 else ()
    table = table_of("block", ">points", ">moved px", ">at most", ">outside", *of_two)
    for row, block in zip(drawing.blocks, drawing.engines[0].network.sampled_blocks, strict=True):
        drift = () if row.median_drift_px is None else (f"{row.median_drift_px:.2g}", f"{row.largest_drift_px:.2g}")
        table.add_row(
            block.name,
            str(row.points),
            f"{row.mean_offset_px:.1f}",
            f"{row.largest_offset_px:.1f}",
            f"{row.outside:.0%}",
            *drift,
        )
    out.print(table)
    out.print(f"picture: {drawing.path}")
    if "random weights" in drawing.engines[0].weights_source:
        out.print(f"note: the engine holds {drawing.engines[0].weights_source}, so these places mean nothing.")
    write_json(drawing, json_file, force=force)
    if len(engine) == 2:
        print_next("validate", "--engine", engine[1], *option("--checkpoint", checkpoint))
    elif drawing.engines[0].path is None and drawing.engines[0].network.is_released:
        name = drawing.engines[0].variant
        size = () if image_size is None else ("--image-size", image_size)
        print_next("export", "--variant", name, "--sampling-locations", *option("--checkpoint", checkpoint), *size)
    else:
        print_next("validate", "--engine", engine[0])


def serve(
    engine: Annotated[
        str | None, typer.Option("--engine", help="FILE.onnx, FILE.engine, FILE.pt2, or RUNTIME:FILE.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A YAML file of these options' names; options come before it.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the model in addresses. Default: its variant.")] = None,
    host: Annotated[str | None, typer.Option("--host", help="Default: 127.0.0.1; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Default: 8000.")] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Of a Ray cluster, such as auto. Default: Ray is started here.")
    ] = None,
    replicas: Annotated[int | None, typer.Option("--replicas", help="Copies of the engine. Default: 1.")] = None,
    max_replicas: Annotated[
        int | None, typer.Option("--max-replicas", help="With more load, up to so many copies. Default: --replicas.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option("--gpus", help="Of each copy, such as 0.5. Default: 1 if it runs on CUDA.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Of each copy's CPU. Default: a fair share.")] = None,
    max_batch: Annotated[
        int | None,
        typer.Option("--max-batch", help="Images in one call and in one request. Default: the engine's, or 16."),
    ] = None,
    max_wait_ms: Annotated[
        float | None, typer.Option("--max-wait-ms", help="That a request waits for others. Default: 2.")
    ] = None,
    max_body_mb: Annotated[float | None, typer.Option("--max-body-mb", help="More is 413. Default: 32.")] = None,
    max_pixels: Annotated[int | None, typer.Option("--max-pixels", help="More is 400. Default: 25000000.")] = None,
    max_requests: Annotated[
        int | None, typer.Option("--max-requests", help="At a time; one more is 429. Default: 128.")
    ] = None,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout-s", help="For an answer; later it is 503. Default: 10.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Take the place of a server of the same name on the cluster.")
    ] = False,
    drain_s: Annotated[
        float | None, typer.Option("--drain-s", help="For what is being answered after SIGTERM. Default: 30.")
    ] = None,
) -> None:
    """Serve an engine over HTTP: the Open Inference Protocol, POST /v1/classify, and a page at /."""
    options = {key: value for key, value in locals().items() if key != "config"} | {"force": force or None}
    from dat_deploy import serving as library

    with err.status("starting") as status:

        def progress(what: str) -> None:
            status.update(what)
            if not what:
                status.stop()

        library.serve(config, progress=progress, note=lambda text: out.print(in_shell(text)), **options)


def demo(
    directory: Annotated[Path, typer.Option("--directory", help="Where the files go; they are replaced.")] = Path(
        "demo"
    ),
) -> None:
    """Export tiny with random weights, validate and time it; then demo, which is trained. About two minutes."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make folder {directory}: {error.strerror}; choose another --directory.") from error
    tiny, trained = directory / "tiny.onnx", directory / "demo.onnx"
    report, page = directory / "validation.json", directory / "report.html"
    record, plot = directory / "bench.json", directory / "bench.png"
    picture = directory / "ankle_boot.png"
    with resources.as_file(resources.files("dat_deploy").joinpath("data", picture.name)) as source:
        shutil.copy(source, picture)
    engines = ["pytorch:tiny", str(tiny), f"openvino:{tiny}"]
    engine_words = " ".join(f"--engine {name}" for name in engines)
    steps: dict[str, Callable[[], None]] = {
        f"export --variant tiny --output {tiny}": lambda: export(variant="tiny", output=tiny, force=True),
        f"validate --engine {tiny} --batch 1,2 --json {report}": lambda: validate(
            engine=str(tiny), batch="1,2", json_file=report, force=True
        ),
        f"bench {engine_words} --rounds 3 --json {record} --plot {plot}": lambda: bench(
            engine=engines, rounds=3, json_file=record, plot=plot, force=True
        ),
        f"export --variant demo --output {trained}": lambda: export(variant="demo", output=trained, force=True),
        f"validate --engine {trained} --html {page}": lambda: validate(engine=str(trained), html=page, force=True),
        f"classify {picture} --engine {trained} --top 3": lambda: classify(image=[picture], engine=str(trained), top=3),
    }
    began = time.monotonic()
    for number, (command, run) in enumerate(steps.items(), 1):
        out.print(f"\n[{number}/{len(steps)}] $ dat-deploy {command}")
        step_began = time.monotonic()
        run()
        out.print(f"[{number}/{len(steps)}] took {time.monotonic() - step_began:.0f} s")
    out.print(
        f"\nAll of it worked in {time.monotonic() - began:.0f} s; the files are in {directory}. "
        f"With an official checkpoint (links in the README):\n"
        f"  dat-deploy export --variant tiny --checkpoint dat_tiny_in1k_224.pth\n"
        f"  dat-deploy classify PHOTOGRAPH.jpg --engine tiny.onnx"
    )
