"""`deformable_attention` of any size, in any type: blocks of keys, and a bias that goes through the L1 cache.

One program computes one head of one image for a tile of TILE_ROWS × TILE_COLUMNS queries, over blocks of keys with the
running softmax of FlashAttention (arXiv 2205.14135). What is this kernel's own is the bias. Its coordinate in the table
is separable: y depends on the query's row and the key, x on the query's column and the key. So for a block of keys

- the two columns of the table and their weights are worked out once, [BLOCK_KEYS, TILE_COLUMNS], for all query rows;
- a row of the table, read at those columns and blended in x, serves all query rows beside it. Where the query rows are
  as far apart as the rows of the table (DAT+, DAT++) or nearly so (DAT), which rows those are is known when the kernel
  is compiled (`ROW_TAPS`), and only their weights depend on the key. That holds while no location is far outside of the
  map, which each program looks up first; else, and for tables of another size, every bias is read by itself.

That is two reads a bias in place of four, without masks. Neighbours in a warp are neighbouring queries of one key, and
those read neighbouring entries of one row of the table. docs/kernels.md has the figures.
"""

import triton
import triton.language as tl

from dat_deploy.plugins.online_softmax import attend

__all__ = ["attend_to_all", "deformable_attention_kernel", "grid_coordinate"]

MARGIN = tl.constexpr(2)  # rows beyond either end of the table that `_bias` may meet going by rows


@triton.jit
def grid_coordinate(index, size, HALF_PIXEL: tl.constexpr):
    """Queries in the frame of the sampling locations, see reference.query_grid."""
    return (index + 0.5) / size * 2 - 1 if HALF_PIXEL else index / tl.maximum(size - 1, 1) * 2 - 1


@triton.jit
def _table_coordinate(query, location, size):
    """Where the bias of a query and a key lies on an axis of the table, in entries.

    Far outside all is zero, so far outside it ends. A NaN ends there, too; `_bias` puts it back.
    """
    coordinate = ((query - location) * 0.5 + 1) * 0.5 * (size - 1)
    return tl.minimum(tl.maximum(coordinate, -8.0), size + 8.0)


@triton.jit
def _hat(distance):
    return tl.maximum(1 - tl.abs(distance), 0.0)


@triton.jit
def _taps(coordinate, size):
    """The first of the two entries around a coordinate, and the weights of both; zeros outside of the table."""
    first = tl.minimum(tl.maximum(tl.floor(coordinate), 0.0), tl.maximum(size - 2, 0) * 1.0)
    second_weight = tl.where(size > 1, _hat(coordinate - first - 1), 0.0)
    return first.to(tl.int32), _hat(coordinate - first), second_weight


@triton.jit
def _stack(rows, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """`rows[FIRST], rows[FIRST + STEP], ...` on a new last axis: [BLOCK_KEYS, TILE_COLUMNS, COUNT]."""
    if COUNT == 1:
        stacked = tl.expand_dims(rows[FIRST], 2)
    elif COUNT == 2:
        stacked = tl.join(rows[FIRST], rows[FIRST + STEP])
    else:
        even = _stack(rows, FIRST, STEP * 2, COUNT // 2)
        odd = _stack(rows, FIRST + STEP, STEP * 2, COUNT // 2)
        stacked = tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1], COUNT))
    return stacked


@triton.jit
def _bias(
    table,
    location_y,
    location_x,
    is_key,
    first_row,
    first_column,
    height,
    width,
    table_height,
    factor,
    HALF_PIXEL: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The bias of each query of the tile to each key of the block, times `factor`; -1e30 where there is no key.

    Columns go by parts of 8, so that what depends on the key and the query's row alone serves several of a thread's.
    Unless ROW_TAPS is 0, the rows of the table that are read must exist, but for MARGIN at either end.

    Returns [TILE_ROWS · TILE_COLUMNS, BLOCK_KEYS] float32.
    """
    PART: tl.constexpr = 8
    PARTS: tl.constexpr = TILE_COLUMNS // PART
    RIGHT: tl.constexpr = 1 if TABLE_WIDTH > 1 else 0
    is_number = (location_y == location_y) & (location_x == location_x)
    nothing = tl.where(is_key, tl.where(is_number, 0.0, float("nan")), -1e30)[:, None]

    lefts, left_weights, right_weights = (), (), ()
    for part in tl.static_range(PARTS):
        query_x = grid_coordinate(first_column + part * PART + tl.arange(0, PART), width, HALF_PIXEL)
        x = _table_coordinate(query_x[None, :], location_x[:, None], TABLE_WIDTH)
        left, left_weight, right_weight = _taps(x, TABLE_WIDTH)  # BLOCK_KEYS, PART
        lefts = lefts + (left,)
        left_weights = left_weights + (left_weight * factor,)
        right_weights = right_weights + (right_weight * factor,)

    biases = ()
    if ROW_TAPS == 0:
        BELOW = tl.minimum(table_height - 1, 1) * TABLE_WIDTH
        for i in tl.static_range(TILE_ROWS):
            query_y = grid_coordinate(first_row + i, height, HALF_PIXEL)
            y = _table_coordinate(query_y, location_y, table_height)
            upper, upper_weight, lower_weight = _taps(y, table_height)
            for part in tl.static_range(PARTS):
                start = table + (upper[:, None] * TABLE_WIDTH + lefts[part])
                upper_row = left_weights[part] * tl.load(start) + right_weights[part] * tl.load(start + RIGHT)
                start += BELOW
                lower_row = left_weights[part] * tl.load(start) + right_weights[part] * tl.load(start + RIGHT)
                bias = nothing + upper_weight[:, None] * upper_row + lower_weight[:, None] * lower_row
                biases = biases + (bias,)
    else:
        # Query row i lies between rows i and i + 1 of two taps; of three, around row i + 1.
        y = _table_coordinate(grid_coordinate(first_row, height, HALF_PIXEL), location_y, table_height)
        table_row = tl.floor(y).to(tl.int32) - (ROW_TAPS - 2)
        rows, steps = (), ()
        for r in tl.static_range(TILE_ROWS + ROW_TAPS - 1):
            for part in tl.static_range(PARTS):
                start = table + (table_row[:, None] * TABLE_WIDTH + lefts[part])
                if r < MARGIN or r > TILE_ROWS + ROW_TAPS - 2 - MARGIN:
                    exists = (table_row + r >= 0) if r < MARGIN else (table_row + r < table_height)
                    left_entry = tl.load(start + r * TABLE_WIDTH, mask=exists[:, None], other=0.0)
                    right_entry = tl.load(start + (r * TABLE_WIDTH + RIGHT), mask=exists[:, None], other=0.0)
                else:
                    left_entry = tl.load(start + r * TABLE_WIDTH)
                    right_entry = tl.load(start + (r * TABLE_WIDTH + RIGHT))
                row = nothing + left_weights[part] * left_entry + right_weights[part] * right_entry
                if r > 0:
                    steps = steps + (row - rows[(r - 1) * PARTS + part],)
                rows = rows + (row,)
        # How much less than a row of the table it is from one row of queries to the next.
        second, first = grid_coordinate(1, height, HALF_PIXEL), grid_coordinate(0, height, HALF_PIXEL)
        lag = 1 - (second - first) * 0.25 * (table_height - 1)
        for i in tl.static_range(TILE_ROWS):
            distance = y - tl.floor(y)
            if ROW_TAPS == 3:
                distance -= i * lag  # from the middle one of three rows, -1 to 1
                down, up = tl.maximum(distance, 0.0), tl.minimum(distance, 0.0)
            for part in tl.static_range(PARTS):
                if ROW_TAPS == 2:
                    bias = rows[i * PARTS + part] + distance[:, None] * steps[i * PARTS + part]
                else:
                    bias = rows[(i + 1) * PARTS + part] + down[:, None] * steps[(i + 1) * PARTS + part]
                    bias += up[:, None] * steps[i * PARTS + part]
                biases = biases + (bias,)
    stacked = _stack(biases, 0, 1, TILE_ROWS * PARTS)  # BLOCK_KEYS, PART, TILE_ROWS · PARTS
    return tl.reshape(tl.trans(stacked, 2, 1, 0), (TILE_ROWS * TILE_COLUMNS, BLOCK_KEYS))


@triton.jit
def _goes_by_rows(
    sampling_locations,
    keys,
    first_row,
    height,
    table_height,
    HALF_PIXEL: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Whether `_bias` may go by rows, for all keys: it may unless a location is far outside of the map."""
    query_y = grid_coordinate(first_row, height, HALF_PIXEL)
    tl.static_assert(TILE_ROWS >= 2 * MARGIN)  # then a row is beyond one end of the table alone
    top = tl.full((BLOCK_KEYS,), float("inf"), tl.float32)
    bottom = tl.full((BLOCK_KEYS,), float("-inf"), tl.float32)
    for first_key in range(0, keys, BLOCK_KEYS):
        n = tl.minimum(first_key + tl.arange(0, BLOCK_KEYS), keys - 1)
        y = _table_coordinate(query_y, tl.load(sampling_locations + 2 * n), table_height)
        top, bottom = tl.minimum(top, y), tl.maximum(bottom, y)
    # A hair more than what is seen, because there the same coordinate may be rounded otherwise.
    top, bottom = tl.floor(tl.min(top, 0) - 1e-3), tl.floor(tl.max(bottom, 0) + 1e-3)
    first, last = top - (ROW_TAPS - 2), bottom + TILE_ROWS
    return (first >= -MARGIN) & (last < table_height + MARGIN)


@triton.jit
def attend_to_all(
    q,
    key,
    value,
    sampling_locations,
    table,
    first_row,
    first_column,
    height,
    width,
    keys,
    table_height,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PIXEL: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    PIPELINED: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The attention of a tile of queries: [TILE_ROWS · TILE_COLUMNS, BLOCK_DIM] float32."""
    TILE: tl.constexpr = TILE_ROWS * TILE_COLUMNS
    dim = tl.arange(0, BLOCK_DIM)
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    attended = tl.zeros((TILE, BLOCK_DIM), tl.float32)
    for first_key in tl.range(0, keys, BLOCK_KEYS, num_stages=None if PIPELINED else 1):
        n = first_key + tl.arange(0, BLOCK_KEYS)
        is_key = n < keys
        key_offset = n[:, None] * CHANNELS + dim[None, :]
        if EVEN_KEYS and BLOCK_DIM == HEAD_DIM:
            k = tl.load(key + key_offset)
            v = tl.load(value + key_offset)
        else:
            key_mask = is_key[:, None] & (dim < HEAD_DIM)[None, :]
            k = tl.load(key + key_offset, mask=key_mask, other=0.0)
            v = tl.load(value + key_offset, mask=key_mask, other=0.0)
        location = sampling_locations + 2 * tl.minimum(n, keys - 1)
        location_y, location_x = tl.load(location), tl.load(location + 1)
        bias = _bias(
            table,
            location_y,
            location_x,
            is_key,
            first_row,
            first_column,
            height,
            width,
            table_height,
            HEAD_DIM**0.5,
            HALF_PIXEL,
            ROW_TAPS,
            TABLE_WIDTH,
            TILE_ROWS,
            TILE_COLUMNS,
            BLOCK_KEYS,
        )
        largest, total, attended = attend(q, k, v, bias, largest, total, attended, HEAD_DIM)
    return attended / total[:, None]


@triton.jit(do_not_specialize=["height", "width", "keys", "table_height"])
def deformable_attention_kernel(
    query,
    key,
    value,
    sampling_locations,
    relative_position_bias_table,
    height,
    width,
    keys,
    table_height,
    output,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    HALF_PIXEL: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Grid: image, head, tile of queries, the last fastest. Layouts as in reference.deformable_attention."""
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    tiles_across = tl.cdiv(width, TILE_COLUMNS)
    tiles = tl.cdiv(height, TILE_ROWS) * tiles_across
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % NUM_HEADS
    image = (program // tiles // NUM_HEADS).to(tl.int64)
    group = head // (NUM_HEADS // OFFSET_GROUPS)
    first_row, first_column = tile // tiles_across * TILE_ROWS, tile % tiles_across * TILE_COLUMNS
    first_new_row = first_row  # the last tile reaches up into the one before rather than down beyond the map
    first_row = tl.minimum(first_row, tl.maximum(height - TILE_ROWS, 0))

    query += image * (height * width * CHANNELS) + head * HEAD_DIM
    output += image * (height * width * CHANNELS) + head * HEAD_DIM
    key += image * (keys * CHANNELS) + head * HEAD_DIM
    value += image * (keys * CHANNELS) + head * HEAD_DIM
    sampling_locations += (image * OFFSET_GROUPS + group) * (keys * 2)
    table = relative_position_bias_table + head * (table_height * TABLE_WIDTH)

    dim = tl.arange(0, BLOCK_DIM)
    in_tile = tl.arange(0, TILE_ROWS * TILE_COLUMNS)
    row, column = first_row + in_tile // TILE_COLUMNS, first_column + in_tile % TILE_COLUMNS
    is_query = (row >= first_new_row) & (row < height) & (column < width)
    query_offset = (row * width + column)[:, None] * CHANNELS + dim[None, :]
    query_mask = is_query[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(query + query_offset, mask=query_mask, other=0.0)  # TILE, BLOCK_DIM

    by_rows = False
    if ROW_TAPS > 0:
        by_rows = _goes_by_rows(
            sampling_locations, keys, first_row, height, table_height, HALF_PIXEL, ROW_TAPS, TILE_ROWS, BLOCK_KEYS
        )
    if by_rows:
        attended = attend_to_all(
            q,
            key,
            value,
            sampling_locations,
            table,
            first_row,
            first_column,
            height,
            width,
            keys,
            table_height,
            CHANNELS,
            HEAD_DIM,
            HALF_PIXEL,
            TABLE_WIDTH,
            ROW_TAPS,
            True,
            EVEN_KEYS,
            BLOCK_DIM,
            TILE_ROWS,
            TILE_COLUMNS,
            BLOCK_KEYS,
        )
    else:
        attended = attend_to_all(
            q,
            key,
            value,
            sampling_locations,
            table,
            first_row,
            first_column,
            height,
            width,
            keys,
            table_height,
            CHANNELS,
            HEAD_DIM,
            HALF_PIXEL,
            TABLE_WIDTH,
            0,
            ROW_TAPS == 0,  # beside the other loop its buffers would come on top
            EVEN_KEYS,
            BLOCK_DIM,
            TILE_ROWS,
            TILE_COLUMNS,
            BLOCK_KEYS,
        )
    tl.store(output + query_offset, attended.to(output.dtype.element_ty), mask=query_mask)
