"""A record of the GPU benchmark as Markdown and as a picture. Needs no torch, and matplotlib for the picture alone."""

import importlib.util
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_record import Record, Row

from dat_deploy.files import atomic_output

__all__ = ["Bar", "bars", "markdown", "plot", "targets"]

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
GPU_OF_BARS = "H200"
IMAGES_PER_S = {"tiny": 19_000, "small": 11_500, "base": 9_000}
OURS = ("fused", "fused+compile")
IMPLEMENTATIONS = ("eager", "compile", "flex", "fused")


@dataclass(frozen=True)
class Bar:
    """A target of the project beside what was found."""

    what: str
    target: str
    found: str
    verdict: str


def rows(record: Record, part: str, **labels: str) -> list[Row]:
    """Those that may be used: measured, and right."""
    return [
        row
        for row in record.rows.values()
        if row.part == part and not row.error and all(row.labels.get(name) == value for name, value in labels.items())
    ]


def number(record: Record, name: str, part: str, **labels: str) -> float | None:
    return next((row.numbers[name] for row in rows(record, part, **labels) if name in row.numbers), None)


def _at_least(what: str, target: float, found: float | None, unit: str, format_: str = ".2f") -> Bar:
    if found is None:
        return Bar(what, f"≥ {target:,g}{unit}", "–", NOT_MEASURED)
    return Bar(what, f"≥ {target:,g}{unit}", f"{found:,{format_}}{unit}", MET if found >= target else MISSED)


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def bars(record: Record) -> list[Bar]:
    """Every target, in the order of the project's list."""

    def median(implementation: str) -> float | None:
        return number(record, "median_us", "operators", bar="yes", implementation=implementation)

    def best(**labels: str) -> Row | None:
        ours = [row for mode in OURS for row in rows(record, "networks", mode=mode, **labels)]
        return min(ours, key=lambda row: row.numbers["p50_ms"], default=None)

    found, fused = [], median("fused")
    for implementation, target in (("eager", 10.0), ("compile", 3.0), ("flex", 1.5)):
        what = f"`deformable_attention`, `base-384` stage 3, fp16, batch 64: speed / {implementation}"
        found.append(_at_least(what, target, _ratio(median(implementation), fused), "×"))
    share = number(record, "share_of_datasheet_roofline", "operators", bar="yes", implementation="fused")
    percent = None if share is None else 100 * share
    found.append(_at_least("the same: share of its roofline (datasheet)", 50.0, percent, " %", ".0f"))
    peaks = [number(record, "peak_mib", "memory", mode=mode) for mode in ("eager", "fused")]
    found.append(_at_least("`pp-tiny` 800×1344, batch 1: peak memory of eager / ours", 5.0, _ratio(*peaks), "×"))
    names = dict.fromkeys(
        [*IMAGES_PER_S, *(row.labels["variant"] for row in rows(record, "networks", image="224x224"))]
    )
    for name in names:
        ours = best(variant=name, batch="128")
        compiled = number(record, "p50_ms", "networks", variant=name, batch="128", mode="compile")
        speed = _ratio(compiled, ours.numbers["p50_ms"]) if ours else None
        found.append(_at_least(f"`{name}`, fp16, batch 128: speed / compiled reference", 1.5, speed, "×"))
    for name, target in IMAGES_PER_S.items():
        ours = best(variant=name, batch="128")
        images = ours.numbers["images_per_s"] if ours else None
        found.append(_at_least(f"`{name}`, fp16, batch 128", target, images, " images/s", ".0f"))
    ours = best(variant="tiny", batch="1")
    latency = ours.numbers["p50_ms"] if ours else None
    verdict = NOT_MEASURED if latency is None else MET if latency <= 0.5 else MISSED
    found.append(
        Bar("`tiny`, fp16, batch 1: p50", "≤ 0.5 ms", "–" if latency is None else f"{latency:.3f} ms", verdict)
    )
    return found


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---"] * len(head)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)]


def _shown(value: float | None, format_: str = ".2f", scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:,{format_}}"


def _operators(record: Record) -> list[str]:
    by_case: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in record.rows.values():
        if row.part == "operators":
            key = tuple(row.labels[name] for name in ("operator", "shape", "batch", "for"))
            by_case.setdefault(key, {})[row.labels["implementation"]] = row
    lines = []
    for (operator, shape, batch, users), found in sorted(by_case.items()):
        right = {name: row.numbers for name, row in found.items() if not row.error}
        took = {name: right[name]["median_us"] if name in right else None for name in IMPLEMENTATIONS}
        fused = right.get("fused", {})
        speeds = [_ratio(took[name], took["fused"]) for name in ("eager", "compile", "flex")]
        cells = [operator, f"{users.split('; ')[0]}{' …' * ('; ' in users)}: {shape}", batch]
        cells += ["error" if name in found and found[name].error else _shown(took[name], ".1f") for name in took]
        cells += [_shown(speed, ".1f") for speed in speeds]
        cells += [_shown(fused.get("bytes"), ".1f", 1e-6), _shown(fused.get("tb_per_s"))]
        cells += [_shown(fused.get("tflop_per_s"), ".0f")]
        cells += [_shown(fused.get(f"share_of_{kind}_roofline"), ".0f", 100) for kind in ("datasheet", "measured")]
        lines.append(cells)
    head = ["operator", "shape", "batch", *(f"{name} µs" for name in IMPLEMENTATIONS)]
    head += ["× eager", "× compile", "× flex", "MB", "TB/s", "TFLOP/s", "% of roofline, datasheet", "measured"]
    return _table(head, lines) if lines else ["No operator was measured."]


def _networks(record: Record) -> list[str]:
    lines = []
    for row in (row for row in record.rows.values() if row.part == "networks"):
        labels, found = row.labels, row.numbers
        compiled = number(
            record, "p50_ms", "networks", variant=labels["variant"], batch=labels["batch"], mode="compile"
        )
        cells = [f"`{labels['variant']}` {labels['image']}", labels["batch"], labels["mode"]]
        if row.error:
            lines.append([*cells, f"error: {row.error[:80]}", *["–"] * 5])
            continue
        speed = _ratio(compiled, found["p50_ms"])
        cells += [_shown(found["images_per_s"], ".0f"), _shown(found["p50_ms"], ".3f"), _shown(found["p99_ms"], ".3f")]
        cells += [_shown(found["peak_mib"], ".0f"), _shown(speed), "yes" if found["in_graph"] else "no"]
        lines.append(cells)
    lines.sort(key=lambda cells: (cells[0], int(cells[1]), cells[2]))
    head = ["network", "batch", "mode", "images/s", "p50 ms", "p99 ms", "peak MiB", "× compile", "in a CUDA graph"]
    return _table(head, lines) if lines else ["No network was measured."]


def _engines(record: Record) -> list[str]:
    """Beside the compiled network and AOTInductor, each of the same variant and batch."""
    order = list(dict.fromkeys(row.labels["variant"] for row in record.rows.values() if row.part == "engines"))
    lines = []
    for row in (row for row in record.rows.values() if row.part == "engines"):
        labels, found = row.labels, row.numbers
        same = {"variant": labels["variant"], "batch": labels["batch"]}
        variant = "any" if same["variant"] == "any" else f"`{same['variant']}` {labels['image']}"
        cells = [variant, labels["batch"], labels["engine"]]
        if row.error:
            why = "not here" if labels["batch"] == "any" else "error"
            cells += [f"{why}: {row.error[:80]}".replace("|", "\\|"), *["–"] * 10]
        else:
            compiled = number(record, "p50_ms", "networks", mode="fused+compile", **same)
            packaged = number(record, "p50_ms", "engines", engine="aotinductor", **same)
            cells += [_shown(found["images_per_s"], ".0f")]
            cells += [_shown(found[f"{name}_ms"], ".3f") for name in ("p50", "p90", "p99", "host_p50")]
            cells += [_shown(found["build_s"], ".0f")]
            cells += [_shown(found[f"{name}_mib"], ".0f") for name in ("engine", "device")]
            layers = [f"{value:.0f} {name.removesuffix(' layers')}" for name, value in _layers(found)]
            cells += [", ".join(layers) or "–"]
            cells += [_shown(_ratio(other, found["p50_ms"])) for other in (compiled, packaged)]
        batch = int(labels["batch"]) if labels["batch"].isdigit() else 0
        lines.append(((order.index(same["variant"]), batch, found.get("p50_ms", math.inf)), cells))
    if not lines:
        return ["No engine was measured."]
    head = ["network", "batch", "engine", "images/s", "p50 ms", "p90 ms", "p99 ms", "p50 ms from NumPy", "build s"]
    head += ["engine MiB", "device MiB", "layers", "× fused+compile", "× aotinductor"]
    said = "Engines in fp16, with images and logits on the device but for one column; TensorRT must beat aotinductor:"
    return [said, "", *_table(head, (cells for _, cells in sorted(lines)))]


def _layers(numbers: dict[str, float]) -> list[tuple[str, float]]:
    """How many layers compute in each precision, the most first."""
    counted = [(name, value) for name, value in numbers.items() if name.endswith(" layers")]
    return sorted(counted, key=lambda item: -item[1])


def _sentences(record: Record) -> list[str]:
    said = []
    for row in rows(record, "ceilings"):
        said.append(
            f"This GPU reached {row.numbers['tflop_per_s']:.0f} TFLOP/s (float16 product) and "
            f"{row.numbers['tb_per_s']:.2f} TB/s (copy)."
        )
    for row in rows(record, "memory"):
        said.append(f"`pp-tiny` 800×1344, batch 1, {row.labels['mode']}: peak {row.numbers['peak_mib']:,.0f} MiB.")
    ptx = [row for row in record.rows.values() if row.part == "ptx"]
    if ptx:
        same = sum(bool(row.numbers.get("identical")) for row in ptx)
        said.append(
            f"PTX launched through the driver: {same} of {len(ptx)} operators equal the torch operator exactly."
        )
    for row in (row for row in record.rows.values() if row.part == "tests"):
        passed, failed = row.numbers.get("passed", 0), row.numbers.get("failed", 0)
        said.append(f"Tests marked gpu: {passed:.0f} passed, {failed:.0f} failed. {row.error or ''}".strip())
    tuned = [row.numbers["best_us"] for row in rows(record, "tune")]
    if tuned:
        said.append(
            f"{len(tuned)} problems were tuned; the median of the fastest is {statistics.median(tuned):.1f} µs."
        )
    for key, row in record.rows.items():
        if row.error:
            said.append(f"`{key}`: {row.error}")
    if record.not_measured:
        shown = [f"`{key}` ({why})" for key, why in list(record.not_measured.items())[:12]]
        more = len(record.not_measured) - len(shown)
        said.append(f"Not measured: {', '.join(shown)}{f', and {more} more' * bool(more)}.")
    return said


def targets(record: Record) -> str:
    """The verdicts as a table."""
    lines = _table(["target", "wanted", "found", ""], ([b.what, b.target, b.found, b.verdict] for b in bars(record)))
    if GPU_OF_BARS not in record.machine.gpu:
        lines += ["", f"The targets are for an {GPU_OF_BARS}; this is {record.machine.gpu}."]
    return "\n".join(lines)


def markdown(record: Record) -> str:
    """The tables for the README, each target's verdict first."""
    machine = record.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [targets(record), "", *_networks(record), "", *_engines(record), "", *_operators(record), ""]
    lines += [f"- {sentence}" for sentence in _sentences(record)]
    where = f"{machine.gpu}, {machine.memory_gib} GiB, {versions}"
    lines += ["", f"{where}; commit {record.commit or 'unknown'} (source {record.source}), {record.date}."]
    return "\n".join(lines)


def plot(record: Record, path: Path) -> str | None:
    """Write a PNG: speeds beside eager, operators left, networks right. What prevents it is returned as a sentence."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed; run --part report with the JSON where it is"
    operators, networks = _operator_speeds(record), _network_speeds(record)
    if not operators and not networks:
        return "no plot: nothing that could be drawn was measured"
    from matplotlib.figure import Figure

    panels = [
        (title, speeds)
        for title, speeds in (("operators, batch 64", operators), ("networks, largest batch", networks))
        if speeds
    ]
    height = 1.8 + 0.75 * max(len(speeds) for _, speeds in panels)
    figure = Figure(figsize=(7.5 * len(panels), height), layout="constrained", facecolor="white")
    for index, (title, speeds) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _bars_of(axes, speeds)
        axes.set_title(f"{title}: times as fast as eager", loc="left", fontsize=11)
    versions = record.machine.versions
    small = f"{record.machine.gpu}, torch {versions.get('torch')}, Triton {versions.get('triton')}, {record.date[:10]}"
    figure.supxlabel(small, x=0.01, ha="left", fontsize=8, color="#6b7680")
    with atomic_output(path, force=True) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return None


def _operator_speeds(record: Record, most: int = 12) -> dict[str, dict[str, float]]:
    """Speed relative to eager by implementation, for the shapes that have most of them."""
    found: dict[str, dict[str, float]] = {}
    for row in rows(record, "operators", batch="64"):
        same = {name: row.labels[name] for name in ("operator", "shape", "batch")}
        eager = number(record, "median_us", "operators", implementation="eager", **same)
        if eager and row.labels["implementation"] != "eager":
            shifted = ", shifted" if "shifted" in row.labels["shape"] else ""
            label = f"{row.labels['operator']}{shifted}\n{row.labels['for'].split('; ')[0]}"
            found.setdefault(label, {})[row.labels["implementation"]] = eager / row.numbers["median_us"]
    with_ours = [item for item in found.items() if "fused" in item[1]]
    return dict(sorted(with_ours, key=lambda item: -len(item[1]))[:most])


def _network_speeds(record: Record) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    measured = rows(record, "networks")
    largest = max((int(row.labels["batch"]) for row in measured), default=0)
    for row in measured:
        of_variant = {"variant": row.labels["variant"], "batch": str(largest)}
        eager = number(record, "p50_ms", "networks", mode="eager", **of_variant)
        if eager and row.labels["batch"] == str(largest) and row.labels["mode"] != "eager":
            found.setdefault(f"{row.labels['variant']}\nbatch {largest}", {})[row.labels["mode"]] = (
                eager / row.numbers["p50_ms"]
            )
    return found


COLOURS = {"compile": "#d9822b", "flex": "#7a5ea8", "fused": "#2f6f9f", "fused+compile": "#3c8d5a"}


def _bars_of(axes: Any, speeds: dict[str, dict[str, float]]) -> None:
    kinds = [kind for kind in COLOURS if any(kind in found for found in speeds.values())]
    thickness = 0.8 / len(kinds)
    for offset, kind in enumerate(kinds):
        drawn = [(i, found[kind]) for i, found in enumerate(speeds.values()) if kind in found]
        positions = [i - 0.4 + (offset + 0.5) * thickness for i, _ in drawn]
        bars_drawn = axes.barh(
            positions, [speed for _, speed in drawn], thickness * 0.9, color=COLOURS[kind], label=kind
        )
        axes.bar_label(bars_drawn, [f"{speed:.1f}×" for _, speed in drawn], padding=3, fontsize=8)
    axes.axvline(1.0, color="#9aa5ae", linewidth=1)
    axes.set_yticks(range(len(speeds)), list(speeds), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
