"""`neighborhood_attention` in one launch: bias, softmax and values; only the output reaches memory.

There are two kernels: `register_form` computes in half precision what a network asks for, the one here everything.

One program of it computes one head of one image for a tile of TILE_ROWS × TILE_COLUMNS queries. The neighbors of all of
them lie in a rectangle of (TILE_ROWS + K - 1) × (TILE_COLUMNS + K - 1) keys; it is walked KEY_ROWS rows at a time, and
what is no neighbor of a query is masked. With a dilation, pixels of the same remainders form maps of their own, and a
tile is of one of them.
"""

import functools

import triton
import triton.language as tl

from dat_deploy.plugins.launch import Configuration, Launch, Problem, Shape, are_known, ceil_div, next_power_of_two
from dat_deploy.plugins.neighborhood_attention.register_form import (
    QUERY_COLUMNS,
    QUERY_ROWS,
    inner_groups,
    register_neighbors_kernel,
)
from dat_deploy.plugins.online_softmax import attend

__all__ = ["configurations", "launch", "neighborhood_attention_kernel", "problem"]

INPUTS = ("qkv", "padding_qkv", "relative_position_bias_table")
SCALARS = ("height", "width")
TILES = [(8, 8, 4, 4), (8, 8, 2, 4), (16, 8, 2, 8), (4, 16, 2, 4), (8, 8, 1, 4)]
# Tiles, each of a warp, images, and the most registers; in the order of their speed on an H200, large maps first.
REGISTER_TILES: list[tuple[int, int, int | None]] = [
    (4, 8, 168),
    (2, 8, 128),
    (4, 4, 168),
    (2, 4, None),
    (4, 1, None),
    (2, 1, None),
]
WIDE = 32  # columns of a map from which on tiles in the middle of it share their bias
REGISTER_KERNEL_SIZE = 7  # of 2 rows of queries, whose neighbors are in 8 rows
BLOCK_BYTES = 4096  # of a block of keys: larger ones spill registers, or take more shared memory than TensorRT allows

# Below any score; and below that by so much that no rounding of one brings it near the other.
NO_SCORE_YET = tl.constexpr(-1e20)
NO_NEIGHBOR = tl.constexpr(-1e30)


@triton.jit
def _window(position, positions, KERNEL_SIZE: tl.constexpr):
    """The first of the K neighbors on an axis: a window that would leave the map is shifted inwards."""
    return tl.minimum(tl.maximum(position - KERNEL_SIZE // 2, 0), positions - KERNEL_SIZE)


@triton.jit(do_not_specialize=list(SCALARS))
def neighborhood_attention_kernel(
    qkv,
    padding_qkv,
    relative_position_bias_table,
    height,
    width,
    output,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    DILATION: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
):
    """Grid: image, head, pair of remainders, tile of queries, the last fastest. Layouts as in the reference."""
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    TILE: tl.constexpr = TILE_ROWS * TILE_COLUMNS
    TABLE_SIDE: tl.constexpr = 2 * KERNEL_SIZE - 1
    BLOCK_KEYS: tl.constexpr = KEY_ROWS * KEY_COLUMNS
    tiles_across = tl.cdiv(tl.cdiv(width, DILATION), TILE_COLUMNS)
    tiles = tl.cdiv(tl.cdiv(height, DILATION), TILE_ROWS) * tiles_across
    program = tl.program_id(0)
    tile = program % tiles
    remainders = program // tiles % (DILATION * DILATION)
    head = program // tiles // (DILATION * DILATION) % NUM_HEADS
    image = (program // tiles // (DILATION * DILATION * NUM_HEADS)).to(tl.int64) * (height * width)
    remainder_y, remainder_x = remainders // DILATION, remainders % DILATION
    positions_y = tl.cdiv(tl.maximum(height, KERNEL_SIZE * DILATION) - remainder_y, DILATION)
    positions_x = tl.cdiv(tl.maximum(width, KERNEL_SIZE * DILATION) - remainder_x, DILATION)

    qkv += image * (3 * CHANNELS) + head * HEAD_DIM
    output += image * CHANNELS + head * HEAD_DIM
    padding_qkv += head * HEAD_DIM
    table = relative_position_bias_table + head * (TABLE_SIDE * TABLE_SIDE)

    dim = tl.arange(0, BLOCK_DIM)
    is_dim = (dim < HEAD_DIM)[None, :]
    in_tile = tl.arange(0, TILE)
    first_row, first_column = tile // tiles_across * TILE_ROWS, tile % tiles_across * TILE_COLUMNS
    row, column = first_row + in_tile // TILE_COLUMNS, first_column + in_tile % TILE_COLUMNS
    query_y, query_x = row * DILATION + remainder_y, column * DILATION + remainder_x
    query_mask = ((query_y < height) & (query_x < width))[:, None] & is_dim
    query_pixel = query_y * width + query_x
    q = tl.load(qkv + (query_pixel[:, None] * (3 * CHANNELS) + dim[None, :]), mask=query_mask, other=0.0)
    row, column = tl.minimum(row, positions_y - 1), tl.minimum(column, positions_x - 1)  # none outside of the map
    window_y, window_x = _window(row, positions_y, KERNEL_SIZE), _window(column, positions_x, KERNEL_SIZE)
    query_entry = row * TABLE_SIDE + column - (KERNEL_SIZE - 1) * (TABLE_SIDE + 1)

    first_key_row = _window(first_row, positions_y, KERNEL_SIZE)
    first_key_column = _window(first_column, positions_x, KERNEL_SIZE)
    in_block = tl.arange(0, BLOCK_KEYS)
    largest = tl.full((TILE,), NO_SCORE_YET, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    attended = tl.zeros((TILE, BLOCK_DIM), tl.float32)
    for block_row in range(0, TILE_ROWS + KERNEL_SIZE - 1, KEY_ROWS):
        key_row = first_key_row + block_row + in_block // KEY_COLUMNS
        key_column = first_key_column + in_block % KEY_COLUMNS
        key_y, key_x = key_row * DILATION + remainder_y, key_column * DILATION + remainder_x
        in_map = (key_y < height) & (key_x < width)
        key_mask = in_map[:, None] & is_dim
        key_offset = (key_y * width + key_x)[:, None] * (3 * CHANNELS) + dim[None, :]
        k = tl.load(qkv + CHANNELS + key_offset, mask=key_mask, other=0.0)
        v = tl.load(qkv + 2 * CHANNELS + key_offset, mask=key_mask, other=0.0)
        if PADDED:
            padding_k = tl.load(padding_qkv + CHANNELS + dim, mask=dim < HEAD_DIM, other=0.0).to(k.dtype)
            padding_v = tl.load(padding_qkv + 2 * CHANNELS + dim, mask=dim < HEAD_DIM, other=0.0).to(v.dtype)
            k = tl.where(in_map[:, None], k, padding_k[None, :])
            v = tl.where(in_map[:, None], v, padding_v[None, :])
        step_y, step_x = key_row[None, :] - window_y[:, None], key_column[None, :] - window_x[:, None]
        is_neighbor = (step_y >= 0) & (step_y < KERNEL_SIZE) & (step_x >= 0) & (step_x < KERNEL_SIZE)
        entry = (key_row * TABLE_SIDE + key_column)[None, :] - query_entry[:, None]
        # A block may hold no neighbor of a query: finite, and far below NO_SCORE_YET, so that all its weights are 0.
        bias = tl.load(table + entry, mask=is_neighbor, other=0.0).to(tl.float32) * HEAD_DIM**0.5
        bias = tl.where(is_neighbor, bias, NO_NEIGHBOR)
        largest, total, attended = attend(q, k, v, bias, largest, total, attended, HEAD_DIM)
    attended = attended / total[:, None]
    end = output + (query_pixel[:, None] * CHANNELS + dim[None, :])
    tl.store(end, attended.to(output.dtype.element_ty), mask=query_mask)


def problem(
    qkv: Shape, num_heads: int, kernel_size: int, dilation: int, element_bytes: int, table_bytes: int
) -> Problem:
    """What the speed of a launch depends on, from the shapes of reference.neighborhood_attention."""
    batch, height, width, channels3 = qkv
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "heads": int(num_heads),
        "head_dim": int(channels3 // (3 * num_heads)),
        "kernel_size": int(kernel_size),
        "dilation": int(dilation),
        "element_bytes": element_bytes,
        "table_bytes": table_bytes,
    }


def configurations(problem: Problem) -> list[Configuration]:
    """Every way to cut the problem up; the first, the one of fewest scores, is taken where nothing was measured."""
    key_bytes = problem["head_dim"] * problem["element_bytes"]
    fitting = [tile for tile in TILES if tile[2] * _key_columns(problem, tile[1]) * key_bytes <= BLOCK_BYTES]
    tiles = fitting or TILES[-1:]

    def scores(tile: tuple[int, int, int, int]) -> int:
        rows, columns, key_rows, _ = tile
        key_columns = _key_columns(problem, columns)
        keys = ceil_div(rows + problem["kernel_size"] - 1, key_rows) * key_rows * key_columns
        return _tiles(problem, rows, columns) * rows * columns * keys

    by_blocks = [
        Configuration((("TILE_ROWS", rows), ("TILE_COLUMNS", columns), ("KEY_ROWS", key_rows)), num_warps, 2)
        for rows, columns, key_rows, num_warps in (
            sorted(tiles, key=scores) if are_known(problem, "height", "width") else tiles
        )
    ]
    if not _fits_registers(problem):
        return by_blocks

    tiles_of_form = REGISTER_TILES
    if _register_columns(problem["width"], problem["kernel_size"])[1] <= 10:
        tiles_of_form = sorted(REGISTER_TILES, key=lambda tile: tile[2] is not None)
    elif problem["width"] < WIDE:
        tiles_of_form = sorted(REGISTER_TILES, key=lambda tile: tile[0])

    def is_idle(tile: tuple[int, int, int | None]) -> tuple[bool, int]:
        """Whether a large GPU is left with fewer warps than it may have; then as little in turn as there is."""
        warp_tiles, images, _ = tile
        idle = _register_programs(problem, warp_tiles, images) * warp_tiles < 132 * 12
        return idle, images * idle

    if are_known(problem, "batch"):
        tiles_of_form = sorted(tiles_of_form, key=is_idle)
    in_registers = [
        Configuration((("WARP_TILES", warp_tiles), ("IMAGES", images)), warp_tiles, 1, max_registers)
        for warp_tiles, images, max_registers in tiles_of_form
    ]
    return [*in_registers, by_blocks[0]]  # one more for GPUs of sm_75, whose products are of another form


def _fits_registers(problem: Problem) -> bool:
    """Whether the second form computes this: half precision, a map that is not padded, of a known size."""
    return (
        are_known(problem, "height", "width")
        and min(problem["height"], problem["width"]) >= problem["kernel_size"]
        and problem["kernel_size"] == REGISTER_KERNEL_SIZE
        and problem["dilation"] == 1
        and problem["element_bytes"] == 2
        and problem["head_dim"] in (16, 32)
    )


@functools.cache
def _register_columns(width: int, kernel_size: int) -> tuple[int, int]:
    """Columns of a tile of queries and of its keys, an even number; of 7 and 8 what makes fewer scores."""

    def keys(columns: int) -> int:
        def window(column: int) -> int:
            return min(max(column - kernel_size // 2, 0), width - kernel_size)

        starts = [min(first, width - columns) for first in range(0, width, columns)]
        most = max(window(first + columns - 1) + kernel_size - window(first) for first in starts)
        return max(8, most + most % 2)

    choices = [(columns, keys(columns)) for columns in (QUERY_COLUMNS, QUERY_COLUMNS - 1) if columns <= width]
    return min(choices, key=lambda choice: ceil_div(width, choice[0]) * choice[1])


def _key_columns(problem: Problem, tile_columns: int) -> int:
    return next_power_of_two(tile_columns + problem["kernel_size"] - 1)


def _tiles(problem: Problem, rows: int, columns: int) -> int:
    """Of one map of the pixels of the same remainders."""
    height, width = (ceil_div(problem[side], problem["dilation"]) for side in ("height", "width"))
    return ceil_div(height, rows) * ceil_div(width, columns)


def _register_programs(problem: Problem, warp_tiles: int, images: int) -> int:
    columns, _ = _register_columns(problem["width"], problem["kernel_size"])
    tiles = problem["heads"] * ceil_div(problem["height"], QUERY_ROWS) * ceil_div(problem["width"], columns)
    return ceil_div(problem["batch"], images) * ceil_div(tiles, warp_tiles)


def launch(problem: Problem, configuration: Configuration) -> Launch:
    tiles = dict(configuration.tiles)
    if "WARP_TILES" in tiles:
        return _launch_in_registers(problem, configuration)
    dilation, reach = problem["dilation"], problem["kernel_size"] * problem["dilation"]
    programs = dilation**2 * _tiles(problem, tiles["TILE_ROWS"], tiles["TILE_COLUMNS"])
    return Launch(
        kernel=neighborhood_attention_kernel,
        programs=problem["batch"] * problem["heads"] * programs,
        inputs=INPUTS,
        scalars={name: problem[name] for name in SCALARS},
        constants={
            "NUM_HEADS": problem["heads"],
            "HEAD_DIM": problem["head_dim"],
            "KERNEL_SIZE": problem["kernel_size"],
            "DILATION": dilation,
            "PADDED": not are_known(problem, "height", "width") or min(problem["height"], problem["width"]) < reach,
            "BLOCK_DIM": max(16, next_power_of_two(problem["head_dim"])),
            "KEY_COLUMNS": _key_columns(problem, tiles["TILE_COLUMNS"]),
            **tiles,
        },
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        max_registers=configuration.max_registers,
    )


def _launch_in_registers(problem: Problem, configuration: Configuration) -> Launch:
    tiles = dict(configuration.tiles)
    columns, key_columns = _register_columns(problem["width"], problem["kernel_size"])
    return Launch(
        kernel=register_neighbors_kernel,
        programs=_register_programs(problem, tiles["WARP_TILES"], tiles["IMAGES"]),
        inputs=INPUTS,
        scalars={"batch": problem["batch"]},
        constants={
            "HEIGHT": problem["height"],
            "WIDTH": problem["width"],
            "NUM_HEADS": problem["heads"],
            "HEAD_DIM": problem["head_dim"],
            "KERNEL_SIZE": problem["kernel_size"],
            "TILE_COLUMNS": columns,
            "KEY_COLUMNS": key_columns,
            "INNER": inner_groups(ceil_div(problem["height"], QUERY_ROWS), tiles["WARP_TILES"]),
            **tiles,
        },
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        max_registers=configuration.max_registers,
    )
