"""The report as one page that needs nothing else: verdict, tables, plots, and the points of both sides on pictures."""

import base64
import io
import math
from dataclasses import replace
from importlib import resources
from pathlib import Path

import jinja2
import numpy as np

from dat_deploy.benchmark.plotting import check_matplotlib
from dat_deploy.files import atomic_output
from dat_deploy.validate.check import Check
from dat_deploy.validate.plotting import figure_from_drift, figure_from_errors, figure_from_flips, svg_from_figure
from dat_deploy.validate.report import ValidationReport
from dat_deploy.visualize.plotting import block_points, figure_from_points

__all__ = ["html_from_report", "write_page"]

PICTURES = 2  # photographs that the points are drawn on
FLIPS = 200  # listed at most


def write_page(report: ValidationReport, path: Path, *, force: bool = False) -> None:
    """Write `html_from_report` whole or not at all.

    Raises:
        UnsupportedError: if matplotlib is not installed.
        OutputError: as `atomic_output`.
    """
    check_matplotlib()
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
    )


def _figure(check: Check, what: str) -> str:
    value = getattr(check, what)
    if value is None:
        return ""
    if check.unit in ("", "spread"):
        return f"{value:.2e} {check.unit}".rstrip()
    return f"{value:.3g} {check.unit}"


def _plots(report: ValidationReport) -> list[tuple[str, str, str]]:
    """(title, what it says in words, SVG) of each plot that there is something for."""
    plots = []
    if report.trace is not None and report.trace.errors:
        worst = max(report.trace.errors, key=lambda row: math.inf if math.isnan(row.error) else row.error)
        words = f"Largest error behind each block as a share of its largest value; most at {worst.block}."
        plots.append(("Error by block", words, svg_from_figure(figure_from_errors(report.trace.errors))))
    if report.accuracy is not None and report.accuracy.flips:
        words = f"{len(report.accuracy.flips)} images flip: by how many logits each side prefers its own answer."
        plots.append(("Margins of flips", words, svg_from_figure(figure_from_flips(report.accuracy.flips))))
    if report.drift:
        nearest = max(report.drift, key=lambda row: row.share)
        words = (
            f"Distance between the two sides' sampling locations in pixels of the feature map; nearest to what is "
            f"allowed at {nearest.block}."
        )
        if any(math.isnan(row.largest) for row in report.drift):
            words += " Blocks whose locations are NaN have no marks."
        plots.append(("Drift by block", words, svg_from_figure(figure_from_drift(report.drift))))
    return plots


def _pictures(report: ValidationReport) -> list[str]:
    """PNG pictures in base64: the points of both sides on the first photographs, the engine's hollow."""
    trace = report.trace
    if trace is None or trace.engine_locations is None or not trace.locations:
        return []
    pictures = []
    blocks = [(block, (block.groups, *block.sampled_map)) for block in trace.network.sampled_blocks]
    about = replace(report.engine, network=trace.network, preprocessing=trace.network.preprocessing)
    for index, image in enumerate(trace.images[:PICTURES]):
        photograph = image.transpose(1, 2, 0) * about.preprocessing.std + about.preprocessing.mean
        points = [
            [
                block_points(block, locations[block.name][index], np.full(shares, 1 / math.prod(shares[1:])))
                for block, shares in blocks
                if np.isfinite(locations[block.name][index]).all()
            ]
            for locations in (trace.locations, trace.engine_locations)
        ]
        if len(points[0]) != len(points[1]):  # NaN has no place in a picture
            return []
        sides = (replace(report.reference, network=trace.network), about)
        figure = figure_from_points(photograph.clip(0, 1), f"photograph {index + 1}", sides, points)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=90)
        pictures.append(base64.b64encode(data.getvalue()).decode())
    return pictures
