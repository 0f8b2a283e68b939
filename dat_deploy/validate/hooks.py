"""Tensors from inside a network in PyTorch."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["captured"]


@torch.inference_mode()
def captured(
    network: torch.nn.Module,
    sources: Sequence[tuple[str, str]],
    images: NDArray[np.float32],
    dtype: torch.dtype = torch.float32,
) -> dict[tuple[str, str], NDArray[np.float32]]:
    """What passes modules in one forward pass.

    Args:
        sources: (module, `input`, `output` or sampling `locations`), see `Step`.
        images: [B, 3, H, W]; dtype: that the network takes them in.
    """
    tensors: dict[tuple[str, str], NDArray[np.float32]] = {}

    def hook(source: tuple[str, str]) -> Callable[..., None]:
        def keep(_: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            match source[1]:
                case "locations":
                    value = output[1].locations
                case "input":
                    value = inputs[0]
                case _:
                    value = output[0] if isinstance(output, tuple) else output
            tensors[source] = value.float().numpy().copy()

        return keep

    handles = [network.get_submodule(source[0]).register_forward_hook(hook(source)) for source in sources]
    try:
        network(torch.from_numpy(images).to(dtype))
    finally:
        for handle in handles:
            handle.remove()
    return tensors
