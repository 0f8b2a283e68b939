"""`deformable_attention` as a TensorRT plugin: what is its own; plugins/tensorrt/registry.py has the rest."""

from collections.abc import Sequence
from typing import Any

from dat_deploy.plugins.deformable_attention.torch_op import deformable_attention
from dat_deploy.plugins.tensorrt.registry import PluginSpecification

__all__ = ["SPECIFICATION"]


def _output_shape(query: Sequence[Any], *_: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(query)


SPECIFICATION = PluginSpecification(
    name="deformable_attention",
    operator=deformable_attention,
    inputs={"query": 4, "key": 3, "value": 3, "sampling_locations": 5, "relative_position_bias_table": 3},
    attributes={"num_heads": int, "half_pixel_queries": bool},
    output_shape=_output_shape,
    sized_by=("query", "key", "sampling_locations", "relative_position_bias_table"),
)
