"""`neighborhood_attention` as ONNX functions of standard operators: one body a lowering.

The map is cut into tiles of queries; each tile attends to the one rectangle of keys that holds all neighbors of its
queries, and what is no neighbor is masked. So the products are dense and small, and a key is copied about 3 times
rather than K² times. The bodies differ in how pixels get into their tiles: by Gather, or by a product with zeros and
ones where nothing may be gathered.
"""

import onnxscript
from onnxscript import FLOAT
from onnxscript import opset18 as op

from dat_deploy.plugins.onnx_domain import DOMAIN

__all__ = ["BODIES", "HELPERS"]


@onnxscript.script(DOMAIN, default_opset=op)
def axis_tiles(size, kernel_size: int, dilation: int):
    """One axis cut into tiles, as integer tables; n tiles of T queries, and S keys that a tile needs at most.

    T is 7, which divides the maps of 224 px images.

    Returns:
        pixel: [n·T], of each query; the last tile repeats the last pixel.
        key: [n, S], pixels that the tile's keys come from; from `size` on it is padding.
        bias_index: [n, T, S], row of the bias table for each query and key, where they are neighbors.
        is_neighbor: [n, T, S].
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    minus = op.Constant(value_ints=[-1])
    tile = op.Constant(value_int=7)
    kernel = op.Constant(value_int=kernel_size)
    step = op.Constant(value_int=dilation)
    length = op.Squeeze(size)
    padded = op.Max(length, kernel * step)
    count = (length + tile - 1) / tile
    pixel = op.Min(op.Range(zero, count * tile, one), length - 1)  # n·T
    remainder = op.Mod(pixel, step)
    positions = (padded - remainder + step - 1) / step  # pixels with that remainder
    first = op.Min(op.Max(pixel / step - kernel / 2, zero), positions - kernel)  # n·T, in steps of the dilation
    first_pixel = op.Reshape(first * step + remainder, op.Concat(minus, op.Reshape(tile, minus), axis=0))  # n, T

    # the keys of a tile: from those of its first query on, whatever its remainder, to those of its last
    corner = op.Range(zero, count, one) * tile
    lowest = op.Min(op.Max(corner / step - kernel / 2, zero), padded / step - kernel) * step
    last_query = op.Min(corner + tile - 1, length - 1)
    highest = op.Min(op.Max(last_query / step - kernel / 2, zero), (padded + step - 1) / step - kernel)
    highest = op.Min((highest + kernel) * step, padded)
    span = op.ReduceMax(highest - lowest, keepdims=0)
    start = op.Min(lowest, padded - span)
    key = op.Unsqueeze(start, op.Constant(value_ints=[1])) + op.Range(zero, span, one)  # n, S

    key_of_pair = op.Unsqueeze(key, op.Constant(value_ints=[1]))  # n, 1, S
    distance = key_of_pair - op.Unsqueeze(first_pixel, op.Constant(value_ints=[2]))  # n, T, S
    inside = op.And(distance >= zero, distance < kernel * step)
    is_neighbor = op.And(inside, op.Equal(op.Mod(distance, step), zero))
    query_of_pair = op.Unsqueeze(op.Reshape(pixel, op.Shape(first_pixel)), op.Constant(value_ints=[2]))
    bias_index = (key_of_pair - query_of_pair) / step + kernel - 1
    bias_index = op.Clip(bias_index, zero, kernel + kernel - 2)
    return pixel, key, bias_index, is_neighbor


@onnxscript.script(DOMAIN, default_opset=op)
def tile_bias(table, bias_y, bias_x, is_neighbor_y, is_neighbor_x):
    """[M, n, T², S²]: the bias of each query and key of a tile; -30000, which float16 has, for no neighbors."""
    zero = op.Constant(value_ints=[0])
    minus = op.Constant(value_ints=[-1])
    side = op.Shape(table, start=2, end=3)
    by_x = op.Constant(value_ints=[1, 3, 5])
    by_y = op.Constant(value_ints=[0, 2, 4])
    index = op.Unsqueeze(bias_y * side, by_x) + op.Unsqueeze(bias_x, by_y)  # ny, nx, Ty, Tx, Sy, Sx
    is_neighbor = op.And(op.Unsqueeze(is_neighbor_y, by_x), op.Unsqueeze(is_neighbor_x, by_y))
    flat_table = op.Reshape(table, op.Concat(zero, minus, axis=0))
    bias = op.Where(is_neighbor, op.Gather(flat_table, index, axis=1), op.Constant(value_float=-30000.0))
    queries = op.Shape(bias_y, start=1, end=2) * op.Shape(bias_x, start=1, end=2)
    keys = op.Shape(bias_y, start=2, end=3) * op.Shape(bias_x, start=2, end=3)
    return op.Reshape(bias, op.Concat(zero, minus, queries, keys, axis=0))


@onnxscript.script(DOMAIN, default_opset=op)
def attention_in_tiles(q, k, v, bias, head_dim):
    """Queries [B, M, n, T², D], keys and values [B, M, n, S², D] -> [B, M, n, T², D]."""
    scores = op.MatMul(q / op.Sqrt(op.Cast(head_dim, to=1)), op.Transpose(k, perm=[0, 1, 2, 4, 3])) + bias
    return op.MatMul(op.Softmax(scores, axis=-1), v)


@onnxscript.script(DOMAIN, default_opset=op)
def neighborhood_attention_gather(
    qkv: FLOAT["B", "H", "W", "C3"],  # noqa: F821  # letters of dimensions, as onnxscript writes them
    padding_qkv: FLOAT["C3"],  # noqa: F821
    relative_position_bias_table: FLOAT["M", "T", "T"],  # noqa: F821
    num_heads: int,
    kernel_size: int,
    dilation: int,
) -> FLOAT["B", "H", "W", "C"]:  # noqa: F821
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    minus = op.Constant(value_ints=[-1])
    by_row = op.Constant(value_ints=[1, 3])
    by_column = op.Constant(value_ints=[0, 2])
    heads = op.Reshape(op.Constant(value_int=num_heads), one)
    image = op.Gather(qkv, op.Constant(value_int=0), axis=0)
    height = op.Shape(image, start=0, end=1)
    width = op.Shape(image, start=1, end=2)
    channels3 = op.Shape(image, start=2, end=3)
    head_dim = channels3 / (heads * 3)

    query_y, key_y, bias_y, is_neighbor_y = axis_tiles(height, kernel_size, dilation)
    query_x, key_x, bias_x, is_neighbor_x = axis_tiles(width, kernel_size, dilation)
    tile_y = op.Shape(bias_y, start=1, end=2)
    tile_x = op.Shape(bias_x, start=1, end=2)
    count_y = op.Shape(bias_y, start=0, end=1)
    count_x = op.Shape(bias_x, start=0, end=1)
    from_y = op.Reshape(query_y * width, op.Concat(count_y, one, tile_y, one, axis=0))
    from_x = op.Reshape(query_x, op.Concat(one, count_x, one, tile_x, axis=0))
    query_index = op.Reshape(from_y + from_x, minus)  # n·T²
    real = op.And(op.Unsqueeze(key_y < height, by_row), op.Unsqueeze(key_x < width, by_column))
    key_index = op.Unsqueeze(key_y * width, by_row) + op.Unsqueeze(key_x, by_column)
    key_index = op.Reshape(op.Where(real, key_index, height * width), minus)  # n·S²; H·W is the padding
    y = op.Range(op.Constant(value_int=0), op.Squeeze(height), op.Constant(value_int=1))
    x = op.Range(op.Constant(value_int=0), op.Squeeze(width), op.Constant(value_int=1))
    to_y = (y / tile_y) * count_x * tile_y * tile_x + op.Mod(y, tile_y) * tile_x
    to_x = (x / tile_x) * tile_y * tile_x + op.Mod(x, tile_x)
    target = op.Reshape(op.Unsqueeze(to_y, one) + op.Unsqueeze(to_x, zero), minus)  # H·W

    batch = op.Shape(qkv, start=0, end=1)
    pixels = op.Reshape(qkv, op.Concat(zero, minus, channels3, axis=0))
    pixels = op.Concat(pixels, op.Expand(padding_qkv, op.Concat(batch, one, channels3, axis=0)), axis=1)
    split = op.Reshape(pixels, op.Concat(zero, zero, heads * 3, head_dim, axis=0))
    split = op.Transpose(split, perm=[0, 2, 1, 3])  # B, 3·M, H·W + 1, D
    q, k, v = op.Split(split, op.Concat(heads, heads, heads, axis=0), axis=1)
    tiles = op.Concat(zero, zero, count_y * count_x, minus, head_dim, axis=0)
    q = op.Reshape(op.Gather(q, query_index, axis=2), tiles)  # B, M, n, T², D
    k = op.Reshape(op.Gather(k, key_index, axis=2), tiles)  # B, M, n, S², D
    v = op.Reshape(op.Gather(v, key_index, axis=2), tiles)
    bias = tile_bias(relative_position_bias_table, bias_y, bias_x, is_neighbor_y, is_neighbor_x)
    out = attention_in_tiles(q, k, v, bias, head_dim)
    out = op.Reshape(out, op.Concat(zero, zero, minus, head_dim, axis=0))
    out = op.Transpose(out, perm=[0, 2, 1, 3])  # B, n·T², M, D
    out = op.Gather(op.Reshape(out, op.Concat(zero, zero, minus, axis=0)), target, axis=1)
    return op.Reshape(out, op.Concat(zero, height, width, minus, axis=0))


@onnxscript.script(DOMAIN, default_opset=op)
def selected_pixels(x, from_y, from_x):
    """[B, H, W, C] -> [B, len(from_y), len(from_x), C], by a product with zeros and ones; zeros for what is outside."""
    minus = op.Constant(value_ints=[-1])
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    first = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    image = op.Gather(x, op.Constant(value_int=0), axis=0)
    height = op.Shape(image, start=0, end=1)
    width = op.Shape(image, start=1, end=2)
    rows = op.Cast(op.Equal(op.Unsqueeze(from_y, one), op.Range(first, op.Squeeze(height), step)), to=1)
    columns = op.Cast(op.Equal(op.Unsqueeze(from_x, one), op.Range(first, op.Squeeze(width), step)), to=1)
    out = op.MatMul(rows, op.Reshape(x, op.Concat(zero, height, minus, axis=0)))  # B, n, W·C
    return op.MatMul(columns, op.Reshape(out, op.Concat(zero, zero, width, minus, axis=0)))


@onnxscript.script(DOMAIN, default_opset=op)
def neighborhood_attention_hat(
    qkv: FLOAT["B", "H", "W", "C3"],  # noqa: F821
    padding_qkv: FLOAT["C3"],  # noqa: F821
    relative_position_bias_table: FLOAT["M", "T", "T"],  # noqa: F821
    num_heads: int,
    kernel_size: int,
    dilation: int,
) -> FLOAT["B", "H", "W", "C"]:  # noqa: F821
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    minus = op.Constant(value_ints=[-1])
    heads = op.Reshape(op.Constant(value_int=num_heads), one)
    image = op.Gather(qkv, op.Constant(value_int=0), axis=0)
    height = op.Shape(image, start=0, end=1)
    width = op.Shape(image, start=1, end=2)
    channels = op.Shape(image, start=2, end=3) / 3
    head_dim = channels / heads

    query_y, key_y, bias_y, is_neighbor_y = axis_tiles(height, kernel_size, dilation)
    query_x, key_x, bias_x, is_neighbor_x = axis_tiles(width, kernel_size, dilation)
    tile_y = op.Shape(bias_y, start=1, end=2)
    tile_x = op.Shape(bias_x, start=1, end=2)
    span_y = op.Shape(bias_y, start=2, end=3)
    span_x = op.Shape(bias_x, start=2, end=3)
    count_y = op.Shape(bias_y, start=0, end=1)
    count_x = op.Shape(bias_x, start=0, end=1)
    key_y = op.Reshape(key_y, minus)
    key_x = op.Reshape(key_x, minus)
    is_padding = op.Or(op.Unsqueeze(key_y >= height, one), op.Unsqueeze(key_x >= width, zero))
    is_padding = op.Unsqueeze(op.Cast(is_padding, to=1), minus)  # n·S, n·S, 1

    q, kv = op.Split(qkv, op.Concat(channels, channels * 2, axis=0), axis=-1)
    padding_kv = op.Slice(padding_qkv, channels, channels * 3, zero)
    q = selected_pixels(q, query_y, query_x)
    q = op.Reshape(q, op.Concat(zero, count_y, tile_y, count_x, tile_x, heads, head_dim, axis=0))
    q = op.Transpose(q, perm=[0, 5, 1, 3, 2, 4, 6])
    q = op.Reshape(q, op.Concat(zero, heads, count_y * count_x, tile_y * tile_x, head_dim, axis=0))
    kv = selected_pixels(kv, key_y, key_x) + is_padding * padding_kv
    kv = op.Reshape(kv, op.Concat(zero, count_y, span_y, count_x, span_x, heads * 2, head_dim, axis=0))
    kv = op.Transpose(kv, perm=[0, 5, 1, 3, 2, 4, 6])
    kv = op.Reshape(kv, op.Concat(zero, heads * 2, count_y * count_x, span_y * span_x, head_dim, axis=0))
    k, v = op.Split(kv, op.Concat(heads, heads, axis=0), axis=1)
    bias = tile_bias(relative_position_bias_table, bias_y, bias_x, is_neighbor_y, is_neighbor_x)
    out = attention_in_tiles(q, k, v, bias, head_dim)
    out = op.Reshape(out, op.Concat(zero, heads, count_y, count_x, tile_y, tile_x, head_dim, axis=0))
    out = op.Transpose(out, perm=[0, 2, 4, 3, 5, 1, 6])
    out = op.Reshape(out, op.Concat(zero, count_y * tile_y, count_x * tile_x, channels, axis=0))
    plane = op.Concat(height, width, axis=0)
    return op.Slice(out, op.Constant(value_ints=[0, 0]), plane, op.Constant(value_ints=[1, 2]))


BODIES = {
    "function": neighborhood_attention_gather,
    "gather": neighborhood_attention_gather,
    "gridsample": neighborhood_attention_gather,
    "hat": neighborhood_attention_hat,
}
HELPERS = (axis_tiles, tile_bias, attention_in_tiles, selected_pixels)
