"""`window_attention` in one launch: shift, partition, bias, mask, softmax and merge; only the output reaches memory.

One program computes one head of one block of queries, for the same place in WINDOWS windows after another. A window
never moves: the roll is in the addresses. There are two forms.

- `whole_window_kernel`, for half precision and up to MOST_PIXELS pixels a window: the scores of all keys of a window
  are in registers at once, so that the softmax is a plain one. So is the bias, which is the same in every window: the
  head's table goes through shared memory once a program.
- `window_attention_kernel`, for the rest: blocks of keys with a running softmax.
"""

import triton
import triton.language as tl

from dat_deploy.plugins.launch import Configuration, Launch, Problem, Shape, are_known, ceil_div, next_power_of_two
from dat_deploy.plugins.online_softmax import attend

__all__ = ["configurations", "launch", "problem", "whole_window_kernel", "window_attention_kernel"]

INPUTS = ("qkv", "relative_position_bias_table")
SCALARS = ("batch", "height", "width")
TILES = [(64, 64, 4), (64, 32, 4), (32, 32, 2), (64, 16, 4)]
BLOCK_BYTES = 4096  # of a block of keys: larger ones spill registers, or take more shared memory than TensorRT allows
WHOLE_TILES = [(64, 4), (32, 2)]  # queries and warps: 16 queries a warp
MOST_PIXELS = 144  # whose scores and bias are in registers at once
MAX_KEPT = 2  # blocks of keys whose bias stays in registers from window to window
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


@triton.jit
def _bias(table, m, n, head, NUM_HEADS: tl.constexpr, WINDOW_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The bias of pixels m to pixels n of a window, as `attend` takes it; -inf where there is no key: [M, N]."""
    PIXELS: tl.constexpr = WINDOW_SIZE * WINDOW_SIZE
    dy = m[:, None] // WINDOW_SIZE - n[None, :] // WINDOW_SIZE + (WINDOW_SIZE - 1)
    dx = m[:, None] % WINDOW_SIZE - n[None, :] % WINDOW_SIZE + (WINDOW_SIZE - 1)
    entry = (dy * (2 * WINDOW_SIZE - 1) + dx) * NUM_HEADS + head
    is_key = (n < PIXELS)[None, :]
    bias = tl.load(table + entry, mask=(m < PIXELS)[:, None] & is_key, other=0.0).to(tl.float32)
    return tl.where(is_key, bias * HEAD_DIM**0.5, float("-inf"))


@triton.jit
def _attend_block(
    start,
    q,
    query_region,
    bias,
    block,
    window_y,
    window_x,
    height,
    width,
    largest,
    total,
    attended,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    SHIFT_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take block `block` of the keys of a window into the softmax; see `attend`."""
    n = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    dim = tl.arange(0, BLOCK_DIM)
    pixel, region = _pixels(n, window_y, window_x, height, width, WINDOW_SIZE, SHIFT_SIZE)
    offset = pixel[:, None] * (3 * CHANNELS) + dim[None, :]
    mask = (n < WINDOW_SIZE * WINDOW_SIZE)[:, None] & (dim < HEAD_DIM)[None, :]
    k = tl.load(start + CHANNELS + offset, mask=mask, other=0.0)
    v = tl.load(start + 2 * CHANNELS + offset, mask=mask, other=0.0)
    if SHIFT_SIZE > 0:
        bias += tl.where(query_region[:, None] == region[None, :], 0.0, MASKED * HEAD_DIM**0.5)
    return attend(q, k, v, bias, largest, total, attended, HEAD_DIM)


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
    KEEP_BIAS: tl.constexpr,
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

    program = tl.program_id(0)
    head = program // QUERY_BLOCKS % NUM_HEADS
    first_window = program // (QUERY_BLOCKS * NUM_HEADS) * WINDOWS
    windows_across = width // WINDOW_SIZE
    windows_an_image = windows_across * (height // WINDOW_SIZE)

    m = program % QUERY_BLOCKS * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    dim = tl.arange(0, BLOCK_DIM)
    is_dim = (dim < HEAD_DIM)[None, :]
    query_mask = (m < PIXELS)[:, None] & is_dim
    biases = ()
    if KEEP_BIAS:
        for i in tl.static_range(KEY_BLOCKS):
            kept = i * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
            biases = biases + (_bias(relative_position_bias_table, m, kept, head, NUM_HEADS, WINDOW_SIZE, HEAD_DIM),)

    for window in range(first_window, min(first_window + WINDOWS, batch * windows_an_image)):
        image = (window // windows_an_image).to(tl.int64) * (height * width)
        window_y = window % windows_an_image // windows_across
        window_x = window % windows_across
        pixel, query_region = _pixels(m, window_y, window_x, height, width, WINDOW_SIZE, SHIFT_SIZE)
        start = qkv + image * (3 * CHANNELS) + head * HEAD_DIM
        q = tl.load(start + (pixel[:, None] * (3 * CHANNELS) + dim[None, :]), mask=query_mask, other=0.0)

        largest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_QUERIES,), tl.float32)
        attended = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
        if KEEP_BIAS:
            for block in tl.static_range(KEY_BLOCKS):
                bias = biases[block]
                largest, total, attended = _attend_block(
                    start,
                    q,
                    query_region,
                    bias,
                    block,
                    window_y,
                    window_x,
                    height,
                    width,
                    largest,
                    total,
                    attended,
                    CHANNELS,
                    HEAD_DIM,
                    BLOCK_DIM,
                    BLOCK_KEYS,
                    WINDOW_SIZE,
                    SHIFT_SIZE,
                    MASKED,
                )
        else:
            for block in range(0, KEY_BLOCKS):
                n = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
                bias = _bias(relative_position_bias_table, m, n, head, NUM_HEADS, WINDOW_SIZE, HEAD_DIM)
                largest, total, attended = _attend_block(
                    start,
                    q,
                    query_region,
                    bias,
                    block,
                    window_y,
                    window_x,
                    height,
                    width,
                    largest,
                    total,
                    attended,
                    CHANNELS,
                    HEAD_DIM,
                    BLOCK_DIM,
                    BLOCK_KEYS,
                    WINDOW_SIZE,
                    SHIFT_SIZE,
                    MASKED,
                )
        attended = attended / total[:, None]
        end = output + image * CHANNELS + head * HEAD_DIM
        tl.store(
            end + (pixel[:, None] * CHANNELS + dim[None, :]), attended.to(output.dtype.element_ty), mask=query_mask
        )


@triton.jit
def _register_bias(
    table,
    first_query,
    head,
    FIRST: tl.constexpr,
    KEYS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    TABLE_SIZE: tl.constexpr,
):
    """The bias of a block of queries to keys from FIRST on, as `attend` takes it; -inf where there is no key.

    Its index has the axes (8 keys, 8 queries, warp, query, pair of keys): registers, registers, warps, lanes, lanes.
    That is how the matrix product holds its scores, so they meet in the same threads and nothing is exchanged.

    Returns [BLOCK_QUERIES, KEYS] float32.
    """
    PIXELS: tl.constexpr = WINDOW_SIZE * WINDOW_SIZE
    SPAN: tl.constexpr = 2 * WINDOW_SIZE - 1
    WARPS: tl.constexpr = BLOCK_QUERIES // 16
    COUNT: tl.constexpr = BLOCK_QUERIES * KEYS // 2
    entry = tl.arange(0, TABLE_SIZE)
    entries = tl.load(table + entry * NUM_HEADS + head, mask=entry < SPAN * SPAN, other=float("-inf")).to(tl.float32)
    entries *= HEAD_DIM**0.5

    eighth = tl.arange(0, KEYS // 8)[:, None, None, None, None]
    half = tl.arange(0, 2)[None, :, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None]
    row = tl.arange(0, 8)[None, None, None, :, None]
    pair = tl.arange(0, 4)[None, None, None, None, :]
    m = tl.minimum(first_query + 16 * warp + 8 * half + row, PIXELS - 1)
    origin = (m // WINDOW_SIZE + WINDOW_SIZE - 1) * SPAN + m % WINDOW_SIZE + WINDOW_SIZE - 1
    n = FIRST + 8 * eighth + 2 * pair
    left = tl.where(n < PIXELS, origin - n // WINDOW_SIZE * SPAN - n % WINDOW_SIZE, SPAN * SPAN)
    n += 1
    right = tl.where(n < PIXELS, origin - n // WINDOW_SIZE * SPAN - n % WINDOW_SIZE, SPAN * SPAN)
    left = tl.reshape(tl.gather(entries, tl.reshape(left, (COUNT,)), 0), (KEYS // 8, 2, WARPS, 8, 4))
    right = tl.reshape(tl.gather(entries, tl.reshape(right, (COUNT,)), 0), (KEYS // 8, 2, WARPS, 8, 4))
    return tl.reshape(tl.trans(tl.join(left, right), 2, 1, 3, 0, 4, 5), (BLOCK_QUERIES, KEYS))


@triton.jit
def _whole_scores(
    start,
    q,
    m,
    bias,
    is_edge,
    window_y,
    window_x,
    height,
    width,
    FIRST: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    SHIFT_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The scores of a block of queries to keys from FIRST on, times sqrt(HEAD_DIM), and the values of these keys."""
    PIXELS: tl.constexpr = WINDOW_SIZE * WINDOW_SIZE
    n = FIRST + tl.arange(0, KEYS)
    dim = tl.arange(0, HEAD_DIM)
    pixel, region = _pixels(n, window_y, window_x, height, width, WINDOW_SIZE, SHIFT_SIZE)
    offset = pixel[:, None] * (3 * CHANNELS) + dim[None, :]
    if FIRST + KEYS <= PIXELS:
        k = tl.load(start + CHANNELS + offset)
        v = tl.load(start + 2 * CHANNELS + offset)
    else:
        k = tl.load(start + CHANNELS + offset, mask=(n < PIXELS)[:, None], other=0.0)
        v = tl.load(start + 2 * CHANNELS + offset, mask=(n < PIXELS)[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k), acc=bias)
    if SHIFT_SIZE > 0:
        if is_edge:  # elsewhere all are neighbours
            _, query_region = _pixels(m, window_y, window_x, height, width, WINDOW_SIZE, SHIFT_SIZE)
            scores += tl.where(query_region[:, None] == region[None, :], 0.0, MASKED * HEAD_DIM**0.5)
    return scores, v


@triton.jit(do_not_specialize=list(SCALARS))
def whole_window_kernel(
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
    TABLE_SIZE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    MORE_KEYS: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Grid and layouts as in `window_attention_kernel`. Keys go in two parts, the second may be none."""
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    PIXELS: tl.constexpr = WINDOW_SIZE * WINDOW_SIZE
    QUERY_BLOCKS: tl.constexpr = (PIXELS + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    SCALE: tl.constexpr = 1.4426950408889634 / HEAD_DIM**0.5  # see `attend`
    # Sums by a product with ones; of four warps Triton has these in shared memory, which is full with large windows.
    BY_PRODUCT: tl.constexpr = MORE_KEYS == 0 or BLOCK_QUERIES < 64

    program = tl.program_id(0)
    head = program // QUERY_BLOCKS % NUM_HEADS
    first_window = program // (QUERY_BLOCKS * NUM_HEADS) * WINDOWS
    windows_across = width // WINDOW_SIZE
    windows_an_image = windows_across * (height // WINDOW_SIZE)

    first_query = program % QUERY_BLOCKS * BLOCK_QUERIES
    m = first_query + tl.arange(0, BLOCK_QUERIES)
    is_query = (m < PIXELS)[:, None]
    dim = tl.arange(0, HEAD_DIM)[None, :]
    table = relative_position_bias_table
    bias = _register_bias(
        table, first_query, head, 0, KEYS, NUM_HEADS, HEAD_DIM, WINDOW_SIZE, BLOCK_QUERIES, TABLE_SIZE
    )
    if MORE_KEYS > 0:
        more_bias = _register_bias(
            table, first_query, head, KEYS, MORE_KEYS, NUM_HEADS, HEAD_DIM, WINDOW_SIZE, BLOCK_QUERIES, TABLE_SIZE
        )

    for window in range(first_window, min(first_window + WINDOWS, batch * windows_an_image)):
        image = (window // windows_an_image).to(tl.int64) * (height * width)
        window_y = window % windows_an_image // windows_across
        window_x = window % windows_across
        is_edge = (window_y == height // WINDOW_SIZE - 1) | (window_x == windows_across - 1)
        pixel, _ = _pixels(m, window_y, window_x, height, width, WINDOW_SIZE, SHIFT_SIZE)
        start = qkv + image * (3 * CHANNELS) + head * HEAD_DIM
        q = tl.load(start + (pixel[:, None] * (3 * CHANNELS) + dim), mask=is_query, other=0.0)
        scores, v = _whole_scores(
            start,
            q,
            m,
            bias,
            is_edge,
            window_y,
            window_x,
            height,
            width,
            0,
            KEYS,
            CHANNELS,
            HEAD_DIM,
            WINDOW_SIZE,
            SHIFT_SIZE,
            MASKED,
        )
        largest = tl.max(scores, 1)
        if MORE_KEYS > 0:
            more_scores, more_v = _whole_scores(
                start,
                q,
                m,
                more_bias,
                is_edge,
                window_y,
                window_x,
                height,
                width,
                KEYS,
                MORE_KEYS,
                CHANNELS,
                HEAD_DIM,
                WINDOW_SIZE,
                SHIFT_SIZE,
                MASKED,
            )
            largest = tl.maximum(largest, tl.max(more_scores, 1))
        largest *= SCALE
        weights = tl.exp2(scores * SCALE - largest[:, None]).to(v.dtype)
        ones = tl.full((KEYS, 8), 1.0, v.dtype)  # the product has rows of 8 times the same
        total = tl.dot(weights, ones) if BY_PRODUCT else tl.sum(weights.to(tl.float32), 1)
        attended = tl.dot(weights, v)
        if MORE_KEYS > 0:
            weights = tl.exp2(more_scores * SCALE - largest[:, None]).to(v.dtype)
            if BY_PRODUCT:
                total = tl.dot(weights, tl.full((MORE_KEYS, 8), 1.0, v.dtype), acc=total)
            else:
                total += tl.sum(weights.to(tl.float32), 1)
            attended = tl.dot(weights, more_v, acc=attended)
        if BY_PRODUCT:
            total = tl.max(total, 1)
        attended *= (1 / total)[:, None]
        end = output + image * CHANNELS + head * HEAD_DIM
        tl.store(end + (pixel[:, None] * CHANNELS + dim), attended.to(output.dtype.element_ty), mask=is_query)


def problem(
    qkv: Shape, num_heads: int, window_size: int, shift_size: int, element_bytes: int, table_bytes: int
) -> Problem:
    """What the speed of a launch depends on, from the shapes of reference.window_attention."""
    batch, height, width, channels3 = qkv
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "heads": int(num_heads),
        "head_dim": int(channels3 // (3 * num_heads)),
        "window_size": int(window_size),
        "shift_size": int(shift_size),
        "element_bytes": element_bytes,
        "table_bytes": table_bytes,
    }


def configurations(problem: Problem) -> list[Configuration]:
    """Every way to cut the problem up; the first, the one of least padding, is taken where nothing was measured.

    Where the bias stays in registers, programs take several windows once there are enough to keep a large GPU busy.
    """
    pixels = problem["window_size"] ** 2
    chunks = [4, 16, 1]
    if are_known(problem, "batch", "height", "width"):
        windows = problem["batch"] * (problem["height"] * problem["width"] // pixels) * problem["heads"]
        chunks = sorted((16, 4, 1), key=lambda chunk: windows < 1024 * chunk)
        if _is_whole(problem):  # of 16 only large windows have some use, and only if there are many
            chunks = [4, 16, 1] if windows >= 2048 else [1, 4, 16]
    key_bytes = problem["head_dim"] * problem["element_bytes"]
    tiles = [tile for tile in TILES if tile[1] * key_bytes <= BLOCK_BYTES]

    def padded_scores(tile: tuple[int, int, int]) -> int:
        queries, keys, _ = tile
        return ceil_div(pixels, queries) * queries * ceil_div(pixels, keys) * keys

    by_blocks = [
        Configuration((("BLOCK_QUERIES", queries), ("BLOCK_KEYS", keys), ("WINDOWS", chunk)), num_warps, 2)
        for queries, keys, num_warps in sorted(tiles, key=padded_scores)
        for chunk in (chunks if _keeps_bias(problem, keys) else (1,))
    ]
    if _is_whole(problem):
        with_mask = problem["shift_size"] > 0 and pixels > 64  # of which two warps spill registers
        blocks = WHOLE_TILES[:1] if with_mask else WHOLE_TILES
        whole = [
            Configuration((("BLOCK_QUERIES", queries), ("WINDOWS", chunk)), num_warps, 1 if pixels <= 64 else 2)
            for queries, num_warps in sorted(blocks, key=lambda tile: ceil_div(pixels, tile[0]) * tile[0])
            for chunk in chunks
        ]
        # One more for GPUs of sm_75, where these spill registers; whatever the batch, for tactics are numbered.
        blocks_alike = [each for each in by_blocks if each.tiles[:2] == by_blocks[0].tiles[:2]]
        return [*whole, min(blocks_alike, key=lambda each: abs(dict(each.tiles)["WINDOWS"] - 4))]
    return by_blocks


def _is_whole(problem: Problem) -> bool:
    """Whether the scores of a whole window fit into registers."""
    return (
        problem["window_size"] ** 2 <= MOST_PIXELS and problem["element_bytes"] == 2 and problem["head_dim"] in (16, 32)
    )


def _key_parts(pixels: int) -> tuple[int, int]:
    """Two powers of two of least sum that hold as many keys; the second is 0 where one alone is no larger."""
    whole = max(16, next_power_of_two(pixels))
    first = whole // 2
    rest = max(16, next_power_of_two(pixels - first)) if pixels > first >= 16 else whole
    return (first, rest) if first + rest < whole else (whole, 0)


def _keeps_bias(problem: Problem, block_keys: int) -> bool:
    """Only where it is cheap: then the loop over blocks of keys is unrolled, and all are in shared memory at once."""
    blocks = ceil_div(problem["window_size"] ** 2, block_keys)
    return blocks <= MAX_KEPT and problem["head_dim"] <= 32 and problem["element_bytes"] == 2


def launch(problem: Problem, configuration: Configuration) -> Launch:
    tiles = dict(configuration.tiles)
    pixels = problem["window_size"] ** 2
    windows = problem["batch"] * (problem["height"] * problem["width"] // pixels)
    query_blocks = ceil_div(pixels, tiles["BLOCK_QUERIES"])
    constants = {
        "NUM_HEADS": problem["heads"],
        "HEAD_DIM": problem["head_dim"],
        "WINDOW_SIZE": problem["window_size"],
        "SHIFT_SIZE": problem["shift_size"],
        "MASKED": MASKED,
        **tiles,
    }
    is_whole = "BLOCK_KEYS" not in tiles
    if is_whole:
        keys, more_keys = _key_parts(pixels)
        entries = (2 * problem["window_size"] - 1) ** 2
        constants |= {"TABLE_SIZE": next_power_of_two(entries + 1), "KEYS": keys, "MORE_KEYS": more_keys}
    else:
        constants |= {
            "KEEP_BIAS": _keeps_bias(problem, tiles["BLOCK_KEYS"]),
            "BLOCK_DIM": max(16, next_power_of_two(problem["head_dim"])),
        }
    return Launch(
        kernel=whole_window_kernel if is_whole else window_attention_kernel,
        programs=ceil_div(windows, tiles["WINDOWS"]) * problem["heads"] * query_blocks,
        inputs=INPUTS,
        scalars={name: problem[name] for name in SCALARS},
        constants=constants,
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        max_registers=configuration.max_registers,
    )
