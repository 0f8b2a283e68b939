"""What is known of `neighborhood_attention`."""

from dat_deploy.plugins.specification import INT, Input, Role, Specification, shape_without_projection

__all__ = ["SPECIFICATION"]


SPECIFICATION = Specification(
    name="neighborhood_attention",
    inputs={
        "qkv": Input("B H W 3C"),
        "padding_qkv": Input("3C", Role.WEIGHT),
        "relative_position_bias_table": Input("M T T", Role.TABLE),
    },
    attributes={"num_heads": INT, "kernel_size": INT, "dilation": INT},
    output_shape=shape_without_projection,
    sized_by=("qkv",),
)
