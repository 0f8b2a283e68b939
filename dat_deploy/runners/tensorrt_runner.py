"""TensorRT and TensorRT-RTX on an NVIDIA GPU: an engine that `dat-deploy build` made, by its passport."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from dat_deploy.engine.passport import check_backend, open_engine
from dat_deploy.engine.tensorrt.library import MODULES, check_installed, import_tensorrt
from dat_deploy.environment import gpu_architecture
from dat_deploy.runners.base import Images, Outputs, Runner, describe
from dat_deploy.runners.runtime import Runtime

if TYPE_CHECKING:
    from torch import Tensor

# torch and the plugins are imported where an engine is opened, so that the table of runtimes is light.

__all__ = ["RUNTIMES", "TensorrtRunner"]


class TensorrtRunner(Runner):
    """A built engine; each batch has its CUDA graph. Several threads may call it, and take turns.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`, which must be the passport's; None for that one.
        threads: of the CPU, which computes nothing here.

    Raises:
        PassportError: if the engine is not what its passport says; nothing was deserialised then.
        UnsupportedError: if this machine or its TensorRT is another than the engine was built for.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        backend: str | None = None,
        image_size: tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> None:
        passport, content = open_engine(path)
        check_backend(path, passport, backend)
        trt = import_tensorrt(passport.backend)
        from dat_deploy.engine.tensorrt.session import Session, check_fits
        from dat_deploy.plugins.tensorrt import registry

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
            path=path,
            file_kind="engine",
        )
        self._session = Session(
            trt,
            content,
            name=name,
            profiles=passport.profiles,
            outputs=passport.outputs,
            image_size=passport.metadata.image_size,
        )

    def _run(self, images_nchw: Images) -> Outputs:
        return self._session.run(images_nchw)

    def outputs_on_device(self, images_nchw: "Tensor") -> "dict[str, Tensor]":
        """As `outputs`, for a CUDA tensor; nothing passes through host memory."""
        return self._session.run_on_device(images_nchw)

    def close(self) -> None:
        self._session.close()


def _reasons() -> list[str]:
    return [] if gpu_architecture() else ["torch sees no CUDA device here"]


RUNTIMES = tuple(
    Runtime(
        backend,
        "FILE.engine",
        MODULES[backend],
        backend,
        meaning,
        functools.partial(TensorrtRunner, backend=backend),
        _reasons,
        opens=".engine",
        has_passport=True,
        check_installed=functools.partial(check_installed, backend),
        device="cuda",
    )
    for backend, meaning in (
        ("tensorrt", "TensorRT, an engine of `build()`"),
        ("tensorrt-rtx", "TensorRT-RTX, the same"),
    )
)
