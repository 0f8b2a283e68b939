"""`window_attention` in one launch: shift, partition, bias, mask, softmax and merge; only the output reaches memory.

One program computes one head of one block of queries, for the same place in WINDOWS windows after another: their bias
is the same, so it is gathered once and stays in registers. A window never moves: the roll is in the addresses.
"""

import triton
import triton.language as tl

from dat_deploy.plugins.launch import Configuration, Launch, Problem, Shape, ceil_div, next_power_of_two

__all__ = ["configurations", "launch", "problem", "window_attention_kernel"]

INPUTS = ("qkv", "relative_position_bias_table")
SCALARS = ("batch", "height", "width")
TILES = [(64, 64, 4), (64, 32, 4), (32, 32, 2), (16, 16, 1)]
MAX_KEY_BLOCKS = 9  # of which the bias is kept in registers
MASKED = -100.0  # between pixels that only the roll has made neighbours; reference.shifted_window_mask


@triton.jit
def _region(index, size, WINDOW_SIZE: tl.constexpr, SHIFT_SIZE: tl.constexpr):
    """Pixels of different regions are no neighbours before the roll; reference.shifted_window_mask."""
    return (index >= size - WINDOW_SIZE).to(tl.int32) + (index >= size - SHIFT_SIZE).to(tl.int32)


@triton.jit
def _pixels(
    in_window,
    window_y,
    window_x,
    height,
    width,
    WINDOW_SIZE: tl.constexpr,
    SHIFT_SIZE: tl.constexpr,
):
    """Where the pixels of a window are in the map, and their regions."""
    y = window_y * WINDOW_SIZE + in_window // WINDOW_SIZE
    x = window_x * WINDOW_SIZE + in_window % WINDOW_SIZE
    region = _region(y, height, WINDOW_SIZE, SHIFT_SIZE) * 3 + _region(x, width, WINDOW_SIZE, SHIFT_SIZE)
    y, x = y + SHIFT_SIZE, x + SHIFT_SIZE
    y, x = tl.where(y >= height, y - height, y), tl.where(x >= width, x - width, x)
    return y * width + x, region


@triton.jit(do_not_specialize=list(SCALARS))
def window_attention_kernel(
    qkv,
    relative_position_bias_table,
    batch,
    height,
    width,
    output,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    SHIFT_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Grid: chunk of WINDOWS windows, head, block of queries, the last fastest. Layouts as in the reference."""
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    PIXELS: tl.constexpr = WINDOW_SIZE * WINDOW_SIZE
    QUERY_BLOCKS: tl.constexpr = (PIXELS + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    KEY_BLOCKS: tl.constexpr = (PIXELS + BLOCK_KEYS - 1) // BLOCK_KEYS
    # The bias enters as the accumulator of q · k, so it is divided by what q · k is still to be multiplied by.
    scale: tl.constexpr = 1.4426950408889634 / HEAD_DIM**0.5
    factor: tl.constexpr = HEAD_DIM**0.5

    program = tl.program_id(0)
    head = program // QUERY_BLOCKS % NUM_HEADS
    first_window = program // (QUERY_BLOCKS * NUM_HEADS) * WINDOWS
    windows_across = width // WINDOW_SIZE
    windows_an_image = windows_across * (height // WINDOW_SIZE)

    m = program % QUERY_BLOCKS * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    dim = tl.arange(0, BLOCK_DIM)
    is_dim = (dim < HEAD_DIM)[None, :]
    biases = ()
    for block in tl.static_range(KEY_BLOCKS):
        n = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        dy = m[:, None] // WINDOW_SIZE - n[None, :] // WINDOW_SIZE + (WINDOW_SIZE - 1)
        dx = m[:, None] % WINDOW_SIZE - n[None, :] % WINDOW_SIZE + (WINDOW_SIZE - 1)
        entry = (dy * (2 * WINDOW_SIZE - 1) + dx) * NUM_HEADS + head
        mask = (m < PIXELS)[:, None] & (n < PIXELS)[None, :]
        bias = tl.load(relative_position_bias_table + entry, mask=mask, other=0.0).to(tl.float32) * factor
        biases = biases + (tl.where((n < PIXELS)[None, :], bias, float("-inf")),)

    for window in range(first_window, min(first_window + WINDOWS, batch * windows_an_image)):
        image = (window // windows_an_image).to(tl.int64) * (height * width)
        window_y = window % windows_an_image // windows_across
        window_x = window % windows_across
        pixel, query_region = _pixels(m, window_y, window_x, height, width, WINDOW_SIZE, SHIFT_SIZE)
        mask = (m < PIXELS)[:, None] & is_dim
        start = qkv + image * (3 * CHANNELS) + head * HEAD_DIM
        q = tl.load(start + (pixel[:, None] * (3 * CHANNELS) + dim[None, :]), mask=mask, other=0.0)

        largest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_QUERIES,), tl.float32)
        attended = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
        for block in tl.static_range(KEY_BLOCKS):
            n = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
            key_pixel, key_region = _pixels(n, window_y, window_x, height, width, WINDOW_SIZE, SHIFT_SIZE)
            key_offset = key_pixel[:, None] * (3 * CHANNELS) + dim[None, :]
            key_mask = (n < PIXELS)[:, None] & is_dim
            k = tl.load(start + CHANNELS + key_offset, mask=key_mask, other=0.0)
            v = tl.load(start + 2 * CHANNELS + key_offset, mask=key_mask, other=0.0)
            bias = biases[block]
            if SHIFT_SIZE > 0:
                bias += tl.where(query_region[:, None] == key_region[None, :], 0.0, MASKED * factor)
            scores = tl.dot(q, tl.trans(k), acc=bias, input_precision="ieee")
            new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - new_largest[:, None])
            correction = tl.exp2(largest - new_largest)
            total = total * correction + tl.sum(weights, 1)
            attended = tl.dot(weights.to(v.dtype), v, acc=attended * correction[:, None], input_precision="ieee")
            largest = new_largest
        attended = attended / total[:, None]
        end = output + image * CHANNELS + head * HEAD_DIM
        tl.store(
            end + (pixel[:, None] * CHANNELS + dim[None, :]), attended.to(output.dtype.element_ty), mask=mask
        )


def problem(qkv: Shape, num_heads: int, window_size: int, shift_size: int) -> Problem:
    """What the speed of a launch depends on, from the shapes of reference.window_attention."""
    batch, height, width, channels3 = qkv
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "heads": num_heads,
        "head_dim": channels3 // (3 * num_heads),
        "window_size": window_size,
        "shift_size": shift_size,
    }


def configurations(problem: Problem) -> list[Configuration]:
    """Every way to cut the problem up; the first, the one of least padding, is taken where nothing was measured.

    Programs take several windows once there are enough of them to keep a large GPU busy all the same.
    """
    pixels = problem["window_size"] ** 2

    def padded_scores(tile: tuple[int, int, int]) -> int:
        queries, keys, _ = tile
        return ceil_div(pixels, queries) * queries * ceil_div(pixels, keys) * keys

    tiles = sorted((tile for tile in TILES if ceil_div(pixels, tile[1]) <= MAX_KEY_BLOCKS), key=padded_scores)
    windows = problem["batch"] * (problem["height"] * problem["width"] // pixels) * problem["heads"]
    chunks = sorted((1, 4, 16), key=lambda chunk: windows < 2048 * chunk)
    return [
        Configuration((("BLOCK_QUERIES", queries), ("BLOCK_KEYS", keys), ("WINDOWS", chunk)), num_warps, 2)
        for chunk in chunks
        for queries, keys, num_warps in tiles
    ]


def launch(problem: Problem, configuration: Configuration) -> Launch:
    tiles = dict(configuration.tiles)
    pixels = problem["window_size"] ** 2
    windows = problem["batch"] * (problem["height"] * problem["width"] // pixels)
    query_blocks = ceil_div(pixels, tiles["BLOCK_QUERIES"])
    return Launch(
        kernel=window_attention_kernel,
        programs=ceil_div(windows, tiles["WINDOWS"]) * problem["heads"] * query_blocks,
        inputs=INPUTS,
        scalars={name: problem[name] for name in SCALARS},
        constants={
            "NUM_HEADS": problem["heads"],
            "HEAD_DIM": problem["head_dim"],
            "WINDOW_SIZE": problem["window_size"],
            "SHIFT_SIZE": problem["shift_size"],
            "MASKED": MASKED,
            "BLOCK_DIM": max(16, next_power_of_two(problem["head_dim"])),
            **tiles,
        },
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
    )
