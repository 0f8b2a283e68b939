"""`deformable_sample` in one launch: four rows of channels read for each point, one written."""

import triton
import triton.language as tl

from dat_deploy.plugins.launch import Configuration, Launch, Problem, Shape, ceil_div, next_power_of_two

__all__ = ["configurations", "deformable_sample_kernel", "launch", "problem"]

INPUTS = ("value", "sampling_locations")
SCALARS = ("height", "width", "points")
TILES = [(32, 4), (64, 4), (16, 4), (16, 2)]


@triton.jit
def _taps(location, size):
    """The two pixels around a location on an axis of `size` pixels, and their weights; zeros outside of the map."""
    coordinate = (location + 1) * 0.5 * (size - 1)
    coordinate = tl.minimum(tl.maximum(coordinate, -8.0), size + 8.0)
    first = tl.minimum(tl.maximum(tl.floor(coordinate), 0.0), tl.maximum(size - 2, 0) * 1.0)
    first_weight = tl.maximum(1 - tl.abs(coordinate - first), 0.0)
    second_weight = tl.where(size > 1, tl.maximum(1 - tl.abs(coordinate - first - 1), 0.0), 0.0)
    nothing = tl.where(location == location, 0.0, float("nan"))
    return first.to(tl.int32), first_weight + nothing, second_weight + nothing


@triton.jit
def _read(value, pixel, weight, channel, is_channel, CHANNELS: tl.constexpr):
    """`weight` times the channels of each pixel, [BLOCK_POINTS, BLOCK_CHANNELS]; a pixel of no weight is not read."""
    mask = (weight != 0)[:, None] & is_channel[None, :]
    return weight[:, None] * tl.load(value + (pixel[:, None] * CHANNELS + channel[None, :]), mask=mask, other=0.0)


@triton.jit(do_not_specialize=list(SCALARS))
def deformable_sample_kernel(
    value,
    sampling_locations,
    height,
    width,
    points,
    output,
    CHANNELS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    BLOCK_POINTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Grid: image, block of channels of a group, block of points, the last fastest. Layouts as in the reference."""
    GROUP_CHANNELS: tl.constexpr = CHANNELS // OFFSET_GROUPS
    CHANNEL_BLOCKS: tl.constexpr = (GROUP_CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    point_blocks = tl.cdiv(points, BLOCK_POINTS)
    program = tl.program_id(0)
    channel_block = program // point_blocks % (OFFSET_GROUPS * CHANNEL_BLOCKS)
    group = channel_block // CHANNEL_BLOCKS
    image = (program // point_blocks // (OFFSET_GROUPS * CHANNEL_BLOCKS)).to(tl.int64)

    value += image * (height * width * CHANNELS) + group * GROUP_CHANNELS
    output += image * (points * CHANNELS) + group * GROUP_CHANNELS
    sampling_locations += (image * OFFSET_GROUPS + group) * (points * 2)

    point = program % point_blocks * BLOCK_POINTS + tl.arange(0, BLOCK_POINTS)
    channel = channel_block % CHANNEL_BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_point, is_channel = point < points, channel < GROUP_CHANNELS
    location_y = tl.load(sampling_locations + 2 * point, mask=is_point, other=-3.0)
    location_x = tl.load(sampling_locations + 2 * point + 1, mask=is_point, other=-3.0)
    top, top_weight, bottom_weight = _taps(location_y, height)
    left, left_weight, right_weight = _taps(location_x, width)
    pixel = top * width + left
    sampled = _read(value, pixel, top_weight * left_weight, channel, is_channel, CHANNELS)
    sampled += _read(value, pixel + 1, top_weight * right_weight, channel, is_channel, CHANNELS)
    sampled += _read(value, pixel + width, bottom_weight * left_weight, channel, is_channel, CHANNELS)
    sampled += _read(value, pixel + width + 1, bottom_weight * right_weight, channel, is_channel, CHANNELS)
    mask = is_point[:, None] & is_channel[None, :]
    offset = point[:, None] * CHANNELS + channel[None, :]
    tl.store(output + offset, sampled.to(output.dtype.element_ty), mask=mask)


def problem(value: Shape, sampling_locations: Shape, element_bytes: int) -> Problem:
    """What the speed of a launch depends on, from the shapes of reference.deformable_sample."""
    batch, height, width, channels = value
    _, groups, sampled_height, sampled_width, _ = sampling_locations
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "points": sampled_height * sampled_width,
        "channels": int(channels),
        "offset_groups": int(groups),
        "element_bytes": element_bytes,
    }


def configurations(problem: Problem) -> list[Configuration]:
    """Every way to cut the problem up; the first is taken where nothing was measured."""
    return [Configuration((("BLOCK_POINTS", points),), num_warps, 1) for points, num_warps in TILES]


def launch(problem: Problem, configuration: Configuration) -> Launch:
    tiles = dict(configuration.tiles)
    group_channels = problem["channels"] // problem["offset_groups"]
    block_channels = min(128, next_power_of_two(group_channels))
    blocks = problem["offset_groups"] * ceil_div(group_channels, block_channels)
    return Launch(
        kernel=deformable_sample_kernel,
        programs=problem["batch"] * blocks * ceil_div(problem["points"], tiles["BLOCK_POINTS"]),
        inputs=INPUTS,
        scalars={name: problem[name] for name in SCALARS},
        constants={
            "CHANNELS": problem["channels"],
            "OFFSET_GROUPS": problem["offset_groups"],
            "BLOCK_CHANNELS": block_channels,
            **tiles,
        },
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        max_registers=configuration.max_registers,
    )
