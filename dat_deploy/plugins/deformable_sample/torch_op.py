"""`torch.ops.dat_deploy.deformable_sample`: one node for torch.export."""

import torch
from torch import Tensor

from dat_deploy.plugins.deformable_sample import reference

__all__ = ["deformable_sample"]


@torch.library.custom_op("dat_deploy::deformable_sample", mutates_args=())
def deformable_sample(value: Tensor, sampling_locations: Tensor) -> Tensor:
    return reference.deformable_sample(value, sampling_locations)


@deformable_sample.register_fake
def _(value: Tensor, sampling_locations: Tensor) -> Tensor:
    batch, _, _, channels = value.shape
    _, _, sampled_height, sampled_width, _ = sampling_locations.shape
    return value.new_empty(batch, sampled_height * sampled_width, channels)
