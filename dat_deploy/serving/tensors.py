"""The tensors that an exported file or an engine takes and gives, in the words of the Open Inference Protocol."""

from collections.abc import Sequence
from dataclasses import dataclass

from dat_deploy.metadata import FileMetadata

__all__ = ["TensorSpec", "input_spec", "output_specs"]


@dataclass(frozen=True)
class TensorSpec:
    """An input or an output.

    Attributes:
        datatype: the protocol's name of its type, such as `FP32`.
        shape: with the batch as the first axis; -1 for each axis that is free.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


def input_spec(metadata: FileMetadata) -> TensorSpec:
    """`image` [B, 3, H, W]: normalised images; B is free unless the file's batch is fixed, H and W if any size goes."""
    sides = (-1, -1) if metadata.dynamic_image_size else metadata.image_size
    return TensorSpec("image", "FP32", (_batch(metadata), 3, *sides))


def output_specs(metadata: FileMetadata, outputs: Sequence[str]) -> tuple[TensorSpec, ...]:
    """What each of `outputs` is, in their order; all are float32, whatever the network computes in.

    Raises:
        ExportError: for a name that is no output of the network.
    """
    return tuple(TensorSpec(name, "FP32", (_batch(metadata), *_shape(metadata, name))) for name in outputs)


def _batch(metadata: FileMetadata) -> int:
    return -1 if metadata.batch is None else metadata.batch


def _shape(metadata: FileMetadata, name: str) -> tuple[int, ...]:
    """Without the batch."""
    output = metadata.network.output(name)
    free = output.sides if metadata.dynamic_image_size else ()
    return tuple(-1 if axis in free else side for axis, side in enumerate(output.shape))
