"""What a wrong `deformable_sample` gives."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dat_deploy.plugins.deformable_sample.reference import deformable_sample

__all__ = ["mistakes"]


def mistakes(inputs: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """See `Operator.mistakes`."""
    value, locations = inputs["value"], inputs["sampling_locations"]
    sides = torch.tensor(value.shape[1:3]).double()
    yield "x and y of the locations were swapped", deformable_sample(value, locations.flip(-1))
    moved = ((locations + 1) * sides - 1) / (sides - 1).clamp(min=1) - 1
    yield "it read with align_corners=False", deformable_sample(value, moved)
    index = ((locations + 1) / 2 * (sides - 1)).round()
    yield "it read the nearest pixel", deformable_sample(value, index / (sides - 1).clamp(min=1) * 2 - 1)
    yield "it read the border outside the map", deformable_sample(value, locations.clamp(-1, 1))
