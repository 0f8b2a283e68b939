"""What a page of validation draws: error by block, margins of flips, drift by block."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dat_deploy.validate.accuracy import Flip
from dat_deploy.validate.drift import BlockDrift
from dat_deploy.validate.trace import BlockError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure_from_drift", "figure_from_errors", "figure_from_flips", "svg_from_figure"]

INK, FAINT, GOOD, BAD = "#1f2933", "#9aa5b1", "#0072b2", "#d55e00"
LEAST = 1e-9  # what is equal has no place on an axis of powers


def _new_figure(rows: int, height: float = 0.3) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(8.6, max(2.2, height * rows + 1.1)), layout="constrained", facecolor="none")


def figure_from_errors(rows: Sequence[BlockError]) -> "Figure":
    """A line of errors from the image to the logits."""
    figure = _new_figure(len(rows), 0.2)
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    axes.plot([row.error for row in rows], places, "o-", color=BAD, markersize=4, label="engine")
    if rows[0].rounded is not None:
        own = [math.nan if row.rounded is None else row.rounded for row in rows]
        axes.plot(own, places, "o-", color=FAINT, markersize=4, label="eager PyTorch in this precision")
        axes.legend(frameon=False, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("largest error / largest value", fontsize=8)
    axes.set_yticks(places, [row.block for row in rows], fontsize=7)
    axes.invert_yaxis()
    _plain_axes(axes)
    return figure


def figure_from_flips(flips: Sequence[Flip]) -> "Figure":
    """A mark for each image that flips; those near the corner flip by rounding."""
    figure = _new_figure(8)
    axes = figure.add_subplot()
    axes.scatter(
        [flip.reference_margin for flip in flips],
        [flip.engine_margin for flip in flips],
        s=18, color=BAD, alpha=0.6, linewidths=0,
    )  # fmt: skip
    axes.set_xlabel("PyTorch prefers its answer by, logits", fontsize=8)
    axes.set_ylabel("the engine prefers its own by, logits", fontsize=8)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _plain_axes(axes)
    return figure


def figure_from_drift(rows: Sequence[BlockDrift]) -> "Figure":
    """Median, 99th percentile and largest of each block, and what is allowed."""
    figure = _new_figure(len(rows))
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    for name, colour, mark in (("median", FAINT, "|"), ("p99", GOOD, "o"), ("largest", BAD, "D")):
        axes.scatter(
            [np.maximum(LEAST, getattr(row, name)) for row in rows],
            places,
            s=30,
            color=colour,
            marker=mark,
            label=name,
        )
    limits = [row.allowed for row in rows]
    axes.scatter(limits, places, s=60, color=INK, marker="|", label="allowed")
    axes.set_xscale("log")
    axes.set_xlabel("pixels of the feature map", fontsize=8)
    axes.set_yticks(places, [row.block for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    _plain_axes(axes)
    return figure


def _plain_axes(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=7, colors=INK)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)


def svg_from_figure(figure: "Figure") -> str:
    """The element alone, to stand in a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
