"""What is known of `deformable_sample`."""

from collections.abc import Sequence
from typing import Any

from dat_deploy.plugins.specification import Frame, Input, Role, Specification

__all__ = ["SPECIFICATION"]


def _output_shape(value: Sequence[Any], sampling_locations: Sequence[Any]) -> tuple[Any, ...]:
    return value[0], sampling_locations[2] * sampling_locations[3], value[3]


SPECIFICATION = Specification(
    name="deformable_sample",
    inputs={"value": Input("B H W C"), "sampling_locations": Input("B G Hk Wk 2", Role.LOCATIONS)},
    attributes={},
    output_shape=_output_shape,
    sized_by=("value", "sampling_locations"),
    frame=Frame(-1.0, 1.0, align_corners=True, axes=("y", "x")),
)
