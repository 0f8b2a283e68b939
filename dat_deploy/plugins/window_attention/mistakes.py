"""What a wrong `window_attention` gives."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dat_deploy.plugins.window_attention.reference import window_attention

__all__ = ["mistakes"]


def mistakes(inputs: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """See `Operator.mistakes`."""
    qkv, table = inputs["qkv"], inputs["relative_position_bias_table"]
    if attributes["shift_size"]:
        yield "its windows were not shifted", window_attention(qkv, table, **{**attributes, "shift_size": 0})
    yield "the bias table were zero", window_attention(qkv, torch.zeros_like(table), **attributes)
    side = 2 * attributes["window_size"] - 1
    transposed = table.reshape(side, side, -1).transpose(0, 1).reshape(table.shape)
    yield "the bias table were transposed", window_attention(qkv, transposed, **attributes)
