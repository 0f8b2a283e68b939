"""Where a network in PyTorch first leaves the numbers that its precision has."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["first_overflow", "kept_in_fp32"]


@torch.inference_mode()
def first_overflow(network: torch.nn.Module, images: NDArray[np.float32], takes: torch.dtype) -> tuple[str, int] | None:
    """The first module that makes something not finite of what is finite, and on how many images; None if none does.

    Args:
        images: [N, 3, H, W]; takes: their type in the network.
    """
    first: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(_: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not first and not _is_finite(output) and _is_finite(inputs):
                first.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name]
    places = []
    try:
        for image in images:
            first.clear()
            output = network(torch.from_numpy(image[None].copy()).to(takes))
            if first:
                places.append(first[0])
            elif not _is_finite(output):
                places.append("")
    finally:
        for handle in handles:
            handle.remove()
    return (places[0], len(places)) if places else None


def _is_finite(values: Any) -> bool:
    if isinstance(values, torch.Tensor):
        return not values.is_floating_point() or bool(values.isfinite().all())
    return all(map(_is_finite, values)) if isinstance(values, tuple | list) else True


def kept_in_fp32(modules: Sequence[str], precision: str) -> str:
    """What to do about modules whose range half precision does not have."""
    kept = f"keep it in float32, `export(fp32={list(modules)})`, or " if modules else ""
    return f'{kept}export with `precision="{"bf16" if precision == "fp16" else "fp32"}"`'
