"""`deformable_attention` in one launch: scores, interpolated bias, softmax and values; only the output reaches memory.

There are two kernels: `general_form` computes everything, `shared_table_form` in half precision what a network asks for
at the image size of its tables.
"""

from dat_deploy.plugins.deformable_attention import shared_table_form
from dat_deploy.plugins.deformable_attention.general_form import deformable_attention_kernel
from dat_deploy.plugins.deformable_attention.shared_table_form import deformable_attention_shared_table_kernel
from dat_deploy.plugins.launch import Configuration, Launch, Problem, Shape, are_known, ceil_div, next_power_of_two

__all__ = ["configurations", "launch", "problem"]

INPUTS = ("query", "key", "value", "sampling_locations", "relative_position_bias_table")
SCALARS = ("height", "width", "keys", "table_height")
TILES = [(8, 8, 64, 4), (16, 8, 32, 4), (8, 16, 32, 4), (4, 16, 64, 4), (8, 8, 32, 4)]
SMALL_TILES = [(8, 8, 32, 8)]  # in float32 and for larger heads, of which the others spill registers


def problem(
    query: Shape,
    key: Shape,
    sampling_locations: Shape,
    table: Shape,
    num_heads: int,
    half_pixel_queries: bool,
    element_bytes: int,
    table_bytes: int,
) -> Problem:
    """What the speed of a launch depends on, from the shapes of reference.deformable_attention."""
    batch, height, width, channels = query
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "keys": key[1],
        "heads": int(num_heads),
        "head_dim": int(channels // num_heads),
        "offset_groups": int(sampling_locations[1]),
        "table_height": int(table[1]),
        "table_width": int(table[2]),
        "half_pixel": half_pixel_queries,
        "element_bytes": element_bytes,
        "table_bytes": table_bytes,
    }


def configurations(problem: Problem) -> list[Configuration]:
    """Every way to cut the problem up; the first, the one of least work, is taken where nothing was measured."""
    tiles = SMALL_TILES if problem["element_bytes"] == 4 or problem["head_dim"] > 32 else TILES

    def work(tile: tuple[int, int, int, int]) -> int:
        rows, columns, keys, _ = tile
        padded_queries = ceil_div(problem["height"], rows) * rows * ceil_div(problem["width"], columns) * columns
        by_rows = _row_taps(problem, rows) > 0 and rows <= problem["height"] + 1
        return padded_queries * ceil_div(problem["keys"], keys) * keys * (3 if by_rows else 5)

    general = [
        Configuration((("TILE_ROWS", rows), ("TILE_COLUMNS", columns), ("BLOCK_KEYS", keys)), num_warps, 2)
        for rows, columns, keys, num_warps in (
            sorted(tiles, key=work) if are_known(problem, "height", "width", "keys") else tiles
        )
    ]
    if not _fits_shared_table(problem):
        return general
    across = ceil_div(problem["width"], 8)
    rows = shared_table_form.TILE_ROWS
    shared = [
        Configuration(
            (("TILE_ROWS", rows), ("COLUMN_TILES", count), ("BLOCK_KEYS", shared_table_form.BLOCK_KEYS)), 1, 3
        )
        for count in sorted({across, 1} if problem["half_pixel"] else {across}, reverse=True)
    ]
    # Last, until what is here now has run on a GPU as an earlier version of it has; `tune` weighs and checks it.
    return [*general, *shared]


def _fits_shared_table(problem: Problem) -> bool:
    """In half precision, with a table whose entries are as far apart as queries, or nearly so."""
    names = ("height", "width", "keys", "table_height", "table_width")
    if problem["element_bytes"] != 2 or problem["head_dim"] not in (16, 32) or not are_known(problem, *names):
        return False
    height, width = problem["height"], problem["width"]
    size = shared_table_form.table_bytes(height, problem["table_height"], problem["table_width"])
    return (
        min(height, width) > 1
        and (problem["table_height"], problem["table_width"]) == (2 * height - 1, 2 * width - 1)
        and size <= 1024 * shared_table_form.SHARED_KIB[-1]
    )


def launch(problem: Problem, configuration: Configuration) -> Launch:
    tiles = dict(configuration.tiles)
    shared = "COLUMN_TILES" in tiles
    rows, columns = tiles["TILE_ROWS"], 8 * tiles["COLUMN_TILES"] if shared else tiles["TILE_COLUMNS"]
    programs = ceil_div(problem["height"], rows) * ceil_div(problem["width"], columns)
    constants = {
        "NUM_HEADS": problem["heads"],
        "HEAD_DIM": problem["head_dim"],
        "OFFSET_GROUPS": problem["offset_groups"],
        "HALF_PIXEL": bool(problem["half_pixel"]),
        "TABLE_WIDTH": problem["table_width"],
        "EVEN_KEYS": are_known(problem, "keys") and problem["keys"] % tiles["BLOCK_KEYS"] == 0,
        **tiles,
    }
    if shared:
        height, table_width = problem["height"], problem["table_width"]
        size = shared_table_form.table_bytes(height, problem["table_height"], table_width)
        constants |= {
            "TABLE_HEIGHT": problem["table_height"],
            "PAD_ROWS": shared_table_form.padding(height),
            "FILL_WIDTH": next_power_of_two(table_width + 3),
            "SHARED_KIB": next(kib for kib in shared_table_form.SHARED_KIB if size <= 1024 * kib),
        }
    else:
        constants |= {
            "ROW_TAPS": _row_taps(problem, rows),
            "BLOCK_DIM": max(16, next_power_of_two(problem["head_dim"])),
        }
    return Launch(
        kernel=deformable_attention_shared_table_kernel if shared else deformable_attention_kernel,
        programs=problem["batch"] * problem["heads"] * programs,
        inputs=INPUTS,
        scalars={name: problem[name] for name in SCALARS},
        constants=constants,
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
    )


def _row_taps(problem: Problem, tile_rows: int) -> int:
    """2 if rows of queries are as far apart as rows of the table, 3 if they are closer, but by less than one row from
    the first of a tile to its last; else 0."""
    if not are_known(problem, "height"):
        return 0
    height, table_steps = problem["height"], problem["table_height"] - 1
    spans = 2 * height if problem["half_pixel"] else 2 * max(height - 1, 1)
    if table_steps == spans:
        return 2
    return 3 if 0 <= (min(tile_rows, height) - 1) * (spans - table_steps) <= spans else 0
