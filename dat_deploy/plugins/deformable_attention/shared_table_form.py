"""`deformable_attention` in half precision, with the part of the table that a tile of queries needs in shared memory.

What a score costs is not its products but its bias: four entries of the table, at a place that no two keys share.
The general form reads them from the L1 cache, which looks up a line for every key and row of every read and is busy
with that alone (docs/kernels.md). Here

- the table is in shared memory, {T[x], T[x + 1]} and the steps to their right in one entry of 8 bytes: one read and
  one or two operations of half precision give a row's bias of two neighbouring queries (`half2`). There are zeros
  around it, so nothing is masked;
- where the bias of a key begins, and how far it is between entries, is worked out once a program for all queries,
  and lies in shared memory, too;
- queries are dealt out to the rows of the matrix product so that a thread has ROWS_A_LANE rows by 2 columns of the
  map: its biases of a key are ROWS_A_LANE + 1 reads of neighbouring rows, and arrive where the product wants its
  accumulator;
- the shift of the softmax is not the largest score so far, which would be looked up across lanes for each key, but one
  for each query that is known before: its largest score with SAMPLES blocks of keys, plus the largest bias, less LIFT.
  A weight is then 2^LIFT or so at most. Where that guess was bad, the sum of a query's weights says so: too small to be
  exact in half precision, or infinite. Such tiles are computed again, by the general form. So are those with a location
  that is no number or far outside, and with a table that half precision does not hold.
"""

import triton
import triton.language as tl

from dat_deploy.plugins.deformable_attention.general_form import attend_to_all, grid_coordinate
from dat_deploy.plugins.half2 import (
    ASSEMBLY,
    half2,
    half2_first,
    half2_firsts,
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
    "deformable_attention_shared_table_kernel",
    "shared_bytes",
    "tile",
]

BLOCK_KEYS = 16  # of one matrix product of a warp
SAMPLES = tl.constexpr(2)  # blocks of keys that the shift is guessed from
LIFT = tl.constexpr(6.0)
LEAST_TOTAL = tl.constexpr(0.0625)  # below it weights are rounded more than the products are
MOST_TOTAL = tl.constexpr(1e6)  # above it bfloat16, which holds larger weights, loses what they multiply
LARGEST_ENTRY = tl.constexpr(30000.0)  # times sqrt(HEAD_DIM), so that a step between two is finite in half precision
PAD = tl.constexpr(
    3
)  # rows and columns of zeros before the table: for points MARGIN outside, and one that is gone back
MARGIN = tl.constexpr(2)  # how many pixels outside of the map a location may lie
AGAIN_ROWS = tl.constexpr(4)  # by 8 columns: a tile of what is computed again, for that takes more registers
ENTRY = tl.constexpr(8 if ASSEMBLY.value else 1)  # bytes; in the interpreter an address is a number of entries

# What may be taken. PTX declares it here, for Triton gives no shared memory that stays from step to step; in whole KiB,
# so that what Triton takes after it begins at the same alignment.
SHARED_KIB = (3, 4, 6, 8, 10, 12, 14, 17, 20, 24, 28, 32, 36, 40)
SIZES = tl.constexpr(SHARED_KIB)
DECLARATIONS = tl.constexpr(
    tuple(f"{{ .shared .align 1024 .b8 table[{1024 * kib}]; mov.u32 $0, table; }}" for kib in SHARED_KIB)
)


def tile(rows_a_lane: int, lane_rows: int, warp_rows: int, warps: int) -> tuple[int, int]:
    """Rows and columns of queries that a program has at once."""
    return rows_a_lane * lane_rows * warp_rows, 2 * (8 // lane_rows) * (warps // warp_rows)


def shared_bytes(height: int, width: int, tile_rows: int, columns: int, keys: int) -> int:
    """Of the table and the places of keys, for tiles of these rows, all columns of a program together."""
    rows, pitch = height + tile_rows + 5, (width + columns + 8) // 4 * 4
    return 8 * (rows * pitch + -(-keys // BLOCK_KEYS) * BLOCK_KEYS)


@triton.jit
def _declare_shared(SIZE: tl.constexpr, any_scalar):
    """The address of so much shared memory, 0 in the interpreter.

    It is called pure, as all assembly here, for torch takes a kernel with any other to write all of its arguments. What
    comes before what is then said by the data: what fills it returns what its stores return, and the address that is
    read from is made of that.
    """
    if ASSEMBLY:
        address = tl.inline_asm_elementwise(
            DECLARATIONS[SIZE], "=r,r", [any_scalar], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        address = 0
    return address


@triton.jit
def _table_entry(table, row, column, TABLE_HEIGHT: tl.constexpr, TABLE_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """An entry of the table times sqrt(HEAD_DIM), 0 outside of it; float32."""
    inside = (row >= 0) & (row < TABLE_HEIGHT) & (column >= 0) & (column < TABLE_WIDTH)
    return tl.load(table + (row * TABLE_WIDTH + column), mask=inside, other=0.0).to(tl.float32) * HEAD_DIM**0.5


@triton.jit
def _fill_table(
    address,
    table,
    top,
    left,
    TABLE_HEIGHT: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PITCH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write ROWS by PITCH entries of the table, from row `top` and column `left` on, to shared memory.

    Returns the largest and the smallest of each lane, when all are there.
    """
    FOURS: tl.constexpr = PITCH // 4
    largest = tl.zeros((LANES,), tl.float32)
    smallest = tl.zeros((LANES,), tl.float32)
    for first in range(0, ROWS * FOURS, LANES):
        n = first + tl.arange(0, LANES)
        row, column = n // FOURS + top, n % FOURS * 4 + left
        a = _table_entry(table, row, column, TABLE_HEIGHT, TABLE_WIDTH, HEAD_DIM)
        b = _table_entry(table, row, column + 1, TABLE_HEIGHT, TABLE_WIDTH, HEAD_DIM)
        c = _table_entry(table, row, column + 2, TABLE_HEIGHT, TABLE_WIDTH, HEAD_DIM)
        d = _table_entry(table, row, column + 3, TABLE_HEIGHT, TABLE_WIDTH, HEAD_DIM)
        e = _table_entry(table, row, column + 4, TABLE_HEIGHT, TABLE_WIDTH, HEAD_DIM)
        f = _table_entry(table, row, column + 5, TABLE_HEIGHT, TABLE_WIDTH, HEAD_DIM)
        most, least = tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), tl.minimum(tl.minimum(a, b), tl.minimum(c, d))
        if ASSEMBLY:  # returns `most`, so that whoever has it knows that the entries are written
            most = tl.inline_asm_elementwise(
                "{ .reg .pred p; .reg .b32 ab, bc, cd, de; setp.lt.s32 p, $7, $8; sub.rn.f16x2 ab, $3, $2;"
                " sub.rn.f16x2 bc, $4, $3; sub.rn.f16x2 cd, $5, $4; sub.rn.f16x2 de, $6, $5;"
                " @p st.shared.v4.b32 [$1], {$2, ab, $3, bc}; @p st.shared.v4.b32 [$1 + 16], {$4, cd, $5, de};"
                " mov.b32 $0, $9; }",
                "=f,r,r,r,r,r,r,r,n,f",
                [
                    address + 32 * n,
                    half2(a, b),
                    half2(b, c),
                    half2(c, d),
                    half2(d, e),
                    half2(e, f),
                    n,
                    ROWS * FOURS,
                    most,
                ],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        largest, smallest = tl.maximum(largest, most), tl.minimum(smallest, least)
    return largest, smallest


@triton.jit
def _place(
    sampling_locations,
    n,
    keys,
    height,
    width,
    TABLE_HEIGHT: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    HALF_PIXEL: tl.constexpr,
):
    """Where the bias of keys n to the map's first query is; beyond the last key that of the last.

    Returns the entry, how far below and right of it as a pair, and whether the location is a number and near the map.
    """
    STEP_Y: tl.constexpr = 0.25 * (TABLE_HEIGHT - 1)
    STEP_X: tl.constexpr = 0.25 * (TABLE_WIDTH - 1)
    MOST_Y: tl.constexpr = TABLE_HEIGHT // 2 + PAD + MARGIN - 0.01
    MOST_X: tl.constexpr = TABLE_WIDTH // 2 + PAD + MARGIN - 0.01
    start = sampling_locations + 2 * tl.minimum(n, keys - 1)
    y = (grid_coordinate(0, height, HALF_PIXEL) + 2) * STEP_Y + PAD - tl.load(start) * STEP_Y
    x = (grid_coordinate(0, width, HALF_PIXEL) + 2) * STEP_X + PAD - tl.load(start + 1) * STEP_X
    is_near = (y >= 1) & (y <= MOST_Y) & (x >= 1) & (x <= MOST_X)
    y, x = tl.minimum(tl.maximum(y, 1.0), MOST_Y), tl.minimum(tl.maximum(x, 1.0), MOST_X)
    row, column = tl.floor(y), tl.floor(x)
    return row.to(tl.int32) * PITCH + column.to(tl.int32), half2(y - row, x - column), is_near


@triton.jit
def _fill_places(
    address,
    first_entry,
    sampling_locations,
    keys,
    height,
    width,
    KEYS: tl.constexpr,
    TABLE_HEIGHT: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    HALF_PIXEL: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write `_place` of each key to shared memory. Returns 0, or -inf in a lane of a key that is not near, then."""
    smallest = tl.zeros((LANES,), tl.float32)
    for first in range(0, KEYS, LANES):
        n = first + tl.arange(0, LANES)
        entry, fractions, is_near = _place(
            sampling_locations, n, keys, height, width, TABLE_HEIGHT, TABLE_WIDTH, PITCH, HALF_PIXEL
        )
        far = tl.where(is_near, 0.0, float("-inf"))
        if ASSEMBLY:
            far = tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.lt.s32 p, $4, $5; @p st.shared.v2.b32 [$1], {$2, $3}; mov.b32 $0, $6; }",
                "=f,r,r,r,r,n,f",
                [address + 8 * n, first_entry + 8 * entry, fractions, n, KEYS, far],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        smallest = tl.minimum(smallest, far)
    return smallest


@triton.jit
def _settled(entry, fractions, lags, lag_x, PITCH: tl.constexpr):
    """Go on from the map's first query to a lane's, which lies `lags` less than whole entries from it.

    Returns the entry before that query, and pairs: how far it is below and right of it; how far right its two columns
    are, of the second nothing if it is left of its own entry; and how far left, of the second alone.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p, q; .reg .b16 y, x; .reg .b32 v, m, z, a; mov.b32 z, 0;"
            " sub.rn.f16x2 v, $5, $6; setp.lt.f16x2 p|q, v, z; set.lt.f16x2.f16x2 m, v, z; add.rn.f16x2 v, v, m;"
            " mov.b32 a, $4; @p sub.s32 a, a, $8; @q sub.s32 a, a, 8;"
            " mov.b32 {y, x}, v; mov.b32 z, {x, x};"
            " sub.rn.sat.f16x2 m, z, $7; sub.rn.sat.f16x2 z, $7, z;"
            " mov.b32 $0, a; mov.b32 $1, v; mov.b32 $2, m; mov.b32 $3, z; }",
            "=r,=r,=r,=r,r,r,r,r,n",
            [entry, fractions, lags, lag_x, 8 * PITCH],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        y = half2_first(fractions).to(tl.float32) - half2_first(lags).to(tl.float32)
        x = half2_second(fractions).to(tl.float32) - half2_second(lags).to(tl.float32)
        entry -= tl.where(y < 0, PITCH, 0) + tl.where(x < 0, 1, 0)
        y, x = tl.where(y < 0, y + 1, y), tl.where(x < 0, x + 1, x)
        second = x - half2_second(lag_x).to(tl.float32)
        return entry, half2(y, x), half2(x, tl.maximum(second, 0.0)), half2(x * 0, tl.maximum(-second, 0.0))


@triton.jit
def _rows_of(
    table,
    entry,
    fractions,
    lags,
    lag_x,
    top,
    left,
    TABLE_HEIGHT: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PIXEL: tl.constexpr,
    ROWS_A_LANE: tl.constexpr,
):
    """How far below its entry a lane's first query is, in the first of a pair; and the ROWS_A_LANE + 1 rows of the
    table from that entry on, blended in x: a pair of columns of queries each."""
    if HALF_PIXEL:
        entry, fractions, right_steps, left_steps = _settled(entry, fractions, lags, lag_x, PITCH)
    rows = ()
    for r in tl.static_range(ROWS_A_LANE + 1):
        if ASSEMBLY:
            two, steps = tl.inline_asm_elementwise(
                "ld.shared.v2.b32 {$0, $1}, [$2];",
                "=r,=r,r",
                [entry + 8 * PITCH * r],
                dtype=(tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            row, column = (entry + PITCH * r) // PITCH + top, (entry + PITCH * r) % PITCH + left
            a = _table_entry(table, row, column, TABLE_HEIGHT, TABLE_WIDTH, HEAD_DIM)
            b = _table_entry(table, row, column + 1, TABLE_HEIGHT, TABLE_WIDTH, HEAD_DIM)
            c = _table_entry(table, row, column + 2, TABLE_HEIGHT, TABLE_WIDTH, HEAD_DIM)
            two = half2(a, b)
            steps = half2_sub(half2(b, c), two)
        if HALF_PIXEL:
            row_of_two = half2_fnma_of_first(steps, left_steps, half2_fma(steps, right_steps, two))
        else:
            row_of_two = half2_fma_of_second(fractions, steps, two)
        rows = rows + (row_of_two,)
    return fractions, rows


@triton.jit
def _biases_of_eight(
    places,
    table,
    sampling_locations,
    first_key,
    keys,
    lane,
    offset,
    height,
    width,
    lags,
    lag_x,
    lag_y,
    top,
    left,
    TABLE_HEIGHT: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PIXEL: tl.constexpr,
    ROWS_A_LANE: tl.constexpr,
):
    """The biases, times sqrt(HEAD_DIM), of eight keys, of which a lane has two neighbouring ones, to its queries.

    Returns a tensor of pairs of columns for each row of a lane and each of its two keys, the key fastest.
    """
    if ASSEMBLY:
        a, fractions_a, b, fractions_b = tl.inline_asm_elementwise(
            "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r",
            [places + 8 * first_key + 16 * (lane % 4)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        n = first_key + 2 * (lane % 4)
        a, fractions_a, _ = _place(
            sampling_locations, n, keys, height, width, TABLE_HEIGHT, TABLE_WIDTH, PITCH, HALF_PIXEL
        )
        b, fractions_b, _ = _place(
            sampling_locations, n + 1, keys, height, width, TABLE_HEIGHT, TABLE_WIDTH, PITCH, HALF_PIXEL
        )
    below_a, rows_a = _rows_of(
        table,
        a + offset,
        fractions_a,
        lags,
        lag_x,
        top,
        left,
        TABLE_HEIGHT,
        TABLE_WIDTH,
        PITCH,
        HEAD_DIM,
        HALF_PIXEL,
        ROWS_A_LANE,
    )
    below_b, rows_b = _rows_of(
        table,
        b + offset,
        fractions_b,
        lags,
        lag_x,
        top,
        left,
        TABLE_HEIGHT,
        TABLE_WIDTH,
        PITCH,
        HEAD_DIM,
        HALF_PIXEL,
        ROWS_A_LANE,
    )
    below = half2_firsts(below_a, below_b)
    biases, steps_a, steps_b = (), (), ()
    for i in tl.static_range(ROWS_A_LANE):
        step_a, step_b = half2_sub(rows_a[i + 1], rows_a[i]), half2_sub(rows_b[i + 1], rows_b[i])
        if HALF_PIXEL and i > 0:  # row i lies around the i-th of the table's, from -1 to 1 of it
            lag = i * lag_y + tl.zeros((1,), tl.float32)
            lag = half2(lag, lag)
            down, up = half2_part_above(below, lag), half2_part_above(lag, below)
            bias_a = half2_fnma_of_first(up, steps_a[i - 1], half2_fma_of_first(down, step_a, rows_a[i]))
            bias_b = half2_fnma_of_second(up, steps_b[i - 1], half2_fma_of_second(down, step_b, rows_b[i]))
        else:
            bias_a = half2_fma_of_first(below, step_a, rows_a[i])
            bias_b = half2_fma_of_second(below, step_b, rows_b[i])
        steps_a, steps_b = steps_a + (step_a,), steps_b + (step_b,)
        biases = biases + (bias_a, bias_b)
    return biases


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
    leftmost,
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
    COLUMNS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Compute what a program has stored by the general form."""
    in_tile = tl.arange(0, AGAIN_ROWS * 8)
    dim = tl.arange(0, HEAD_DIM)[None, :]
    for down in range(0, TILE_ROWS, AGAIN_ROWS):
        for across in range(0, COLUMNS, 8):
            top, left = first_row + down, leftmost + across
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
                AGAIN_ROWS,
                8,
                BLOCK_KEYS,
            )
            is_own = (row >= first_new_row) & (row < first_row + TILE_ROWS) & (column < leftmost + COLUMNS)
            tl.store(output + query_offset, attended.to(output.dtype.element_ty), mask=is_query & is_own[:, None])


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
    KEYS: tl.constexpr,
    SHARED_SIZE: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    ROWS_A_LANE: tl.constexpr,
    LANE_ROWS: tl.constexpr,
    WARP_ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Grid: image, head, rows of queries, columns of them; the last fastest. Layouts as in the general form.

    A program takes COLUMN_TILES tiles of queries (`tile`), one after the other. Fragment i of a tile is row i of every
    lane's queries, 16 a warp: first the left ones of the pairs of columns of eight lanes, PAIRS across by LANE_ROWS
    down, then the right ones. Warps go on down WARP_ROWS times, then to the right.
    """
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    SCALE: tl.constexpr = 1.4426950408889634 / HEAD_DIM**0.5
    PAIRS: tl.constexpr = 8 // LANE_ROWS
    QUERIES: tl.constexpr = 16 * WARPS
    TILE_ROWS: tl.constexpr = ROWS_A_LANE * LANE_ROWS * WARP_ROWS
    TILE_COLUMNS: tl.constexpr = 2 * PAIRS * (WARPS // WARP_ROWS)
    COLUMNS: tl.constexpr = TILE_COLUMNS * COLUMN_TILES
    ROWS: tl.constexpr = (TABLE_HEIGHT + 1) // 2 + TILE_ROWS + PAD + MARGIN
    PITCH: tl.constexpr = ((TABLE_WIDTH + 1) // 2 + COLUMNS + PAD + MARGIN + 3) // 4 * 4
    tl.static_assert(1024 * SIZES[SHARED_SIZE] >= 8 * (KEYS + ROWS * PITCH))
    programs_across = tl.cdiv(width, COLUMNS)
    programs = tl.cdiv(height, TILE_ROWS) * programs_across
    program = tl.program_id(0)
    head = program // programs % NUM_HEADS
    image = (program // programs // NUM_HEADS).to(tl.int64)
    group = head // (NUM_HEADS // OFFSET_GROUPS)
    first_new_row = program % programs // programs_across * TILE_ROWS
    first_row = tl.minimum(first_new_row, tl.maximum(height - TILE_ROWS, 0))  # up into the tile before, as there
    leftmost = program % programs_across * COLUMNS

    query += image * (height * width * CHANNELS) + head * HEAD_DIM
    output += image * (height * width * CHANNELS) + head * HEAD_DIM
    key += image * (keys * CHANNELS) + head * HEAD_DIM
    value += image * (keys * CHANNELS) + head * HEAD_DIM
    sampling_locations += (image * OFFSET_GROUPS + group) * (keys * 2)
    table = relative_position_bias_table + head * (TABLE_HEIGHT * TABLE_WIDTH)

    places = _declare_shared(SHARED_SIZE, program)
    top, left = first_row - PAD, leftmost - PAD
    largest_bias, smallest_bias = _fill_table(
        places + ENTRY * KEYS, table, top, left, TABLE_HEIGHT, TABLE_WIDTH, ROWS, PITCH, HEAD_DIM, 128 * WARPS
    )
    far = _fill_places(
        places,
        places + ENTRY * KEYS,
        sampling_locations,
        keys,
        height,
        width,
        KEYS,
        TABLE_HEIGHT,
        TABLE_WIDTH,
        PITCH,
        HALF_PIXEL,
        128 * WARPS,
    )
    largest_bias, smallest_bias = tl.max(largest_bias, 0), tl.min(tl.minimum(smallest_bias, far), 0)
    are_exact = (largest_bias < LARGEST_ENTRY) & (smallest_bias > -LARGEST_ENTRY)
    keys_held = tl.where(are_exact, keys, 0)
    # The largest and the smallest of all lanes of all warps are there when all have written; so the address waits for
    # them, not for a barrier, which nothing would keep before assembly that is called pure.
    tl.debug_barrier()
    if ASSEMBLY:
        places = tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, $1;",
            "=r,r,f,f",
            [places, largest_bias, smallest_bias],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )

    lag_y, lag_x = 0.0, 0.0
    if HALF_PIXEL:
        lag_y, lag_x = 1 - (height - 1) / height, 1 - (width - 1) / width
    lane = tl.arange(0, 32 * WARPS)
    lane_row = (lane // 4 % 8 // PAIRS + lane // 32 % WARP_ROWS * LANE_ROWS) * ROWS_A_LANE
    lane_column = 2 * (lane // 4 % PAIRS + lane // (32 * WARP_ROWS) * PAIRS)
    lag_of_second = tl.zeros((1,), tl.float32) + lag_x
    lag_of_second = half2(lag_of_second * 0, lag_of_second)  # of a plain 0 it would be put together at each use
    in_fragment = tl.arange(0, QUERIES)
    eighth = in_fragment % 8
    row = first_row + (eighth // PAIRS + in_fragment // 16 % WARP_ROWS * LANE_ROWS) * ROWS_A_LANE
    in_tile_column = 2 * (eighth % PAIRS + in_fragment // (16 * WARP_ROWS) * PAIRS) + in_fragment // 8 % 2
    dim = tl.arange(0, HEAD_DIM)[None, :]
    in_block = tl.arange(0, BLOCK_KEYS)
    diagonal = (tl.arange(0, HEAD_DIM)[:, None] == dim).to(tl.float32).to(query.dtype.element_ty)
    ones = tl.full((BLOCK_KEYS, 8), 1.0, value.dtype.element_ty)
    for column_tile in tl.range(0, COLUMN_TILES, disable_licm=True):
        first_column = leftmost + column_tile * TILE_COLUMNS
        column = first_column + in_tile_column
        lags = half2((first_row + lane_row) * lag_y, (first_column + lane_column) * lag_x)
        offset = ENTRY * (lane_row * PITCH + first_column - leftmost + lane_column)
        queries, shifts, attended, totals = (), (), (), ()
        for i in tl.static_range(ROWS_A_LANE):
            is_query = ((row + i < height) & (column < width))[:, None]
            q = tl.load(query + (((row + i) * width + column)[:, None] * CHANNELS + dim), mask=is_query, other=0.0)
            largest = tl.full((QUERIES, BLOCK_KEYS), float("-inf"), tl.float32)
            for sample in tl.static_range(SAMPLES):
                n = (sample * BLOCK_KEYS + in_block) * keys // (SAMPLES * BLOCK_KEYS)
                largest = tl.maximum(largest, tl.dot(q, tl.trans(tl.load(key + n[:, None] * CHANNELS + dim))))
            shifts = shifts + ((tl.max(largest, 1) + largest_bias) * SCALE - LIFT,)
            # By a product with ones on the diagonal to registers, where the next product wants them; else Triton would
            # read them from shared memory for every block of keys.
            queries = queries + (tl.dot(q, diagonal).to(q.dtype),)
            attended = attended + (tl.zeros((QUERIES, HEAD_DIM), tl.float32),)
            totals = totals + (tl.zeros((QUERIES, 8), tl.float32),)  # 8 times the same

        for first_key in tl.range(0, keys_held, BLOCK_KEYS):
            n = first_key + in_block
            if EVEN_KEYS:
                k = tl.load(key + n[:, None] * CHANNELS + dim)
                v = tl.load(value + n[:, None] * CHANNELS + dim)
            else:  # beyond the last key is the last, whose weight there multiplies nothing and is not counted
                k = tl.load(key + tl.minimum(n, keys - 1)[:, None] * CHANNELS + dim)
                v = tl.load(value + n[:, None] * CHANNELS + dim, mask=(n < keys)[:, None], other=0.0)
                ones = (n[:, None] + tl.zeros((1, 8), tl.int32) < keys).to(tl.float32).to(v.dtype)
            kt = tl.trans(k)
            early = _biases_of_eight(
                places,
                table,
                sampling_locations,
                first_key,
                keys,
                lane,
                offset,
                height,
                width,
                lags,
                lag_of_second,
                lag_y,
                top,
                left,
                TABLE_HEIGHT,
                TABLE_WIDTH,
                PITCH,
                HEAD_DIM,
                HALF_PIXEL,
                ROWS_A_LANE,
            )
            late = _biases_of_eight(
                places,
                table,
                sampling_locations,
                first_key + 8,
                keys,
                lane,
                offset,
                height,
                width,
                lags,
                lag_of_second,
                lag_y,
                top,
                left,
                TABLE_HEIGHT,
                TABLE_WIDTH,
                PITCH,
                HEAD_DIM,
                HALF_PIXEL,
                ROWS_A_LANE,
            )
            new_attended, new_totals = (), ()
            for i in tl.static_range(ROWS_A_LANE):
                pairs = tl.join(tl.join(early[2 * i], early[2 * i + 1]), tl.join(late[2 * i], late[2 * i + 1]))
                # Warp, eighth, two keys, which of the two, eight keys, which query of the pair.
                pairs = tl.reshape(tl.join(half2_first(pairs), half2_second(pairs)), (WARPS, 8, 4, 2, 2, 2))
                bias = tl.reshape(tl.permute(pairs, (0, 5, 1, 4, 2, 3)), (QUERIES, BLOCK_KEYS)).to(tl.float32)
                scores = tl.dot(queries[i], kt, acc=bias)
                weights = tl.exp2(scores * SCALE - shifts[i][:, None]).to(v.dtype)
                new_attended = new_attended + (tl.dot(weights, v, acc=attended[i]),)
                new_totals = new_totals + (tl.dot(weights, ones, acc=totals[i]),)
            attended, totals = new_attended, new_totals

        is_exact = tl.full((QUERIES,), True, tl.int1)
        for i in tl.static_range(ROWS_A_LANE):
            is_query = (row + i < height) & (column < width)
            sums = tl.max(totals[i], 1)
            is_exact = is_exact & (((sums >= LEAST_TOTAL) & (sums < MOST_TOTAL)) | ~is_query)
            result = attended[i] * (1 / sums)[:, None]
            is_new = (is_query & (row + i >= first_new_row))[:, None]
            end = output + (((row + i) * width + column)[:, None] * CHANNELS + dim)
            tl.store(end, result.to(output.dtype.element_ty), mask=is_new)
        are_exact = are_exact & (tl.min(is_exact.to(tl.int32), 0) == 1)

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
            leftmost,
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
            COLUMNS,
            BLOCK_KEYS,
        )
