"""`torch.ops.dat_deploy.window_attention`: one node for torch.export."""

import torch
from torch import Tensor

from dat_deploy.plugins.window_attention import reference

__all__ = ["window_attention"]


@torch.library.custom_op("dat_deploy::window_attention", mutates_args=())
def window_attention(
    qkv: Tensor, relative_position_bias_table: Tensor, num_heads: int, window_size: int, shift_size: int
) -> Tensor:
    return reference.window_attention(qkv, relative_position_bias_table, num_heads, window_size, shift_size)


@window_attention.register_fake
def _(qkv: Tensor, relative_position_bias_table: Tensor, num_heads: int, window_size: int, shift_size: int) -> Tensor:
    batch, height, width, channels3 = qkv.shape
    return qkv.new_empty(batch, height, width, channels3 // 3)
