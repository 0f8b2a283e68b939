"""The command line: parse, one library call, print. Exit codes: 0 done, 1 user error, 2 wrong answer, 3 cannot here."""

import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dat_deploy.commands.stages import Stages
from dat_deploy.errors import DatDeployError, OutputError
from dat_deploy.networks.dat.variants import VARIANTS, Variant, get_variant

if TYPE_CHECKING:
    from dat_deploy.benchmark import Record
    from dat_deploy.classify import Classification
    from dat_deploy.engine.inspector import OnnxFile
    from dat_deploy.engine.passport import Passport
    from dat_deploy.metadata import FileMetadata
    from dat_deploy.serving.client import ServedClassification
    from dat_deploy.validate.accuracy import Accuracy

# Everything that loads torch, NumPy or a runtime is imported inside the command that needs it, so that --help is quick.

app = typer.Typer(
    name="dat-deploy",
    help="Vision transformers with deformable attention (DAT, DAT++): from checkpoint to validated, fast inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug keeps Python's own traceback
    rich_markup_mode=None,
)
# Text is printed as it is: in rich's markup, a file called a[b]:x:.onnx would lose its [b] and gain an emoji.
out = Console(
    highlight=False,
    soft_wrap=True,
    markup=False,
    emoji=False,
    width=None if sys.stdout.isatty() else 160,  # tables in a pipe stay whole
)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

FLIPS_SHOWN = 10

VariantOption = Annotated[str, typer.Option("--variant", help=f"One of: {', '.join(VARIANTS)}.")]
FeaturesOption = Annotated[
    str | None,
    typer.Option("--features", help="Stages, such as 0,1,2,3: their maps instead of logits, for use as a backbone."),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", help="Official .pth or .safetensors file. Without it: random weights; demo has its own."
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        help="FILE.onnx, FILE.engine, FILE.pt2, or RUNTIME:TARGET such as openvino:FILE.onnx, pytorch:tiny.",
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace output files that exist.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")]


@app.command()
def variants(json_file: JsonOption = None, force: ForceOption = False) -> None:
    """List the networks."""
    _check_json(json_file, force=force)
    table = Table("variant", "family", "image", box=None)
    for heading in ("params", "GMACs", "top-1"):
        table.add_column(heading, justify="right")
    table.add_column("checked on")
    for variant in VARIANTS.values():
        table.add_row(
            variant.name,
            variant.family,
            _size(variant.image_size),
            "" if variant.parameters is None else f"{variant.parameters / 1e6:.1f}M",
            "" if variant.gmacs is None else f"{variant.gmacs:.1f}",
            "" if variant.published_top1 is None else f"{variant.published_top1:.1f}%",
            " ".join(variant.runtimes_checked),
        )
    out.print(table)
    out.print("top-1: ImageNet-1K, as its authors report it. checked on: every lowering agreed with PyTorch there.")
    _write_json([asdict(variant) for variant in VARIANTS.values()], json_file, force=force)
    _next("export", "--variant", "tiny")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Official .pth file.")],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Turn a checkpoint into a .safetensors file, which cannot hold code."""
    from dat_deploy.networks import convert as library

    _check_json(json_file, force=force)
    with err.status(f"reading {checkpoint.name}"):
        variant, weights = library.convert(checkpoint, output, force=force)
    out.print(f"{output}: variant {variant.name}, weights sha256 {weights.sha256[:12]}")
    _notes(weights.notes)
    _write_json({"variant": variant.name, "weights_sha256": weights.sha256}, json_file, force=force)
    _next("export", "--variant", variant.name, "--checkpoint", output, *_features(variant))


@app.command()
def export(
    variant: VariantOption = "",
    checkpoint: CheckpointOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: VARIANT.onnx.")] = None,
    lowering: Annotated[
        str, typer.Option("--lowering", help="function, plugin, gather, gridsample or hat; see the README.")
    ] = "function",
    precision: Annotated[
        str, typer.Option("--precision", help="fp32, fp16 or bf16; input and output stay fp32.")
    ] = "fp32",
    fp32: Annotated[
        list[str] | None,
        typer.Option("--fp32", help="A module to keep in fp32, such as stages.3 or 'stages.*.attns.1'; repeat it."),
    ] = None,
    no_fp32: Annotated[
        list[str] | None,
        typer.Option("--no-fp32", help="A module of which nothing is to stay in fp32, such as cls_norm; repeat it."),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="dynamic, or a number.")] = "dynamic",
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size", help="Such as 448 or 224x448 (height x width); dynamic: any that DAT+ and DAT++ take."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Instead of --variant: an official YAML file of a network.")
    ] = None,
    features: FeaturesOption = None,
    sampling_locations: Annotated[
        bool, typer.Option("--sampling-locations", help="Also give what visualize draws; slower.")
    ] = False,
    opset: Annotated[int, typer.Option("--opset", help="17, 18 or 19.")] = 18,
    source: Annotated[
        Path | None, typer.Option("--from", help="Change the lowering of this exported file instead of exporting anew.")
    ] = None,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Write a network as one self-contained ONNX file."""
    fixed_batch = None if batch == "dynamic" else _number(batch, "--batch", "a number, or 'dynamic'")
    size = None if image_size in (None, "dynamic") else _image_size(image_size)
    stages = None if features is None else _numbers(features, "--features", "0,1,2,3")
    name = variant or str(config or "")
    if source is None:
        if not name or (variant and config):
            raise DatDeployError(
                f"export takes one of --variant NAME, --config FILE.yaml and --from FILE. "
                f"Variants: {', '.join(VARIANTS)}."
            )
        if config is not None and config.suffix not in (".yaml", ".yml"):
            raise DatDeployError(f"--config got '{config}'; it takes a .yaml file of LeapLabTHU/DAT or like it.")
        if variant:
            get_variant(variant)  # before torch is loaded
        target = output or Path(f"{Path(name).stem if config else name}.onnx")
    else:
        new = (name, checkpoint, image_size, features, sampling_locations, batch != "dynamic", opset != 18)
        if any(new) or precision != "fp32" or fp32 or no_fp32:
            raise DatDeployError(
                "--from changes nothing but --lowering; every other option needs a new export, without --from."
            )
        target = output or source.with_suffix(f".{lowering}.onnx")
    _check_json(json_file, force=force)
    with Stages("export", err) as shown:
        from dat_deploy import export as library

        if source is not None:
            report = library.relower(source, target, lowering, force=force, progress=shown.begin)
        else:
            report = library.export(
                name,
                target,
                checkpoint=checkpoint,
                lowering=lowering,
                precision=precision,
                fp32=fp32 or (),
                no_fp32=no_fp32 or (),
                batch=fixed_batch,
                image_size=size,
                dynamic_image_size=image_size == "dynamic",
                features=stages,
                sampling_locations=sampling_locations,
                opset_version=opset,
                force=force,
                progress=shown.begin,
            )
    metadata = report.metadata
    size_taken = "any size" if metadata.dynamic_image_size else _size(metadata.image_size)
    out.print(
        f"{report.path}: {metadata.variant} {size_taken}, batch {metadata.batch or 'dynamic'}, "
        f"lowering {metadata.lowering}, opset {metadata.opset_version}, {metadata.precision}, "
        f"{report.operators} operators, {report.nodes} nodes, {report.size_bytes / 1e6:.0f} MB, {report.seconds:.0f} s"
    )
    out.print(str(report.census))
    out.print(f"weights: {metadata.weights_source}, sha256 {metadata.weights_sha256[:12]}")
    _notes(report.notes)
    _write_json(asdict(report), json_file, force=force)
    if metadata.lowering == "plugin":
        _next("export", "--from", report.path, "--lowering", "function")
    else:
        _next("validate", "--engine", report.path, *_option("--checkpoint", checkpoint))


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="An exported file in fp32.")],
    data: Annotated[
        Path, typer.Option("--data", help="A folder of images like those that it will see; labels are not needed.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: FILE.int8.onnx.")] = None,
    images: Annotated[int, typer.Option("--images", help="How many of the folder's to calibrate with, at most.")] = 512,
    method: Annotated[
        str, typer.Option("--method", help="How ranges come from what is seen: percentile, minmax or entropy.")
    ] = "percentile",
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Bring the linear layers of an exported file to int8, with ranges measured on images."""
    _check_json(json_file, force=force)
    target = output or source.with_suffix(".int8.onnx")
    with Stages("quantize", err) as shown:
        from dat_deploy.export import quantize as library

        report = library.quantize(source, target, data, images=images, method=method, force=force, progress=shown.begin)
    metadata = report.metadata
    calibration = metadata.calibration
    assert calibration is not None
    out.print(
        f"{report.path}: {metadata.variant}, lowering {metadata.lowering}, {metadata.precision}, "
        f"{len(report.layers)} layers quantized, {report.size_bytes / 1e6:.1f} MB, {report.seconds:.0f} s"
    )
    out.print(str(report.census))
    out.print(
        f"calibrated on {calibration.images} images of {calibration.folder}, sha256 {calibration.sha256[:12]}, "
        f"{calibration.method} of {calibration.library} {calibration.library_version}"
    )
    _notes(report.notes)
    _write_json(asdict(report), json_file, force=force)
    _next("validate", "--engine", report.path, "--data", data)


@app.command()
def build(
    source: Annotated[Path | None, typer.Argument(help="An exported file; none for --backend aotinductor.")] = None,
    backend: Annotated[
        str, typer.Option("--backend", help="tensorrt, tensorrt-rtx, or aotinductor, which builds from --variant.")
    ] = "tensorrt",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: FILE.engine, or VARIANT.pt2.")] = None,
    batch: Annotated[
        str, typer.Option("--batch", help="A profile each: 1,8,32; a range: 1-32; with its commonest batch: 1-8-32.")
    ] = "1",
    lowering: Annotated[
        str, typer.Option("--lowering", help="auto: the fastest that is right here; or as in export.")
    ] = "auto",
    plugins: Annotated[
        str, typer.Option("--plugins", help="auto, ahead-of-time (no Python where the engine runs), or IPluginV3.")
    ] = "auto",
    arch: Annotated[
        str | None,
        typer.Option("--arch", help="Compute capabilities to run on, such as 80,86,89. Default: this GPU's."),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", help="TensorRT's timings, read and written; makes later builds quick."),
    ] = None,
    workspace_mib: Annotated[
        int | None, typer.Option("--workspace-mib", help="GPU memory that one layer may use. Default: all.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="Where there is a choice: aotinductor, files of dynamic size.")
    ] = None,
    variant: Annotated[str, typer.Option("--variant", help="For aotinductor: as in export.")] = "",
    config: Annotated[Path | None, typer.Option("--config", help="For aotinductor: as in export.")] = None,
    checkpoint: CheckpointOption = None,
    features: FeaturesOption = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="For aotinductor: fp32, fp16 or bf16. An exported file has its own."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="For aotinductor: cpu or cuda. Default: cuda where there is one.")
    ] = None,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Build an engine, with a passport beside it that says what it is."""
    pixels = None if image_size is None else _image_size(image_size)
    stages = None if features is None else _numbers(features, "--features", "0,1,2,3")
    architectures = [] if arch is None else _numbers(arch, "--arch", "80,86,89")
    if variant and config:
        raise DatDeployError("build takes one of --variant NAME and --config FILE.yaml.")
    if variant:
        get_variant(variant)  # before torch is loaded
    _check_json(json_file, force=force)
    with Stages("build", err) as shown:
        from dat_deploy.engine import build as library

        report = library.build(
            source,
            output or (Path(f"{config.stem}.pt2") if config else None),
            backend=backend,
            batches=batch.split(","),
            lowering=lowering,
            plugin_form=plugins,
            architectures=architectures,
            timing_cache=timing_cache,
            workspace_bytes=None if workspace_mib is None else workspace_mib * 2**20,
            variant=variant or (None if config is None else str(config)),
            checkpoint=checkpoint,
            image_size=pixels,
            features=stages,
            precision=precision,
            device=device,
            force=force,
            progress=shown.begin,
        )
    _print_passport(report.path, report.passport)
    _notes(report.notes)
    out.print(f"built in {report.seconds:.0f} s; its passport is {report.path}.json")
    _write_json(asdict(report), json_file, force=force)
    _next(*_after(report.path, report.passport, "inspect"))


@app.command()
def inspect(
    engine: Annotated[Path, typer.Argument(help="An engine that build made, or an exported file.")],
    layers: Annotated[bool, typer.Option("--layers", help="List each layer with its formats.")] = False,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Say what an exported file or an engine holds; on the GPU that an engine is for, also what is in that."""
    from dat_deploy.engine import inspector as library

    _check_json(json_file, force=force)
    found = library.inspect(engine)
    if found.file is not None:
        _print_file(engine, found.metadata, found.file)
    elif found.passport is not None:
        _print_passport(engine, found.passport)
    if found.unseen is not None:
        out.print(f"layers of the built engine: not seen; {found.unseen}")
    elif found.engine_layers:
        plugins = sum(layer.is_plugin for layer in found.engine_layers)
        out.print(
            f"layers of the built engine: {_counts(library.count_types(found.engine_layers))}; {plugins} plugins, "
            f"{library.fused_attention(found.engine_layers)} fused attentions of TensorRT's own"
        )
    if layers and found.engine_layers:
        table = Table("layer", "kind", "precision", "inputs", "outputs", "tactic", box=None)
        for row in found.engine_layers:
            formats = ("; ".join(row.inputs), "; ".join(row.outputs))
            table.add_row(row.name, row.kind, row.precision, *formats, row.tactic)
        out.print(table)
    _write_json(asdict(found), json_file, force=force)
    if found.passport is None:
        _next("build", engine, *_backend_option())
    else:
        _next(*_after(engine, found.passport, "doctor"))


@app.command()
def package(
    engine: Annotated[
        list[Path], typer.Option("--engine", help="FILE.onnx, or FILE.engine; repeat it for engines of several GPUs.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model repository; other models in it stay.")
    ] = Path("model_repository"),
    name: Annotated[str | None, typer.Option("--name", help="Of the model. Default: the variant's.")] = None,
    batch: Annotated[
        str, typer.Option("--batch", help="Batches to prefer, of FILE.onnx; an engine's profiles say it themselves.")
    ] = "8,32",
    images: Annotated[
        bool, typer.Option("--images", help="Also write a model that takes RGB pictures of any size as they are.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="gpu or cpu.")] = "gpu",
    instances: Annotated[int, typer.Option("--instances", help="Copies of the network, on each GPU.")] = 1,
    queue_delay_us: Annotated[
        int, typer.Option("--queue-delay-us", help="How long a request waits for others to make up a batch.")
    ] = 500,
    queue_size: Annotated[int, typer.Option("--queue-size", help="Requests that may wait; more are refused.")] = 256,
    queue_timeout_us: Annotated[
        int, typer.Option("--queue-timeout-us", help="How long a request may wait before it is refused.")
    ] = 1_000_000,
    kserve: Annotated[
        Path | None, typer.Option("--kserve", help="Also write this file, YAML of an InferenceService of KServe.")
    ] = None,
    storage_uri: Annotated[
        str | None, typer.Option("--storage-uri", help="For --kserve: where the repository will be.")
    ] = None,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Write a model repository for Triton Inference Server."""
    preferred = _numbers(batch, "--batch", "8,32")
    _check_json(json_file, force=force)
    with Stages("package", err) as shown:
        from dat_deploy.serving.triton import repository as library

        shown.begin("packaging")
        report = library.package(
            engine,
            output,
            name=name,
            batches=preferred,
            images=images,
            device=device,
            instances=instances,
            queue_delay_us=queue_delay_us,
            queue_size=queue_size,
            queue_timeout_us=queue_timeout_us,
            kserve=kserve,
            storage_uri=storage_uri,
            force=force,
        )
    out.print(f"{report.path}:")
    for file in report.files:
        out.print(f"  {file}")
    for model in report.models:
        inputs, outputs = (
            ", ".join(f"{tensor.name} {tensor.datatype} {list(tensor.shape)}" for tensor in tensors)
            for tensors in (model.inputs, model.outputs)
        )
        batches = f"up to {model.max_batch}" if model.max_batch else "fixed"
        out.print(f"{model.name}: {inputs} -> {outputs}, batch {batches}")
    if kserve is not None:
        out.print(f"{kserve}: KServe's InferenceService of it")
    _notes(report.notes)
    _write_json(asdict(report), json_file, force=force)
    out.print(f"next: {shlex.join(report.server)}")


@app.command()
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
            "--tolerance", help="Largest error of an output. Default: 1e-4; fp16, bf16: twice that of eager PyTorch."
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
    sizes = _numbers(batch, "--batch")
    pixels = None if image_size is None else [_image_size(size) for size in image_size.split(",")]
    _check_json(json_file, force=force)
    _check_json(html, force=force)
    if html is not None:
        from dat_deploy.benchmark.plotting import check_matplotlib

        check_matplotlib()
    with Stages("validate", err) as shown:
        from dat_deploy import validate as library

        report = library.validate(
            engine,
            checkpoint=checkpoint,
            images=image,
            data=data,
            limit=limit,
            strict_data=strict_data,
            batches=sizes,
            image_sizes=pixels,
            tolerance=tolerance,
            gates=_gates(gate or []),
            skip=skip or (),
            trace=html is not None,
            progress=shown.begin,
            data_progress=lambda done, of: shown.count(done, of, "data"),
        )
    table = Table("check", box=None)
    for heading in ("batch", "error", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    table.add_column("")
    for check in report.checks:
        verdict = {True: "ok", False: "FAILED", None: "not run"}[check.passed]
        error = "" if check.error is None else _figure(check.error, check.unit)
        allowed = _figure(check.tolerance, check.unit)
        table.add_row(check.name, str(check.batch or ""), error, allowed, verdict, check.detail)
    out.print(table)
    if report.accuracy is not None:
        _print_accuracy(report.accuracy)
    if json_file is not None:
        report.write(json_file, force=force)
    if html is not None:
        with Stages("validate", err) as shown:
            from dat_deploy.validate.page import write_page

            shown.begin("drawing the page")
            write_page(report, html, force=force)
        out.print(f"page: {html}")
    _notes(report.notes)
    if report.differs and report.engine.file_kind == "exported":
        tolerated = ("--tolerance", "0.1") if report.engine.precision == "int8" else ()
        _next("bisect", "--engine", engine, *_option("--checkpoint", checkpoint), *tolerated)
    report.raise_if_failed()
    out.print(report.verdict)
    network = report.engine.network
    again = ["--engine", engine, *_option("--checkpoint", checkpoint)]
    if not _is_released(network):
        _next("bench", "--engine", engine)
    elif len(report.engine.outputs) > max(1, len(network.features)):  # the points, which PyTorch does not give there
        _next("visualize", "PHOTOGRAPH.jpg", "--engine", f"pytorch:{network.name}", *again)
    else:
        size = (
            ()
            if network.image_size == VARIANTS[network.name].image_size
            else ("--image-size", _size(network.image_size))
        )
        _next("bench", "--engine", f"pytorch:{network.name}", *again, *_features(network), *size)


def _self_test(engine: str | None, checkpoint: Path | None, json_file: Path | None, *, force: bool) -> None:
    _check_json(json_file, force=force)
    with Stages("self-test", err) as shown:
        from dat_deploy.validate import self_test as library

        found = library.self_test(engine, checkpoint=checkpoint, progress=shown.begin)
    table = Table("fault", "caught by", "", box=None)
    for tried in found.tried:
        table.add_row(tried.fault, ", ".join(tried.caught_by) or "NOTHING", tried.story)
    out.print(table)
    _write_json(asdict(found), json_file, force=force)
    found.raise_if_failed()
    out.print(found.verdict)
    _next("validate", "--engine", engine or "demo.onnx")


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
    if not unit:
        return f"{value:.2e}"
    return f"{value:.3g}{'' if unit == '%' else ' '}{unit}"


def _print_accuracy(accuracy: "Accuracy") -> None:
    """The images that flip, and those that could not be read."""
    if accuracy.flips:
        table = Table("image that flips", "label", "PyTorch", "engine", box=None)
        for heading in ("margin", "engine's"):
            table.add_column(heading, justify="right")
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


@app.command()
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
    _check_json(json_file, force=force)
    with Stages("bisect", err) as shown:
        from dat_deploy.validate import bisect as library

        report = library.bisect(engine, checkpoint=checkpoint, images=image, tolerance=tolerance, progress=shown.begin)
    table = Table("after", "tensor", box=None)
    for heading in ("error", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for run in report.steps:
        verdict = "ok" if run.passed else "WRONG"
        table.add_row(run.place, run.tensor, f"{run.error:.2e}", f"{run.tolerance:.2e}", verdict)
    out.print(table)
    if json_file is not None:
        report.write(json_file, force=force)
    out.print(report.finding)
    again = _option("--checkpoint", checkpoint)
    if report.agrees:
        _next("validate", "--engine", engine, *again)
    else:  # is it the file, or what runs it?
        path = str(report.engine.path)
        other = path if report.engine.runtime == "openvino" else f"openvino:{path}"
        _next("bisect", "--engine", other, *again)
    report.raise_if_found()


@app.command()
def bench(
    engine: Annotated[list[str], typer.Option("--engine", help="As in validate; repeat it, all run side by side.")],
    checkpoint: CheckpointOption = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="The engine that ratios refer to. Default: the first.")
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, such as 1,8,32.")] = "1",
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="Where an engine has the choice: pytorch:VARIANT, dynamic files.")
    ] = None,
    features: FeaturesOption = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Turns of each engine.")] = 5,
    seconds: Annotated[float, typer.Option("--seconds", help="Timed in each turn.")] = 1.0,
    threads: Annotated[int | None, typer.Option("--threads", help="Of each engine. Default: all cores.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the result to this PNG file.")] = None,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Time engines side by side, each in its own process, in turns."""
    sizes = _numbers(batch, "--batch")
    pixels = None if image_size is None else _image_size(image_size)
    stages = None if features is None else _numbers(features, "--features", "0,1,2,3")
    _check_pytorch_options(engine, checkpoint, features)
    from dat_deploy import benchmark as library
    from dat_deploy.files import check_output

    if plot is not None:
        library.check_plot(plot)
    for path in (plot, json_file):
        if path is not None:
            check_output(path, force=force)
    with Stages("bench", err) as shown:
        record = library.benchmark(
            engine,
            batches=sizes,
            rounds=rounds,
            seconds=seconds,
            threads=threads,
            checkpoint=checkpoint,
            image_size=pixels,
            features=stages,
            baseline=baseline,
            progress=shown.count,
        )
    _print_record(record)
    busy = max(row.others_busy_cores for row in record.rows)
    if busy > 0.1 * record.hardware.cores:
        out.print(f"note: other processes kept up to {busy:.1f} cores busy meanwhile; repeat it on a quiet machine.")
    given = {", ".join(settings.outputs) for settings in record.settings.engines.values()}
    if len(given) > 1:
        out.print(f"note: these engines do not compute the same: some give {' and some '.join(sorted(given))}.")
    if json_file is not None:
        record.write(json_file, force=force)
    if plot is not None:
        with Stages("bench", err) as shown:
            shown.begin("drawing the plot")
            library.plot(record, plot, force=force)
        out.print(f"plot: {plot}")
    if json_file is not None:
        _next("compare", json_file, "LATER.json")
    else:
        again = [word for name in engine for word in ("--engine", name)]
        for option, value in (("--checkpoint", checkpoint), ("--features", features), ("--image-size", image_size)):
            again += [] if value is None else [option, str(value)]
        _next("bench", *again, "--json", "record.json", "--plot", "record.png")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A record that bench --json wrote.")],
    second: Annotated[Path, typer.Argument(help="Another, of the same settings on the same hardware.")],
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Compare two benchmark records; refused if their settings differ."""
    _check_json(json_file, force=force)
    from dat_deploy.benchmark import Record
    from dat_deploy.benchmark import compare as compare_records

    comparison = compare_records(Record.read(first), Record.read(second))
    table = Table("engine", box=None)
    for heading in ("batch", "first ms", "second ms", "second / first", "range"):
        table.add_column(heading, justify="right")
    for row in comparison.rows:
        ratio = row.latency_ratio
        table.add_row(
            row.engine,
            str(row.batch),
            f"{row.first_ms:.2f}",
            f"{row.second_ms:.2f}",
            f"{ratio.median:.3f}",
            f"{ratio.lowest:.3f} to {ratio.highest:.3f}",
        )
    out.print(table)
    for name, (old, new) in comparison.versions.items():
        out.print(f"{name}: {old} and {new}")
    _write_json(asdict(comparison), json_file, force=force)
    _next("bench", "--help")


@app.command()
def classify(
    image: Annotated[list[Path], typer.Argument(help="Image files.")],
    engine: EngineOption,
    checkpoint: CheckpointOption = None,
    top: Annotated[int, typer.Option("--top", help="Classes to show.")] = 5,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Name what is on images."""
    _check_pytorch_options([engine], checkpoint, None)
    from dat_deploy import classify as library

    _check_json(json_file, force=force)
    with err.status("classifying"):
        result = library.classify(image, engine, checkpoint=checkpoint, top=top)
    _print_predictions(result)
    if "random weights" in result.engine.weights_source:
        out.print(f"note: the engine holds {result.engine.weights_source}, so these names mean nothing.")
    _write_json(asdict(result), json_file, force=force)
    _next("bench", "--engine", engine, *_option("--checkpoint", checkpoint))


@app.command()
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

    _check_json(json_file, force=force)
    if golden is not None:
        library.write_golden_picture(golden, force=force)
        out.print(f"{golden}: the golden picture; run your pipeline on it, and save what it gives with numpy.save")
        _write_json({"golden": golden}, json_file, force=force)
        _next("preprocess", "--check", "--engine", engine or "tiny.onnx", "--array", "YOURS.npy")
        return
    named = [word for path in images for word in ("--image", path)]
    again = ["--engine", engine, *_option("--checkpoint", checkpoint)]
    if output is not None:
        batch = library.preprocess_for_engine(images, engine, output=output, force=force)
        out.print(f"{output}: {batch.dtype} {list(batch.shape)}, from {batch.min():.2f} to {batch.max():.2f}")
        _write_json({"output": output, "shape": batch.shape, "images": images}, json_file, force=force)
        _next("preprocess", "--check", *again, *named, "--array", "YOURS.npy")
        return
    _check_pytorch_options([engine], checkpoint, None)
    with err.status("comparing"):
        report = library.check_preprocessing(
            engine, images=images, arrays=array, checkpoint=checkpoint, tolerance_units=tolerance
        )
    golden_says = f", {'as' if report.golden_passed else 'NOT as'} its file says" if report.golden_expected else ""
    out.print(f"golden picture for {engine}: sha256 {report.golden_here[:12]}{golden_says}")
    table = Table("pipeline", box=None)
    for heading in ("images", "max", "mean", "over 1", "flips"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
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
    _notes(report.notes)
    _write_json(report.to_dict(), json_file, force=force)
    report.raise_if_failed()
    out.print(report.verdict)
    _next(*(("validate", *again) if array else ("preprocess", "--golden", "golden.png", "--engine", engine)))


@app.command()
def tune(
    variant: VariantOption,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, such as 1,8,32.")] = "1",
    image_size: Annotated[str | None, typer.Option("--image-size", help="Pixels: 224, or HEIGHTxWIDTH.")] = None,
    precision: Annotated[str, typer.Option("--precision", help="fp16, bf16 or fp32.")] = "fp16",
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Measure which configuration of each kernel is the fastest on this GPU; later runs take it.

    It is kept in ~/.cache/dat-deploy/configurations.json, or in the file that DAT_DEPLOY_CONFIGURATIONS names.
    """
    pixels = None if image_size is None else _image_size(image_size)
    batches = _numbers(batch, "--batch")
    _check_json(json_file, force=force)
    with Stages("tune", err) as shown:
        from dat_deploy.benchmark.tune import tune as measure

        tuning = measure(
            get_variant(variant),
            batches=batches,
            image_size=pixels,
            precision=precision,
            progress=shown.count,
        )
    table = Table("operator", "problem", "fastest", box=None)
    table.add_column("us", justify="right")
    table.add_column("default us", justify="right")
    for row in tuning.launches:
        problem = row.problem
        size = "x".join(str(problem[name]) for name in ("batch", "height", "width"))
        tiles = " ".join(f"{name}={value}" for name, value in row.configuration.tiles)
        cells = (f"{tiles} warps={row.configuration.num_warps}", f"{row.microseconds:.1f}")
        default = "" if row.default_microseconds is None else f"{row.default_microseconds:.1f}"
        table.add_row(row.operator, size, *cells, default)
    out.print(table)
    wrong = [(row.operator, configuration) for row in tuning.launches for configuration in row.wrong]
    for operator, configuration in wrong:
        tiles = " ".join(f"{name}={value}" for name, value in configuration.tiles)
        err.print(
            f"{operator} with {tiles} computes something else on this GPU; it was left out. Report this as a bug."
        )
    out.print(f"kept for {tuning.gpu} in {tuning.path}")
    _write_json(asdict(tuning), json_file, force=force)
    _next("bench", "--engine", f"pytorch:{variant}")


@app.command()
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
    pixels = None if image_size is None else _image_size(image_size)
    _check_pytorch_options(engine, checkpoint, None)
    _check_json(json_file, force=force)
    target = output or Path(f"{image.stem}.points.png")
    with Stages("visualize", err) as shown:
        from dat_deploy import visualize as library

        shown.begin("looking")
        found = library.visualize(image, engine, target, checkpoint=checkpoint, image_size=pixels, force=force)
    table = Table("block", box=None)
    for heading in ("points", "moved px", "at most", "outside"):
        table.add_column(heading, justify="right")
    if len(engine) == 2:
        table.add_column("drift px", justify="right")
        table.add_column("at most", justify="right")
    for row in found.blocks:
        drift = () if row.median_drift_px is None else (f"{row.median_drift_px:.2g}", f"{row.largest_drift_px:.2g}")
        table.add_row(
            f"stages.{row.stage}.attns.{row.block}",
            str(row.points),
            f"{row.mean_offset_px:.1f}",
            f"{row.largest_offset_px:.1f}",
            f"{row.outside:.0%}",
            *drift,
        )
    out.print(table)
    out.print(f"picture: {found.path}")
    if "random weights" in found.engines[0].weights_source:
        out.print(f"note: the engine holds {found.engines[0].weights_source}, so these places mean nothing.")
    _write_json(asdict(found), json_file, force=force)
    if len(engine) == 2:
        _next("validate", "--engine", engine[1], *_option("--checkpoint", checkpoint))
    elif found.engines[0].path is None and _is_released(found.engines[0].network):
        name = found.engines[0].variant
        size = () if image_size is None else ("--image-size", image_size)
        _next("export", "--variant", name, "--sampling-locations", *_option("--checkpoint", checkpoint), *size)
    else:
        _next("validate", "--engine", engine[0])


@app.command()
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

        library.serve(config, progress=progress, note=out.print, **options)


@app.command()
def client(
    image: Annotated[list[Path], typer.Argument(help="Image files.")],
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

    _check_json(json_file, force=force)
    found = library.client(image, url, name=name, top=top)
    _print_predictions(found)
    _write_json(asdict(found), json_file, force=force)
    _next("bench", "--help")


@app.command()
def doctor(force: ForceOption = False, json_file: JsonOption = None) -> None:
    """Print what a bug report needs, and what can run here."""
    _check_json(json_file, force=force)
    from dat_deploy import doctor as library

    with err.status("looking"):
        found = library.doctor()
    hardware = found.hardware
    table = Table(box=None, show_header=False)
    for name, version in found.versions.items():
        table.add_row(name, version)
    for name, installed in found.packages.items():
        table.add_row(name, installed or "not installed")
    table.add_row("commit", found.commit or "not a checkout")
    table.add_row("cpu", f"{hardware.cpu}, {hardware.cores} cores, {' '.join(hardware.cpu_flags)}")
    table.add_row("memory", f"{hardware.memory_gib} GiB")
    table.add_row("gpu", ", ".join(hardware.gpus) or "none")
    for runtime, reasons in found.runtimes.items():
        table.add_row(f"runs {runtime}", "; ".join(reasons) or "yes")
    for where, networks in found.lowerings.items():
        for network, verdicts in networks.items():
            table.add_row(f"lowerings, {where}", f"{network}: {'; '.join(map(str, verdicts))}")
    out.print(table)
    _write_json(asdict(found), json_file, force=force)
    _next("demo")


@app.command()
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
    named = " ".join(f"--engine {name}" for name in engines)
    steps: dict[str, Callable[[], None]] = {
        f"export --variant tiny --output {tiny}": lambda: export(variant="tiny", output=tiny, force=True),
        f"validate --engine {tiny} --batch 1,2 --json {report}": lambda: validate(
            engine=str(tiny), batch="1,2", json_file=report, force=True
        ),
        f"bench {named} --rounds 3 --json {record} --plot {plot}": lambda: bench(
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


# Exit codes as a shell reports them; typer makes 130 of a KeyboardInterrupt.
_SIGNALS = {128 + signal.SIGINT: "interrupted", 128 + signal.SIGTERM: "terminated"}


def main() -> None:
    """Entry point: an expected failure is one line on stderr and its exit code; a bug keeps its traceback."""
    received: list[int] = []

    def unwind(signal_number: int, _: FrameType | None) -> None:
        received.append(signal_number)
        sys.exit(128 + signal_number)  # so that half-written files and workers go

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell has background jobs ignore SIGINT
            signal.signal(number, unwind)
    code: int | str | None = 0
    try:
        code = _run()
    except Exception:
        if not received:  # torch may lose our SystemExit while it imports, and then fail in another way
            raise
    if received:
        code = 128 + received[0]
    if code in _SIGNALS:
        err.print(f"error: {_SIGNALS[code]}")
    sys.exit(code)


def _run() -> int | str | None:
    """The exit code."""
    try:
        app(prog_name="dat-deploy")
    except DatDeployError as error:
        err.print(f"error: {error}")
        return error.exit_code
    except SystemExit as stop:
        # the parser of options exits with 2, which here means that an answer is wrong
        return 1 if stop.code == 2 else stop.code
    return 0


def _print_file(path: Path, metadata: "FileMetadata", file: "OnnxFile") -> None:
    size = "any size" if metadata.dynamic_image_size else _size(metadata.image_size)
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
        f"{rule.color}, resized to {_size(rule.resize_size)} ({rule.interpolation}), {rule.crop} crop of "
        f"{_size(rule.image_size)}, mean {mean}, std {std}",
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


def _print_passport(path: Path, passport: "Passport") -> None:
    metadata = passport.metadata
    table = Table(box=None, show_header=False)
    table.add_row("engine", f"{path}, {passport.engine_bytes / 1e6:.0f} MB, sha256 {passport.engine_sha256[:12]}")
    table.add_row("network", f"{metadata.variant} {_size(metadata.image_size)}, gives {', '.join(passport.outputs)}")
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
        table.add_row("layers", f"{_counts(passport.layers)} in the network that was parsed")
    if passport.engine_layers is not None:
        table.add_row("", f"{_counts(passport.engine_layers)} in the engine")
    if passport.plugins:
        table.add_row("plugins", _counts(passport.plugins))
    table.add_row("weights", f"{metadata.weights_source}, sha256 {metadata.weights_sha256[:12]}")
    if passport.source is not None and passport.source_sha256 is not None:
        table.add_row("built from", f"{passport.source}, sha256 {passport.source_sha256[:12]}")
    table.add_row("built with", ", ".join(f"{name} {version}" for name, version in passport.versions.items()))
    verdict = passport.verdict
    table.add_row("validated", "never" if verdict is None else f"{verdict.date}: {verdict.sentence}")
    out.print(table)


def _backend_option() -> tuple[str, ...]:
    """Where only TensorRT-RTX is installed, the option that names it."""
    from dat_deploy.engine.tensorrt.library import missing

    return ("--backend", "tensorrt-rtx") if missing("tensorrt") and not missing("tensorrt-rtx") else ()


def _after(engine: Path, passport: "Passport", elsewhere: str) -> tuple[object, ...]:
    """The next command: to validate the engine, where it can run."""
    from dat_deploy.runners import RUNTIMES

    if RUNTIMES[passport.backend].reasons():
        return (elsewhere, engine) if elsewhere == "inspect" else (elsewhere,)
    if passport.verdict is not None:
        return ("bench", "--engine", engine)
    source = passport.metadata.weights_source
    return ("validate", "--engine", engine, *(() if _needs_no_checkpoint(source) else ("--checkpoint", source)))


def _needs_no_checkpoint(weights_source: str) -> bool:
    return any(words in weights_source for words in ("random weights", "ship with dat-deploy"))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _print_predictions(result: "Classification | ServedClassification") -> None:
    for path, predictions in zip(result.images, result.predictions, strict=True):
        out.print(str(path))
        for prediction in predictions:
            out.print(f"  {prediction.probability:7.2%}  {prediction.name}")


def _print_record(record: "Record") -> None:
    table = Table("engine", "precision", box=None)
    for heading in ("batch", "p50 ms", "p90 ms", "p99 ms", "images/s", "ratio", "range"):
        table.add_column(heading, justify="right")
    for row in record.rows:
        ratio = row.latency_ratio
        table.add_row(
            row.engine,
            record.settings.engines[row.engine].precision,
            str(row.batch),
            f"{row.p50_ms:.2f}",
            f"{row.p90_ms:.2f}",
            f"{row.p99_ms:.2f}",
            f"{row.images_per_s:.1f}",
            f"{ratio.median:.3f}",
            f"{ratio.lowest:.3f} to {ratio.highest:.3f}",
        )
    out.print(table)
    hardware = record.hardware
    out.print(
        f"ratio: latency / latency of {record.settings.baseline}, round by round; below 1 is faster. "
        f"{hardware.cpu}, {hardware.cores} cores."
    )


def _next(*words: object) -> None:
    out.print(f"next: dat-deploy {shlex.join(str(word) for word in words)}")


def _notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        out.print(f"note: {note}")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _is_released(network: Variant) -> bool:
    """Whether `--variant` names it, its image size and features aside."""
    row = VARIANTS.get(network.name)
    return row is not None and (row.family, row.stages, row.classes) == (
        network.family,
        network.stages,
        network.classes,
    )


def _features(network: Variant) -> tuple[str, ...]:
    return ("--features", ",".join(map(str, network.features))) if network.features else ()


def _option(name: str, value: Path | None) -> tuple[str, ...]:
    return () if value is None else (name, str(value))


def _check_pytorch_options(engines: list[str], checkpoint: Path | None, features: str | None) -> None:
    from dat_deploy.runners import engine_path

    for option, value in (("--checkpoint", checkpoint), ("--features", features)):
        if value is not None and all(engine_path(engine) for engine in engines):
            raise DatDeployError(
                f"{option} is for pytorch:VARIANT, but {', '.join(engines)} holds its own; leave the option out."
            )


def _number(text: str, option: str, accepted: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DatDeployError(f"{option} got '{text}'; it takes {accepted}.") from None


def _numbers(text: str, option: str, example: str = "1,8,32") -> list[int]:
    return [_number(part, option, f"numbers such as {example}") for part in text.split(",")]


def _image_size(text: str) -> tuple[int, int]:
    sides = [_number(part, "--image-size", "a side such as 448, or HEIGHTxWIDTH") for part in text.lower().split("x")]
    if len(sides) > 2:
        raise DatDeployError(f"--image-size got '{text}'; it takes a side such as 448, or HEIGHTxWIDTH.")
    return sides[0], sides[-1]


def _check_json(path: Path | None, *, force: bool) -> None:
    """Before long work."""
    if path is None:
        return
    from dat_deploy.files import check_output

    check_output(path, force=force)


def _write_json(content: object, path: Path | None, *, force: bool) -> None:
    if path is None:
        return
    from dat_deploy.files import atomic_output

    default: Callable[[Any], str] = str
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=default) + "\n", encoding="utf-8")
