"""A record of the GPU benchmark as Markdown and as a picture. Needs no torch, and matplotlib for the picture alone."""

import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_record import Record, Row

from dat_deploy.files import atomic_output
from dat_deploy.variants import VARIANTS

__all__ = ["markdown", "plot", "targets", "write_documents"]

NOT_MEASURED = "not measured"
GPU_OF_TARGETS = "H200"
IMAGES_PER_S = {"tiny": 19_000, "small": 11_500, "base": 9_000}
COLOURS = {"eager": "#9aa5ae", "compile": "#d9822b", "flex": "#7a5ea8", "flex+bias": "#b39ddb", "sdpa": "#b5485d"}
COLOURS |= {"prototype": "#4aa3a2", "fused": "#2f6f9f", "fused+compile": "#3c8d5a"}
PEERS = ("eager", "compile", "flex", "flex+bias", "sdpa", "prototype")


def rows(record: Record | None, part: str, **labels: str) -> list[Row]:
    """Those that may be used: measured, and right."""
    return [
        row
        for row in (record.rows.values() if record else ())
        if row.part == part and not row.error and all(row.labels.get(name) == value for name, value in labels.items())
    ]


def number(record: Record | None, name: str, part: str, **labels: str) -> float | None:
    return next((row.numbers[name] for row in rows(record, part, **labels) if name in row.numbers), None)


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def _shown(value: float | None, format_: str = ".2f", scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:,{format_}}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def targets(record: Record | None) -> str:
    """Every target of the project beside what was found, as a table."""

    def median(implementation: str) -> float | None:
        return number(record, "median_us", "operators", bar="yes", implementation=implementation)

    def best(name: str, **labels: str) -> float | None:
        modes = (number(record, name, "networks", mode=mode, **labels) for mode in ("fused", "fused+compile"))
        found = [value for value in modes if value is not None]
        return (max if name == "images_per_s" else min)(found) if found else None

    lines = []

    def add(
        what: str, target: float, found: float | None, unit: str, format_: str = ".1f", *, most: bool = False
    ) -> None:
        verdict = NOT_MEASURED
        if found is not None:
            met = found <= target if most else found >= target
            verdict = f"{found:,{format_}}{unit}, {'met' if met else 'missed'}"
        lines.append([what, f"{'≤' if most else '≥'} {target:,g}{unit}", verdict])

    for peer, target in (("eager", 10.0), ("compile", 3.0), ("flex", 1.5)):
        what = f"`deformable_attention`, fp16, `base-384` stage 3, batch 64: times as fast as {peer}"
        add(what, target, _ratio(median(peer), median("fused")), "×")
    share = number(record, "share_of_floor", "operators", bar="yes", implementation="fused")
    add("the same: share of its floor, exponentials included", 50.0, share and 100 * share, " %", ".0f")
    peaks = [number(record, "peak_mib", "memory", mode=mode) for mode in ("eager", "fused")]
    add("`pp-tiny` at 800×1344, batch 1: peak memory of eager / fused", 5.0, _ratio(*peaks), "×")
    for name in ("tiny", "base-384", "pp-tiny"):
        at = {"variant": name, "batch": "128"}
        compiled = number(record, "p50_ms", "networks", mode="compile", **at)
        speed = _ratio(compiled, best("p50_ms", **at))
        add(f"`{name}`, fp16, batch 128: times as fast as torch.compile max-autotune", 1.5, speed, "×")
    for name, target in IMAGES_PER_S.items():
        found = best("images_per_s", variant=name, batch="128")
        add(f"`{name}`, fp16, batch 128", target, found, " images/s", ".0f")
    add("`tiny`, fp16, batch 1: p50", 0.5, best("p50_ms", variant="tiny", batch="1"), " ms", ".3f", most=True)
    if record and GPU_OF_TARGETS not in record.machine.gpu:
        lines.append([f"the targets are for an {GPU_OF_TARGETS}; this is {record.machine.gpu}", "", ""])
    return _table(["what", "target", "measured"], lines)


def operators(record: Record | None) -> str:
    """A line a shape: our time, the peers' in multiples of it, and the share of what the card's own ceilings allow."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in record.rows.values() if record else ():
        if row.part == "operators":
            shape = tuple(row.labels[name] for name in ("operator", "for", "shape", "batch"))
            found.setdefault(shape, {})[row.labels["implementation"]] = row
    lines = []
    for (operator, user, shape, batch), by_peer in sorted(found.items()):
        took = {name: None if row.error else row.numbers["median_us"] for name, row in by_peer.items()}
        fused = by_peer["fused"].numbers if took.get("fused") else {}
        floors = {name: value for name, value in fused.items() if name.startswith("floor_")}
        bound = max(floors, key=lambda name: floors[name]).split("_")[1] if floors else "–"
        cells = [operator, f"{user}, {shape.split(', ')[0]}" + ", shifted" * ("shifted" in shape), batch]
        cells.append("wrong" if "fused" in by_peer and by_peer["fused"].error else _shown(took.get("fused"), ".1f"))
        cells.append(_shown(fused.get("cold_us"), ".1f"))
        for peer in PEERS:
            is_wrong = peer in by_peer and by_peer[peer].error
            cells.append("error" if is_wrong else _shown(_ratio(took.get(peer), took.get("fused"))))
        lines.append(
            [*cells, _shown(fused.get("share_of_floor"), ".0f", 100), bound, _shown(fused.get("sm_mhz"), ".0f")]
        )
    head = ["operator", "shape", "batch", "fused µs", "cold L2 µs", *(f"{peer} ×" for peer in PEERS)]
    return _table([*head, "% of floor", "bound by", "MHz"], lines) if lines else f"Operators: {NOT_MEASURED}."


def networks(record: Record | None) -> str:
    lines = []
    for row in (row for row in (record.rows.values() if record else ()) if row.part == "networks"):
        labels, took = row.labels, row.numbers
        same = {"variant": labels["variant"], "batch": labels["batch"]}
        cells = [f"`{labels['variant']}`", labels["batch"], labels["mode"]]
        if row.error:
            cells += [f"error: {row.error[:80]}".replace("|", "\\|"), *["–"] * 9]
        else:
            cells.append(_shown(took["images_per_s"], ".0f"))
            cells += [_shown(took[name], ".3f") for name in ("p50_ms", "cold_p50_ms", "cold_p90_ms", "cold_p99_ms")]
            cells.append(_shown(took["peak_mib"], ".0f"))
            peers = (number(record, "p50_ms", "networks", mode=mode, **same) for mode in ("eager", "compile"))
            cells += [_shown(_ratio(other, took["p50_ms"])) for other in peers]
            gmacs, ceiling = VARIANTS[labels["variant"]].gmacs, number(record, "tflop_per_s", "ceilings")
            cells.append(_shown(_ratio(2 * (gmacs or 0) * took["images_per_s"] / 1000, ceiling), ".0f", 100))
        lines.append(cells)
    lines.sort(key=lambda cells: (cells[0], int(cells[1]), cells[2]))
    head = ["network, fp16", "batch", "mode", "images/s", "p50 ms", "cold L2: p50 ms", "p90 ms", "p99 ms", "peak MiB"]
    return (
        _table([*head, "× eager", "× compile", "% of product ceiling"], lines)
        if lines
        else f"Networks: {NOT_MEASURED}."
    )


def _sentences(record: Record) -> list[str]:
    said = []
    for row in rows(record, "ceilings"):
        found = row.numbers
        said.append(
            f"This card reached {found['tflop_per_s']:.0f} TFLOP/s (float16 product, {found['product_mhz']:.0f} MHz) "
            f"and {found['tb_per_s']:.2f} TB/s (copy); exponentials: 16 a clock a multiprocessor, at each row's clock."
        )
    checked = [row for row in record.rows.values() if row.part == "correctness"]
    if checked:
        said.append(f"{sum(not row.error for row in checked)} of {len(checked)} checks of correctness passed.")
    for part in ("memory", "tune", "engines", "tests", "profile", "ncu"):
        for row in rows(record, part):
            numbers = ", ".join(f"{name} {value:,.4g}" for name, value in row.numbers.items())
            said.append(f"{part} {' '.join(row.labels.values())}: {numbers}")
    said += [f"`{key}`: {row.error}" for key, row in record.rows.items() if row.error]
    if record.not_measured:
        shown = [f"`{key}` ({why})" for key, why in list(record.not_measured.items())[:12]]
        more = len(record.not_measured) - len(shown)
        said.append(f"Not measured: {', '.join(shown)}{f', and {more} more' * bool(more)}.")
    return said


def where(record: Record | None) -> str:
    if record is None:
        return f"No GPU was at hand: {NOT_MEASURED}."
    machine = record.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return (
        f"{machine.gpu}, {machine.memory_gib} GiB, {versions}; commit {record.commit or 'unknown'} "
        f"(source {record.source}), {record.date}."
    )


def markdown(record: Record) -> str:
    """All of a record, the targets first."""
    said = "\n".join(f"- {sentence}" for sentence in _sentences(record))
    return "\n\n".join([targets(record), networks(record), operators(record), said, where(record)])


def write_documents(root: Path, record: Record | None) -> list[str]:
    """Put the tables between the marks in README.md and docs/kernels.md. Returns their names."""
    tables = {"README.md": [targets(record), where(record)], "docs/kernels.md": [operators(record), where(record)]}
    begin, end = "<!-- made by make bench-gpu ARGUMENTS=--report -->", "<!-- end -->"
    for name, parts in tables.items():
        text = (root / name).read_text(encoding="utf-8")
        body = "\n\n".join([begin, *parts, end])
        made, count = re.subn(
            f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, body=body: body, text, flags=re.DOTALL
        )
        assert count == 1, f"{name} has {count} places for the tables"
        with atomic_output(root / name, force=True) as temporary:
            temporary.write_text(made, encoding="utf-8")
    return list(tables)


def plot(record: Record, path: Path) -> str | None:
    """Write a PNG: operators by their share of the floor, networks by their speed. What prevents it is returned."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed; run --report with the JSON where it is"
    shares: dict[str, dict[str, float]] = {}
    for row in rows(record, "operators", operator="deformable_attention"):
        if "share_of_floor" in row.numbers:
            label = f"{row.labels['for']}, batch {row.labels['batch']}"
            shares.setdefault(label, {})[row.labels["implementation"]] = 100 * row.numbers["share_of_floor"]
    speeds: dict[str, dict[str, float]] = {}
    for row in rows(record, "networks"):
        same = {"variant": row.labels["variant"], "batch": row.labels["batch"]}
        eager = number(record, "p50_ms", "networks", mode="eager", **same)
        if eager and row.labels["mode"] != "eager":
            label = f"{same['variant']}, batch {same['batch']}"
            speeds.setdefault(label, {})[row.labels["mode"]] = eager / row.numbers["p50_ms"]
    drawn = [("deformable_attention: % of what this card's ceilings allow", "{:.0f}", shares)]
    drawn = [each for each in [*drawn, ("networks: times as fast as eager", "{:.1f}×", speeds)] if each[2]]
    if not drawn:
        return "no plot: nothing that could be drawn was measured"
    from matplotlib.figure import Figure

    height = 1.8 + 0.8 * max(len(values) for *_, values in drawn)
    figure = Figure(figsize=(8.0 * len(drawn), height), layout="constrained", facecolor="white")
    for index, (title, format_, values) in enumerate(drawn):
        axes = figure.add_subplot(1, len(drawn), index + 1)
        _bars(axes, values, format_)
        axes.set_title(title, loc="left", fontsize=11)
    versions = record.machine.versions
    small = f"{record.machine.gpu}, torch {versions.get('torch')}, Triton {versions.get('triton')}, {record.date[:10]}"
    figure.supxlabel(small, x=0.01, ha="left", fontsize=8, color="#6b7680")
    with atomic_output(path, force=True) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return None


def _bars(axes: Any, values: dict[str, dict[str, float]], format_: str) -> None:
    kinds = [kind for kind in COLOURS if any(kind in found for found in values.values())]
    thickness = 0.8 / len(kinds)
    for offset, kind in enumerate(kinds):
        here = [(i - 0.4 + (offset + 0.5) * thickness, v[kind]) for i, v in enumerate(values.values()) if kind in v]
        positions, lengths = zip(*here, strict=True)
        drawn = axes.barh(positions, lengths, thickness * 0.9, color=COLOURS[kind], label=kind)
        axes.bar_label(drawn, [format_.format(length) for length in lengths], padding=3, fontsize=7)
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.04))
