# ruff: noqa: N803  # Triton's sizes are constants and spelled as such
"""`toy_sample` in one launch."""

import triton
import triton.language as tl

from dat_deploy.plugins.launch import Configuration, Launch, Problem, Shape, ceil_div

__all__ = ["configurations", "launch", "problem", "toy_sample_kernel"]

INPUTS = ("value", "sampling_locations", "scale_table")


@triton.jit
def toy_sample_kernel(
    value, sampling_locations, scale_table, pixels, output, CHANNELS: tl.constexpr, SLOPE: tl.constexpr,
    STEP_X: tl.constexpr, STEP_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of pixels of all images."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < pixels * CHANNELS
    pixel = element // CHANNELS
    x = tl.load(sampling_locations + 2 * pixel, mask=mask)
    y = tl.load(sampling_locations + 2 * pixel + 1, mask=mask)
    scale = tl.load(scale_table + element % CHANNELS, mask=mask).to(tl.float32)
    read = tl.load(value + element, mask=mask).to(tl.float32)
    tl.store(
        output + element, (read * (SLOPE + STEP_X * x + STEP_Y * y) * scale).to(output.dtype.element_ty), mask=mask
    )


def problem(value: Shape, slope: float, steps: tuple[float, float], element_bytes: int, table_bytes: int) -> Problem:
    batch, height, width, channels = value
    sizes = {"batch": batch, "height": height, "width": width, "channels": channels}
    return {
        **sizes, "slope": slope, "step_x": steps[0], "step_y": steps[1], "element_bytes": element_bytes,
        "table_bytes": table_bytes,
    }  # fmt: skip


def configurations(problem: Problem) -> list[Configuration]:
    return [Configuration((("BLOCK", block),), 4, 1) for block in (256, 512)]


def launch(problem: Problem, configuration: Configuration) -> Launch:
    pixels = problem["batch"] * problem["height"] * problem["width"]
    tiles = dict(configuration.tiles)
    constants = {
        "CHANNELS": problem["channels"], "SLOPE": problem["slope"], "STEP_X": problem["step_x"],
        "STEP_Y": problem["step_y"], **tiles,
    }  # fmt: skip
    return Launch(
        kernel=toy_sample_kernel,
        programs=ceil_div(pixels * problem["channels"], tiles["BLOCK"]),
        inputs=INPUTS,
        scalars={"pixels": pixels},
        constants=constants,
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
    )
