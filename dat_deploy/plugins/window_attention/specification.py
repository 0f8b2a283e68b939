"""What is known of `window_attention`."""

from dat_deploy.plugins.specification import INT, Input, Role, Specification, shape_without_projection

__all__ = ["SPECIFICATION"]


SPECIFICATION = Specification(
    name="window_attention",
    inputs={"qkv": Input("B H W 3C"), "relative_position_bias_table": Input("T M", Role.TABLE)},
    attributes={"num_heads": INT, "window_size": INT, "shift_size": INT},
    output_shape=shape_without_projection,
    sized_by=("qkv",),
)
