"""The CPU table of the README: every lowering and runtime beside eager PyTorch, in one run.

    python benchmarks/cpu.py [--variant tiny,pp-tiny] [--batch 1] [--rounds 7]

Writes benchmarks/results/cpu/DATE-VARIANTS.json and .png, and prints the table in Markdown. Quiet machines only:
nothing is written if other processes kept more than a tenth of the cores busy.
"""

import argparse
import datetime
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from dat_deploy.benchmark import Record, benchmark, plot
from dat_deploy.export import LOWERINGS, export, relower
from dat_deploy.networks.dat.variants import VARIANTS
from dat_deploy.runners import RUNTIMES

RESULTS = Path(__file__).parent / "results" / "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny,pp-tiny", help="one or several; the first is the baseline")
    parser.add_argument("--batch", default="1", help="one or several, such as 1,8")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    variants = arguments.variant.split(",")
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, console.status("exporting") as status:
        engines = [f"pytorch:{variant}" for variant in variants]
        for variant in variants:
            files = {lowering: Path(folder, _file(variant, lowering)) for lowering in LOWERINGS if lowering != "plugin"}
            export(variant, files["function"])
            for lowering, path in files.items():
                if lowering != "function":
                    relower(files["function"], path, lowering)
            if VARIANTS[variant].takes_any_size:
                files["dynamic"] = Path(folder, _file(variant, "dynamic"))
                export(variant, files["dynamic"], dynamic_image_size=True)
            engines += [f"onnxruntime:{path}" for path in files.values()]
            engines += [f"{name}:{files['function']}" for name in ("openvino", "openvino-bf16") if _runs(name)]
        record = benchmark(
            engines,
            batches=[int(size) for size in arguments.batch.split(",")],
            rounds=arguments.rounds,
            progress=lambda done, total, doing: status.update(f"{doing} ({done}/{total})"),
        )
    busy = max(row.others_busy_cores or 0.0 for row in record.rows)
    if busy > 0.1 * record.hardware.cores:
        print(_markdown(record, variants))
        sys.exit(f"not written: other processes kept up to {busy:.2f} cores busy; repeat it on a quiet machine")
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = RESULTS / f"{datetime.date.today()}-{'-'.join(variants)}"
    record.write(stem.with_suffix(".json"), force=True)
    plot(record, stem.with_suffix(".png"), force=True)
    print(_markdown(record, variants))


def _file(variant: str, form: str) -> str:
    return f"{variant}.{form}.onnx"


def _runs(runtime: str) -> bool:
    return not RUNTIMES[runtime].reasons()


def _markdown(record: Record, variants: list[str]) -> str:
    lines = [
        "| engine | batch | p50 ms | p90 ms | p99 ms | images/s | latency / the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record.rows:
        ratio = row.latency_ratio
        cells = (
            row.engine,
            row.batch,
            f"{row.p50_ms:.1f}",
            f"{row.p90_ms:.1f}",
            f"{row.p99_ms:.1f}",
            f"{row.images_per_s:.1f}",
            f"{ratio.median:.2f} ({ratio.lowest:.2f} to {ratio.highest:.2f})",
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    busy = max(row.others_busy_cores or 0.0 for row in record.rows)
    hardware, versions = record.hardware, record.versions
    by_name = {(row.engine, row.batch): np.array(row.round_p50_ms) for row in record.rows}
    first, *others = variants
    pairs = [(f"onnxruntime:{_file(v, 'function')}", f"onnxruntime:{_file(v, 'gridsample')}") for v in variants]
    for other in others:
        pairs.append((f"pytorch:{other}", f"pytorch:{first}"))
        pairs.append((f"onnxruntime:{_file(other, 'function')}", f"onnxruntime:{_file(first, 'function')}"))
    for batch in record.settings.batches:
        for one, another in pairs:
            ratios = by_name[one, batch] / by_name[another, batch]
            lines.append(
                f"\n{one} / {another}, batch {batch}, round by round: "
                f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            )
    lines += [
        "",
        f"{hardware.cpu}, {hardware.cores} cores, {' '.join(hardware.cpu_flags)}; others kept at most {busy:.2f} cores "
        f"busy. {', '.join(f'{name} {version}' for name, version in versions.items() if name != 'os')}; "
        f"commit {record.commit}, {record.date}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
