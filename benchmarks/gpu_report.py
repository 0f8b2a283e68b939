"""A record of the GPU benchmark as Markdown and as a picture. Needs no torch, and matplotlib for the picture alone."""

import importlib.util
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_record import Record, Row

from dat_deploy.files import atomic_output
from dat_deploy.networks.dat.variants import VARIANTS

__all__ = ["markdown", "plot", "targets", "write_documents"]

NOT_MEASURED = "not measured"
GPU_OF_TARGETS = "H200"
SPEEDS = {"eager": 10.0, "compile": 3.0, "flex": 1.5}  # as which it is to be, at least
IMAGES_PER_S = {"tiny": 19_000, "small": 11_500, "base": 9_000}
COLOURS = {"eager": "#9aa5ae", "compile": "#d9822b", "flex": "#7a5ea8", "flex+bias": "#b39ddb", "sdpa": "#b5485d"}
COLOURS |= {"fused": "#2f6f9f", "fused+compile": "#3c8d5a"}
PEERS = {"eager": "eager", "compile": "torch.compile", "flex": "FlexAttention with the bias in its `score_mod`"}
PEERS |= {"flex+bias": "FlexAttention with a bias", "sdpa": "SDPA with a mask"}
EXPONENTIALS_A_CLOCK = 16  # of one multiprocessor, from compute capability 8.0 to 9.0
LEGEND = """A peer's column has its time in multiples of the fused kernel's: 10.00 takes ten times as long. The floor is
what this card's own ceilings allow: memory, products or exponentials, whichever binds; where memory does, the L2 cache
is cold. Of `flex+bias` and `sdpa` the bias was computed before."""
LAUNCH_US = 3.0  # a floor below that is not the kernel's


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


def share_of_floor(record: Record, row: Row) -> tuple[float | None, str]:
    """The floor of an operator's row beside its time, from this card's own ceilings; and what binds it: bytes, products
    or exponentials, 16 a clock a multiprocessor at the clock of the row. Where bytes do, the cache is to be cold."""
    ceilings, took = next(iter(rows(record, "ceilings")), None), row.numbers
    if ceilings is None:
        return None, "–"
    mhz = took["sm_mhz"] or ceilings.numbers["product_mhz"]
    floors_us = {
        "products": took["flops"] / ceilings.numbers["tflop_per_s"] / 1e6,
        "memory": took["bytes"] / ceilings.numbers["tb_per_s"] / 1e6,
        "exponentials": took["exponentials"]
        / (EXPONENTIALS_A_CLOCK * record.machine.multiprocessors * (mhz or math.inf)),
    }
    bound = max(floors_us, key=lambda name: floors_us[name])
    if floors_us[bound] < LAUNCH_US:
        return None, "launches"
    return floors_us[bound] / took["cold_us" if bound == "memory" else "median_us"], bound


def targets(record: Record | None) -> str:
    """Every target of the project beside what was found, as a table."""
    failed = [row for row in (record.rows.values() if record else ()) if row.error]

    def speed(peer: str) -> float | None:
        took = [number(record, "median_us", "operators", bar="yes", implementation=name) for name in (peer, "fused")]
        return _ratio(*took)

    def best(name: str, batch: str, variant: str) -> float | None:
        modes = ("fused", "fused+compile")
        found = [number(record, name, "networks", mode=mode, batch=batch, variant=variant) for mode in modes]
        return min((each for each in found if each is not None), default=None)

    lines = []

    def add(line: str, target: float, unit: str, found: float | None, *, most: bool = False, **labels: str) -> None:
        has_failed = any(labels.items() <= row.labels.items() for row in failed)
        verdict = "failed" if has_failed else NOT_MEASURED
        if found is not None:
            met = found <= target if most else found >= target
            verdict = f"{found:,.{0 if found >= 100 else 1 if found >= 2 else 3}f}{unit}, {'met' if met else 'missed'}"
        lines.append([line, f"{'≤' if most else '≥'} {target:,g}{unit}", verdict])

    of_bar = "`deformable_attention`, fp16, `base-384` stage 3, batch 64"
    for peer, target in SPEEDS.items():
        add(f"{of_bar}: times as fast as {PEERS[peer]}", target, "×", speed(peer), bar="yes", implementation="fused")
    bars = rows(record, "operators", bar="yes", implementation="fused")
    share = share_of_floor(record, bars[0])[0] if record and bars else None
    add("the same: share of its floor, exponentials included", 50.0, " %", share and 100 * share, bar="yes")
    peaks = [number(record, "peak_mib", "memory", mode=mode) for mode in ("eager", "fused")]
    add("`pp-tiny` at 800×1344, batch 1: peak memory of eager / fused", 5.0, "×", _ratio(*peaks), what="memory")
    for name in ("tiny", "base-384", "pp-tiny"):
        compiled = number(record, "p50_ms", "networks", mode="compile", variant=name, batch="128")
        what = f"`{name}`, fp16, batch 128: times as fast as torch.compile max-autotune"
        add(what, 1.5, "×", _ratio(compiled, best("p50_ms", "128", name)), variant=name, batch="128")
    for name, target in IMAGES_PER_S.items():
        found = _ratio(128e3, best("p50_ms", "128", name))
        add(f"`{name}`, fp16, batch 128", target, " images/s", found, variant=name, batch="128", mode="fused")
    add("`tiny`, fp16, batch 1: p50", 0.5, " ms", best("p50_ms", "1", "tiny"), most=True, variant="tiny", batch="1")
    if record and GPU_OF_TARGETS not in record.machine.gpu:
        lines.append([f"the targets are for an {GPU_OF_TARGETS}; this is {record.machine.gpu}", "", ""])
    return _table(["what", "target", "measured"], lines)


def operators(record: Record | None) -> str:
    """A line a shape: our time, the peers' in multiples of it, and the share of what the card's own ceilings allow."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in record.rows.values() if record else ():
        if row.part == "operators" and "implementation" in row.labels:
            shape = tuple(row.labels[name] for name in ("operator", "for", "shape", "batch"))
            found.setdefault(shape, {})[row.labels["implementation"]] = row
    lines = []
    for (operator, user, shape, batch), by_peer in sorted(found.items()):

        def time_of(peer: str, by_peer: dict[str, Row] = by_peer) -> float | str | None:
            row = by_peer.get(peer)
            if row is not None and row.error:
                return "wrong" if row.error.startswith("wrong") else "failed"
            return row.numbers["median_us"] if row else None

        ours = time_of("fused")
        fused = by_peer["fused"].numbers if isinstance(ours, float) else {}
        share, bound = share_of_floor(record, by_peer["fused"]) if record and fused else (None, "–")
        bar = " (the targets')" if by_peer.get("fused", next(iter(by_peer.values()))).labels.get("bar") else ""
        cells = [operator, f"{user}{bar}: {shape}", batch, ours if isinstance(ours, str) else _shown(ours, ".1f")]
        cells.append(_shown(fused.get("cold_us"), ".1f"))
        for peer in PEERS:
            took = time_of(peer)
            cells.append(took if isinstance(took, str) else _shown(_ratio(took, fused.get("median_us"))))
        tuned = "–" if "tuned" not in fused else "yes" if fused["tuned"] else "no"
        lines.append([*cells, _shown(share, ".0f", 100), bound, _shown(fused.get("sm_mhz"), ".0f"), tuned])
    head = ["operator, fp16", "shape", "batch", "fused µs", "cold L2 µs", *(f"{peer} / fused" for peer in PEERS)]
    if not lines:
        return f"Operators: {NOT_MEASURED}."
    return f"{_table([*head, '% of floor', 'bound by', 'MHz', 'tuned'], lines)}\n\n{LEGEND}"


def networks(record: Record | None) -> str:
    lines = []
    for row in (row for row in (record.rows.values() if record else ()) if row.part == "networks"):
        labels, took = row.labels, row.numbers
        same = {"variant": labels["variant"], "batch": labels["batch"]}
        cells = [f"`{labels['variant']}`", labels["batch"], labels["mode"]]
        if row.error:
            cells += [f"failed: {row.error[:100]}".replace("|", "\\|"), *["–"] * 9]
        else:
            cells.append(_shown(took["images_per_s"], ".0f"))
            cells += [_shown(took.get(f"{name}_ms"), ".3f") for name in ("p50", "cold_p50", "cold_p90", "cold_p99")]
            peers = [number(record, "p50_ms", "networks", mode=mode, **same) for mode in ("eager", "compile")]
            cells += [_shown(took["peak_mib"], ".0f"), *(_shown(_ratio(peer, took["p50_ms"])) for peer in peers)]
            gmacs, ceiling = VARIANTS[labels["variant"]].gmacs, number(record, "tflop_per_s", "ceilings")
            cells.append(_shown(_ratio(2 * (gmacs or 0) * took["images_per_s"] / 1000, ceiling), ".0f", 100))
            cells.append(_shown(took.get("tuned"), ".0f", 100))
        lines.append(cells)
    lines.sort(key=lambda cells: (cells[0], int(cells[1]), cells[2]))
    head = ["network, fp16", "batch", "mode", "images/s", "p50 ms", "cold L2: p50 ms", "p90 ms", "p99 ms", "peak MiB"]
    head += ["eager / this", "compile / this", "% of product ceiling", "% of launches tuned"]
    return _table(head, lines) if lines else f"Networks: {NOT_MEASURED}."


def _sentences(record: Record) -> list[str]:
    said = []
    for row in rows(record, "ceilings"):
        found, moved = row.numbers, "copy" if any("copy of" in note for note in row.notes) else "addition"
        said.append(
            f"This card reached {found['tflop_per_s']:.0f} TFLOP/s (float16 product, {found['product_mhz']:.0f} MHz) "
            f"and {found['tb_per_s']:.2f} TB/s ({moved}); exponentials: 16 a clock a multiprocessor, "
            "at each row's clock."
        )
    for part in ("memory", "operators", "engines", "tests", "profile", "ncu"):
        for row in (row for row in rows(record, part) if "implementation" not in row.labels):
            numbers = ", ".join(f"{name} {value:,.4g}" for name, value in row.numbers.items())
            said.append(f"{row.kind} {' '.join(row.labels.values())}: {numbers}")
    said += [f"`{key}`: {row.error}" for key, row in record.rows.items() if row.error]
    notes: dict[str, list[str]] = {}
    for key, row in record.rows.items():
        for note in (note for note in row.notes if "could not be captured" in note or "compiled here" in note):
            notes.setdefault(note, []).append(key)
    said += [
        f"{note}: `{'`, `'.join(keys[:5])}`{f' and {len(keys) - 5} more' * (len(keys) > 5)}"
        for note, keys in notes.items()
    ]
    if record.not_measured:
        shown = [f"`{key}` ({why})" for key, why in list(record.not_measured.items())[:12]]
        more = len(record.not_measured) - len(shown)
        said.append(f"Not measured: {', '.join(shown)}{f', and {more} more' * bool(more)}.")
    return said


def where(record: Record | None) -> str:
    if record is None:
        return (
            f"Nothing was run on a GPU yet: {NOT_MEASURED}. The kernels were compiled for seven architectures, and run "
            f"in Triton's interpreter."
        )
    machine = record.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    checked = [row for row in record.rows.values() if row.part == "correctness"]
    return (
        f"{sum(not row.error for row in checked)} of {len(checked)} checks of correctness passed. "
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
        of = shares.setdefault(f"{row.labels['for']}, batch {row.labels['batch']}", {})
        of[row.labels["implementation"]] = 100 * (share_of_floor(record, row)[0] or 0.0)
    speeds: dict[str, dict[str, float]] = {}
    for row in sorted(rows(record, "networks"), key=lambda row: (row.labels["variant"], int(row.labels["batch"]))):
        of = speeds.setdefault(f"{row.labels['variant']}, batch {row.labels['batch']}", {})
        of[row.labels["mode"]] = row.numbers["images_per_s"]
    title = "deformable_attention, fp16: % of what this card's ceilings allow"
    drawn = [(title, shares), ("networks, fp16: images/s, logarithmic", speeds)]
    drawn = [(title, values) for title, values in drawn if values]
    if not drawn:
        return "no plot: nothing that could be drawn was measured"
    from matplotlib.figure import Figure

    height = 1.8 + 0.8 * max(len(values) for _, values in drawn)
    figure = Figure(figsize=(8.0 * len(drawn), height), layout="constrained", facecolor="white")
    for index, (title, values) in enumerate(drawn):
        axes = figure.add_subplot(1, len(drawn), index + 1)
        _bars(axes, values)
        axes.set_title(title, loc="left", fontsize=11)
        if values is speeds:
            axes.set_xscale("log")
        else:
            axes.axvline(50, color="#3c8d5a", linewidth=1, linestyle=":")  # the target
    versions = record.machine.versions
    small = f"{record.machine.gpu}, torch {versions.get('torch')}, Triton {versions.get('triton')}, {record.date[:10]}"
    figure.supxlabel(small, x=0.01, ha="left", fontsize=8, color="#6b7680")
    with atomic_output(path, force=True) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return None


def _bars(axes: Any, values: dict[str, dict[str, float]]) -> None:
    kinds = [kind for kind in COLOURS if any(kind in found for found in values.values())]
    thickness = 0.8 / len(kinds)
    for offset, kind in enumerate(kinds):
        here = [(i - 0.4 + (offset + 0.5) * thickness, v[kind]) for i, v in enumerate(values.values()) if kind in v]
        positions, lengths = zip(*here, strict=True)
        drawn = axes.barh(positions, lengths, thickness * 0.9, color=COLOURS[kind], label=kind)
        axes.bar_label(drawn, [f"{length:,.0f}" for length in lengths], padding=3, fontsize=7)
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.04))
