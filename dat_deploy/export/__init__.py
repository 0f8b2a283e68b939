"""Checkpoint -> one self-contained ONNX file."""

import contextlib
import dataclasses
import gc
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from dat_deploy.errors import ExportError
from dat_deploy.export.census import PrecisionCensus, precision_census
from dat_deploy.export.options import (
    LOWERINGS,
    OPSET_VERSIONS,
    already_inlined,
    check_lowering,
    check_opset,
    check_precision,
)
from dat_deploy.files import atomic_output, check_output
from dat_deploy.metadata import DOMAIN_NAME, FileMetadata, load_onnx, read_metadata
from dat_deploy.networks.checkpoint_file import check_checkpoint
from dat_deploy.networks.family import Network, family_of, find_network
from dat_deploy.precision import FULL
from dat_deploy.progress import Progress

if TYPE_CHECKING:
    import onnx_ir as ir

# What loads torch or a graph library is imported after the checks, so that a wrong argument is told at once.

__all__ = [
    "LOWERINGS",
    "OPSET_VERSIONS",
    "ExportReport",
    "FileMetadata",
    "PrecisionCensus",
    "export",
    "read_metadata",
    "relower",
]


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export` wrote.

    Attributes:
        census: what the nodes of the file compute in.
        notes: what the user must know of the weights, such as that they are random, or that tables were resized.
    """

    path: Path
    metadata: FileMetadata
    size_bytes: int
    nodes: int
    operators: int
    census: PrecisionCensus
    outputs: tuple[str, ...]
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Imports and tracing make objects by the million that live to the end; looking through them took a tenth of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
def export(
    variant: str | Network,
    output: Path,
    *,
    checkpoint: Path | None = None,
    lowering: str = "function",
    precision: str = "fp32",
    fp32: Sequence[str] = (),
    no_fp32: Sequence[str] = (),
    batch: int | None = None,
    image_size: tuple[int, int] | None = None,
    dynamic_image_size: bool = False,
    features: Sequence[int] | None = None,
    sampling_locations: bool = False,
    opset_version: int = 18,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> ExportReport:
    """Write a network with the weights of `checkpoint` as one self-contained ONNX file.

    Args:
        variant: see `find_network`.
        output: written whole or not at all.
        checkpoint: an official .pth or .safetensors file; without one the weights are random, from a fixed seed.
        lowering: one of LOWERINGS.
        precision: one of `precision.EXPORTED`; inputs and outputs are float32 in each.
        fp32: modules to keep in float32 with all below them, such as `stages.3` or `stages.*.attns.1`.
        no_fp32: modules in which nothing is to stay in float32 that does by default, such as `cls_norm`.
        batch: a fixed batch, or None for a dynamic one.
        image_size: (height, width) in pixels, if not the variant's own.
        dynamic_image_size: the file takes any image size that the network does; DAT+ and DAT++ alone.
        features: stages whose maps the file gives instead of logits, for use as a backbone.
        sampling_locations: also give the sampling locations of each deformable block, and the attention that each
            point receives, for `visualize`; slower, and for a fixed image size alone.
        opset_version: one of OPSET_VERSIONS.
        force: replace `output` if it exists.
        progress: called with what is being done.

    Raises:
        DatDeployError: one of its subclasses for each thing that can be wrong with the arguments.
    """
    start = time.monotonic()
    check_output(output, force=force)
    check_opset(opset_version)
    check_lowering(lowering)
    check_precision(precision, fp32, no_fp32)
    if batch is not None and batch < 1:
        raise ExportError(f"batch {batch} is not possible; give a number from 1, or 'dynamic'.")
    network = find_network(variant, image_size=image_size, features=features)
    if dynamic_image_size:
        network.check_any_size()
        if sampling_locations:
            raise ExportError(
                "`sampling_locations` needs a fixed image size, since the number of points follows from it. "
                "Give `image_size=(height, width)`."
            )
    check_checkpoint(checkpoint)
    from dat_deploy.export.onnx_model import onnx_from_model
    from dat_deploy.export.precision import cast_graph

    progress("loading weights")
    family = family_of(network)
    weights = family.weights(network, checkpoint)
    module = family.module(network, weights, fused=True, sampled_points=sampling_locations)
    metadata = FileMetadata.of(
        network,
        weights,
        batch=batch,
        dynamic_image_size=dynamic_image_size,
        lowering=lowering,
        precision=precision,
        fp32_added=tuple(fp32),
        fp32_removed=tuple(no_fp32),
        opset_version=opset_version,
    )
    model = onnx_from_model(
        module,
        network,
        sampled_points=sampling_locations,
        batch=batch,
        dynamic_image_size=dynamic_image_size,
        opset_version=opset_version,
        progress=progress,
    )
    if precision != FULL.name:
        progress(f"casting to {precision}")
    cast_graph(model, precision, fp32=fp32, no_fp32=no_fp32)
    report = _lowered_and_saved(model, metadata, output, force=force, progress=progress)
    return dataclasses.replace(report, seconds=time.monotonic() - start, notes=weights.notes)


def relower(
    source: Path, output: Path, lowering: str, *, force: bool = False, progress: Progress = lambda _: None
) -> ExportReport:
    """Give the operators of an exported file another form, in its precision; it must still have them as nodes.

    Raises:
        ExportError: if the operators of `source` are already inlined, or there is no such lowering.
    """
    start = time.monotonic()
    check_output(output, force=force)
    check_lowering(lowering)
    progress("reading the file")
    proto = load_onnx(source)
    metadata = FileMetadata.from_properties({entry.key: entry.value for entry in proto.metadata_props}, source)
    if not any(node.domain == DOMAIN_NAME for node in proto.graph.node):
        raise already_inlined()
    import onnx_ir as ir

    metadata = dataclasses.replace(metadata, lowering=lowering)
    report = _lowered_and_saved(ir.from_proto(proto), metadata, output, force=force, progress=progress)
    return dataclasses.replace(report, seconds=time.monotonic() - start)


def _lowered_and_saved(
    model: "ir.Model", metadata: FileMetadata, output: Path, *, force: bool, progress: Progress
) -> ExportReport:
    import onnx_ir as ir

    from dat_deploy.export.lowering import lower
    from dat_deploy.plugins.onnx_domain import operator_nodes

    operators = len(operator_nodes(model))
    progress("lowering")
    model = lower(model, metadata.lowering)
    progress("writing")
    model.producer_name = "dat-deploy"
    model.producer_version = metadata.version
    model.graph.name = f"{metadata.family}_" + re.sub(r"\W", "_", metadata.network.name)
    model.metadata_props.update(metadata.to_properties())
    proto = ir.to_proto(model)
    with atomic_output(output, force=force) as temporary:
        onnx.save(proto, temporary)
    return ExportReport(
        path=output,
        metadata=metadata,
        size_bytes=output.stat().st_size,
        nodes=len(model.graph),
        operators=operators,
        census=precision_census(proto),
        outputs=tuple(str(value.name) for value in model.graph.outputs),
    )
