"""`torch.ops.dat_deploy.deformable_sample`: the kernel on CUDA, else the reference; one node for torch.export."""

from torch import Tensor

from dat_deploy.plugins.deformable_sample.specification import SPECIFICATION
from dat_deploy.plugins.dispatch import compute, require, require_inputs, torch_operator

__all__ = ["deformable_sample"]


def _check(value: Tensor, sampling_locations: Tensor) -> None:
    require_inputs(SPECIFICATION, value, sampling_locations)
    channels, groups = value.shape[-1], sampling_locations.shape[1]
    require(
        groups > 0 and channels % groups == 0,
        SPECIFICATION.name,
        f"{channels} channels and {groups} groups of locations",
        "groups that divide the channels",
    )


@torch_operator(SPECIFICATION, _check)
def deformable_sample(value: Tensor, sampling_locations: Tensor) -> Tensor:
    """Read a channels-last feature map between its pixels, at points that a network chose.

    This is `torch.nn.functional.grid_sample` (bilinear, `align_corners=True`, zeros outside) for channels-last maps,
    with one set of points for each group of channels: group g owns the channels g·C/G to (g + 1)·C/G. It has no
    gradient. Source: arXiv 2201.00520, §3.2.

    Args:
        value: [B, H, W, C], the feature map.
        sampling_locations: [B, G, Hk, Wk, 2] float32, where each group reads, last axis (y, x); -1 and +1 are the
            centres of the first and last pixel of an axis. Points outside read zeros.

    Returns:
        [B, Hk·Wk, C] in the type of `value`, the points row by row.

    Raises:
        ShapeError: if shapes, types or devices do not fit each other.
    """
    return compute(SPECIFICATION, (value, sampling_locations), ())
