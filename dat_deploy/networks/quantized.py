"""Eight bits in eager PyTorch: what a network's linear layers take, and their weights, rounded as `quantize` does."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["quantized_network"]

LARGEST = 127  # of symmetric int8


@torch.inference_mode()
def quantized_network(network: nn.Module, images: Tensor, stays: Callable[[str], bool] = lambda _: False) -> nn.Module:
    """A copy of `network` that rounds what its products of data with weights multiply; the products are float32.

    Data have one scale a tensor, weights one a channel of their output; all are symmetric. Depthwise convolutions stay.

    Args:
        images: [B, 3, H, W], on which the ranges of data are seen.
        stays: whether the module of that name is not rounded.
    """
    copied = copy.deepcopy(network)
    layers = [
        module
        for name, module in copied.named_modules()
        if not stays(name) and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
    ]
    largest: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        (x,) = inputs
        largest[layer] = torch.maximum(largest.get(layer, x.new_zeros(())), x.abs().max())

    seeing = [layer.register_forward_pre_hook(see) for layer in layers]
    for image in images:
        copied(image[None])
    for handle in seeing:
        handle.remove()
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        others = tuple(range(1, weight.ndim))
        layer.weight = nn.Parameter(_rounded(weight, weight.abs().amax(others, keepdim=True)), requires_grad=False)
        if layer in largest:
            layer.register_forward_pre_hook(lambda _, inputs, top=largest[layer]: (_rounded(inputs[0], top),))
    return copied


def _rounded(values: Tensor, largest: Tensor) -> Tensor:
    """To the nearest of 255 steps from `-largest` to `largest`."""
    step = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return (values / step).round().clamp(-LARGEST, LARGEST) * step
