"""A record as a picture."""

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dat_deploy.benchmark.record import Record, Row
from dat_deploy.errors import OutputError, UnsupportedError
from dat_deploy.files import atomic_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_matplotlib", "check_plot", "plot"]

_INK, _FAINT, _GRID = "#1f2933", "#6b7680", "#dde2e6"
_COLOURS = ("#2f6f9f", "#d9822b", "#3c8d5a", "#b5485d", "#7a5ea8", "#8c6d46", "#4aa3a2", "#5f6b76")
_BASELINE_COLOUR = "#9aa5ae"


def check_plot(path: Path) -> None:
    """Refuse before a long measurement what `plot` would refuse after it.

    Raises:
        UnsupportedError: if matplotlib is not installed.
        OutputError: if `path` does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise OutputError(f"{path} does not end in .png, and plots are PNG; write {path.with_suffix('.png')}")
    check_matplotlib()


def check_matplotlib() -> None:
    """Raises UnsupportedError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("plots need matplotlib: pip install 'dat-deploy[plot]'")


def plot(record: Record, path: Path, *, force: bool = False) -> None:
    """Write `record` as a PNG: latency as bars for one batch, throughput as lines for several.

    Raises:
        UnsupportedError, OutputError: as `check_plot` and `atomic_output`.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    is_sweep = len(record.settings.batches) > 1
    height = 4.8 if is_sweep else 2.0 + 0.6 * len(record.rows)
    figure = Figure(figsize=(9, height), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1), facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.tick_params(colors=_FAINT, labelcolor=_INK, length=0, labelsize=10)
    axes.set_axisbelow(True)
    if is_sweep:
        _throughput_lines(axes, record)
    else:
        _latency_bars(axes, record.rows, record.settings.baseline)
    figure.suptitle(_title(record), x=0.012, ha="left", fontsize=13, fontweight="bold", color=_INK)
    figure.supxlabel(_small_print(record), x=0.012, ha="left", fontsize=7.5, color=_FAINT, linespacing=1.5)
    with atomic_output(path, force=force) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def _latency_bars(axes: "Axes", rows: Sequence[Row], baseline: str) -> None:
    """A bar to the median, a thin line on to p99 with a tick at p90 and p99; the label stands right of all of them."""
    positions = range(len(rows))
    colours = [_BASELINE_COLOUR if row.engine == baseline else _COLOURS[0] for row in rows]
    axes.barh(positions, [row.p50_ms for row in rows], height=0.56, color=colours)
    for position, row in zip(positions, rows, strict=True):
        axes.plot([row.p50_ms, row.p99_ms], [position] * 2, color=_INK, linewidth=1)
        axes.plot([row.p90_ms], [position], color=_INK, marker="|", markersize=8)
        axes.plot([row.p99_ms], [position], color=_INK, marker="|", markersize=13)
        label = f"{_number(row.p50_ms)} ms"
        if len(rows) > 1:
            ratio = row.latency_ratio
            spread = f"  ({ratio.lowest:.2f}–{ratio.highest:.2f})"
            label += "   baseline" if row.engine == baseline else f"   {ratio.median:.2f}×{spread}"
        axes.annotate(
            label,
            (row.p99_ms, position),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},  # over the grid
        )
    axes.set_yticks(positions, [_shortened(row.engine) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    axes.set_xlim(0, max(row.p99_ms for row in rows) * 1.45)  # room for the labels
    axes.set_xlabel("latency in ms: bar to the median, ticks at p90 and p99", fontsize=9, color=_FAINT, loc="left")
    axes.xaxis.grid(visible=True, color=_GRID, linewidth=0.8)
    axes.spines["left"].set_visible(False)


def _throughput_lines(axes: "Axes", record: Record) -> None:
    batches = record.settings.batches
    for index, engine in enumerate(record.settings.engines):
        rows = [row for row in record.rows if row.engine == engine]
        best = max(row.images_per_s for row in rows)
        axes.plot(
            [row.batch for row in rows],
            [row.images_per_s for row in rows],
            marker="o",
            markersize=5,
            linewidth=2,
            linestyle="-" if index < len(_COLOURS) else "--",
            color=_COLOURS[index % len(_COLOURS)],
            label=f"{_shortened(engine)}   up to {_number(best)}/s",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches], minor=False)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch", fontsize=9, color=_FAINT)
    axes.set_ylabel("images per second, from the median", fontsize=9, color=_FAINT)
    axes.yaxis.grid(visible=True, color=_GRID, linewidth=0.8)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, labelcolor=_INK)


def _title(record: Record) -> str:
    networks = dict.fromkeys(
        f"{e.variant} {e.image_size[0]}×{e.image_size[1]}" for e in record.settings.engines.values()
    )
    batches = record.settings.batches
    what = "throughput" if len(batches) > 1 else f"latency at batch {batches[0]}"
    return f"DAT {', '.join(networks)}: {what}"


def _small_print(record: Record) -> str:
    settings, hardware = record.settings, record.hardware
    flags = [flag for flag in ("avx512_vnni", "amx_bf16", "sve") if flag in hardware.cpu_flags]
    runtimes = dict.fromkeys(engine.runtime for engine in settings.engines.values())
    versions = [f"{name} {record.versions[name].split('-')[0]}" for name in runtimes if name in record.versions]
    fewest, most = min(row.calls for row in record.rows), max(row.calls for row in record.rows)
    calls = f"{most} timed calls" if fewest == most else f"{fewest} to {most} timed calls"
    how = f"{calls} a row in {settings.rounds} interleaved rounds, each engine in its own process"
    if len(settings.engines) > 1 and len(settings.batches) == 1:
        how += f"; ×: latency relative to {_shortened(settings.baseline)}, median of the rounds (lowest–highest)"
    commit = f", commit {record.commit[:10]}{'-dirty' * record.commit.endswith('-dirty')}" if record.commit else ""
    lines = (
        ", ".join([*hardware.gpus, hardware.cpu, f"{hardware.cores} cores", *flags, f"{hardware.memory_gib} GiB"]),
        f"{', '.join(versions)}, dat-deploy {record.versions.get('dat-deploy', '?')}{commit}, {record.date[:10]}",
        how,
    )
    return "\n".join(textwrap.fill(line, 170) for line in lines)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _shortened(name: str) -> str:
    return name if len(name) <= 34 else f"{name[:12]}…{name[-21:]}"
