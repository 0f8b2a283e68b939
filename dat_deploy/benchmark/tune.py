"""Measure which configuration of each kernel is the fastest for a network on the GPU at hand, and keep the choice."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dat_deploy.errors import DatDeployError, ShapeError
from dat_deploy.networks.family import Network, find_network
from dat_deploy.precision import EXPORTED

if TYPE_CHECKING:
    from dat_deploy.benchmark.tune_network import Tuning

# What loads torch is imported after the checks, so that a wrong argument is told at once.

__all__ = ["tune"]


def tune(
    name_or_variant: str | Network,
    *,
    batches: Sequence[int] = (1,),
    image_size: tuple[int, int] | None = None,
    precision: str = "fp16",
    progress: Callable[[int, int, str], None] | None = None,
) -> "Tuning":
    """Time every configuration of every kernel that the network launches, and keep the fastest right one for this GPU.

    The operators of processes that start afterwards take what is kept; see `plugins.tuning`.

    Args:
        precision: one of `precision.EXPORTED`.
        progress: called with how many launches are done, of how many, and what comes next.

    Raises:
        DatDeployError: if there is no such precision.
        ShapeError, VariantError: see `find_network`; ShapeError for a batch of none, too.
        UnsupportedError: if there is no CUDA device.
    """
    if precision not in EXPORTED:
        raise DatDeployError(f"there is no precision '{precision}'; it is one of {', '.join(EXPORTED)}.")
    if not batches or min(batches) < 1:
        raise ShapeError(f"batch sizes {list(batches)} cannot be run; give sizes of at least 1, such as 1,8,32.")
    network = find_network(name_or_variant, image_size=image_size)
    from dat_deploy.benchmark.tune_network import tune_network

    return tune_network(network, batches, precision, progress)
