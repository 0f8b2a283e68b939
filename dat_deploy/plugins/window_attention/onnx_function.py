"""`window_attention` as ONNX functions of standard operators: one body a lowering.

All bodies share the attention; they differ in how pixels get into their windows and back. `function` moves each pixel
once, by one Gather that shifts and partitions at the same time: the fastest on ONNX Runtime's CPU. The inlined
lowerings roll with Slice and Concat, which compilers for accelerators fuse, and which vanish where nothing is shifted.
"""

import onnxscript
from onnxscript import FLOAT
from onnxscript import opset18 as op

from dat_deploy.plugins.onnx_domain import DOMAIN

__all__ = ["BODIES", "HELPERS"]


@onnxscript.script(DOMAIN, default_opset=op)
def window_bias(qkv, relative_position_bias_table, window_size: int, shift_size: int):
    """[nW or 1, M, Ws², Ws²]: the bias of each pair of pixels, and -100 between pixels that only the shift unites.

    Without a shift all windows share one bias, so the first axis is 1. All of it is constant once the size is known.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    first = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    image = op.Gather(qkv, op.Constant(value_int=0), axis=0)
    side = op.Reshape(op.Constant(value_int=window_size), one)
    shift = op.Reshape(op.Constant(value_int=shift_size), one)
    area = side * side

    pixels = op.Range(first, op.Constant(value_int=window_size), step)
    offset = op.Unsqueeze(pixels, one) - op.Unsqueeze(pixels, zero) + side - 1  # Ws, Ws
    offset_y = op.Reshape(offset * (side + side - 1), op.Concat(side, one, side, one, axis=0))
    offset_x = op.Reshape(offset, op.Concat(one, side, one, side, axis=0))
    index = op.Reshape(offset_y + offset_x, op.Concat(area, area, axis=0))
    bias = op.Gather(op.Transpose(relative_position_bias_table, perm=[1, 0]), index, axis=1)  # M, Ws², Ws²

    is_shifted = shift > 0
    rows = op.Where(is_shifted, op.Shape(image, start=0, end=1) / side, one)
    columns = op.Where(is_shifted, op.Shape(image, start=1, end=2) / side, one)
    height = rows * side
    width = columns * side
    y = op.Range(first, op.Squeeze(height), step)
    x = op.Range(first, op.Squeeze(width), step)
    region_y = op.Cast(y >= height - side, to=7) + op.Cast(y >= height - shift, to=7)
    region_x = op.Cast(x >= width - side, to=7) + op.Cast(x >= width - shift, to=7)
    region_y = op.Reshape(region_y * 3, op.Concat(rows, one, side, one, axis=0))
    region_x = op.Reshape(region_x, op.Concat(one, columns, one, side, axis=0))
    region = op.Reshape(region_y + region_x, op.Concat(rows * columns, area, axis=0))
    together = op.Equal(
        op.Unsqueeze(region, op.Constant(value_ints=[1])), op.Unsqueeze(region, op.Constant(value_ints=[2]))
    )
    mask = op.Where(together, op.Constant(value_float=0.0), op.Constant(value_float=-100.0))  # nW or 1, Ws², Ws²
    return op.Unsqueeze(mask, one) + bias


@onnxscript.script(DOMAIN, default_opset=op)
def attention_in_windows(split, bias, head_dim):
    """Query, key and value as [3, B, nW, M, Ws², D] -> [B, nW, M, Ws², D]."""
    q, k, v = op.Split(split, op.Constant(value_ints=[1, 1, 1]), axis=0)
    axis = op.Constant(value_ints=[0])
    q = op.Squeeze(q, axis)
    k = op.Squeeze(k, axis)
    v = op.Squeeze(v, axis)
    scores = op.MatMul(q / op.Sqrt(op.Cast(head_dim, to=1)), op.Transpose(k, perm=[0, 1, 2, 4, 3])) + bias
    return op.MatMul(op.Softmax(scores, axis=-1), v)


@onnxscript.script(DOMAIN, default_opset=op)
def window_attention_roll(
    qkv: FLOAT["B", "H", "W", "C3"],  # noqa: F821  # letters of dimensions, as onnxscript writes them
    relative_position_bias_table: FLOAT["T", "M"],  # noqa: F821
    num_heads: int,
    window_size: int,
    shift_size: int,
) -> FLOAT["B", "H", "W", "C"]:  # noqa: F821
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    minus = op.Constant(value_ints=[-1])
    end = op.Constant(value_ints=[9223372036854775807])
    axis_y = op.Constant(value_ints=[1])
    axis_x = op.Constant(value_ints=[2])
    side = op.Reshape(op.Constant(value_int=window_size), one)
    shift = op.Reshape(op.Constant(value_int=shift_size), one)
    heads = op.Reshape(op.Constant(value_int=num_heads), one)
    image = op.Gather(qkv, op.Constant(value_int=0), axis=0)
    height = op.Shape(image, start=0, end=1)
    width = op.Shape(image, start=1, end=2)
    rows = height / side
    columns = width / side
    head_dim = op.Shape(image, start=2, end=3) / (heads * 3)

    rolled = op.Concat(op.Slice(qkv, shift, end, axis_y), op.Slice(qkv, zero, shift, axis_y), axis=1)
    rolled = op.Concat(op.Slice(rolled, shift, end, axis_x), op.Slice(rolled, zero, shift, axis_x), axis=2)
    three = op.Constant(value_ints=[3])
    split = op.Reshape(rolled, op.Concat(zero, rows, side, columns, side, three, heads, head_dim, axis=0))
    split = op.Transpose(split, perm=[5, 0, 1, 3, 6, 2, 4, 7])  # 3, B, H/Ws, W/Ws, M, Ws, Ws, D
    split = op.Reshape(split, op.Concat(three, minus, rows * columns, heads, side * side, head_dim, axis=0))
    bias = window_bias(qkv, relative_position_bias_table, window_size, shift_size)
    out = attention_in_windows(split, bias, head_dim)
    out = op.Reshape(out, op.Concat(minus, rows, columns, heads, side, side, head_dim, axis=0))
    out = op.Transpose(out, perm=[0, 1, 4, 2, 5, 3, 6])  # B, H/Ws, Ws, W/Ws, Ws, M, D
    out = op.Reshape(out, op.Concat(minus, height, width, heads * head_dim, axis=0))
    back = op.Neg(shift)
    out = op.Concat(op.Slice(out, back, end, axis_y), op.Slice(out, zero, back, axis_y), axis=1)
    return op.Concat(op.Slice(out, back, end, axis_x), op.Slice(out, zero, back, axis_x), axis=2)


@onnxscript.script(DOMAIN, default_opset=op)
def window_attention_gather(
    qkv: FLOAT["B", "H", "W", "C3"],  # noqa: F821
    relative_position_bias_table: FLOAT["T", "M"],  # noqa: F821
    num_heads: int,
    window_size: int,
    shift_size: int,
) -> FLOAT["B", "H", "W", "C"]:  # noqa: F821
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    minus = op.Constant(value_ints=[-1])
    three = op.Constant(value_ints=[3])
    first = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    side = op.Reshape(op.Constant(value_int=window_size), one)
    shift = op.Reshape(op.Constant(value_int=shift_size), one)
    heads = op.Reshape(op.Constant(value_int=num_heads), one)
    image = op.Gather(qkv, op.Constant(value_int=0), axis=0)
    height = op.Shape(image, start=0, end=1)
    width = op.Shape(image, start=1, end=2)
    rows = height / side
    columns = width / side
    area = side * side
    channels3 = op.Shape(image, start=2, end=3)
    head_dim = channels3 / (heads * 3)

    # where each pixel of each window comes from, as a pixel of the flat map; and the way back
    y = op.Mod(op.Range(first, op.Squeeze(height), step) + shift, height)
    x = op.Mod(op.Range(first, op.Squeeze(width), step) + shift, width)
    from_y = op.Reshape(y * width, op.Concat(rows, one, side, one, axis=0))
    from_x = op.Reshape(x, op.Concat(one, columns, one, side, axis=0))
    source = op.Reshape(from_y + from_x, minus)  # H·W
    y = op.Mod(op.Range(first, op.Squeeze(height), step) - shift + height, height)
    x = op.Mod(op.Range(first, op.Squeeze(width), step) - shift + width, width)
    to_y = (y / side) * columns * area + op.Mod(y, side) * side
    to_x = (x / side) * area + op.Mod(x, side)
    target = op.Reshape(op.Unsqueeze(to_y, one) + op.Unsqueeze(to_x, zero), minus)  # H·W

    pixels = op.Gather(op.Reshape(qkv, op.Concat(zero, minus, channels3, axis=0)), source, axis=1)
    split = op.Reshape(pixels, op.Concat(zero, rows * columns, area, three, heads, head_dim, axis=0))
    split = op.Transpose(split, perm=[3, 0, 1, 4, 2, 5])  # 3, B, nW, M, Ws², D
    # changes nothing, but stops ONNX Runtime from splitting this transpose into three slower ones
    split = op.Reshape(split, op.Concat(three, minus, rows * columns, heads, area, head_dim, axis=0))
    bias = window_bias(qkv, relative_position_bias_table, window_size, shift_size)
    out = attention_in_windows(split, bias, head_dim)
    out = op.Transpose(out, perm=[0, 1, 3, 2, 4])  # B, nW, Ws², M, D
    out = op.Gather(op.Reshape(out, op.Concat(zero, minus, heads * head_dim, axis=0)), target, axis=1)
    return op.Reshape(out, op.Concat(zero, height, width, minus, axis=0))


BODIES = {
    "function": window_attention_gather,
    "gather": window_attention_roll,
    "gridsample": window_attention_roll,
    "hat": window_attention_roll,
}
HELPERS = (window_bias, attention_in_windows)
