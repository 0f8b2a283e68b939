"""What is known of `toy_sample`."""

from collections.abc import Sequence
from typing import Any

from dat_deploy.plugins.specification import FLOAT, FLOATS, Frame, Input, Role, Specification

__all__ = ["SPECIFICATION"]


def _output_shape(value: Sequence[Any], *_: Sequence[Any], **__: Any) -> tuple[Any, ...]:
    return tuple(value)


SPECIFICATION = Specification(
    name="toy_sample",
    inputs={
        "value": Input("B H W C"),
        "sampling_locations": Input("B H W 2", Role.LOCATIONS),
        "scale_table": Input("C", Role.TABLE),
    },
    attributes={"slope": FLOAT, "steps": FLOATS},
    output_shape=_output_shape,
    sized_by=("value",),
    frame=Frame(0.0, 1.0, align_corners=False, axes=("x", "y")),
)
