"""`deformable_sample` as a TensorRT plugin: what is its own; plugins/tensorrt/registry.py has the rest."""

from collections.abc import Sequence
from typing import Any

from dat_deploy.plugins.deformable_sample.torch_op import deformable_sample
from dat_deploy.plugins.tensorrt.registry import PluginSpecification

__all__ = ["SPECIFICATION"]


def _output_shape(value: Sequence[Any], sampling_locations: Sequence[Any]) -> tuple[Any, ...]:
    return value[0], sampling_locations[2] * sampling_locations[3], value[3]


SPECIFICATION = PluginSpecification(
    name="deformable_sample",
    operator=deformable_sample,
    inputs={"value": 4, "sampling_locations": 5},
    attributes={},
    output_shape=_output_shape,
    sized_by=("value", "sampling_locations"),
)
