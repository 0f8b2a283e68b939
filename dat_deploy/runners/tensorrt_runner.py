"""TensorRT and TensorRT-RTX on an NVIDIA GPU: an engine that `dat-deploy build` made, by its passport."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dat_deploy.engine.passport import check_backend, open_engine
from dat_deploy.engine.tensorrt.library import import_tensorrt
from dat_deploy.engine.tensorrt.session import Session, check_fits
from dat_deploy.plugins.tensorrt import registry
from dat_deploy.runners.base import Images, Runner, describe

__all__ = ["TensorrtRunner"]


class TensorrtRunner(Runner):
    """A built engine; each batch has its CUDA graph. Several threads may call it, and take turns.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`, which must be the passport's; None for that one.

    Raises:
        PassportError: if the engine is not what its passport says; nothing was deserialised then.
        UnsupportedError: if this machine or its TensorRT is another than the engine was built for.
    """

    def __init__(
        self, path: Path, name: str, *, backend: str | None = None, image_size: tuple[int, int] | None = None
    ) -> None:
        passport, content = open_engine(path)
        check_backend(path, passport, backend)
        trt = import_tensorrt(passport.backend)
        check_fits(passport, trt, name)
        if passport.plugin_form == "IPluginV3":
            registry.register_plugins(trt)
        self.description = describe(
            passport.metadata,
            name,
            image_size,
            outputs=passport.outputs,
            runtime=passport.backend,
            runtime_version=passport.backend_version,
            device="cuda",
            precision=passport.metadata.precision,
            threads=1,
            profiles=passport.profiles,
        )
        self._session = Session(
            trt,
            content,
            name=name,
            profiles=passport.profiles,
            outputs=passport.outputs,
            image_size=passport.metadata.image_size,
        )

    def _run(self, images_nchw: Images) -> dict[str, NDArray[np.float32]]:
        return self._session.run(images_nchw)

    def outputs_on_device(self, images_nchw: Tensor) -> dict[str, Tensor]:
        """As `outputs`, for a CUDA tensor; nothing passes through host memory."""
        return self._session.run_on_device(images_nchw)

    def close(self) -> None:
        self._session.close()
