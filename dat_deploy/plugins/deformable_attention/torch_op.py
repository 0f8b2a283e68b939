"""`torch.ops.dat_deploy.deformable_attention`: one node for torch.export."""

import torch
from torch import Tensor

from dat_deploy.plugins.deformable_attention import reference

__all__ = ["deformable_attention"]


@torch.library.custom_op("dat_deploy::deformable_attention", mutates_args=())
def deformable_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sampling_locations: Tensor,
    relative_position_bias_table: Tensor,
    num_heads: int,
    half_pixel_queries: bool,
) -> Tensor:
    return reference.deformable_attention(
        query, key, value, sampling_locations, relative_position_bias_table, num_heads, half_pixel_queries
    )


@deformable_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sampling_locations: Tensor,
    relative_position_bias_table: Tensor,
    num_heads: int,
    half_pixel_queries: bool,
) -> Tensor:
    return query.new_empty(query.shape)
