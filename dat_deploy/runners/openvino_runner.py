"""OpenVINO on the CPU, in float32 or bfloat16."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray

from dat_deploy.environment import available_cores
from dat_deploy.errors import EngineBuildError, EngineRunError, UnsupportedError
from dat_deploy.metadata import FileMetadata, load_onnx
from dat_deploy.runners.base import Graph, Images, Outputs, Runner, describe, no_plugin_here
from dat_deploy.runners.runtime import Runtime

if TYPE_CHECKING:
    import openvino as ov

# OpenVINO is imported where a file is opened, so that the table of runtimes is light.

__all__ = ["RUNTIMES", "OpenvinoRunner"]


class OpenvinoRunner(Runner):
    """An exported file on OpenVINO.

    Args:
        image_size: (height, width) in pixels to compile for at once; others are compiled when they come.
        precision: `fp32` or `bf16`; bf16 is refused where the CPU has no bfloat16 instructions, since OpenVINO would
            run float32 there and say nothing.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        image_size: tuple[int, int] | None = None,
        threads: int | None = None,
        precision: str = "fp32",
    ) -> None:
        import openvino as ov

        self._core = ov.Core()
        self._threads = threads or available_cores()
        if precision == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UnsupportedError(
                f"this CPU ({self._core.get_property('CPU', 'FULL_DEVICE_NAME')}) has no bfloat16 instructions; "
                f"OpenVINO would run float32 instead. Use openvino:{path}"
            )
        self._settings = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            "INFERENCE_NUM_THREADS": self._threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._model = load_onnx(path)
        metadata = FileMetadata.from_properties({p.key: p.value for p in self._model.metadata_props}, path)
        if metadata.lowering == "plugin":
            raise no_plugin_here(name)
        self.description = describe(
            metadata,
            name,
            image_size,
            outputs=[output.name for output in self._model.graph.output],
            runtime="openvino",
            runtime_version=ov.__version__,
            device="cpu",
            precision="int8" if metadata.precision == "int8" and precision == "fp32" else precision,
            threads=self._threads,
            rounds_locations=precision == "bf16",
            path=path,
        )
        self._requests: dict[tuple[int, ...], ov.InferRequest] = {}
        self._request((self.description.batch or 1, 3, *self.description.image_size))

    def _request(self, shape: tuple[int, ...]) -> "ov.InferRequest":
        """One compiled network a shape: with a static one OpenVINO is faster by a fifth than with a dynamic one."""
        if shape not in self._requests:
            self._requests[shape] = self._open(self._model, {"image": shape})
        return self._requests[shape]

    def _open(self, model_proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> "ov.InferRequest":
        try:
            # OpenVINO's reader knows no model-local functions (2026.4), so they are inlined on the way in
            inlined = onnx.inliner.inline_local_functions(model_proto)
            model = self._core.read_model(inlined.SerializeToString())
            model.reshape(dict(shapes))
            return self._core.compile_model(model, "CPU", self._settings).create_infer_request()
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise EngineBuildError(f"OpenVINO cannot open {self.description.name}: {text}") from error

    def _run(self, images_nchw: Images) -> Outputs:
        results = self._infer(self._request(images_nchw.shape), {"image": images_nchw})
        return dict(zip(self.description.outputs, results, strict=True))

    def open_graph(self, onnx_model: bytes) -> Graph:
        model = onnx.load_from_string(onnx_model)

        def run(feeds: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
            return self._infer(self._open(model, {name: value.shape for name, value in feeds.items()}), dict(feeds))[0]

        return run

    def _infer(self, request: "ov.InferRequest", feeds: dict[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        try:
            results = request.infer(feeds, share_inputs=True)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise EngineRunError(f"OpenVINO failed while running {self.description.name}: {text}") from error
        return [np.array(results[output], dtype=np.float32) for output in request.model_outputs]

    def close(self) -> None:
        self._requests.clear()
        del self._model


def _reasons_against_bf16() -> list[str]:
    import openvino as ov

    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return []
    return ["this CPU has no bfloat16 instructions"]


RUNTIMES = (
    Runtime("openvino", "FILE.onnx", "openvino", "openvino", "OpenVINO on the CPU, fp32", OpenvinoRunner),
    Runtime(
        "openvino-bf16",
        "FILE.onnx",
        "openvino",
        "openvino",
        "OpenVINO on the CPU, bf16",
        functools.partial(OpenvinoRunner, precision="bf16"),
        _reasons_against_bf16,
    ),
)
