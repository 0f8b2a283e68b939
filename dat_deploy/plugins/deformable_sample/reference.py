"""What `deformable_sample` means: a bilinear read of a feature map at learned locations."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["deformable_sample"]


def deformable_sample(value: Tensor, sampling_locations: Tensor) -> Tensor:
    """Read a channels-last feature map at one set of locations for each group of channels.

    The read is bilinear, with `align_corners=True` and zeros outside, `φ(z; p) = Σ_r g(p_y, r_y) g(p_x, r_x) z[r]`
    with `g(a, b) = max(0, 1 - |a - b|)` (arXiv 2201.00520, §3.2). Arguments and result are those of
    `torch_op.deformable_sample`; the coordinates are used in their own type.
    """
    batch, height, width, channels = value.shape
    _, groups, sampled_height, sampled_width, _ = sampling_locations.shape
    images = value.reshape(batch, height, width, groups, channels // groups).permute(0, 3, 4, 1, 2)
    sampled = F.grid_sample(
        images.reshape(batch * groups, channels // groups, height, width).to(sampling_locations.dtype),
        sampling_locations.flatten(0, 1).flip(-1),  # grid_sample takes (x, y)
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    )  # B·G, C/G, Hk, Wk
    sampled = sampled.reshape(batch, channels, sampled_height * sampled_width)
    return sampled.transpose(1, 2).to(value.dtype).contiguous()
