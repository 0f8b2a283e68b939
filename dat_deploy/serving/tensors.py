"""The tensors that an exported file or an engine takes and gives, in the words of the Open Inference Protocol."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dat_deploy.errors import ExportError
from dat_deploy.metadata import FileMetadata
from dat_deploy.networks.dat.variants import stride

__all__ = ["TensorSpec", "input_spec", "output_specs"]

_OUTPUT = re.compile(r"logits|feature_map_([0-3])|(?:sampling_locations|attention)_([0-3])_(0|[1-9][0-9]{0,3})")


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

    `logits` [B, classes]; `feature_map_i` [B, C, H, W] of stage i; `sampling_locations_i_j` [B, G, Hk, Wk, 2] and
    `attention_i_j` [B, G, Hk, Wk] of the deformable block j of stage i.

    Raises:
        ExportError: for a name that is no output of the network.
    """
    return tuple(TensorSpec(name, "FP32", (_batch(metadata), *_shape(metadata, name))) for name in outputs)


def _batch(metadata: FileMetadata) -> int:
    return -1 if metadata.batch is None else metadata.batch


def _shape(metadata: FileMetadata, output: str) -> tuple[int, ...]:
    """Without the batch."""
    network = metadata.network
    found = _OUTPUT.fullmatch(output)
    numbers = [] if found is None else [int(text) for text in found.groups() if text is not None]
    if found is not None and not numbers and not network.features:
        return (network.classes,)
    if len(numbers) == 1 and numbers[0] in network.features:
        return network.stages[numbers[0]].channels, *_feature_map(metadata, numbers[0])
    if len(numbers) == 2 and tuple(numbers) in network.deformable_blocks:
        stage = network.stages[numbers[0]]
        sides = _feature_map(metadata, numbers[0])
        sampled = sides if metadata.dynamic_image_size else stage.sampled_map(*sides)
        return (stage.offset_groups, *sampled, *((2,) if output.startswith("sampling") else ()))
    maps = [f"feature_map_{i}" for i in network.features]
    blocks = [f"sampling_locations_{i}_{j} and attention_{i}_{j}" for i, j in network.deformable_blocks]
    raise ExportError(
        f"'{output}' is no output of {network.name}; its outputs are {', '.join(maps or ['logits'])}"
        f"{', and on request ' + ', '.join(blocks) if blocks else ''}. Export it again."
    )


def _feature_map(metadata: FileMetadata, stage: int) -> tuple[int, int]:
    """(H, W) of a stage's tensors; -1 where the image's size is free."""
    if metadata.dynamic_image_size:
        return -1, -1
    height, width = metadata.image_size
    return height // stride(stage), width // stride(stage)
