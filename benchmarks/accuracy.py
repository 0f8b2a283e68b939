"""Top-1 of `demo` on Fashion-MNIST's 10,000 test pictures, in every lowering, precision and runtime that is here.

    make fashion-mnist                       # the pictures, out of a Debian package
    .venv/bin/python benchmarks/accuracy.py  # 5 minutes on 2 cores; benchmarks/results/accuracy/demo.json and .md

Each row holds an engine against eager PyTorch in fp32 by what `dat-deploy validate --data` uses.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dat_deploy.environment import commit, hardware, versions
from dat_deploy.errors import DatDeployError, UnsupportedError
from dat_deploy.export import export, relower
from dat_deploy.export.quantize import quantize
from dat_deploy.images.data_set import DataSet, open_data_set
from dat_deploy.networks.dat.variants import VARIANTS
from dat_deploy.runners import Runner, open_runner
from dat_deploy.validate.accuracy import Accuracy, compare_on_data

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data" / "fashion-mnist"
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
LOWERINGS = ("gather", "gridsample", "hat")


@dataclass(frozen=True)
class Row:
    """`drop`: points of top-1 lost against eager PyTorch in fp32; `low`, `high`: 95 % interval of top-1."""

    engine: str
    precision: str
    top1: float
    low: float
    high: float
    drop: float
    top5: float
    flips: int
    mcnemar_p: float
    largest_error: float
    mean_error: float


class Remembered(Runner):
    """The reference, which answers each batch once."""

    def __init__(self, inner: Runner) -> None:
        self.inner, self.description = inner, inner.description
        self.answers: dict[bytes, dict[str, NDArray[np.float32]]] = {}

    def _run(self, images_nchw: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        key = images_nchw.tobytes()
        if key not in self.answers:
            self.answers[key] = self.inner.outputs(images_nchw)
        return self.answers[key]

    def close(self) -> None:
        self.inner.close()


def engines(folder: Path, calibration: Path) -> list[tuple[str, str, str]]:
    """(name, precision, engine) of each; the files are exported into `folder`."""
    files = {"function": folder / "demo.onnx"}
    export("demo", files["function"])
    for lowering in LOWERINGS:
        files[lowering] = relower(files["function"], folder / f"demo.{lowering}.onnx", lowering).path
    found = []

    def add(name: str, precision: str, engine: str) -> None:
        found.append((name, precision, engine))

    for lowering, path in files.items():
        add(f"ONNX Runtime, `{lowering}`", "fp32", str(path))
    add("OpenVINO, `function`", "fp32", f"openvino:{files['function']}")
    for precision in ("fp16", "bf16"):
        path = folder / f"demo.{precision}.onnx"
        export("demo", path, precision=precision)
        if precision == "fp16":
            add("ONNX Runtime, `function`", precision, str(path))
        add("OpenVINO, `function`", precision, f"openvino:{path}")
    add("OpenVINO, rounding all by itself", "bf16", f"openvino-bf16:{files['function']}")
    int8 = folder / "demo.int8.onnx"
    quantize(files["function"], int8, calibration)
    add("ONNX Runtime, `function`", "int8", str(int8))
    return found


def measure(data: DataSet, calibration: Path, progress: Callable[[str], None] = lambda _: None) -> list[Row]:
    """A row for each engine that runs here, eager PyTorch first."""
    reference = Remembered(open_runner("pytorch:demo"))
    about = reference.description
    rows = [_row("PyTorch eager", "fp32", compare_on_data(reference, reference, about, data))]
    with tempfile.TemporaryDirectory() as folder:
        progress("exporting")
        for name, precision, engine in engines(Path(folder), calibration):
            progress(f"{name}, {precision}")
            try:
                with open_runner(engine) as runner:
                    found = compare_on_data(runner, reference, about, data)
            except UnsupportedError as error:
                progress(f"left out: {name}: {error}")
                continue
            rows.append(_row(name, precision, found))
    return rows


def _row(engine: str, precision: str, found: Accuracy) -> Row:
    assert found.engine is not None
    assert found.reference is not None
    assert found.mcnemar_p is not None
    top1 = found.engine.top1
    return Row(
        engine=engine,
        precision=precision,
        top1=top1.percent,
        low=top1.low,
        high=top1.high,
        drop=found.reference.top1.percent - top1.percent,
        top5=found.engine.top5.percent,
        flips=len(found.flips),
        mcnemar_p=found.mcnemar_p,
        largest_error=found.largest_error,
        mean_error=found.mean_error,
    )


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [
        "| engine | precision | top-1 (95 % interval) | points lost | flips | McNemar's p | largest error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        top1 = f"{row.top1:.2f} % ({row.low:.2f} to {row.high:.2f})"
        lines.append(
            f"| {row.engine} | {row.precision} | {top1} | {row.drop:+.2f} | {row.flips} | {row.mcnemar_p:.2g} | "
            f"{row.largest_error:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with test/ and calibration/")
    parser.add_argument("--limit", type=int, help="use so many test pictures")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    try:
        data = open_data_set(arguments.data / "test", VARIANTS["demo"].class_names, arguments.limit)
        rows = measure(data, arguments.data / "calibration", progress=lambda text: print(text, file=sys.stderr))
    except DatDeployError as error:
        sys.exit(f"error: {error}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {
        "images": len(data.images),
        "commit": commit(),
        "hardware": asdict(hardware()),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    (arguments.output / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    (arguments.output / "demo.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
