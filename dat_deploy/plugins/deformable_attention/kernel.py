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
# Of the table in shared memory: rows a lane, rows of lanes, of warps, warps (see shared_table_form.tile), and the most
# registers; of what makes as little padding the one before was faster on an H200.
SHARED_TILES: list[tuple[int, int, int, int, int | None]] = [
    (3, 2, 2, 2, 168),
    (4, 2, 2, 2, None),
    (4, 2, 1, 1, None),
    (3, 4, 1, 1, 168),
    (2, 2, 2, 2, None),
]
FEW_KEYS = 128  # up to which a program takes all tiles of a row, for it makes as much as it computes
MANY_SCORES = 1_000_000  # from which on a GPU has enough programs that what each makes first does not tell
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
    shared = _shared_configurations(problem)
    if not shared:
        return general
    few = [each for each in general if dict(each.tiles)["TILE_COLUMNS"] == dict(each.tiles)["TILE_ROWS"]]
    batch = problem["batch"] if are_known(problem, "batch") else 8
    scores = batch * problem["heads"] * problem["height"] * problem["width"] * problem["keys"]
    return [*shared, *few] if scores >= MANY_SCORES else [*few, *shared]


def _shared_configurations(problem: Problem) -> list[Configuration]:
    """Those of `shared_table_form`, the fastest first; none where it does not compute this.

    It takes half precision, and tables whose entries are as far apart as queries, or nearly so.
    """
    names = ("height", "width", "keys", "table_height", "table_width")
    if problem["element_bytes"] != 2 or problem["head_dim"] not in (16, 32, 64) or not are_known(problem, *names):
        return []
    height, width = problem["height"], problem["width"]
    if min(height, width) < 2 or (problem["table_height"], problem["table_width"]) != (2 * height - 1, 2 * width - 1):
        return []

    has_few_keys, found = problem["keys"] <= FEW_KEYS, []
    for rows_a_lane, lane_rows, warp_rows, num_warps, max_registers in SHARED_TILES:
        rows, columns = shared_table_form.tile(rows_a_lane, lane_rows, warp_rows, num_warps)
        across = ceil_div(width, columns)
        count = across if has_few_keys else 1
        size = shared_table_form.shared_bytes(height, width, rows, count * columns, problem["keys"])
        fits_registers = problem["head_dim"] <= 32 or rows_a_lane <= 2
        # TensorRT gives 48 KiB, of which Triton takes for its products what is held back here.
        room_kib = 44 - 4 * num_warps if problem["head_dim"] <= 32 else 20
        if fits_registers and size <= 1024 * min(room_kib, shared_table_form.SHARED_KIB[-1]):
            tiles = (
                ("ROWS_A_LANE", rows_a_lane),
                ("LANE_ROWS", lane_rows),
                ("WARP_ROWS", warp_rows),
                ("COLUMN_TILES", count),
            )
            padding = ceil_div(height, rows) * rows * across * columns / (height * width)
            found.append((round(padding, 1), Configuration(tiles, num_warps, 3, max_registers)))
    return [configuration for _, configuration in sorted(found, key=lambda each: each[0])]


def launch(problem: Problem, configuration: Configuration) -> Launch:
    tiles = dict(configuration.tiles)
    height, width, keys = problem["height"], problem["width"], problem["keys"]
    constants = {
        "NUM_HEADS": problem["heads"],
        "HEAD_DIM": problem["head_dim"],
        "OFFSET_GROUPS": problem["offset_groups"],
        "HALF_PIXEL": bool(problem["half_pixel"]),
        "TABLE_WIDTH": problem["table_width"],
        **tiles,
    }
    is_shared = "COLUMN_TILES" in tiles
    if is_shared:
        rows, columns = shared_table_form.tile(
            tiles["ROWS_A_LANE"], tiles["LANE_ROWS"], tiles["WARP_ROWS"], configuration.num_warps
        )
        columns *= tiles["COLUMN_TILES"]
        block_keys = shared_table_form.BLOCK_KEYS
        size = shared_table_form.shared_bytes(height, width, rows, columns, keys)
        constants |= {
            "TABLE_HEIGHT": problem["table_height"],
            "KEYS": ceil_div(keys, block_keys) * block_keys,
            "SHARED_SIZE": sum(1024 * kib < size for kib in shared_table_form.SHARED_KIB),
            "WARPS": configuration.num_warps,
            "BLOCK_KEYS": block_keys,
        }
    else:
        rows, columns, block_keys = tiles["TILE_ROWS"], tiles["TILE_COLUMNS"], tiles["BLOCK_KEYS"]
        constants |= {
            "ROW_TAPS": _row_taps(problem, rows),
            "BLOCK_DIM": max(16, next_power_of_two(problem["head_dim"])),
        }
    constants["EVEN_KEYS"] = are_known(problem, "keys") and keys % block_keys == 0
    return Launch(
        kernel=deformable_attention_shared_table_kernel if is_shared else deformable_attention_kernel,
        programs=problem["batch"] * problem["heads"] * ceil_div(height, rows) * ceil_div(width, columns),
        inputs=INPUTS,
        scalars={name: problem[name] for name in SCALARS},
        constants=constants,
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        max_registers=configuration.max_registers,
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
