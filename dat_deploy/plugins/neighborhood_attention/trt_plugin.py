"""`neighborhood_attention` as a TensorRT plugin: what is its own; plugins/tensorrt/registry.py has the rest."""

from collections.abc import Sequence
from typing import Any

from dat_deploy.plugins.neighborhood_attention.torch_op import neighborhood_attention
from dat_deploy.plugins.tensorrt.registry import PluginSpecification

__all__ = ["SPECIFICATION"]


def _output_shape(qkv: Sequence[Any], *_: Sequence[Any]) -> tuple[Any, ...]:
    return qkv[0], qkv[1], qkv[2], qkv[3] // 3


SPECIFICATION = PluginSpecification(
    name="neighborhood_attention",
    operator=neighborhood_attention,
    inputs={"qkv": 4, "padding_qkv": 1, "relative_position_bias_table": 3},
    attributes={"num_heads": int, "kernel_size": int, "dilation": int},
    output_shape=_output_shape,
    sized_by=("qkv",),
)
