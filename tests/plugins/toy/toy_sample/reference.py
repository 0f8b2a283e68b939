"""What `toy_sample` means."""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["toy_sample"]


def toy_sample(
    value: Tensor, sampling_locations: Tensor, scale_table: Tensor, slope: float, steps: Sequence[float]
) -> Tensor:
    """`value · (slope + step_0 x + step_1 y) · scale`, for the x and y of the locations."""
    x, y = sampling_locations.split(1, dim=-1)
    factor = (slope + steps[0] * x + steps[1] * y) * scale_table
    return (value * factor).to(value.dtype)
