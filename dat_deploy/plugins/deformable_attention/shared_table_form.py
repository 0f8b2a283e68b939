"""`deformable_attention` in half precision with the head's table in shared memory: one warp a program, nothing waits.

What a score costs is not its products but its bias: four entries of the table, at a place that no two keys share. The
general form reads them from the L1 cache, which looks up a line for every key and row of every read and is busy with
that alone (docs/kernels.md). Here

- the head's table is in shared memory, {T[x], T[x + 1]} and the steps to their right in one entry of 8 bytes: one read
  and one or two operations of half precision give a row's bias of two neighbouring queries (`half2`). There are zeros
  around it, so nothing is masked;
- scores are transposed, [keys, queries]: a thread of the matrix unit then holds 2 keys by all 8 rows of 2 columns of
  queries, and what depends on the key alone is worked out once for 16 scores. The bias lands where the product wants
  its accumulator;
- the shift of the softmax is not the largest score so far, which would be looked up across lanes for each key, but one
  for each query that is known before: its largest score with SAMPLES of the keys, plus the largest bias, less LIFT. A
  weight is then 2^LIFT or so at most. Where that guess was bad, the sum of a query's weights says so: too small to be
  exact in half precision, or infinite. Such tiles are computed again, by the general form. So are those with a location
  that is no number or far outside, and with a table that half precision does not hold;
- a program is one warp, which waits for no other; keys, values, locations and bias of the next step are under way
  while one is computed.
"""

import triton
import triton.language as tl

from dat_deploy.plugins.deformable_attention.general_form import attend_to_all, grid_coordinate
from dat_deploy.plugins.half2 import (
    ASSEMBLY,
    half2,
    half2_first,
    half2_fma,
    half2_fma_of_first,
    half2_fma_of_second,
    half2_fnma_of_first,
    half2_fnma_of_second,
    half2_part_above,
    half2_second,
    half2_sub,
)

__all__ = [
    "BLOCK_KEYS",
    "SHARED_KIB",
    "TILE_ROWS",
    "deformable_attention_shared_table_kernel",
    "padding",
    "table_bytes",
]

TILE_ROWS = 8
BLOCK_KEYS = 16  # of one matrix product of a warp
SAMPLES = tl.constexpr(2)  # blocks of keys that the shift is guessed from
LIFT = tl.constexpr(6.0)
LEAST_TOTAL = tl.constexpr(0.0625)  # below it weights are rounded more than the products are
MOST_TOTAL = tl.constexpr(1e6)  # above it bfloat16, which holds larger weights, loses what they multiply
LARGEST_ENTRY = tl.constexpr(30000.0)  # times sqrt(HEAD_DIM), so that a step between two is finite in half precision
PAD_COLUMNS = tl.constexpr(2)

# What the table may take. PTX declares it here, for Triton gives no shared memory that stays from step to step; in
# whole KiB, so that what Triton takes after it begins at the same alignment.
SHARED_KIB = (3, 7, 9, 16, 22, 29, 36)
DECLARE_3 = tl.constexpr("{ .shared .align 1024 .b8 table[3072]; mov.u32 $0, table; }")
DECLARE_7 = tl.constexpr("{ .shared .align 1024 .b8 table[7168]; mov.u32 $0, table; }")
DECLARE_9 = tl.constexpr("{ .shared .align 1024 .b8 table[9216]; mov.u32 $0, table; }")
DECLARE_16 = tl.constexpr("{ .shared .align 1024 .b8 table[16384]; mov.u32 $0, table; }")
DECLARE_22 = tl.constexpr("{ .shared .align 1024 .b8 table[22528]; mov.u32 $0, table; }")
DECLARE_29 = tl.constexpr("{ .shared .align 1024 .b8 table[29696]; mov.u32 $0, table; }")
DECLARE_36 = tl.constexpr("{ .shared .align 1024 .b8 table[36864]; mov.u32 $0, table; }")


def padding(height: int) -> int:
    """Rows of zeros at either end of the table, for maps of this many rows."""
    return 4 + max(0, TILE_ROWS - height)


def table_bytes(height: int, table_height: int, table_width: int) -> int:
    """Of shared memory."""
    return 8 * (table_height + 2 * padding(height)) * (table_width + 3)


@triton.jit
def _declare_shared(KIB: tl.constexpr, any_scalar):
    """The address of so much shared memory, 0 in the interpreter.

    It is called pure, as all assembly here, for torch takes a kernel with any other to write all of its arguments. What
    comes before what is then said by the data: `_fill_shared` returns what its stores return, and the address that is
    read from is made of that.
    """
    if not ASSEMBLY:
        return 0
    elif KIB == 3:
        return tl.inline_asm_elementwise(DECLARE_3, "=r,r", [any_scalar], dtype=tl.int32, is_pure=True, pack=1)
    elif KIB == 7:
        return tl.inline_asm_elementwise(DECLARE_7, "=r,r", [any_scalar], dtype=tl.int32, is_pure=True, pack=1)
    elif KIB == 9:
        return tl.inline_asm_elementwise(DECLARE_9, "=r,r", [any_scalar], dtype=tl.int32, is_pure=True, pack=1)
    elif KIB == 16:
        return tl.inline_asm_elementwise(DECLARE_16, "=r,r", [any_scalar], dtype=tl.int32, is_pure=True, pack=1)
    elif KIB == 22:
        return tl.inline_asm_elementwise(DECLARE_22, "=r,r", [any_scalar], dtype=tl.int32, is_pure=True, pack=1)
    elif KIB == 29:
        return tl.inline_asm_elementwise(DECLARE_29, "=r,r", [any_scalar], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(DECLARE_36, "=r,r", [any_scalar], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _table_entry(table, row, column, TABLE_HEIGHT: tl.constexpr, TABLE_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Two neighbours and the steps to the right of them, as pairs, and the first alone; times sqrt(HEAD_DIM)."""
    FACTOR: tl.constexpr = HEAD_DIM**0.5
    LAST: tl.constexpr = TABLE_WIDTH - 1
    table += row * TABLE_WIDTH
    is_row = (row >= 0) & (row < TABLE_HEIGHT)
    a = tl.load(table + tl.minimum(tl.maximum(column, 0), LAST), mask=is_row, other=0.0).to(tl.float32)
    b = tl.load(table + tl.minimum(tl.maximum(column + 1, 0), LAST), mask=is_row, other=0.0).to(tl.float32)
    c = tl.load(table + tl.minimum(tl.maximum(column + 2, 0), LAST), mask=is_row, other=0.0).to(tl.float32)
    a *= tl.where((column >= 0) & (column <= LAST), FACTOR, 0.0)
    b *= tl.where((column >= -1) & (column < LAST), FACTOR, 0.0)
    c *= tl.where((column >= -2) & (column < LAST - 1), FACTOR, 0.0)
    two = half2(a, b)
    return two, half2_sub(half2(b, c), two), a


@triton.jit
def _fill_shared(
    address,
    table,
    TABLE_HEIGHT: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PAD_ROWS: tl.constexpr,
    FILL_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write the table to shared memory.

    Returns the largest entry, whether half precision holds all, and 0, which there is once all is written.
    """
    PITCH: tl.constexpr = TABLE_WIDTH + 3
    ROWS: tl.constexpr = TABLE_HEIGHT + 2 * PAD_ROWS
    FILL_ROWS: tl.constexpr = 1024 // FILL_WIDTH
    largest = tl.full((FILL_ROWS, FILL_WIDTH), float("-inf"), tl.float32)
    smallest = tl.full((FILL_ROWS, FILL_WIDTH), float("inf"), tl.float32)
    written = tl.zeros((FILL_ROWS, FILL_WIDTH), tl.int32)
    column = tl.arange(0, FILL_WIDTH)[None, :]
    is_column = (column >= PAD_COLUMNS) & (column < PAD_COLUMNS + TABLE_WIDTH)
    for first_row in range(0, ROWS, FILL_ROWS):
        row = first_row + tl.arange(0, FILL_ROWS)[:, None]
        two, steps, entry = _table_entry(
            table, row - PAD_ROWS, column - PAD_COLUMNS, TABLE_HEIGHT, TABLE_WIDTH, HEAD_DIM
        )
        is_entry = is_column & (row >= PAD_ROWS) & (row < PAD_ROWS + TABLE_HEIGHT)
        largest = tl.maximum(largest, tl.where(is_entry, entry, float("-inf")))
        smallest = tl.minimum(smallest, entry)
        if ASSEMBLY:
            written |= tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.shared.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }",
                "=r,r,r,r,r",
                [address + 8 * (row * PITCH + column), two, steps, ((column < PITCH) & (row < ROWS)).to(tl.int32)],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
    largest, smallest = tl.max(largest), tl.min(smallest)
    return largest, (largest < LARGEST_ENTRY) & (smallest > -LARGEST_ENTRY), tl.max(written)


@triton.jit
def _floor(x):
    """The floor of 0 <= x < 2^22, as float32 and as int32. Rounding is quick, converting is not."""
    if ASSEMBLY:
        moved = tl.inline_asm_elementwise(
            "add.rm.f32 $0, $1, 0f4B000000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return moved - 8388608.0, moved.to(tl.int32, bitcast=True) & 0x7FFFFF
    else:
        return tl.floor(x), tl.floor(x).to(tl.int32)


@triton.jit
def _locations_of(sampling_locations, first_key, keys):
    """y and x of eight keys, then of the next eight, [8, 1] each; beyond the last key that of the last."""
    n = first_key + tl.arange(0, 8)[:, None]
    early = sampling_locations + 2 * tl.minimum(n, keys - 1)
    late = sampling_locations + 2 * tl.minimum(n + 8, keys - 1)
    return tl.load(early), tl.load(early + 1), tl.load(late), tl.load(late + 1)


@triton.jit
def _table_rows(
    address,
    table,
    location_y,
    location_x,
    query_y,
    query_x,
    lag_x,
    TABLE_HEIGHT: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PAD_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PIXEL: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """The rows of the table around a tile's rows of queries, for eight keys, blended in x.

    Args:
        query_y, query_x: of the tile's first query; lag_x: how much less than an entry of the table it is from one
            column of queries to the next.

    Returns:
        How far below the first (HALF_PIXEL: the second) of these rows the first row of queries lies, 0 to 1, [8, 1]
        float32; and the rows, each of int32 [8, 4]: pairs of columns of queries. The first of each pair, and so a
        query of every tile, is NaN where the location is no number, or so far outside that there is no such row.
    """
    ABOVE: tl.constexpr = 1 if HALF_PIXEL else 0
    PITCH: tl.constexpr = TABLE_WIDTH + 3
    LAST: tl.constexpr = TABLE_HEIGHT + 2 * PAD_ROWS - ABOVE - TILE_ROWS - 0.5
    y = ((query_y - location_y) * 0.5 + 1) * (0.5 * (TABLE_HEIGHT - 1)) + (PAD_ROWS - ABOVE)
    x = ((query_x - location_x) * 0.5 + 1) * (0.5 * (TABLE_WIDTH - 1)) + PAD_COLUMNS
    is_near = (y >= 0) & (y <= LAST) & (x == x)
    y = tl.minimum(tl.maximum(y, 0.0), LAST)
    top, row = _floor(y)

    x += 2 * tl.arange(0, 4)[None, :] * (1 - lag_x)
    x = tl.minimum(tl.maximum(x, 0.0), TABLE_WIDTH + PAD_COLUMNS * 1.0)
    left, column = _floor(x)
    right_of_first = tl.where(is_near, x - left, float("nan"))
    right_of_second = right_of_first - lag_x  # of the entry after it; below 0 it is left of that
    weights = half2(right_of_first, tl.maximum(right_of_second, 0.0))
    back = half2(right_of_first * 0, tl.minimum(right_of_second, 0.0))

    entry = row * PITCH + column
    rows = ()
    for r in tl.static_range(TILE_ROWS + 1 + ABOVE):
        if ASSEMBLY:
            two, steps = tl.inline_asm_elementwise(
                "ld.shared.v2.b32 {$0, $1}, [$2];",
                "=r,=r,r",
                [address + 8 * (entry + r * PITCH)],
                dtype=(tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            two, steps, _ = _table_entry(
                table,
                (entry + r * PITCH) // PITCH - PAD_ROWS,
                (entry + r * PITCH) % PITCH - PAD_COLUMNS,
                TABLE_HEIGHT,
                TABLE_WIDTH,
                HEAD_DIM,
            )
        blended = half2_fma(steps, weights, two)
        if HALF_PIXEL:
            blended = half2_fma_of_first(steps, back, blended)
        rows = rows + (blended,)
    return y - top, rows


@triton.jit
def _joined(parts, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tensors [8, 4], every STEP-th from FIRST, on a new last axis."""
    if COUNT == 2:
        joined = tl.join(parts[FIRST], parts[FIRST + STEP])
    else:
        even = _joined(parts, FIRST, STEP * 2, COUNT // 2)
        odd = _joined(parts, FIRST + STEP, STEP * 2, COUNT // 2)
        joined = tl.reshape(tl.join(even, odd), (8, 4, COUNT))
    return joined


@triton.jit
def _packed_bias(
    address,
    table,
    locations,
    query_y,
    query_x,
    lag_y,
    lag_x,
    TABLE_HEIGHT: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PAD_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PIXEL: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """The bias of 16 keys to the tile, times sqrt(HEAD_DIM): int32 [8 keys, 4 pairs of columns, rows · 2 · 8 keys]."""
    ABOVE: tl.constexpr = 1 if HALF_PIXEL else 0
    early_y, early_x, late_y, late_x = locations
    early_below, early_rows = _table_rows(
        address,
        table,
        early_y,
        early_x,
        query_y,
        query_x,
        lag_x,
        TABLE_HEIGHT,
        TABLE_WIDTH,
        PAD_ROWS,
        HEAD_DIM,
        HALF_PIXEL,
        TILE_ROWS,
    )
    late_below, late_rows = _table_rows(
        address,
        table,
        late_y,
        late_x,
        query_y,
        query_x,
        lag_x,
        TABLE_HEIGHT,
        TABLE_WIDTH,
        PAD_ROWS,
        HEAD_DIM,
        HALF_PIXEL,
        TILE_ROWS,
    )
    below = half2(early_below, late_below)
    biases = ()
    for i in tl.static_range(TILE_ROWS):
        if HALF_PIXEL:  # row i lies around the (i + 1)-th of the table's, from -1 to 1 of it
            lag = i * lag_y + tl.zeros((1, 1), tl.float32)
            lag = half2(lag, lag)
            down, up = half2_part_above(below, lag), half2_part_above(lag, below)
        else:
            down = below
        early = half2_fma_of_first(
            down, half2_sub(early_rows[i + ABOVE + 1], early_rows[i + ABOVE]), early_rows[i + ABOVE]
        )
        late = half2_fma_of_second(
            down, half2_sub(late_rows[i + ABOVE + 1], late_rows[i + ABOVE]), late_rows[i + ABOVE]
        )
        if HALF_PIXEL:
            early = half2_fnma_of_first(up, half2_sub(early_rows[i + 1], early_rows[i]), early)
            late = half2_fnma_of_second(up, half2_sub(late_rows[i + 1], late_rows[i]), late)
        biases = biases + (early, late)
    return _joined(biases, 0, 1, 2 * TILE_ROWS)


@triton.jit
def _tiles_again(
    query,
    key,
    value,
    sampling_locations,
    table,
    output,
    first_row,
    first_new_row,
    first_column,
    height,
    width,
    keys,
    table_height,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PIXEL: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Compute what a program has stored by the general form; in half tiles, for that takes more registers."""
    ROWS: tl.constexpr = TILE_ROWS // 2
    in_tile = tl.arange(0, ROWS * 8)
    dim = tl.arange(0, HEAD_DIM)[None, :]
    for part in range(2 * COLUMN_TILES):
        top, left = first_row + part % 2 * ROWS, first_column + part // 2 * 8
        row, column = top + in_tile // 8, left + in_tile % 8
        is_query = ((row < height) & (column < width))[:, None]
        query_offset = (row * width + column)[:, None] * CHANNELS + dim
        attended = attend_to_all(
            tl.load(query + query_offset, mask=is_query, other=0.0),
            key,
            value,
            sampling_locations,
            table,
            top,
            left,
            height,
            width,
            keys,
            table_height,
            CHANNELS,
            HEAD_DIM,
            HALF_PIXEL,
            TABLE_WIDTH,
            0,
            False,
            EVEN_KEYS,
            HEAD_DIM,
            ROWS,
            8,
            BLOCK_KEYS,
        )
        is_new = is_query & (row >= first_new_row)[:, None]
        tl.store(output + query_offset, attended.to(output.dtype.element_ty), mask=is_new)


@triton.jit(do_not_specialize=["height", "width", "keys", "table_height"])
def deformable_attention_shared_table_kernel(
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
    TABLE_HEIGHT: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PAD_ROWS: tl.constexpr,
    FILL_WIDTH: tl.constexpr,
    SHARED_KIB: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Grid: image, head, rows of queries, columns of them; the last fastest. Layouts as in the general form.

    A program takes COLUMN_TILES tiles of TILE_ROWS x 8 queries, one after the other.
    """
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    TILE: tl.constexpr = TILE_ROWS * 8
    SCALE: tl.constexpr = 1.4426950408889634 / HEAD_DIM**0.5
    programs_across = tl.cdiv(width, 8 * COLUMN_TILES)
    programs = tl.cdiv(height, TILE_ROWS) * programs_across
    program = tl.program_id(0)
    head = program // programs % NUM_HEADS
    image = (program // programs // NUM_HEADS).to(tl.int64)
    group = head // (NUM_HEADS // OFFSET_GROUPS)
    first_new_row = program % programs // programs_across * TILE_ROWS
    first_row = tl.minimum(first_new_row, tl.maximum(height - TILE_ROWS, 0))  # up into the tile before, as there

    query += image * (height * width * CHANNELS) + head * HEAD_DIM
    output += image * (height * width * CHANNELS) + head * HEAD_DIM
    key += image * (keys * CHANNELS) + head * HEAD_DIM
    value += image * (keys * CHANNELS) + head * HEAD_DIM
    sampling_locations += (image * OFFSET_GROUPS + group) * (keys * 2)
    table = relative_position_bias_table + head * (TABLE_HEIGHT * TABLE_WIDTH)

    address = _declare_shared(SHARED_KIB, program)
    largest_bias, is_held, written = _fill_shared(
        address, table, TABLE_HEIGHT, TABLE_WIDTH, PAD_ROWS, FILL_WIDTH, HEAD_DIM
    )
    tl.debug_barrier()
    if ASSEMBLY:
        address = tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; add.s32 $0, $1, $2;",
            "=r,r,r",
            [address, written],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    keys_held = tl.where(is_held, keys, 0)

    lag_y, lag_x = 0.0, 0.0
    if HALF_PIXEL:
        lag_y, lag_x = 1 - (height - 1) / height, 1 - (width - 1) / width
    query_y = grid_coordinate(first_row, height, HALF_PIXEL)
    in_tile = tl.arange(0, TILE)
    row = first_row + in_tile // 8
    dim = tl.arange(0, HEAD_DIM)[None, :]
    in_block = tl.arange(0, BLOCK_KEYS)
    are_exact = is_held
    ones = tl.full((BLOCK_KEYS, 8), 1.0, value.dtype.element_ty)
    for column_tile in tl.range(0, COLUMN_TILES, disable_licm=True):
        first_column = (program % programs_across * COLUMN_TILES + column_tile) * 8
        query_x = grid_coordinate(first_column, width, HALF_PIXEL)
        column = first_column + in_tile % 8
        is_query = (row < height) & (column < width)
        query_offset = (row * width + column)[:, None] * CHANNELS + dim
        qt = tl.trans(tl.load(query + query_offset, mask=is_query[:, None], other=0.0))

        largest = tl.full((BLOCK_KEYS, TILE), float("-inf"), tl.float32)
        for sample in tl.static_range(SAMPLES):
            n = (sample * BLOCK_KEYS + in_block) * keys // (SAMPLES * BLOCK_KEYS)
            largest = tl.maximum(largest, tl.dot(tl.load(key + n[:, None] * CHANNELS + dim), qt))
        shift = (tl.max(largest, 0) + largest_bias) * SCALE - LIFT

        total = tl.zeros((TILE, 8), tl.float32)  # 8 times the same
        attended = tl.zeros((TILE, HEAD_DIM), tl.float32)
        next_locations = _locations_of(sampling_locations, BLOCK_KEYS, keys)
        next_bias = _packed_bias(
            address,
            table,
            _locations_of(sampling_locations, 0, keys),
            query_y,
            query_x,
            lag_y,
            lag_x,
            TABLE_HEIGHT,
            TABLE_WIDTH,
            PAD_ROWS,
            HEAD_DIM,
            HALF_PIXEL,
            TILE_ROWS,
        )
        for first_key in tl.range(0, keys_held, BLOCK_KEYS):
            n = first_key + in_block
            if EVEN_KEYS:
                k = tl.load(key + n[:, None] * CHANNELS + dim)
                v = tl.load(value + n[:, None] * CHANNELS + dim)
            else:
                k = tl.load(key + n[:, None] * CHANNELS + dim, mask=(n < keys)[:, None], other=0.0)
                v = tl.load(value + n[:, None] * CHANNELS + dim, mask=(n < keys)[:, None], other=0.0)
            # Key in eight, pair of columns, row, eight -> eight, key in eight, row, pair, which of the pair.
            pairs = tl.trans(tl.reshape(next_bias, (8, 4, TILE_ROWS, 2)), 3, 0, 2, 1)
            bias = tl.reshape(tl.join(half2_first(pairs), half2_second(pairs)), (BLOCK_KEYS, TILE)).to(tl.float32)
            if not EVEN_KEYS:
                if first_key + BLOCK_KEYS > keys:
                    bias = tl.where((n < keys)[:, None], bias, -1e30)
            next_bias = _packed_bias(
                address,
                table,
                next_locations,
                query_y,
                query_x,
                lag_y,
                lag_x,
                TABLE_HEIGHT,
                TABLE_WIDTH,
                PAD_ROWS,
                HEAD_DIM,
                HALF_PIXEL,
                TILE_ROWS,
            )
            next_locations = _locations_of(sampling_locations, first_key + 2 * BLOCK_KEYS, keys)
            scores = tl.dot(k, qt, acc=bias)
            weights = tl.trans(tl.exp2(scores * SCALE - shift[None, :]).to(v.dtype))
            attended = tl.dot(weights, v, acc=attended)
            total = tl.dot(weights, ones, acc=total)

        sums = tl.max(total, 1)
        is_exact = (sums >= LEAST_TOTAL) & (sums < MOST_TOTAL)
        are_exact = are_exact & (tl.min((is_exact | ~is_query).to(tl.int32), 0) == 1)
        attended *= (1 / sums)[:, None]
        is_new = (is_query & (row >= first_new_row))[:, None]
        tl.store(output + query_offset, attended.to(output.dtype.element_ty), mask=is_new)

    if not are_exact:
        tl.debug_barrier()  # other threads may store there now
        _tiles_again(
            query,
            key,
            value,
            sampling_locations,
            table,
            output,
            first_row,
            first_new_row,
            program % programs_across * COLUMN_TILES * 8,
            height,
            width,
            keys,
            table_height,
            CHANNELS,
            HEAD_DIM,
            HALF_PIXEL,
            TABLE_WIDTH,
            EVEN_KEYS,
            TILE_ROWS,
            COLUMN_TILES,
            BLOCK_KEYS,
        )
