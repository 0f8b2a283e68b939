"""What is known of `deformable_attention`."""

from collections.abc import Sequence
from typing import Any

from dat_deploy.plugins.specification import BOOL, INT, Frame, Input, Role, Specification

__all__ = ["SPECIFICATION"]


def _output_shape(query: Sequence[Any], *_: Sequence[Any], **__: Any) -> tuple[Any, ...]:
    return tuple(query)


SPECIFICATION = Specification(
    name="deformable_attention",
    inputs={
        "query": Input("B H W C"),
        "key": Input("B Ns C"),
        "value": Input("B Ns C"),
        "sampling_locations": Input("B G Hk Wk 2", Role.LOCATIONS),
        "relative_position_bias_table": Input("M Th Tw", Role.TABLE),
    },
    attributes={"num_heads": INT, "half_pixel_queries": BOOL},
    output_shape=_output_shape,
    sized_by=("query", "key", "sampling_locations", "relative_position_bias_table"),
    frame=Frame(-1.0, 1.0, align_corners=True, axes=("y", "x")),
)
