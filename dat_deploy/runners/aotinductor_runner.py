"""AOTInductor, on the CPU or on CUDA: a package that `dat-deploy build` made, by its passport."""

import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dat_deploy.engine.passport import check_backend, open_engine
from dat_deploy.errors import EngineBuildError, EngineRunError, ShapeError
from dat_deploy.runners.base import Images, Outputs, Runner, describe
from dat_deploy.runners.runtime import Runtime

if TYPE_CHECKING:
    from torch import Tensor

# torch is imported where a package is opened, so that the table of runtimes is light.

__all__ = ["RUNTIMES", "AotinductorRunner"]


class AotinductorRunner(Runner):
    """A package of compiled models, one for each batch. Several threads may call it, and take turns.

    Args:
        threads: that one call may use on a CPU; None for as many as torch takes.

    Raises:
        PassportError: if the package is not what its passport says; nothing of it was run then.
        UnsupportedError: if this machine or its torch is another than the package was built for.
        EngineBuildError: if torch cannot open it.
    """

    def __init__(
        self, path: Path, name: str, *, image_size: tuple[int, int] | None = None, threads: int | None = None
    ) -> None:
        passport, content = open_engine(path)
        check_backend(path, passport, "aotinductor")
        import torch

        from dat_deploy.engine.aotinductor.package import check_fits

        check_fits(passport, name)
        device = "cpu" if passport.architectures[0] == "cpu" else "cuda"
        self.description = describe(
            passport.metadata,
            name,
            image_size,
            outputs=passport.outputs,
            runtime="aotinductor",
            runtime_version=str(torch.__version__),
            device=device,
            precision=passport.metadata.precision,
            threads=(threads or torch.get_num_threads()) if device == "cpu" else 1,
            profiles=passport.profiles,
            path=path,
            file_kind="engine",
        )
        self._threads = threads
        self._lock = threading.Lock()
        self._pinned: dict[int, Tensor] = {}
        self._models: dict[int, Any] = {}
        with tempfile.TemporaryDirectory() as folder:  # torch unpacks the file and needs it no more
            package = Path(folder, "package.pt2")
            package.write_bytes(content)
            for profile in passport.profiles:
                self._models[profile.best] = self._open(package, profile.best)

    def _open(self, package: Path, batch: int) -> Any:
        import torch

        from dat_deploy.engine.aotinductor.package import model_name

        # Not torch's aoti_load_package: that would open all the models for each one, and look for a C++ compiler.
        try:
            # single-threaded: else each call queries an event, which a CUDA graph cannot capture; there is a lock here
            return torch._C._aoti.AOTIModelPackageLoader(str(package), model_name(batch), True, 1, -1)
        except Exception as error:  # whatever the compiled code raises
            text = " ".join(str(error).split())
            raise EngineBuildError(f"torch cannot open {self.description.name} for batch {batch}: {text}") from error

    def _run(self, images_nchw: Images) -> Outputs:
        import torch

        with self._lock:
            image = torch.from_numpy(images_nchw)
            if self.description.device == "cpu":
                results = self._call(image)
            else:
                results = [result.cpu() for result in self._call(self._on_device(image))]
        return {name: result.numpy() for name, result in zip(self.description.outputs, results, strict=True)}

    def _on_device(self, image: "Tensor") -> "Tensor":
        """By way of page-locked memory, which is kept: the GPU copies from there without the CPU."""
        import torch

        batch = image.shape[0]
        if batch not in self._pinned:
            self._pinned[batch] = torch.empty(image.shape, pin_memory=True)
        return self._pinned[batch].copy_(image).to("cuda", non_blocking=True)

    def outputs_on_device(self, images_nchw: "Tensor") -> "dict[str, Tensor]":
        """As `outputs`, for a tensor on the engine's device; nothing passes through host memory.

        Raises:
            ShapeError: if there is no model for that shape.
        """
        import torch

        about = self.description
        shape = tuple(images_nchw.shape)
        if shape[1:] != (3, *about.image_size) or not about.takes_batch(shape[0]):
            raise ShapeError(
                f"{about.name}: input 'image' has shape {list(shape)}; it takes [{about.batches_taken}, 3, "
                f"{about.image_size[0]}, {about.image_size[1]}]. Build again with `batches` or `image_size` for "
                f"another."
            )
        with self._lock:  # compiled code reads float32, one row after the other, whatever it is given
            image = images_nchw.to(about.device, torch.float32).contiguous()
            return dict(zip(about.outputs, self._call(image), strict=True))

    def _call(self, image: "Tensor") -> "list[Tensor]":
        import torch

        from dat_deploy.runners.torch_threads import torch_threads

        if not self._models:
            raise EngineRunError(f"{self.description.name} is closed; open it again.")
        threads = torch_threads(self._threads if self.description.device == "cpu" else None)
        in_fp32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # convolutions of fp32
        try:
            with torch.inference_mode(), threads, in_fp32:
                return self._models[image.shape[0]].boxed_run([image])  # type: ignore[no-any-return]  # untyped call
        except Exception as error:  # whatever the compiled code raises
            text = " ".join(str(error).split())
            raise EngineRunError(f"AOTInductor failed while running {self.description.name}: {text}") from error

    def close(self) -> None:
        with self._lock:
            self._models.clear()
            self._pinned.clear()


RUNTIMES = (
    Runtime(
        "aotinductor",
        "FILE.pt2",
        "torch",
        "",
        "AOTInductor, a package of `build()`",
        AotinductorRunner,
        opens=".pt2",
        has_passport=True,
    ),
)
