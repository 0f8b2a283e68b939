"""`torch.ops.dat_deploy.neighborhood_attention`: one node for torch.export."""

import torch
from torch import Tensor

from dat_deploy.plugins.neighborhood_attention import reference

__all__ = ["neighborhood_attention"]


@torch.library.custom_op("dat_deploy::neighborhood_attention", mutates_args=())
def neighborhood_attention(
    qkv: Tensor,
    padding_qkv: Tensor,
    relative_position_bias_table: Tensor,
    num_heads: int,
    kernel_size: int,
    dilation: int,
) -> Tensor:
    return reference.neighborhood_attention(
        qkv, padding_qkv, relative_position_bias_table, num_heads, kernel_size, dilation
    )


@neighborhood_attention.register_fake
def _(
    qkv: Tensor,
    padding_qkv: Tensor,
    relative_position_bias_table: Tensor,
    num_heads: int,
    kernel_size: int,
    dilation: int,
) -> Tensor:
    batch, height, width, channels3 = qkv.shape
    return qkv.new_empty(batch, height, width, channels3 // 3)
