"""The second form of `neighborhood_attention`: neighbors, scores and bias in registers, a plain softmax.

A warp computes 2 rows × up to 8 columns of queries, which is one row block of the matrix product. All their neighbors
lie in 8 rows × KEY_COLUMNS columns of keys, which are taken 8, 4 and 2 columns at a time. The bias, -inf for what is no
neighbor, depends on the place in the map alone: it is made once, and serves IMAGES images. If a column of tiles can be
cut into groups of WARP_TILES, those that touch no border have one bias, and a program takes IMAGES of them, one below
the other.

Nothing goes through shared memory. Threads read what they multiply: the product holds 8 rows by 4 pairs of columns
across a warp, and in which order it sums over head dims and over keys is free.
"""

import triton
import triton.language as tl

from dat_deploy.plugins.half2 import ASSEMBLY

__all__ = ["QUERY_COLUMNS", "QUERY_ROWS", "inner_groups", "register_neighbors_kernel"]

QUERY_ROWS = 2
QUERY_COLUMNS = 8  # at most


def inner_groups(tiles: int, warp_tiles: int) -> int:
    """Of a column of so many tiles: groups between the first and the last one; 0 if it cannot be cut into groups."""
    return tiles // warp_tiles - 2 if tiles % warp_tiles == 0 and tiles // warp_tiles > 2 else 0


@triton.jit
def _first_neighbor(position, positions: tl.constexpr, KERNEL_SIZE: tl.constexpr):
    """Of the K neighbors on an axis: a window that would leave the map is shifted inwards."""
    return tl.minimum(tl.maximum(position - KERNEL_SIZE // 2, 0), positions - KERNEL_SIZE)


@triton.jit
def _key_pixels(
    first_key_row,
    first_key_column,
    eighth,
    in_eighth,
    in_pair,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """Where key `in_eighth + in_pair` of these 8 is; int64, so that what threads have in common of an address, and is
    known, goes into the instruction."""
    row, column = first_key_row + in_eighth // COLUMNS, first_key_column + in_eighth % COLUMNS
    if CLAMPED:  # the map is smaller than the rectangle of keys
        row, column = row + eighth * (8 // COLUMNS), column + in_pair
        return (tl.minimum(row, HEIGHT - 1) * WIDTH + tl.minimum(column, WIDTH - 1)).to(tl.int64)
    else:
        return (row * WIDTH + column).to(tl.int64) + (eighth * (8 // COLUMNS * WIDTH) + in_pair).to(tl.int64)


@triton.jit
def _register_mask_and_bias(
    table,
    first_entry,
    query_row,
    query_column,
    first_key_row,
    first_key_column,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    WARP_TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The bias to 8 rows of COLUMNS keys as an accumulator takes it, -inf for what is no neighbor.

    Its index has the axes (8 keys, row of queries, warp, column of queries, pair of keys): registers, registers, warps,
    lanes, lanes. That is how the matrix product holds its scores, so they meet in the same threads.

    Returns [WARP_TILES, 16, 8 * COLUMNS] float32.
    """
    SIDE: tl.constexpr = 2 * KERNEL_SIZE - 1
    COUNT: tl.constexpr = COLUMNS * WARP_TILES * 64
    window_y = _first_neighbor(query_row, HEIGHT, KERNEL_SIZE)
    window_x = _first_neighbor(query_column, WIDTH, KERNEL_SIZE)
    eighth = tl.arange(0, COLUMNS)[:, None, None, None, None]
    in_eighth = 2 * tl.arange(0, 4)[None, None, None, None, :]
    key_row = first_key_row + eighth * (8 // COLUMNS) + in_eighth // COLUMNS
    key_column = first_key_column + in_eighth % COLUMNS
    is_row = (key_row >= window_y) & (key_row < window_y + KERNEL_SIZE)
    is_left = tl.reshape(is_row & (key_column >= window_x) & (key_column < window_x + KERNEL_SIZE), (COUNT,))
    key_column += 1
    is_right = tl.reshape(is_row & (key_column >= window_x) & (key_column < window_x + KERNEL_SIZE), (COUNT,))
    entry = (key_row - query_row + (KERNEL_SIZE - 1)) * SIDE + key_column - query_column + (KERNEL_SIZE - 1)
    right = table + tl.reshape(first_entry + entry, (COUNT,))
    left = tl.load(right - 1, mask=is_left, other=float("-inf")).to(tl.float32)
    right = tl.load(right, mask=is_right, other=float("-inf")).to(tl.float32)
    bias = tl.reshape(tl.join(left, right) * HEAD_DIM**0.5, (COLUMNS, 2, WARP_TILES, 8, 4, 2))
    return tl.reshape(tl.trans(bias, 2, 1, 3, 0, 4, 5), (WARP_TILES, 16, 8 * COLUMNS))


@triton.jit
def _kept_together(q, zero):
    """The same. The assembler else gathers the registers of a query again for each product."""
    if ASSEMBLY:
        zero = (q.to(tl.int16, bitcast=True) & 0) | zero
        return tl.inline_asm_elementwise("or.b32 $0, $1, $2;", "=r,r,r", [q, zero], dtype=q.dtype, is_pure=True, pack=2)
    else:
        return q


@triton.jit
def _neighbor_keys(
    start,
    origin,
    first_key_row,
    first_key_column,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WARP_TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """8 rows of COLUMNS keys, transposed, each thread with the dims next to each other: [WARP_TILES, D, 8 * COLUMNS].

    Loads are from [threads, dims], for which Triton has one layout; from more axes it chooses by its version.
    """
    QUARTER: tl.constexpr = HEAD_DIM // 4
    eighth = tl.arange(0, COLUMNS)[:, None, None, None]
    in_eighth = tl.arange(0, 8)[None, None, :, None]
    quarter = tl.arange(0, 4)[None, None, None, :]
    pixel = _key_pixels(first_key_row, first_key_column, eighth, in_eighth, 0, HEIGHT, WIDTH, COLUMNS, CLAMPED)
    offset = tl.reshape(origin + pixel * (3 * CHANNELS) + (CHANNELS + quarter * QUARTER), (COLUMNS * WARP_TILES * 32,))
    offset = tl.multiple_of(offset, QUARTER)
    keys = tl.load(start + (offset[:, None] + tl.arange(0, QUARTER)[None, :]))
    keys = tl.reshape(keys, (COLUMNS, WARP_TILES, 8, 4, HEAD_DIM // 16, 2, 2))
    return tl.reshape(tl.trans(keys, 1, 4, 5, 3, 6, 0, 2), (WARP_TILES, HEAD_DIM, 8 * COLUMNS))


@triton.jit
def _neighbor_values(
    start,
    origin,
    first_key_row,
    first_key_column,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WARP_TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """The values of these keys, [WARP_TILES, 8 * COLUMNS, D]; column i·8 + g has dim g·(D / 8) + i."""
    EIGHTH: tl.constexpr = HEAD_DIM // 8
    COUNT: tl.constexpr = COLUMNS * WARP_TILES * 64
    # Axes (8 keys, key of a pair, warp, 8 dims, pair); first keys and origins are [1, WARP_TILES, 1, 1].
    eighth = tl.arange(0, COLUMNS)[:, None, None, None, None]
    in_pair = tl.arange(0, 2)[None, :, None, None, None]
    dims = tl.arange(0, 8)[None, None, None, :, None]
    in_eighth = 2 * tl.arange(0, 4)[None, None, None, None, :]
    pixel = _key_pixels(
        first_key_row[None], first_key_column[None], eighth, in_eighth, in_pair, HEIGHT, WIDTH, COLUMNS, CLAMPED
    )
    offset = tl.reshape(origin[None] + pixel * (3 * CHANNELS) + (2 * CHANNELS + dims * EIGHTH), (COUNT,))
    offset = tl.multiple_of(offset, EIGHTH)
    values = tl.load(start + (offset[:, None] + tl.arange(0, EIGHTH)[None, :]))
    values = tl.reshape(values, (COLUMNS, 2, WARP_TILES, 8, 4, EIGHTH))
    return tl.reshape(tl.trans(values, 2, 0, 4, 1, 5, 3), (WARP_TILES, 8 * COLUMNS, HEAD_DIM))


@triton.jit
def _largest_of_eighths(scores, WARP_TILES: tl.constexpr, COLUMNS: tl.constexpr):
    """[WARP_TILES, 16, 8]: within a thread."""
    return tl.max(tl.reshape(scores, (WARP_TILES, 16, COLUMNS, 8)), 2)


@triton.jit
def _take_values(scores, values, largest, total, attended, ONES: tl.constexpr, HEAD_DIM: tl.constexpr):
    scale: tl.constexpr = 1.4426950408889634 / HEAD_DIM**0.5  # see `attend`
    weights = tl.exp2(scores * scale - largest[:, :, None]).to(values.dtype)
    ones = tl.full((values.shape[0], values.shape[1], ONES), 1.0, values.dtype)
    return tl.dot(weights, ones, acc=total), tl.dot(weights, values, acc=attended)


@triton.jit(do_not_specialize=["batch"])
def register_neighbors_kernel(
    qkv,
    padding_qkv,
    relative_position_bias_table,
    batch,
    output,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    WARP_TILES: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """Grid: chunk of IMAGES images, WARP_TILES tiles, the last fastest. Tiles: head, column, row, the last fastest.

    Of a column's INNER + 2 programs the first and the last one take their tiles in each image of the chunk; the inner
    ones share those between by groups: the first takes IMAGES of them, counted from the first image on, and so on.
    """
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    ROWS: tl.constexpr = (HEIGHT + 1) // 2
    COLUMNS: tl.constexpr = (WIDTH + TILE_COLUMNS - 1) // TILE_COLUMNS
    TILES: tl.constexpr = NUM_HEADS * ROWS * COLUMNS
    PROGRAMS: tl.constexpr = (TILES + WARP_TILES - 1) // WARP_TILES
    CLAMPED: tl.constexpr = HEIGHT < 8 or WIDTH < KEY_COLUMNS
    SCALE: tl.constexpr = 1.4426950408889634 / HEAD_DIM**0.5
    EIGHTH: tl.constexpr = HEAD_DIM // 8
    QUARTER: tl.constexpr = HEAD_DIM // 4

    program = tl.program_id(0)
    image = program // PROGRAMS * IMAGES
    images = min(IMAGES, batch - image)
    program = program % PROGRAMS
    if INNER > 0:
        group = program % (INNER + 2)
        is_inner = (group > 0) & (group <= INNER)
        first = tl.where(is_inner, (group - 1) * IMAGES, 0)
        an_image = tl.where(is_inner, INNER, 1)
        if first >= images * an_image:
            return
        end = tl.minimum(first + IMAGES, images * an_image)
        image += tl.where(is_inner, first // INNER, 0)
        below = tl.where(is_inner, first % INNER, 0)
        first_tile = (program - group + tl.where(is_inner, 1, group)) * WARP_TILES
    else:
        first, an_image, end, below = 0, 1, images, 0
        first_tile = program * WARP_TILES
    tile = first_tile + tl.arange(0, WARP_TILES)[None, None, :, None, None]
    is_tile = tile < TILES
    tile = tl.minimum(tile, TILES - 1)
    head = tile // (ROWS * COLUMNS)
    # The last tiles reach back into those before them, rather than beyond the map; each stores what is its own.
    own_row, own_column = tile % ROWS * 2, tile // ROWS % COLUMNS * TILE_COLUMNS
    first_row, first_column = tl.minimum(own_row, HEIGHT - 2), tl.minimum(own_column, WIDTH - TILE_COLUMNS)
    first_key_row = tl.maximum(tl.minimum(_first_neighbor(first_row, HEIGHT, KERNEL_SIZE), HEIGHT - 8), 0)
    first_key_column = tl.maximum(tl.minimum(_first_neighbor(first_column, WIDTH, KERNEL_SIZE), WIDTH - KEY_COLUMNS), 0)

    in_row = tl.arange(0, 8)[None, None, None, :, None]
    row = first_row + tl.arange(0, 2)[None, :, None, None, None]
    column = first_column + tl.minimum(in_row, TILE_COLUMNS - 1)
    table = relative_position_bias_table
    entry = head * ((2 * KERNEL_SIZE - 1) * (2 * KERNEL_SIZE - 1))
    y, x = first_key_row, first_key_column
    bias_8 = _register_mask_and_bias(
        table, entry, row, column, y, x, HEIGHT, WIDTH, HEAD_DIM, KERNEL_SIZE, WARP_TILES, 8
    )
    if KEY_COLUMNS % 8 >= 4:
        bias_4 = _register_mask_and_bias(
            table, entry, row, column, y, x + 8, HEIGHT, WIDTH, HEAD_DIM, KERNEL_SIZE, WARP_TILES, 4
        )
    if KEY_COLUMNS % 4 >= 2:
        x += KEY_COLUMNS - 2
        bias_2 = _register_mask_and_bias(
            table, entry, row, column, y, x, HEIGHT, WIDTH, HEAD_DIM, KERNEL_SIZE, WARP_TILES, 2
        )

    # Axes (row of queries, warp, column of queries, part of the dims), as the matrix product holds queries.
    half = tl.arange(0, 2)[:, None, None, None]
    in_tile = tl.arange(0, 8)[None, None, :, None]
    quarter = tl.arange(0, 4)[None, None, None, :] * QUARTER
    origin = tl.reshape(head, (1, WARP_TILES, 1, 1)) * HEAD_DIM
    key_y = tl.reshape(first_key_row, (1, WARP_TILES, 1, 1))
    key_x = tl.reshape(first_key_column, (1, WARP_TILES, 1, 1))
    query_y = tl.reshape(first_row, (1, WARP_TILES, 1, 1))
    query_x = tl.reshape(first_column, (1, WARP_TILES, 1, 1)) + tl.minimum(in_tile, TILE_COLUMNS - 1)
    pixel = (query_y * WIDTH + query_x).to(tl.int64) + (half * WIDTH).to(tl.int64)
    dim = tl.arange(0, QUARTER)[None, :]
    query_offset = tl.reshape(origin + pixel * (3 * CHANNELS) + quarter, (WARP_TILES * 64,))
    query_offset = tl.multiple_of(query_offset, QUARTER)[:, None] + dim
    output_offset = tl.reshape(origin + pixel * CHANNELS + quarter, (WARP_TILES * 64,))
    output_offset = tl.multiple_of(output_offset, QUARTER)[:, None] + dim
    is_own = (query_y + half >= tl.reshape(own_row, (1, WARP_TILES, 1, 1))) & (in_tile < TILE_COLUMNS) & (quarter >= 0)
    is_own &= query_x >= tl.reshape(own_column, (1, WARP_TILES, 1, 1))
    is_own &= tl.reshape(is_tile, (1, WARP_TILES, 1, 1))
    is_own = tl.reshape(is_own, (WARP_TILES * 64,))[:, None]

    zero = (output.to(tl.int64) >> 63).to(tl.int16)  # an address has fewer bits, which no compiler knows
    for _ in range(first, end):
        first_pixel = tl.cast(image, tl.int64) * (HEIGHT * WIDTH) + below * (2 * WARP_TILES * WIDTH)
        start = qkv + first_pixel * (3 * CHANNELS)
        q = tl.load(start + query_offset)
        q = tl.trans(tl.reshape(q, (2, WARP_TILES, 8, 4, HEAD_DIM // 16, 2, 2)), 1, 0, 2, 4, 5, 3, 6)
        q = _kept_together(tl.reshape(q, (WARP_TILES, 16, HEAD_DIM)), zero)

        k = _neighbor_keys(start, origin, key_y, key_x, HEIGHT, WIDTH, CHANNELS, HEAD_DIM, WARP_TILES, 8, CLAMPED)
        v_8 = _neighbor_values(start, origin, key_y, key_x, HEIGHT, WIDTH, CHANNELS, HEAD_DIM, WARP_TILES, 8, CLAMPED)
        scores_8 = tl.dot(q, k, acc=bias_8)
        largest = _largest_of_eighths(scores_8, WARP_TILES, 8)
        if KEY_COLUMNS % 8 >= 4:
            more_x = key_x + 8
            k = _neighbor_keys(start, origin, key_y, more_x, HEIGHT, WIDTH, CHANNELS, HEAD_DIM, WARP_TILES, 4, CLAMPED)
            v_4 = _neighbor_values(
                start, origin, key_y, more_x, HEIGHT, WIDTH, CHANNELS, HEAD_DIM, WARP_TILES, 4, CLAMPED
            )
            scores_4 = tl.dot(q, k, acc=bias_4)
            largest = tl.maximum(largest, _largest_of_eighths(scores_4, WARP_TILES, 4))
        if KEY_COLUMNS % 4 >= 2:
            more_x = key_x + (KEY_COLUMNS - 2)
            k = _neighbor_keys(start, origin, key_y, more_x, HEIGHT, WIDTH, CHANNELS, HEAD_DIM, WARP_TILES, 2, CLAMPED)
            v_2 = _neighbor_values(
                start, origin, key_y, more_x, HEIGHT, WIDTH, CHANNELS, HEAD_DIM, WARP_TILES, 2, CLAMPED
            )
            scores_2 = tl.dot(q, k, acc=bias_2)
            largest = tl.maximum(largest, _largest_of_eighths(scores_2, WARP_TILES, 2))

        largest = tl.max(largest, 2) * SCALE
        total = tl.zeros((WARP_TILES, 16, 8), tl.float32)
        attended = tl.zeros((WARP_TILES, 16, HEAD_DIM), tl.float32)
        total, attended = _take_values(scores_8, v_8, largest, total, attended, 8, HEAD_DIM)
        if KEY_COLUMNS % 8 >= 4:
            total, attended = _take_values(scores_4, v_4, largest, total, attended, 8, HEAD_DIM)
        if KEY_COLUMNS % 4 >= 2:
            total, attended = _take_values(scores_2, v_2, largest, total, attended, 8, HEAD_DIM)

        # All 8 columns of `total` are alike; each thread has two.
        total, _ = tl.split(tl.reshape(total, (WARP_TILES, 16, 4, 2)))
        attended = tl.reshape(attended, (WARP_TILES, 16, EIGHTH, 4, 2)) * (1 / total)[:, :, None, :, None]
        attended = tl.reshape(attended.to(output.dtype.element_ty), (WARP_TILES, 2, 8, EIGHTH, 4, 2))
        attended = tl.reshape(tl.trans(attended, 1, 0, 2, 4, 5, 3), (WARP_TILES * 64, QUARTER))
        tl.store(output + first_pixel * CHANNELS + output_offset, attended, mask=is_own)
        if INNER > 0:
            below += 1
            image += (below == an_image).to(tl.int32)
            below = tl.where(below == an_image, 0, below)
        else:
            image += 1
