"""What a wrong `toy_sample` gives."""

from collections.abc import Iterator, Mapping
from typing import Any

from dat_deploy.plugins.toy_sample.reference import toy_sample
from torch import Tensor

__all__ = ["mistakes"]


def mistakes(inputs: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """See `Operator.mistakes`."""
    flipped = {**inputs, "sampling_locations": inputs["sampling_locations"].flip(-1)}
    yield "x and y of the locations were swapped", toy_sample(**flipped, **attributes)
