"""From a checkpoint to a file, an engine and a model repository; and what they hold."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dat_deploy.commands.options import (
    CheckpointOption,
    FeaturesOption,
    ForceOption,
    JsonOption,
    VariantOption,
    find_named,
    parse_features,
    parse_image_size,
    parse_number,
    parse_numbers,
)
from dat_deploy.commands.output import (
    backend_option,
    check_json,
    counts_text,
    err,
    features_option,
    option,
    out,
    print_file,
    print_next,
    print_notes,
    print_passport,
    size_text,
    table_of,
    words_after,
    write_json,
)
from dat_deploy.commands.stages import Stages
from dat_deploy.commands.wording import in_shell
from dat_deploy.errors import DatDeployError
from dat_deploy.networks.family import find_network, network_names

__all__ = ["build", "convert", "export", "inspect", "package", "quantize", "variants"]


def variants(json_file: JsonOption = None, force: ForceOption = False) -> None:
    """List the networks."""
    check_json(json_file, force=force)
    table = table_of("variant", "family", "image", ">params", ">GMACs", ">top-1", "checked on")
    networks = [find_network(name) for name in network_names()]
    for network in networks:
        table.add_row(
            network.name,
            network.family,
            size_text(network.image_size),
            "" if network.parameters is None else f"{network.parameters / 1e6:.1f}M",
            "" if network.gmacs is None else f"{network.gmacs:.1f}",
            "" if network.published_top1 is None else f"{network.published_top1:.1f}%",
            " ".join(network.runtimes_checked),
        )
    out.print(table)
    out.print("top-1: ImageNet-1K, as its authors report it. checked on: every lowering agreed with PyTorch there.")
    write_json([asdict(network) for network in networks], json_file, force=force)
    print_next("export", "--variant", "tiny")


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Official .pth file.")],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Turn a checkpoint into a .safetensors file, which cannot hold code."""
    from dat_deploy.networks.dat import convert as library

    check_json(json_file, force=force)
    with err.status(f"reading {checkpoint.name}"):
        variant, weights = library.convert(checkpoint, output, force=force)
    out.print(f"{output}: variant {variant.name}, weights sha256 {weights.sha256[:12]}")
    print_notes(weights.notes)
    write_json({"variant": variant.name, "weights_sha256": weights.sha256}, json_file, force=force)
    print_next("export", "--variant", variant.name, "--checkpoint", output, *features_option(variant))


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
    fixed_batch = None if batch == "dynamic" else parse_number(batch, "--batch", "a number, or 'dynamic'")
    size = None if image_size in (None, "dynamic") else parse_image_size(image_size)
    feature_stages = parse_features(features)
    name = variant or str(config or "")
    if source is None:
        if not name or (variant and config):
            raise DatDeployError(
                f"export takes one of --variant NAME, --config FILE.yaml and --from FILE. "
                f"Variants: {', '.join(network_names())}."
            )
        if config is not None and config.suffix not in (".yaml", ".yml"):
            raise DatDeployError(f"--config got '{config}'; it takes a .yaml file of LeapLabTHU/DAT or like it.")
        if variant:
            find_named(variant)  # before torch is loaded
        target = output or Path(f"{Path(name).stem if config else name}.onnx")
    else:
        new = (name, checkpoint, image_size, features, sampling_locations, batch != "dynamic", opset != 18)
        if any(new) or precision != "fp32" or fp32 or no_fp32:
            raise DatDeployError(
                "--from changes nothing but --lowering; every other option needs a new export, without --from."
            )
        target = output or source.with_suffix(f".{lowering}.onnx")
    check_json(json_file, force=force)
    with Stages("export", err) as stages:
        from dat_deploy import export as library

        if source is not None:
            report = library.relower(source, target, lowering, force=force, progress=stages.begin)
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
                features=feature_stages,
                sampling_locations=sampling_locations,
                opset_version=opset,
                force=force,
                progress=stages.begin,
            )
    metadata = report.metadata
    size_taken = "any size" if metadata.dynamic_image_size else size_text(metadata.image_size)
    out.print(
        f"{report.path}: {metadata.variant} {size_taken}, batch {metadata.batch or 'dynamic'}, "
        f"lowering {metadata.lowering}, opset {metadata.opset_version}, {metadata.precision}, "
        f"{report.operators} operators, {report.nodes} nodes, {report.size_bytes / 1e6:.0f} MB, {report.seconds:.0f} s"
    )
    out.print(str(report.census))
    out.print(f"weights: {metadata.weights_source}, sha256 {metadata.weights_sha256[:12]}")
    print_notes(report.notes)
    write_json(report, json_file, force=force)
    if metadata.lowering == "plugin":
        print_next("export", "--from", report.path, "--lowering", "function")
    else:
        print_next("validate", "--engine", report.path, *option("--checkpoint", checkpoint))


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
    check_json(json_file, force=force)
    target = output or source.with_suffix(".int8.onnx")
    with Stages("quantize", err) as stages:
        from dat_deploy.export import quantize as library

        report = library.quantize(
            source, target, data, images=images, method=method, force=force, progress=stages.begin
        )
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
    print_notes(report.notes)
    write_json(report, json_file, force=force)
    print_next("validate", "--engine", report.path, "--data", data)


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
    pixels = None if image_size is None else parse_image_size(image_size)
    feature_stages = parse_features(features)
    architectures = [] if arch is None else parse_numbers(arch, "--arch", "80,86,89")
    if variant and config:
        raise DatDeployError("build takes one of --variant NAME and --config FILE.yaml.")
    if variant:
        find_named(variant)  # before torch is loaded
    check_json(json_file, force=force)
    with Stages("build", err) as stages:
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
            features=feature_stages,
            precision=precision,
            device=device,
            force=force,
            progress=stages.begin,
        )
    print_passport(report.path, report.passport)
    print_notes(report.notes)
    out.print(f"built in {report.seconds:.0f} s; its passport is {report.path}.json")
    write_json(report, json_file, force=force)
    print_next(*words_after(report.path, report.passport, "inspect"))


def inspect(
    engine: Annotated[Path, typer.Argument(help="An engine that build made, or an exported file.")],
    layers: Annotated[bool, typer.Option("--layers", help="List each layer with its formats.")] = False,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Say what an exported file or an engine holds; on the GPU that an engine is for, also what is in that."""
    from dat_deploy.engine import inspector as library

    check_json(json_file, force=force)
    inspection = library.inspect(engine)
    if inspection.file is not None:
        print_file(engine, inspection.metadata, inspection.file)
    elif inspection.passport is not None:
        print_passport(engine, inspection.passport)
    if inspection.unseen is not None:
        out.print(f"layers of the built engine: not seen; {in_shell(inspection.unseen)}")
    elif inspection.engine_layers:
        plugins = sum(layer.is_plugin for layer in inspection.engine_layers)
        counts = counts_text(library.count_types(inspection.engine_layers))
        out.print(
            f"layers of the built engine: {counts}; {plugins} plugins, "
            f"{library.fused_attention(inspection.engine_layers)} fused attentions of TensorRT's own"
        )
    if layers and inspection.engine_layers:
        table = table_of("layer", "kind", "precision", "inputs", "outputs", "tactic")
        for row in inspection.engine_layers:
            formats = ("; ".join(row.inputs), "; ".join(row.outputs))
            table.add_row(row.name, row.kind, row.precision, *formats, row.tactic)
        out.print(table)
    write_json(inspection, json_file, force=force)
    if inspection.passport is None:
        print_next("build", engine, *backend_option())
    else:
        print_next(*words_after(engine, inspection.passport, "doctor"))


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
    preferred = parse_numbers(batch, "--batch", "8,32")
    check_json(json_file, force=force)
    with Stages("package", err) as stages:
        from dat_deploy.serving.triton import repository as library

        stages.begin("packaging")
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
    print_notes(report.notes)
    write_json(report, json_file, force=force)
    out.print(f"next: {shlex.join(report.server)}")
