"""`torch.ops.dat_deploy.toy_sample`."""

from dat_deploy.plugins.toy_sample.specification import SPECIFICATION
from torch import Tensor

from dat_deploy.plugins.dispatch import compute, require, require_inputs, torch_operator

__all__ = ["toy_sample"]


def _check(value: Tensor, sampling_locations: Tensor, scale_table: Tensor, slope: float, steps: list[float]) -> None:
    require_inputs(SPECIFICATION, value, sampling_locations, scale_table)
    require(len(steps) == 2, SPECIFICATION.name, f"{len(steps)} steps", "2")


@torch_operator(SPECIFICATION, _check)
def toy_sample(
    value: Tensor, sampling_locations: Tensor, scale_table: Tensor, slope: float, steps: list[float]
) -> Tensor:
    """See the reference."""
    return compute(SPECIFICATION, (value, sampling_locations, scale_table), (slope, steps))
