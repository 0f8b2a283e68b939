"""`window_attention` as an ONNX function of standard operators."""

import onnxscript
from onnxscript import FLOAT
from onnxscript import opset18 as op

from dat_deploy.plugins.onnx_domain import DOMAIN

__all__ = ["BODIES", "HELPERS"]


@onnxscript.script(DOMAIN, default_opset=op)
def window_attention(
    qkv: FLOAT["B", "H", "W", "C3"],
    relative_position_bias_table: FLOAT["T", "M"],
    num_heads: int,
    window_size: int,
    shift_size: int,
):
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    all_axis = op.Constant(value_ints=[9223372036854775807])
    side = op.Reshape(op.Constant(value_int=window_size), one)
    shift = op.Reshape(op.Constant(value_int=shift_size), one)
    heads = op.Reshape(op.Constant(value_int=num_heads), one)
    image = op.Gather(qkv, op.Constant(value_int=0), axis=0)  # only its shape is used: see DESIGN note
    height = op.Shape(image, start=0, end=1)
    width = op.Shape(image, start=1, end=2)
    rows = op.Div(height, side)
    columns = op.Div(width, side)
    axis_y = op.Constant(value_ints=[1])
    axis_x = op.Constant(value_ints=[2])

    # roll up and left
    below = op.Slice(qkv, shift, all_axis, axis_y)
    above = op.Slice(qkv, zero, shift, axis_y)
    rolled = op.Concat(below, above, axis=1)
    right = op.Slice(rolled, shift, all_axis, axis_x)
    left = op.Slice(rolled, zero, shift, axis_x)
    rolled = op.Concat(right, left, axis=2)

    # heads of each window
    three = op.Constant(value_ints=[3])
    minus = op.Constant(value_ints=[-1])
    split_shape = op.Concat(zero, rows, side, columns, side, three, heads, minus, axis=0)
    split = op.Reshape(rolled, split_shape)  # B, H/Ws, Ws, W/Ws, Ws, 3, M, D
    split = op.Transpose(split, perm=[5, 0, 1, 3, 6, 2, 4, 7])  # 3, B, H/Ws, W/Ws, M, Ws, Ws, D
    windows = op.Mul(rows, columns)
    area = op.Mul(side, side)
    head_dim = op.Div(op.Shape(image, start=2, end=3), op.Mul(heads, three))
    q3, k3, v3 = op.Split(split, op.Constant(value_ints=[1, 1, 1]), axis=0)
    shape = op.Concat(minus, windows, heads, area, head_dim, axis=0)
    q = op.Reshape(q3, shape)  # B, nW, M, Ws², D
    k = op.Reshape(k3, shape)
    v = op.Reshape(v3, shape)

    # table row of each pair of pixels
    scalar_zero = op.Constant(value_int=0)
    scalar_one = op.Constant(value_int=1)
    side_scalar = op.Constant(value_int=window_size)
    pixels = op.Range(scalar_zero, side_scalar, scalar_one)
    offset = op.Add(op.Sub(op.Unsqueeze(pixels, one), op.Unsqueeze(pixels, zero)), op.Sub(side, one))  # Ws, Ws
    table_side = op.Sub(op.Add(side, side), one)
    offset_y = op.Reshape(op.Mul(offset, table_side), op.Concat(side, one, side, one, axis=0))
    offset_x = op.Reshape(offset, op.Concat(one, side, one, side, axis=0))
    index = op.Reshape(op.Add(offset_y, offset_x), op.Concat(area, area, axis=0))
    bias = op.Gather(op.Transpose(relative_position_bias_table, perm=[1, 0]), index, axis=1)  # M, Ws², Ws²

    # -100 between pixels that the roll brought together; without a shift there is one region, so one broadcast row
    rolls = op.Min(shift, one)
    mask_rows = op.Where(op.Equal(rolls, one), rows, one)
    mask_columns = op.Where(op.Equal(rolls, one), columns, one)
    mask_height = op.Mul(mask_rows, side)
    mask_width = op.Mul(mask_columns, side)
    y = op.Range(scalar_zero, op.Squeeze(mask_height), scalar_one)
    x = op.Range(scalar_zero, op.Squeeze(mask_width), scalar_one)
    region_y = op.Add(
        op.Cast(op.GreaterOrEqual(y, op.Sub(mask_height, side)), to=7),
        op.Cast(op.GreaterOrEqual(y, op.Sub(mask_height, shift)), to=7),
    )
    region_x = op.Add(
        op.Cast(op.GreaterOrEqual(x, op.Sub(mask_width, side)), to=7),
        op.Cast(op.GreaterOrEqual(x, op.Sub(mask_width, shift)), to=7),
    )
    region_rows = op.Reshape(op.Mul(region_y, three), op.Concat(mask_rows, one, side, one, axis=0))
    region_columns = op.Reshape(region_x, op.Concat(one, mask_columns, one, side, axis=0))
    region_shape = op.Concat(op.Mul(mask_rows, mask_columns), area, axis=0)
    region = op.Reshape(op.Add(region_rows, region_columns), region_shape)
    apart = op.Equal(op.Unsqueeze(region, one), op.Unsqueeze(region, op.Constant(value_ints=[2])))
    mask = op.Where(apart, op.Constant(value_float=0.0), op.Constant(value_float=-100.0))  # nW, Ws², Ws²
    bias = op.Add(op.Unsqueeze(mask, one), bias)  # nW, M, Ws², Ws²

    scale = op.Sqrt(op.Cast(head_dim, to=1))
    scores = op.Add(op.Div(op.MatMul(q, op.Transpose(k, perm=[0, 1, 2, 4, 3])), scale), bias)
    out = op.MatMul(op.Softmax(scores, axis=-1), v)  # B, nW, M, Ws², D
    out = op.Reshape(out, op.Concat(minus, rows, columns, heads, side, side, head_dim, axis=0))
    out = op.Transpose(out, perm=[0, 1, 4, 2, 5, 3, 6])  # B, H/Ws, Ws, W/Ws, Ws, M, D
    out = op.Reshape(out, op.Concat(zero, height, width, minus, axis=0))

    # roll back
    back_y = op.Sub(height, shift)
    back_x = op.Sub(width, shift)
    below = op.Slice(out, back_y, all_axis, axis_y)
    above = op.Slice(out, zero, back_y, axis_y)
    out = op.Concat(below, above, axis=1)
    right = op.Slice(out, back_x, all_axis, axis_x)
    left = op.Slice(out, zero, back_x, axis_x)
    return op.Concat(right, left, axis=2)


BODIES = dict.fromkeys(("function", "gather", "gridsample", "hat"), window_attention)
HELPERS = ()
