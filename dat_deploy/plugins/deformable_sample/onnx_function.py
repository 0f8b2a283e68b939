"""`deformable_sample` as ONNX functions of standard operators: one body a lowering."""

import onnxscript
from onnxscript import FLOAT
from onnxscript import opset18 as op

from dat_deploy.plugins.onnx_domain import DOMAIN

__all__ = ["BODIES", "HELPERS"]


@onnxscript.script(DOMAIN, default_opset=op)
def deformable_sample_gridsample(
    value: FLOAT["B", "H", "W", "C"],  # noqa: F821  # letters of dimensions, as onnxscript writes them
    sampling_locations: FLOAT["B", "G", "Hk", "Wk", 2],  # noqa: F821
) -> FLOAT["B", "Ns", "C"]:  # noqa: F821
    minus = op.Constant(value_ints=[-1])
    image = op.Gather(value, op.Constant(value_int=0), axis=0)
    plane = op.Shape(image, start=0, end=2)
    channels = op.Shape(image, start=2, end=3)
    points = op.Gather(sampling_locations, op.Constant(value_int=0), axis=0)
    groups = op.Shape(points, start=0, end=1)
    sampled = op.Shape(points, start=1, end=3)

    images = op.Transpose(value, perm=[0, 3, 1, 2])
    images = op.Reshape(images, op.Concat(minus, channels / groups, plane, axis=0))  # B·G, C/G, H, W
    grid = op.Reshape(sampling_locations, op.Concat(minus, sampled, op.Constant(value_ints=[2]), axis=0))
    y, x = op.Split(grid, op.Constant(value_ints=[1, 1]), axis=-1)
    out = op.GridSample(
        images, op.Concat(x, y, axis=-1), mode="bilinear", padding_mode="zeros", align_corners=1
    )  # B·G, C/G, Hk, Wk
    out = op.Reshape(out, op.Concat(minus, channels, op.ReduceProd(sampled), axis=0))
    return op.Transpose(out, perm=[0, 2, 1])


@onnxscript.script(DOMAIN, default_opset=op)
def deformable_sample_gather(
    value: FLOAT["B", "H", "W", "C"],  # noqa: F821
    sampling_locations: FLOAT["B", "G", "Hk", "Wk", 2],  # noqa: F821
) -> FLOAT["B", "Ns", "C"]:  # noqa: F821
    """Four neighbours from a map padded with zeros, one border before and two after; channels stay last."""
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    minus = op.Constant(value_ints=[-1])
    image = op.Gather(value, op.Constant(value_int=0), axis=0)
    height = op.Shape(image, start=0, end=1)
    width = op.Shape(image, start=1, end=2)
    channels = op.Shape(image, start=2, end=3)
    points = op.Gather(sampling_locations, op.Constant(value_int=0), axis=0)
    groups = op.Shape(points, start=0, end=1)
    keys = op.Shape(points, start=1, end=2) * op.Shape(points, start=2, end=3)

    locations = op.Reshape(sampling_locations, op.Concat(minus, groups, keys, op.Constant(value_ints=[2]), axis=0))
    location_y, location_x = op.Split(
        op.Transpose(locations, perm=[0, 2, 1, 3]), op.Constant(value_ints=[1, 1]), axis=-1
    )  # B, Ns, G, 1
    last_y = op.Cast(height - 1, to=1)
    last_x = op.Cast(width - 1, to=1)
    y = op.Min(op.Max((location_y + 1.0) * 0.5 * last_y, op.Constant(value_float=-1.0)), last_y + 1.0)
    x = op.Min(op.Max((location_x + 1.0) * 0.5 * last_x, op.Constant(value_float=-1.0)), last_x + 1.0)
    row = op.Floor(y)
    column = op.Floor(x)
    weight_y = y - row
    weight_x = x - column

    padded = op.Pad(value, op.Constant(value_ints=[0, 1, 1, 0, 0, 2, 2, 0]))
    pixels = op.Reshape(padded, op.Concat(zero, minus, groups, channels / groups, axis=0))  # B, pixels, G, C/G
    stride = width + 3
    # clipped again as integers: NaN has no index, and must spoil its own image alone
    padded_row = op.Clip(op.Cast(row, to=7) + 1, op.Constant(value_int=0), op.Squeeze(height) + 1)
    padded_column = op.Clip(op.Cast(column, to=7) + 1, op.Constant(value_int=0), op.Squeeze(width) + 1)
    first = padded_row * stride + padded_column  # B, Ns, G, 1
    group = op.Range(op.Constant(value_int=0), op.Squeeze(groups), op.Constant(value_int=1))
    group = op.Expand(op.Reshape(group, op.Concat(one, groups, one, axis=0)), op.Shape(first))  # B, Ns, G, 1
    above_left = op.GatherND(pixels, op.Concat(first, group, axis=-1), batch_dims=1)  # B, Ns, G, C/G
    above_right = op.GatherND(pixels, op.Concat(first + 1, group, axis=-1), batch_dims=1)
    below_left = op.GatherND(pixels, op.Concat(first + stride, group, axis=-1), batch_dims=1)
    below_right = op.GatherND(pixels, op.Concat(first + (stride + 1), group, axis=-1), batch_dims=1)
    above = above_left + weight_x * (above_right - above_left)
    below = below_left + weight_x * (below_right - below_left)
    out = above + weight_y * (below - above)
    return op.Reshape(out, op.Concat(zero, keys, channels, axis=0))


@onnxscript.script(DOMAIN, default_opset=op)
def hat_rows(location, size):
    """Weight of every row of the map for every key: [B, G, Ns, H], `max(0, 1 - |y - row|)`."""
    last = op.Cast(size - 1, to=1)
    position = (location + 1.0) * 0.5 * last
    rows = op.Cast(op.Range(op.Constant(value_int=0), op.Squeeze(size), op.Constant(value_int=1)), to=1)
    return op.Relu(1.0 - op.Abs(position - rows))


@onnxscript.script(DOMAIN, default_opset=op)
def deformable_sample_hat(
    value: FLOAT["B", "H", "W", "C"],  # noqa: F821
    sampling_locations: FLOAT["B", "G", "Hk", "Wk", 2],  # noqa: F821
) -> FLOAT["B", "Ns", "C"]:  # noqa: F821
    """A product with the matrix of all weights [B, G, Ns, H·W]: no gather at all."""
    zero = op.Constant(value_ints=[0])
    minus = op.Constant(value_ints=[-1])
    image = op.Gather(value, op.Constant(value_int=0), axis=0)
    height = op.Shape(image, start=0, end=1)
    width = op.Shape(image, start=1, end=2)
    channels = op.Shape(image, start=2, end=3)
    points = op.Gather(sampling_locations, op.Constant(value_int=0), axis=0)
    groups = op.Shape(points, start=0, end=1)
    keys = op.Shape(points, start=1, end=2) * op.Shape(points, start=2, end=3)

    locations = op.Reshape(sampling_locations, op.Concat(minus, groups, keys, op.Constant(value_ints=[2]), axis=0))
    location_y, location_x = op.Split(locations, op.Constant(value_ints=[1, 1]), axis=-1)  # B, G, Ns, 1
    weights_y = op.Unsqueeze(hat_rows(location_y, height), op.Constant(value_ints=[4]))
    weights_x = op.Unsqueeze(hat_rows(location_x, width), op.Constant(value_ints=[3]))
    weights = op.Reshape(weights_y * weights_x, op.Concat(zero, groups, keys, minus, axis=0))  # B, G, Ns, H·W
    pixels = op.Reshape(value, op.Concat(zero, minus, groups, channels / groups, axis=0))
    out = op.MatMul(weights, op.Transpose(pixels, perm=[0, 2, 1, 3]))  # B, G, Ns, C/G
    return op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), op.Concat(zero, keys, channels, axis=0))


BODIES = {
    "function": deformable_sample_gather,
    "gather": deformable_sample_gather,
    "gridsample": deformable_sample_gridsample,
    "hat": deformable_sample_hat,
}
HELPERS = (hat_rows,)
