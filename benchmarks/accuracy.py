"""Top-1 of `demo` on Fashion-MNIST's 10,000 test pictures, in every lowering, precision and runtime that is here.

    make fashion-mnist                       # the pictures, out of a Debian package
    .venv/bin/python benchmarks/accuracy.py  # 5 minutes on 2 cores; benchmarks/results/accuracy/demo.json and .md

Each row holds an engine against eager PyTorch in fp32 by what `dat-deploy validate --data` uses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dat_deploy.export import export, relower
from dat_deploy.export.quantize import quantize
from dat_deploy.model import half_network
from dat_deploy.runners import Runner, open_runner
from dat_deploy.runners.pytorch_runner import PytorchRunner

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


class HalfPytorch(Runner):
    """Eager PyTorch in half precision, as the kernels' networks are."""

    def __init__(self, reference: PytorchRunner, dtype: torch.dtype) -> None:
        self.description = reference.description
        self.model = half_network(reference.model, dtype)

    @torch.inference_mode()
    def _run(self, images_nchw: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        logits = self.model(torch.from_numpy(images_nchw))
        assert isinstance(logits, torch.Tensor)
        return {"logits": logits.numpy()}

    def close(self) -> None:
        del self.model


def engines(folder: Path, calibration: Path) -> dict[str, tuple[str, Callable[[], Runner]]]:
    """Name -> precision, and how it is opened; the files are exported into `folder`."""
    files = {"function": folder / "demo.onnx"}
    export("demo", files["function"])
    for lowering in LOWERINGS:
        files[lowering] = relower(files["function"], folder / f"demo.{lowering}.onnx", lowering).path
    found: dict[str, tuple[str, Callable[[], Runner]]] = {}

    def add(name: str, precision: str, engine: str) -> None:
        found[name] = (precision, lambda: open_runner(engine))

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
