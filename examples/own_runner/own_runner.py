"""A runtime of one's own: exported files in ONNX's reference evaluator, which is NumPy alone, and slow."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from dat_deploy.runners import EngineDescription, Outputs, Runner, Runtime

Array = NDArray[np.float32]


class NumpyRunner(Runner):
    """What validate, bench, classify and bisect need: a description, `_run`, `close`; and `open_graph` if it can."""

    def __init__(
        self, path: Path, name: str, *, image_size: tuple[int, int] | None = None, threads: int | None = None
    ) -> None:
        self._model = ReferenceEvaluator(onnx.load(path))
        self.description = EngineDescription.of_file(
            path,
            name=name,
            runtime="numpy",
            runtime_version=np.__version__,
            image_size=image_size,
            threads=threads or 1,
        )

    def _run(self, images_nchw: Array) -> Outputs:
        results = self._model.run(None, {"image": images_nchw})
        return dict(zip(self.description.outputs, results, strict=True))

    def open_graph(self, onnx_model: bytes):  # optional: then `validate` and `bisect` look inside the network, too
        part = ReferenceEvaluator(onnx.load_from_string(onnx_model))

        def run(feeds: Mapping[str, Array]) -> Array:
            return part.run(None, dict(feeds))[0]

        return run

    def close(self) -> None:
        del self._model


# What the entry point of pyproject.toml names: then `--engine numpy:FILE.onnx` works in every command.
RUNTIME = Runtime("numpy", "FILE.onnx", "numpy", "", "ONNX's reference evaluator", NumpyRunner)

if __name__ == "__main__":
    import sys

    from dat_deploy.api import validate

    file = Path(sys.argv[1])
    with NumpyRunner(file, "mine") as runner:
        report = validate(runner, batches=[1, 2])
    print(report.verdict)
