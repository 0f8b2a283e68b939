"""ONNX Runtime, on the CPU or on CUDA."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dat_deploy.environment import available_cores
from dat_deploy.errors import EngineBuildError, EngineRunError, UnsupportedError
from dat_deploy.metadata import FileMetadata, read_metadata
from dat_deploy.precision import FULL, PRECISIONS
from dat_deploy.runners.base import Graph, Images, Outputs, Runner, describe, no_plugin_here
from dat_deploy.runners.runtime import Runtime

if TYPE_CHECKING:
    import onnxruntime as ort

# ONNX Runtime is imported where a file is opened, so that the table of runtimes is light.

__all__ = ["RUNTIMES", "OnnxruntimeRunner"]


class OnnxruntimeRunner(Runner):
    """An exported file on ONNX Runtime; its CPU computes float16 in float32, and has no kernels for bfloat16."""

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        image_size: tuple[int, int] | None = None,
        threads: int | None = None,
        cuda: bool = False,
    ) -> None:
        import onnxruntime as ort

        self._providers = ["CPUExecutionProvider"]
        if cuda:
            if "CUDAExecutionProvider" not in ort.get_available_providers():
                raise UnsupportedError(
                    f"ONNX Runtime {ort.__version__} here has no CUDA; its providers are "
                    f"{', '.join(ort.get_available_providers())}. On a machine with an NVIDIA GPU: "
                    f"pip uninstall onnxruntime; pip install 'dat-deploy[onnxruntime-gpu]'"
                )
            self._providers.insert(0, "CUDAExecutionProvider")
        self._threads = threads or available_cores()
        self._session = self._open(path, name)
        if cuda and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise UnsupportedError(
                "ONNX Runtime fell back to the CPU although CUDA was asked for; its CUDA and cuDNN libraries are "
                "missing or too old. Compare their versions with ONNX Runtime's requirements."
            )
        metadata = FileMetadata.from_properties(self._session.get_modelmeta().custom_metadata_map, path)
        self.description = describe(
            metadata,
            name,
            image_size,
            outputs=[output.name for output in self._session.get_outputs()],
            runtime="onnxruntime-cuda" if cuda else "onnxruntime",
            runtime_version=ort.__version__,
            device="cuda" if cuda else "cpu",
            # its CPU kernels are float32's, between casts, whatever half precision the file has
            precision=FULL.name if PRECISIONS[metadata.precision].is_half and not cuda else metadata.precision,
            threads=self._threads,
            path=path,
        )

    def _open(self, model: Path | bytes, name: str) -> "ort.InferenceSession":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        # the mask of a shifted window leaves probabilities of about 1e-44, which slow matrix products severalfold
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        try:
            source = str(model) if isinstance(model, Path) else model
            return ort.InferenceSession(source, options, providers=self._providers)
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            metadata = read_metadata(model) if isinstance(model, Path) else None
            if metadata is not None and metadata.lowering == "plugin":
                raise no_plugin_here(name) from error
            text = " ".join(str(error).split())
            if metadata is not None and metadata.precision == "bf16" and "NOT_IMPLEMENTED" in text:
                raise UnsupportedError(
                    f"ONNX Runtime {ort.__version__} has no kernels here for the bfloat16 of {name}. Run it on "
                    'OpenVINO (openvino:FILE), build it for TensorRT, or export it with `precision="fp16"`.'
                ) from error
            raise EngineBuildError(f"ONNX Runtime cannot open {name}: {text}") from error

    def _run(self, images_nchw: Images) -> Outputs:
        results = self._call(self._session, {"image": images_nchw})
        return dict(zip(self.description.outputs, results, strict=True))

    def open_graph(self, onnx_model: bytes) -> Graph:
        session = self._open(onnx_model, f"a part of {self.description.name}")
        return lambda feeds: self._call(session, feeds)[0]

    def _call(
        self, session: "ort.InferenceSession", feeds: Mapping[str, NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        try:
            return session.run(None, dict(feeds))  # type: ignore[no-any-return]  # untyped call
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            text = " ".join(str(error).split())
            raise EngineRunError(f"ONNX Runtime failed while running {self.description.name}: {text}") from error

    def close(self) -> None:
        del self._session


def _reasons_against_cuda() -> list[str]:
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        return []
    return ["the installed onnxruntime has no CUDA: pip install 'dat-deploy[onnxruntime-gpu]'"]


RUNTIMES = (
    Runtime(
        "onnxruntime",
        "FILE.onnx",
        "onnxruntime",
        "onnxruntime",
        "ONNX Runtime on the CPU, fp32",
        OnnxruntimeRunner,
        opens=".onnx",
    ),
    Runtime(
        "onnxruntime-cuda",
        "FILE.onnx",
        "onnxruntime",
        "onnxruntime-gpu",
        "ONNX Runtime on CUDA, fp32",
        functools.partial(OnnxruntimeRunner, cuda=True),
        _reasons_against_cuda,
        device="cuda",
    ),
)
