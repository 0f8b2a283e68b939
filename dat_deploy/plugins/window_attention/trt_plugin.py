"""`window_attention` as a TensorRT plugin: what is its own; plugins/tensorrt/registry.py has the rest."""

from collections.abc import Sequence
from typing import Any

from dat_deploy.plugins.tensorrt.registry import PluginSpecification
from dat_deploy.plugins.window_attention.torch_op import window_attention

__all__ = ["SPECIFICATION"]


def _output_shape(qkv: Sequence[Any], *_: Sequence[Any]) -> tuple[Any, ...]:
    return qkv[0], qkv[1], qkv[2], qkv[3] // 3


SPECIFICATION = PluginSpecification(
    name="window_attention",
    operator=window_attention,
    inputs={"qkv": 4, "relative_position_bias_table": 2},
    attributes={"num_heads": int, "window_size": int, "shift_size": int},
    output_shape=_output_shape,
    sized_by=("qkv",),
)
