"""The report as one page that needs nothing else: verdict, tables, plots, and the points of both sides on pictures."""

import base64
import io
import math
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from dat_deploy.benchmark.plotting import check_plot
from dat_deploy.files import atomic_output
from dat_deploy.model import reference_points
from dat_deploy.validate.report import Check, ValidationReport
from dat_deploy.visualize import pixels_from_locations
from dat_deploy.visualize.plotting import BlockPoints, figure_from_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["html_from_report", "write_page"]

PICTURES = 2  # photographs that the points are drawn on
FLIPS = 200  # listed at most
INK, FAINT, GOOD, BAD = "#1f2933", "#9aa5b1", "#0072b2", "#d55e00"


def write_page(report: ValidationReport, path: Path, *, force: bool = False) -> None:
    """Write `html_from_report` whole or not at all.

    Raises:
        UnsupportedError: if matplotlib is not installed.
        OutputError: as `atomic_output`.
    """
    check_plot(path.with_suffix(".png"))
    html = html_from_report(report)
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(html, encoding="utf-8")


def html_from_report(report: ValidationReport) -> str:
    """The page; whatever is in the report, file names too, is text in it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        resources.files("dat_deploy").joinpath("data/validation.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        report=report,
        accuracy=report.accuracy,
        flips=() if report.accuracy is None else report.accuracy.flips[:FLIPS],
        verdicts={True: "ok", False: "failed", None: "not run"},
        figure=_figure,
        plots=_plots(report),
        pictures=_pictures(report),
        version=version("dat-deploy"),
    )


def _figure(check: Check, what: str) -> str:
    value = getattr(check, what)
    if value is None:
        return ""
    return f"{value:.2e}" if not check.unit else f"{value:.3g} {check.unit}"


def _plots(report: ValidationReport) -> list[tuple[str, str, str]]:
    """(title, what it says in words, SVG) of each plot that there is something for."""
    plots = []
    if report.trace is not None and report.trace.errors:
        worst = max(report.trace.errors, key=lambda row: row.error)
        words = f"Largest error behind each block as a share of its largest value; most at {worst.block}."
        plots.append(("Error by block", words, _svg(_plot_errors(report))))
    if report.accuracy is not None and report.accuracy.flips:
        words = f"{len(report.accuracy.flips)} images flip: by how many logits each side prefers its own answer."
        plots.append(("Margins of flips", words, _svg(_plot_margins(report))))
    if report.drift:
        worst_drift = max(report.drift, key=lambda row: row.largest / row.allowed)
        words = (
            f"Distance between the two sides' sampling locations in pixels of the feature map; nearest to what is "
            f"allowed at {worst_drift.block}."
        )
        plots.append(("Drift by block", words, _svg(_plot_drift(report))))
    return plots


def _new_figure(rows: int, height: float = 0.3) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(8.6, max(2.2, height * rows + 1.1)), layout="constrained", facecolor="none")


def _plot_errors(report: ValidationReport) -> "Figure":
    assert report.trace is not None
    rows = report.trace.errors
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


def _plot_margins(report: ValidationReport) -> "Figure":
    assert report.accuracy is not None
    figure = _new_figure(8)
    axes = figure.add_subplot()
    axes.scatter(
        [flip.reference_margin for flip in report.accuracy.flips],
        [flip.engine_margin for flip in report.accuracy.flips],
        s=18, color=BAD, alpha=0.6, linewidths=0,
    )  # fmt: skip
    axes.set_xlabel("PyTorch prefers its answer by, logits", fontsize=8)
    axes.set_ylabel("the engine prefers its own by, logits", fontsize=8)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _plain_axes(axes)
    return figure


def _plot_drift(report: ValidationReport) -> "Figure":
    figure = _new_figure(len(report.drift))
    axes = figure.add_subplot()
    places = np.arange(len(report.drift))
    least = 1e-9  # what is equal has no place on an axis of powers
    for name, colour, mark in (("median", FAINT, "|"), ("p99", GOOD, "o"), ("largest", BAD, "D")):
        axes.scatter(
            [max(least, getattr(row, name)) for row in report.drift],
            places,
            s=30,
            color=colour,
            marker=mark,
            label=name,
        )
    allowed = [row.allowed for row in report.drift]
    axes.scatter(allowed, places, s=60, color=INK, marker="|", label="allowed")
    axes.set_xscale("log")
    axes.set_xlabel("pixels of the feature map", fontsize=8)
    axes.set_yticks(places, [row.block for row in report.drift], fontsize=7)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    _plain_axes(axes)
    return figure


def _plain_axes(axes: object) -> None:
    axes.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]  # matplotlib is optional
    axes.tick_params(labelsize=7, colors=INK)  # type: ignore[attr-defined]
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.6)  # type: ignore[attr-defined]
    axes.set_axisbelow(True)  # type: ignore[attr-defined]


def _svg(figure: "Figure") -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _pictures(report: ValidationReport) -> list[str]:
    """PNG pictures in base64: the points of both sides on the first photographs, the engine's hollow."""
    trace = report.trace
    if trace is None or trace.engine_locations is None or not trace.locations:
        return []
    network = report.engine.network
    pictures = []
    for index, image in enumerate(trace.images[:PICTURES]):
        photograph = image.transpose(1, 2, 0) * report.engine.preprocessing.std + report.engine.preprocessing.mean
        points = [
            [
                _block_points(block, locations[block][index].astype(np.float64), report)
                for block in trace.locations
                if np.isfinite(locations[block][index]).all()
            ]
            for locations in (trace.locations, trace.engine_locations)
        ]
        if len(points[0]) != len(points[1]):  # NaN has no place in a picture
            return []
        about = (report.reference, report.engine)
        figure = figure_from_points(photograph.clip(0, 1), f"photograph {index + 1}", about, points)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=90)
        pictures.append(base64.b64encode(data.getvalue()).decode())
    assert network is not None
    return pictures


def _block_points(
    block: str, locations: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]", report: ValidationReport
) -> BlockPoints:
    network = report.engine.network
    _, stage, _, index = block.split(".")
    groups, height, width, _ = locations.shape
    unmoved = reference_points(height, width, half_pixel=network.half_pixel_queries).double().numpy()
    if network.stages[int(stage)].offset_range_factor < 0:
        unmoved = unmoved.clip(-1, 1)
    sizes = network.feature_map(int(stage)), network.image_size
    return BlockPoints(
        stage=int(stage),
        block=int(index),
        pixels=pixels_from_locations(locations, *sizes).reshape(groups, -1, 2),
        unmoved=pixels_from_locations(unmoved, *sizes).reshape(-1, 2),
        attention=np.ones((groups, height * width)),
    )
