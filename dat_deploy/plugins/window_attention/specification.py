"""What is known of `window_attention`."""

from collections.abc import Sequence
from typing import Any

from dat_deploy.plugins.specification import INT, Input, Role, Specification

__all__ = ["SPECIFICATION"]


def _output_shape(qkv: Sequence[Any], *_: Sequence[Any], **__: Any) -> tuple[Any, ...]:
    return qkv[0], qkv[1], qkv[2], qkv[3] // 3


SPECIFICATION = Specification(
    name="window_attention",
    inputs={"qkv": Input("B H W 3C"), "relative_position_bias_table": Input("T M", Role.TABLE)},
    attributes={"num_heads": INT, "window_size": INT, "shift_size": INT},
    output_shape=_output_shape,
    sized_by=("qkv",),
)
