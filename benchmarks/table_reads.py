"""How many passes through the L1 cache or shared memory a read of the relative position bias table takes.

The machine code does not say it, for it depends on where points lie: it is worked out from the addresses that a warp
reads, for READS reads of `deformable_attention` picked at random, with the points of the GPU benchmark.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gpu_cases import Case
from numpy.typing import NDArray

from dat_deploy.plugins.deformable_attention import shared_table_form
from dat_deploy.plugins.launch import ceil_div

__all__ = ["benchmark_locations", "passes", "wavefronts"]

READS = 50_000
LINE, BANKS = 32, 16  # entries of 4 bytes in a line of the cache; banks of shared memory for entries of 8 bytes
PAD, MARGIN = shared_table_form.PAD.value, shared_table_form.MARGIN.value
LANE = np.arange(32)

Array = NDArray[Any]


def benchmark_locations(case: Case) -> Array:
    """[B, G, Hk · Wk, 2]: points where `gpu_operators` has them, by other random numbers."""
    axes = [(np.arange(size) + 0.5) / (size if case.half_pixel else size - 1) * 2 - 1 for size in case.sampled]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    random = np.random.default_rng(0).standard_normal((case.batch, case.groups, *case.sampled, 2))
    reach = 2 / np.array(case.sampled)
    located = points + np.tanh(random) * reach if case.half_pixel else np.clip(points + 0.1 * random, -1, 1)
    return located.reshape(case.batch, case.groups, -1, 2)


def passes(entries: Array, banks: int) -> Array:
    """Of each row, the entries of one read: the most different ones in one bank."""
    entries = np.sort(entries, axis=1)
    row, column = np.nonzero(np.diff(entries, axis=1, prepend=-1))
    counts = np.bincount(row * banks + entries[row, column] % banks, minlength=len(entries) * banks)
    return counts.reshape(-1, banks).max(1)


def wavefronts(case: Case, constants: Mapping[str, int], locations: Array | None = None) -> float | None:
    """Those of a warp's read of the table, on average, padding included; None for what is not `deformable_attention`.

    Args:
        constants: of the launch; they tell which form it is.
        locations: [B, G, Hk · Wk, 2]; those of the benchmark if there are none.
    """
    if case.operator != "deformable_attention":
        return None
    entries = _entries(case, constants, benchmark_locations(case) if locations is None else locations)
    if "ROWS_A_LANE" in constants:  # 8 bytes a lane are read by half warps
        return 2 * float(passes(entries.reshape(-1, 16), BANKS).mean())
    return float(passes(entries // LINE, 1).mean())


def _entries(case: Case, constants: Mapping[str, int], locations: Array) -> Array:
    """[READS, 32]: what the lanes of a warp read, of the entries around a bias the upper left one.

    In shared memory it is counted as if a program's first column were the map's, which moves all lanes alike.
    """
    generator, is_shared = np.random.default_rng(1), "ROWS_A_LANE" in constants

    def draw(below: int) -> Array:
        return generator.integers(below, size=(READS, 1))

    keys = locations.shape[2]
    padded_keys = ceil_div(keys, constants["BLOCK_KEYS"]) * constants["BLOCK_KEYS"]
    if is_shared:
        names = ("ROWS_A_LANE", "LANE_ROWS", "WARP_ROWS", "WARPS")
        rows_a_lane, lane_rows, warp_rows, warps = (constants[name] for name in names)
        tile_rows, tile_columns = shared_table_form.tile(rows_a_lane, lane_rows, warp_rows, warps)
        warp, eighth, pairs = draw(warps), LANE // 4, 8 // lane_rows
        row = (eighth // pairs + warp % warp_rows * lane_rows) * rows_a_lane
        column = 2 * (eighth % pairs + warp // warp_rows * pairs)
        key = draw(padded_keys // 8) * 8 + LANE % 4 * 2 + draw(2)
    else:
        tile_rows, tile_columns = constants["TILE_ROWS"], constants["TILE_COLUMNS"]
        row, column = draw(tile_rows), draw(tile_columns // 8) * 8 + LANE % 8
        key = draw(padded_keys // 4) * 4 + LANE // 8
    first_row = draw(ceil_div(case.height, tile_rows)) * tile_rows
    row = row + np.minimum(first_row, max(case.height - tile_rows, 0))
    column = column + draw(ceil_div(case.width, tile_columns)) * tile_columns
    head = draw(case.heads)
    location = locations[draw(len(locations)), head // (case.heads // case.groups), np.minimum(key, keys - 1)]

    def entry(axis: int, query: Array) -> Array:
        size, table_size = (case.height, case.width)[axis], case.table[axis]
        step, first = (2 / size, 1 / size - 1) if case.half_pixel else (2 / max(size - 1, 1), -1)
        if not is_shared:
            place = ((first + query * step - location[..., axis]) * 0.5 + 1) * 0.5 * (table_size - 1)
            return np.clip(np.floor(place), 0, max(table_size - 2, 0)).astype(int)
        place = (first + 2 - location[..., axis]) * 0.25 * (table_size - 1) + PAD
        place = np.clip(place, 1, table_size // 2 + PAD + MARGIN - 0.01)
        lag = query / size if case.half_pixel else query * 0.0
        is_before = (place % 1).astype(np.float16) < lag.astype(np.float16)
        return np.floor(place).astype(int) - is_before + query

    y, x = entry(0, row), entry(1, column)
    if is_shared:
        columns = tile_columns * constants["COLUMN_TILES"]
        return y * (((case.table[1] + 1) // 2 + columns + PAD + MARGIN + 3) // 4 * 4) + x
    return (head * case.table[0] + y) * case.table[1] + x
