"""`deformable_attention` as ONNX functions of standard operators: one body a lowering.

All bodies share the attention; they differ in how the bias is read from its table between the pixels.
The table coordinate is separable: y depends on the query's row and the key, x on its column and the key.
"""

import onnxscript
from onnxscript import FLOAT
from onnxscript import opset18 as op

from dat_deploy.plugins.onnx_domain import DOMAIN

__all__ = ["BODIES", "HELPERS"]


@onnxscript.script(DOMAIN, default_opset=op)
def query_coordinates(size, table_size, half_pixel_queries: int):
    """[size] table coordinates of the queries along one axis, for a key at location 0; pixels of the table."""
    half_pixel = op.Constant(value_int=half_pixel_queries)
    half = op.Cast(half_pixel, to=1)
    count = op.Squeeze(size)
    index = op.Cast(op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1)), to=1)
    span = op.Max(
        op.Cast(op.Add(op.Sub(count, op.Constant(value_int=1)), half_pixel), to=1), op.Constant(value_float=1.0)
    )
    coordinate = (index + half * 0.5) / span * 2.0 - 1.0
    last = op.Cast(table_size - 1, to=1)
    return (coordinate * 0.5 + 1.0) * 0.5 * last


@onnxscript.script(DOMAIN, default_opset=op)
def hat_weights(query_coordinate, location, table_size):
    """Weight of every table row for every key and query: [B, G, 1, Ns, H, Th], `max(0, 1 - |y - row|)`."""
    last = op.Cast(table_size - 1, to=1)
    key = location * (last * 0.25)  # B, G, 1, Ns, 1, 1
    position = op.Unsqueeze(query_coordinate, op.Constant(value_ints=[1])) - key  # B, G, 1, Ns, H, 1
    rows = op.Cast(op.Range(op.Constant(value_int=0), op.Squeeze(table_size), op.Constant(value_int=1)), to=1)
    return op.Relu(1.0 - op.Abs(position - rows))


@onnxscript.script(DOMAIN, default_opset=op)
def bias_hat(query, sampling_locations, relative_position_bias_table, half_pixel_queries: int):
    """The bias [B, M, H·W, Ns] as two products with hat functions: no gather at all.

    The keys stay outermost until the end, so that one transpose of a matrix is all the data movement.
    """
    one = op.Constant(value_ints=[1])
    minus = op.Constant(value_ints=[-1])
    image = op.Gather(query, op.Constant(value_int=0), axis=0)
    height = op.Shape(image, start=0, end=1)
    width = op.Shape(image, start=1, end=2)
    points = op.Gather(sampling_locations, op.Constant(value_int=0), axis=0)
    groups = op.Shape(points, start=0, end=1)
    keys = op.Shape(points, start=1, end=2) * op.Shape(points, start=2, end=3)
    heads = op.Shape(relative_position_bias_table, start=0, end=1)
    table_height = op.Shape(relative_position_bias_table, start=1, end=2)
    table_width = op.Shape(relative_position_bias_table, start=2, end=3)

    location_shape = op.Concat(minus, groups, one, keys, one, op.Constant(value_ints=[2]), axis=0)
    location_y, location_x = op.Split(
        op.Reshape(sampling_locations, location_shape), op.Constant(value_ints=[1, 1]), axis=-1
    )
    query_y = query_coordinates(height, table_height, half_pixel_queries)
    query_x = query_coordinates(width, table_width, half_pixel_queries)
    weights_y = hat_weights(query_y, location_y, table_height)  # B, G, 1, Ns, H, Th
    weights_x = hat_weights(query_x, location_x, table_width)  # B, G, 1, Ns, W, Tw

    tables = op.Reshape(relative_position_bias_table, op.Concat(groups, minus, table_height, table_width, axis=0))
    rows = op.Reshape(weights_y, op.Concat(minus, groups, one, keys * height, table_height, axis=0))
    rows = op.MatMul(rows, tables)  # B, G, M/G, Ns·H, Tw
    rows = op.Reshape(rows, op.Concat(minus, groups, heads / groups, keys, height, table_width, axis=0))
    bias = op.MatMul(rows, op.Transpose(weights_x, perm=[0, 1, 2, 3, 5, 4]))  # B, G, M/G, Ns, H, W
    bias = op.Reshape(bias, op.Concat(minus, heads, keys, height * width, axis=0))
    return op.Transpose(bias, perm=[0, 1, 3, 2])


@onnxscript.script(DOMAIN, default_opset=op)
def bias_gridsample(query, sampling_locations, relative_position_bias_table, half_pixel_queries: int):
    """The bias [B, M, H·W, Ns] by GridSample of each group's tables at every pair of query and key."""
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    minus = op.Constant(value_ints=[-1])
    image = op.Gather(query, op.Constant(value_int=0), axis=0)
    height = op.Shape(image, start=0, end=1)
    width = op.Shape(image, start=1, end=2)
    points = op.Gather(sampling_locations, op.Constant(value_int=0), axis=0)
    groups = op.Shape(points, start=0, end=1)
    keys = op.Shape(points, start=1, end=2) * op.Shape(points, start=2, end=3)
    heads = op.Shape(relative_position_bias_table, start=0, end=1)
    table_height = op.Shape(relative_position_bias_table, start=1, end=2)
    table_width = op.Shape(relative_position_bias_table, start=2, end=3)

    # pixels of the table, turned into GridSample's frame: -1 and +1 are the centres of its first and last pixel
    query_y = query_coordinates(height, table_height, half_pixel_queries)
    query_x = query_coordinates(width, table_width, half_pixel_queries)
    last_y = op.Max(op.Cast(table_height - 1, to=1), op.Constant(value_float=1.0))
    last_x = op.Max(op.Cast(table_width - 1, to=1), op.Constant(value_float=1.0))
    frame_y = query_y / last_y * 2.0 - 1.0
    frame_x = query_x / last_x * 2.0 - 1.0
    plane = op.Concat(height, width, axis=0)
    grid_y = op.Expand(op.Reshape(frame_y, op.Concat(height, one, axis=0)), plane)
    grid_x = op.Expand(op.Reshape(frame_x, op.Concat(one, width, axis=0)), plane)
    grid_shape = op.Concat(height * width, one, one, axis=0)
    grid = op.Concat(op.Reshape(grid_x, grid_shape), op.Reshape(grid_y, grid_shape), axis=2)  # H·W, 1, (x, y)
    locations = op.Reshape(sampling_locations, op.Concat(minus, one, keys, two, axis=0))
    location_y, location_x = op.Split(locations, op.Constant(value_ints=[1, 1]), axis=-1)
    displacement = grid - op.Concat(location_x, location_y, axis=-1) * 0.5  # B·G, H·W, Ns, (x, y)
    tables = op.Reshape(relative_position_bias_table, op.Concat(one, groups, minus, table_height, table_width, axis=0))
    batch = op.Shape(sampling_locations, start=0, end=1)
    tables = op.Expand(tables, op.Concat(batch, one, one, one, one, axis=0))
    tables = op.Reshape(tables, op.Concat(minus, heads / groups, table_height, table_width, axis=0))
    bias = op.GridSample(tables, displacement, mode="bilinear", padding_mode="zeros", align_corners=1)
    return op.Reshape(bias, op.Concat(minus, heads, height * width, keys, axis=0))


@onnxscript.script(DOMAIN, default_opset=op)
def bias_gather(query, sampling_locations, relative_position_bias_table, half_pixel_queries: int):
    """The bias [B, M, H·W, Ns]: the two table columns around each key are blended first, then the two rows.

    A table padded with zeros stands for what lies outside; one border before and two after hold every neighbour of a
    coordinate clipped to one pixel outside.
    """
    one = op.Constant(value_ints=[1])
    minus = op.Constant(value_ints=[-1])
    image = op.Gather(query, op.Constant(value_int=0), axis=0)
    height = op.Shape(image, start=0, end=1)
    width = op.Shape(image, start=1, end=2)
    points = op.Gather(sampling_locations, op.Constant(value_int=0), axis=0)
    groups = op.Shape(points, start=0, end=1)
    keys = op.Shape(points, start=1, end=2) * op.Shape(points, start=2, end=3)
    heads = op.Shape(relative_position_bias_table, start=0, end=1)
    table_height = op.Shape(relative_position_bias_table, start=1, end=2)
    table_width = op.Shape(relative_position_bias_table, start=2, end=3)

    location_shape = op.Concat(minus, groups, one, keys, op.Constant(value_ints=[2]), axis=0)
    location_y, location_x = op.Split(
        op.Reshape(sampling_locations, location_shape), op.Constant(value_ints=[1, 1]), axis=-1
    )  # B, G, 1, Ns, 1
    by_query = op.Constant(value_ints=[1])
    last_y = op.Cast(table_height - 1, to=1)
    last_x = op.Cast(table_width - 1, to=1)
    query_y = query_coordinates(height, table_height, half_pixel_queries)
    query_x = query_coordinates(width, table_width, half_pixel_queries)
    y = op.Unsqueeze(query_y, by_query) - op.Squeeze(location_y, minus) * (last_y * 0.25)  # B, G, H, Ns
    x = op.Unsqueeze(query_x, by_query) - op.Squeeze(location_x, minus) * (last_x * 0.25)  # B, G, W, Ns
    y = op.Min(op.Max(y, op.Constant(value_float=-1.0)), last_y + 1.0)
    x = op.Min(op.Max(x, op.Constant(value_float=-1.0)), last_x + 1.0)
    row = op.Floor(y)
    column = op.Floor(x)
    fraction_y = y - row
    fraction_x = x - column

    # the padded table as one row a pixel, the heads of a group side by side: B·G, H·W·Ns pixels of M/G
    padded = op.Pad(relative_position_bias_table, op.Constant(value_ints=[0, 1, 1, 0, 2, 2]))
    tables = op.Reshape(padded, op.Concat(groups, heads / groups, minus, axis=0))
    tables = op.Transpose(tables, perm=[0, 2, 1])  # G, (Th+3)·(Tw+3), M/G
    tables = op.Reshape(tables, op.Concat(minus, heads / groups, axis=0))
    stride = table_width + 3
    area = (table_height + 3) * stride
    group_first = op.Range(op.Constant(value_int=0), op.Squeeze(groups), op.Constant(value_int=1)) * area
    group_first = op.Reshape(group_first, op.Concat(groups, one, one, axis=0))
    # clipped again as integers: NaN has no index, and must spoil its own image alone
    padded_row = op.Clip(op.Cast(row, to=7) + 1, op.Constant(value_int=0), op.Squeeze(table_height) + 1)
    padded_column = op.Clip(op.Cast(column, to=7) + 1, op.Constant(value_int=0), op.Squeeze(table_width) + 1)
    by_column = op.Constant(value_ints=[3])
    by_row = op.Constant(value_ints=[2])
    index = op.Unsqueeze(padded_row * stride + group_first, by_column) + op.Unsqueeze(padded_column, by_row)
    weight_y = op.Unsqueeze(fraction_y, op.Constant(value_ints=[3, 5]))  # B, G, H, 1, Ns, 1
    weight_x = op.Unsqueeze(fraction_x, op.Constant(value_ints=[2, 5]))  # B, G, 1, W, Ns, 1
    above_left = op.Gather(tables, index, axis=0)  # B, G, H, W, Ns, M/G
    above_right = op.Gather(tables, index + 1, axis=0)
    below_left = op.Gather(tables, index + stride, axis=0)
    below_right = op.Gather(tables, index + (stride + 1), axis=0)
    above = above_left + weight_x * (above_right - above_left)
    below = below_left + weight_x * (below_right - below_left)
    bias = op.Transpose(above + weight_y * (below - above), perm=[0, 1, 5, 2, 3, 4])  # B, G, M/G, H, W, Ns
    return op.Reshape(bias, op.Concat(minus, heads, height * width, keys, axis=0))


@onnxscript.script(DOMAIN, default_opset=op)
def attention(query, key, value, bias, num_heads: int):
    """`softmax(q · k / sqrt(D) + bias) v`, heads split from and merged into the last axis."""
    zero = op.Constant(value_ints=[0])
    minus = op.Constant(value_ints=[-1])
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    image = op.Gather(query, op.Constant(value_int=0), axis=0)
    plane = op.Shape(image, start=0, end=2)
    channels = op.Shape(image, start=2, end=3)
    head_dim = channels / heads
    split = op.Concat(zero, minus, heads, head_dim, axis=0)
    q = op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3])  # B, M, H·W, D
    k = op.Transpose(op.Reshape(key, split), perm=[0, 2, 3, 1])  # B, M, D, Ns
    v = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])  # B, M, Ns, D
    scores = op.MatMul(q / op.Sqrt(op.Cast(head_dim, to=1)), k) + bias
    out = op.Transpose(op.MatMul(op.Softmax(scores, axis=-1), v), perm=[0, 2, 1, 3])  # B, H·W, M, D
    return op.Reshape(out, op.Concat(minus, plane, channels, axis=0))


def _operator(bias_of_table: onnxscript.OnnxFunction) -> onnxscript.OnnxFunction:
    """The body that reads the bias so; onnxscript takes no function as an argument, but sees those of its scope."""

    @onnxscript.script(DOMAIN, default_opset=op)
    def deformable_attention(
        query: FLOAT["B", "H", "W", "C"],  # noqa: F821  # letters of dimensions, as onnxscript writes them
        key: FLOAT["B", "Ns", "C"],  # noqa: F821
        value: FLOAT["B", "Ns", "C"],  # noqa: F821
        sampling_locations: FLOAT["B", "G", "Hk", "Wk", 2],  # noqa: F821
        relative_position_bias_table: FLOAT["M", "Th", "Tw"],  # noqa: F821
        num_heads: int,
        half_pixel_queries: int,
    ) -> FLOAT["B", "H", "W", "C"]:  # noqa: F821
        bias = bias_of_table(query, sampling_locations, relative_position_bias_table, half_pixel_queries)
        return attention(query, key, value, bias, num_heads)

    return deformable_attention


# `hat` wins by a factor of 4 over GridSample on ONNX Runtime's CPU, so it is the body of `function` too.
_HAT = _operator(bias_hat)
BODIES = {
    "function": _HAT,
    "gather": _operator(bias_gather),
    "gridsample": _operator(bias_gridsample),
    "hat": _HAT,
}
HELPERS = (query_coordinates, hat_weights, bias_hat, bias_gather, bias_gridsample, attention)
