"""What is known of `neighborhood_attention`."""

from collections.abc import Sequence
from typing import Any

from dat_deploy.plugins.specification import INT, Input, Role, Specification

__all__ = ["SPECIFICATION"]


def _output_shape(qkv: Sequence[Any], *_: Sequence[Any], **__: Any) -> tuple[Any, ...]:
    return qkv[0], qkv[1], qkv[2], qkv[3] // 3


SPECIFICATION = Specification(
    name="neighborhood_attention",
    inputs={
        "qkv": Input("B H W 3C"),
        "padding_qkv": Input("3C", Role.WEIGHT),
        "relative_position_bias_table": Input("M T T", Role.TABLE),
    },
    attributes={"num_heads": INT, "kernel_size": INT, "dilation": INT},
    output_shape=_output_shape,
    sized_by=("qkv",),
)
