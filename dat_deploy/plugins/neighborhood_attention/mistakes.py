"""What a wrong `neighborhood_attention` gives."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dat_deploy.plugins.neighborhood_attention.reference import neighborhood_attention

__all__ = ["mistakes"]


def mistakes(inputs: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """See `Operator.mistakes`."""
    qkv, padding, table = inputs["qkv"], inputs["padding_qkv"], inputs["relative_position_bias_table"]
    for change, changed in (("zero", torch.zeros_like(table)), ("transposed", table.transpose(1, 2))):
        yield f"the bias table were {change}", neighborhood_attention(qkv, padding, changed, **attributes)
