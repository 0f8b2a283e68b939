"""Eager PyTorch, which engines are compared with; what it once computed is kept for the checks that ask again."""

import copy
import hashlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dat_deploy.errors import DatDeployError
from dat_deploy.export.precision import is_within
from dat_deploy.networks.family import family_of
from dat_deploy.runners import EngineDescription, Outputs
from dat_deploy.runners.pytorch_runner import PytorchRunner

__all__ = ["Reference", "open_reference"]

Answer = TypeVar("Answer")


class Reference(PytorchRunner):
    """A network in eager PyTorch, float32, for any number of engines that hold its weights.

    It may be given to `validate` and `bisect` of one engine after another: PyTorch's side is most of a comparison, and
    is then computed once for the same images. What is kept grows with the images, about 10 KB each; `bisect` keeps what
    it looked at inside the network, too.
    """

    def __init__(self, about: EngineDescription, checkpoint: Path | None) -> None:
        with_points = any(block.locations in about.outputs for block in about.network.sampled_blocks)
        name = f"pytorch:{about.variant}"
        super().__init__(about.network, name, checkpoint=checkpoint, sampled_points=with_points)
        self._answers: dict[Hashable, Any] = {}

    def check_fits(self, about: EngineDescription) -> None:
        """Raises DatDeployError unless the engine holds these weights in this network, and gives the same outputs."""
        own = self.description
        if own.weights_sha256 != about.weights_sha256:
            raise DatDeployError(
                f"{about.name} holds the weights of {about.weights_source} (sha256 {about.weights_sha256[:12]}), the "
                f"PyTorch side those of {own.weights_source} ({own.weights_sha256[:12]}). "
                f"Pass the same `checkpoint` that it was exported with."
            )
        if set(about.outputs) != set(own.outputs):
            raise DatDeployError(
                f"{about.name} gives {', '.join(about.outputs)} where its network gives {', '.join(own.outputs)}, so "
                f"they cannot be compared. Export it again, and leave its outputs as they are."
            )
        if about.network != own.network:
            raise DatDeployError(
                f"{about.name} holds another network than the reference {own.name}, or one for another image size. "
                f"Open a reference for it: open_reference(engine.description, checkpoint)."
            )

    def answers(self, images_nchw: NDArray[np.float32]) -> Outputs:
        """As `outputs`, kept."""
        return self.remembered("outputs", images_nchw, lambda: self.outputs(images_nchw))

    def remembered(self, what: Hashable, images: NDArray[Any], compute: Callable[[], Answer]) -> Answer:
        """What `compute` gives, or once gave for the same images; its arrays are read-only."""
        content = np.ascontiguousarray(images)
        key = (what, images.shape, hashlib.sha256(content.data).digest())
        if key not in self._answers:
            self._answers[key] = _frozen(compute())
        return self._answers[key]  # type: ignore[no-any-return]  # of what `compute` gives

    def rounded(
        self, dtype: torch.dtype, locations_too: bool, kept: tuple[str, ...] = ()
    ) -> tuple[torch.nn.Module, torch.dtype]:
        """The same network in a lower precision, and the type of the images that it takes.

        Args:
            locations_too: as a runtime rounds that lowers the precision by itself; else as exported files do.
            kept: modules that stay in float32, see `export(fp32=...)`.
        """
        key = ("rounded", dtype, locations_too, kept)
        if key not in self._answers:
            if locations_too:
                self._answers[key] = copy.deepcopy(self.model).to(dtype)
            else:
                network = family_of(self.description.network).rounded(self.model, dtype)
                self._answers[key] = _with_float32(network, self.model, kept, dtype) if kept else network
        return self._answers[key], dtype if locations_too else torch.float32

    def quantized(self, images: NDArray[np.float32]) -> torch.nn.Module | None:
        """The same network in int8, with ranges seen on `images`; None if its family has none."""
        family = family_of(self.description.network)
        return self.remembered(
            "quantized", images, lambda: family.quantized(self.model, torch.from_numpy(images.copy()))
        )

    def close(self) -> None:
        super().close()
        self._answers.clear()


def _with_float32(
    network: torch.nn.Module, exact: torch.nn.Module, kept: tuple[str, ...], dtype: torch.dtype
) -> torch.nn.Module:
    """A copy of a half-precision network in which the modules `kept` are those of the exact one, between casts."""
    network = copy.deepcopy(network)
    done: list[str] = []
    for name, module in list(network.named_modules()):
        inside = any(name.startswith(f"{other}.") for other in done)
        if not name or inside or not any(is_within(name, pattern) for pattern in kept):
            continue
        module.float().load_state_dict(exact.get_submodule(name).state_dict())
        module.register_forward_pre_hook(lambda _, inputs: _cast(inputs, torch.float32))
        module.register_forward_hook(lambda _, inputs, output: _cast(output, dtype))
        done.append(name)
    return network


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors, however deep in tuples."""
    if isinstance(values, torch.Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, tuple) and type(values) is tuple:
        return tuple(_cast(value, dtype) for value in values)
    return values


def _frozen(answer: Answer) -> Answer:
    """With every array in it read-only, since it will be given again."""
    if isinstance(answer, np.ndarray):
        answer.setflags(write=False)
    elif isinstance(answer, dict | list):
        for part in answer.values() if isinstance(answer, dict) else answer:
            _frozen(part)
    return answer


def open_reference(about: EngineDescription, checkpoint: Path | None = None) -> Reference:
    """Eager PyTorch with the network and the weights of an engine.

    Raises:
        DatDeployError: if the checkpoint, or what stands in for none, holds other weights, or the engine has other
            outputs.
    """
    reference = Reference(about, checkpoint)
    reference.check_fits(about)
    return reference
