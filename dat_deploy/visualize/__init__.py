"""Where a network looks: the points that its deformable blocks sample in a picture, and how far two engines differ."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dat_deploy.benchmark.plotting import check_plot
from dat_deploy.errors import DatDeployError, ShapeError, VerificationError
from dat_deploy.files import check_output
from dat_deploy.images.preprocess import check_images, preprocess, read_image
from dat_deploy.networks.sampling import SampledBlock
from dat_deploy.runners import EngineDescription, EngineOutline, Runner, check_engine, open_runner
from dat_deploy.visualize.plotting import BlockPoints, block_points, distances_px, plot_points

# What loads torch is imported after the checks, so that a wrong argument is told at once.

__all__ = ["BlockSummary", "Visualization", "visualize"]


@dataclass(frozen=True)
class BlockSummary:
    """What the first engine's block does with its points; distances in pixels of the network's input.

    Attributes:
        stage, block: as in the output `sampling_locations_STAGE_BLOCK`.
        points: of all its offset groups together.
        mean_offset_px, largest_offset_px: how far the offsets move the points.
        largest_attention: the share of its group's attention that the most attended point receives.
        outside: the share of the points beyond the centres of the map's border pixels, where sampling mixes in zeros.
        median_drift_px, largest_drift_px: how far the second engine's points are from these; None without one.
    """

    stage: int
    block: int
    points: int
    mean_offset_px: float
    largest_offset_px: float
    largest_attention: float
    outside: float
    median_drift_px: float | None
    largest_drift_px: float | None


@dataclass(frozen=True)
class Visualization:
    """What was drawn into the file `path`: one or two engines on `image`."""

    path: Path
    image: Path
    engines: tuple[EngineDescription, ...]
    blocks: tuple[BlockSummary, ...]


def visualize(
    image: Path,
    engines: Sequence[str],
    output: Path,
    *,
    checkpoint: Path | None = None,
    image_size: tuple[int, int] | None = None,
    force: bool = False,
) -> Visualization:
    """Draw the points that each deformable block samples onto the picture, a panel a stage.

    Args:
        engines: one, or two to compare; `pytorch:VARIANT`, or a file exported with `sampling_locations`.
        output: a PNG, written whole or not at all.
        checkpoint: for `pytorch:VARIANT`.
        image_size: (height, width) in pixels, where the engine has a choice.
        force: replace `output` if it exists.

    Raises:
        DatDeployError: if an engine gives no sampling locations; and as `open_runner`, `read_image`, `check_output` and
            `check_plot`.
        VerificationError: if an engine gives locations or attention that are not finite.
        ShapeError: if two engines do not sample the same maps of the same picture.
    """
    check_output(output, force=force)
    check_plot(output)
    if len(engines) not in (1, 2):
        raise DatDeployError(
            f"{len(engines)} engines were named; visualize draws one, or two and their drift. Name one or two."
        )
    check_images([image])
    for engine in engines:
        _check_has_points(check_engine(engine, checkpoint=checkpoint, image_size=image_size))
    picture = read_image(image)
    with contextlib.ExitStack() as stack:
        runners = [
            stack.enter_context(open_runner(engine, checkpoint=checkpoint, image_size=image_size, sampled_points=True))
            for engine in engines
        ]
        descriptions = tuple(runner.description for runner in runners)
        _check_same_network(descriptions)
        preprocessing = descriptions[0].preprocessing
        image_nchw = preprocess(picture, preprocessing)[None]
        points = [_sampled_points(runner, image_nchw) for runner in runners]
    photograph = image_nchw[0].transpose(1, 2, 0) * preprocessing.std + preprocessing.mean
    plot_points(photograph.clip(0, 1), image.name, descriptions, points, output, force=force)
    blocks = tuple(
        _summary(block, versions)
        for block, versions in zip(descriptions[0].network.sampled_blocks, zip(*points, strict=True), strict=True)
    )
    return Visualization(output, image, descriptions, blocks)


def _check_has_points(about: EngineOutline) -> None:
    blocks = about.network.sampled_blocks
    if not blocks:
        raise DatDeployError(
            f"{about.name}: variant '{about.variant}' has no deformable block, so it samples no points. "
            f"Name an engine of a variant that has some, such as pytorch:tiny."
        )
    if about.outputs is not None and not {block.locations for block in blocks} <= set(about.outputs):
        raise DatDeployError(
            f"{about.name} gives {', '.join(about.outputs)} and no sampling locations. "
            f"Export it again with `sampling_locations=True` to see its points."
        )


def _check_same_network(descriptions: Sequence[EngineDescription]) -> None:
    first, last = descriptions[0], descriptions[-1]
    if first.preprocessing != last.preprocessing or first.network.sampled_blocks != last.network.sampled_blocks:
        raise ShapeError(
            f"{first.name} is {_network(first)}, {last.name} is {_network(last)}; a drift is between "
            f"points of one network at one image size. Name two engines of one variant, or give `image_size`."
        )
    if first.weights_sha256 != last.weights_sha256:
        raise DatDeployError(
            f"{first.name} holds the weights of {first.weights_source} (sha256 {first.weights_sha256[:12]}), "
            f"{last.name} those of {last.weights_source} ({last.weights_sha256[:12]}); "
            f"a drift is between engines of the same weights. Pass the `checkpoint` that the file was exported with."
        )


def _network(about: EngineDescription) -> str:
    return "{} for {}x{}".format(about.variant, *about.image_size)


def _sampled_points(runner: Runner, image_nchw: NDArray[np.float32]) -> list[BlockPoints]:
    about = runner.description
    outputs = runner.in_batches(image_nchw)
    return [
        block_points(block, _finite(about, block.locations, outputs), _finite(about, block.attention, outputs))
        for block in about.network.sampled_blocks
    ]


def _finite(about: EngineDescription, name: str, outputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """The output `name` for the first image."""
    values: NDArray[np.float64] = outputs[name][0].astype(np.float64)
    wrong = values.size - np.count_nonzero(np.isfinite(values))
    if wrong:
        raise VerificationError(
            f"{about.name}: {wrong} of {values.size} values of output '{name}' are NaN or infinite; a picture needs "
            f"finite ones. Find the cause with: `validate(engine={about.name!r})`"
        )
    return values


def _summary(block: SampledBlock, versions: Sequence[BlockPoints]) -> BlockSummary:
    """Of one block, as the first engine has it."""
    first = versions[0]
    offsets = first.offsets_px
    drift = distances_px(first.pixels, versions[1].pixels) if len(versions) > 1 else None
    (top, left), (bottom, right) = block.borders
    y, x = np.moveaxis(first.pixels, -1, 0)
    outside = (y < top) | (y > bottom) | (x < left) | (x > right)
    return BlockSummary(
        stage=first.stage,
        block=first.block,
        points=offsets.size,
        mean_offset_px=float(offsets.mean()),
        largest_offset_px=float(offsets.max()),
        largest_attention=float(first.attention.max()) / first.attention.shape[-1],
        outside=float(outside.mean()),
        median_drift_px=None if drift is None else float(np.median(drift)),
        largest_drift_px=None if drift is None else float(drift.max()),
    )
