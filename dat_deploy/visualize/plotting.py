"""Sampled points as a picture: a photograph for each stage, and on it what the stage's deformable blocks read."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dat_deploy.files import atomic_output
from dat_deploy.networks.sampling import SampledBlock
from dat_deploy.runners.base import EngineDescription

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["VISIBLE_DRIFT_PX", "BlockPoints", "block_points", "distances_px", "figure_from_points", "plot_points"]

VISIBLE_DRIFT_PX = 0.5  # from here on a line joins the two engines' points

_INK, _FAINT, _OUTSIDE = "#1f2933", "#6b7680", "#e9ecef"
# Okabe and Ito's palette, black replaced; beyond eight groups the shape of the mark tells them apart, too.
_COLOURS = ("#e69f00", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#5b3a8c")
_MARKERS = "osD^"
_FAINT_BLOCKS = (0.25, 0.5)  # opacity of a stage's first block and its last but one; the last has 1 and an outline
_SIZES = (1 / 8, 8)  # uniform shares of attention; beyond these a mark shrinks and grows no more
_MARGINS = (0.03, 0.15)  # around the photograph, least and most, as shares of its longer side
_PANEL_INCHES, _KEY_INCHES, _PAD_INCHES = 4.6, 0.95, 0.08


@dataclass(frozen=True)
class BlockPoints:
    """What one deformable block read; positions in pixels of the network's input, (y, x), 0 a pixel's centre.

    Attributes:
        pixels: [G, Ns, 2].
        unmoved: [Ns, 2], where the points would be if no offset moved them.
        attention: [G, Ns], what each point receives, as a multiple of the uniform share 1 / Ns.
    """

    stage: int
    block: int
    pixels: NDArray[np.float64]
    unmoved: NDArray[np.float64]
    attention: NDArray[np.float64]

    @property
    def offsets_px(self) -> NDArray[np.float64]:
        """[G, Ns], how far each point was moved."""
        return distances_px(self.pixels, self.unmoved)


def block_points(block: SampledBlock, locations: NDArray[np.float64], attention: NDArray[np.float64]) -> BlockPoints:
    """Of one image: [G, Hk, Wk, 2] locations, [G, Hk, Wk] attention."""
    groups, height, width = attention.shape
    return BlockPoints(
        stage=block.stage,
        block=block.block,
        pixels=block.pixels(locations).reshape(groups, -1, 2),
        unmoved=block.pixels(block.unmoved()).reshape(-1, 2),
        attention=attention.reshape(groups, -1) * (height * width),
    )


def distances_px(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., 2] twice -> [...]."""
    return np.asarray(np.linalg.norm(a - b, axis=-1))


def plot_points(
    photograph: NDArray[np.float32],
    name: str,
    engines: Sequence[EngineDescription],
    points: Sequence[Sequence[BlockPoints]],
    path: Path,
    *,
    force: bool = False,
) -> None:
    """Write `figure_from_points` as a PNG.

    Raises:
        OutputError: as `atomic_output`.
    """
    figure = figure_from_points(photograph, name, engines, points)
    with atomic_output(path, force=force) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def figure_from_points(
    photograph: NDArray[np.float32],
    name: str,
    engines: Sequence[EngineDescription],
    points: Sequence[Sequence[BlockPoints]],
) -> "Figure":
    """A panel for each stage that has points.

    Args:
        photograph: [H, W, 3] in 0..1, what the networks saw; name: of its file.
        engines, points: one, or two to compare; the same blocks in the same order for both.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height, width = photograph.shape[:2]
    stages = sorted({block.stage for block in points[0]})
    feature_maps = {block.stage: block.feature_map for block in engines[0].network.sampled_blocks}
    columns = len(stages) if len(stages) < 3 else 2
    rows = -(-len(stages) // columns)
    panel_width, panel_height = (_PANEL_INCHES * side / max(height, width) for side in (width, height))
    figure = Figure(
        figsize=(max(columns * (_PANEL_INCHES + 0.2), 8.5), rows * (panel_height + 0.8) + 1.9),
        layout=ConstrainedLayoutEngine(h_pad=_PAD_INCHES, w_pad=_PAD_INCHES),
        facecolor="white",
    )
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[panel_height] * rows + [_KEY_INCHES])
    most_marks = max(sum(block.attention.size for block in points[0] if block.stage == stage) for stage in stages)
    unit_area = float(np.clip(0.3 * panel_width * panel_height * 72**2 / most_marks, 12, 30))
    margin = _margin(points, (height, width))
    for i, stage in enumerate(stages):
        axes = figure.add_subplot(grid[i // columns, i % columns])
        axes.imshow(_backdrop(photograph), cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
        axes.set_xlim(-0.5 - margin, width - 0.5 + margin)
        axes.set_ylim(height - 0.5 + margin, -0.5 - margin)
        axes.set(xticks=[], yticks=[], facecolor=_OUTSIDE, anchor="W")
        axes.spines[:].set_visible(False)
        in_stage = [[block for block in blocks if block.stage == stage] for blocks in points]
        _draw_points(axes, in_stage, unit_area)
        title = _panel_title(in_stage, feature_maps[stage])
        axes.set_title(title, loc="left", fontsize=9, color=_INK, linespacing=1.3)
    groups = max(len(block.attention) for block in points[0])
    _draw_key(figure.add_subplot(grid[-1, :]), groups, unit_area, engines)
    left = _PAD_INCHES / figure.get_figwidth()
    network = engines[0].network
    title = f"{network.family} {_printable(network.name)}: where its deformable blocks look"
    title += ", in two engines" * (len(engines) - 1)
    figure.suptitle(title, x=left, ha="left", fontsize=14, fontweight="bold", color=_INK, parse_math=False)
    small_print = _small_print(engines, name)
    figure.supxlabel(small_print, x=left, ha="left", fontsize=7.5, color=_FAINT, linespacing=1.5, parse_math=False)
    return figure


def _backdrop(photograph: NDArray[np.float32]) -> NDArray[np.float32]:
    """[H, W], grey and with less contrast: colour belongs to the groups, black and white to the marks' outlines."""
    return np.asarray(photograph.mean(axis=-1) * 0.6 + 0.22)


def _margin(points: Sequence[Sequence[BlockPoints]], image_size: tuple[int, int]) -> float:
    """Pixels to leave around the photograph, for points outside."""
    last = np.array(image_size) - 1
    beyond = max(float(np.max([-block.pixels, block.pixels - last])) for blocks in points for block in blocks)
    least, most = (share * max(image_size) for share in _MARGINS)
    return min(max(beyond, least), most)


def _draw_points(axes: "Axes", engines: Sequence[Sequence[BlockPoints]], unit_area: float) -> None:
    """The blocks of one stage: a list of them for each engine."""
    unmoved = engines[0][0].unmoved
    y, x = unmoved.T
    axes.plot(x, y, "+", color="white", markersize=6, markeredgewidth=0.9, zorder=1)
    if len(engines) == 1:
        last = engines[0][-1]
        opacity = min(max(200 / last.attention.size, 0.25), 0.8)  # lines must not hide the marks
        for group, pixels in enumerate(last.pixels):
            _draw_lines(axes, unmoved, pixels, _look(group)[0], opacity)
    opacities = [*np.linspace(*_FAINT_BLOCKS, len(engines[0]) - 1), 1.0]
    for opacity, versions in zip(opacities, zip(*engines, strict=True), strict=True):
        if len(versions) > 1:
            first, second = (block.pixels for block in versions)
            visible = distances_px(first, second) >= VISIBLE_DRIFT_PX
            _draw_lines(axes, first[visible], second[visible], _INK, opacity)
        for is_second, block in enumerate(versions):
            pixels = _inside(axes, block.pixels)
            areas = unit_area * block.attention.clip(*_SIZES)
            for group, order in enumerate(np.argsort(-areas, axis=-1)):  # small ones on top
                colour, marker = _look(group)
                y, x = pixels[group, order].T
                axes.scatter(
                    x,
                    y,
                    areas[group, order],
                    marker=marker,
                    alpha=opacity,
                    facecolor="none" if is_second else colour,
                    edgecolor=_INK if is_second else "white" if opacity == 1 else "none",
                    linewidth=0.8 if is_second else 0.4,
                )


def _draw_lines(
    axes: "Axes", start: NDArray[np.float64], end: NDArray[np.float64], colour: str, opacity: float
) -> None:
    """From each of [N, 2] to its partner."""
    from matplotlib.collections import LineCollection

    segments = np.stack([_inside(axes, start), _inside(axes, end)], axis=1)[..., ::-1]  # N, 2 ends, (x, y)
    axes.add_collection(LineCollection(list(segments), colors=colour, linewidths=0.8, alpha=opacity))


def _inside(axes: "Axes", pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points beyond the margin, on it."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    return pixels.clip((top, left), (bottom, right))


def _look(group: int) -> tuple[str, str]:
    """Colour and marker."""
    return _COLOURS[group % len(_COLOURS)], _MARKERS[group // len(_COLOURS) % len(_MARKERS)]


def _panel_title(engines: Sequence[Sequence[BlockPoints]], feature_map: tuple[int, int]) -> str:
    blocks = engines[0]
    groups, points = blocks[0].attention.shape
    if len(engines) > 1:
        drift = np.concatenate([distances_px(a.pixels, b.pixels).ravel() for a, b in zip(*engines, strict=True)])
        distance = f"drift: {_number(np.median(drift))} px in the median, {_number(drift.max())} px at most"
    else:
        offsets = np.concatenate([block.offsets_px.ravel() for block in blocks])
        distance = f"moved by {_number(offsets.mean())} px on average, {_number(offsets.max())} px at most"
    return (
        f"stage {blocks[0].stage}, feature map {feature_map[0]}×{feature_map[1]}\n"
        f"{_count(len(blocks), 'deformable block')} × {_count(groups, 'offset group')} × {_count(points, 'point')}\n"
        f"{distance}"
    )


def _draw_key(axes: "Axes", groups: int, unit_area: float, engines: Sequence[EngineDescription]) -> None:
    """What the marks mean."""
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

    def mark(label: str, marker: str = "o", colour: str = _FAINT, area: float = 50, opacity: float = 1) -> Line2D:
        size = area**0.5
        return Line2D([], [], ls="", marker=marker, ms=size, mfc=colour, mec="none", alpha=opacity, label=label)

    looks = [_look(group) for group in range(min(groups, len(_COLOURS) * len(_MARKERS)))]
    by_column = [group for column in range(len(_COLOURS)) for group in range(column, len(looks), len(_COLOURS))]
    first, last_but_one = _FAINT_BLOCKS
    legends = (
        (0, "colour: offset group", [mark(str(group), looks[group][1], looks[group][0]) for group in by_column]),
        (
            0.56,
            "area: attention received,\n1 is an even share",
            [mark(text, area=unit_area * times) for text, times in (("¼", 0.25), ("1", 1), ("4", 4))],
        ),
        (
            0.82,
            "opacity: block\nof the stage",
            [mark(text, opacity=opacity) for text, opacity in (("first", first), ("…", last_but_one), ("last", 1))],
        ),
    )
    axes.set_axis_off()
    text = "Each mark is a point of the picture that a block's attention reads. "
    if len(engines) == 1:
        text += "It starts at a white cross, and an offset moves it\n"
        text += "from there; lines show the way for the last block of the stage."
    else:
        discs, rings = (_shortened(_printable(about.name)) for about in engines)
        text += f"Discs: {discs}. Rings: {rings}.\nA line joins the two where they are {VISIBLE_DRIFT_PX} px apart "
        text += "or more. Crosses: where the points would be without offsets."
    axes.text(0, 1, text, fontsize=9, color=_INK, va="top", linespacing=1.4, parse_math=False)
    for x, title, handles in legends:
        legend = Legend(
            axes,
            handles,
            [str(handle.get_label()) for handle in handles],
            title=title,
            loc="upper left",
            bbox_to_anchor=(x, 0.5),
            borderaxespad=0,
            borderpad=0,
            ncols=min(len(_COLOURS), len(handles)),
            frameon=False,
            fontsize=9,
            title_fontsize=9,
            alignment="left",
            handletextpad=0.1,
            columnspacing=0.9,
            labelcolor=_INK,
        )
        axes.add_artist(legend)  # axes.legend keeps the last alone


def _small_print(engines: Sequence[EngineDescription], name: str) -> str:
    lines = [
        f"{about.name}: {about.runtime} {about.runtime_version.split('-')[0]}, {about.device}, {about.precision}, "
        f"weights: {about.weights_source} (sha256 {about.weights_sha256[:12]})"
        for about in engines
    ]
    height, width = engines[0].image_size
    lines.append(f"{name}, {height}×{width}, dat-deploy {version('dat-deploy')}")
    return "\n".join(textwrap.fill(_printable(line), 140) for line in lines)


def _printable(text: str) -> str:
    """Without what the font may lack: a file's name can hold anything."""
    return "".join(letter if letter.isprintable() and letter <= "ÿ" else "?" for letter in text)


def _shortened(name: str) -> str:
    return name if len(name) <= 40 else f"…{name[-39:]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.3f}" if value >= 0.001 else "<0.001"
