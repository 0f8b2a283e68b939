"""Which implementation of the operators a network in PyTorch calls."""

import copy
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from dat_deploy import plugins
from dat_deploy.plugins.deformable_attention import reference as deformable_attention_reference
from dat_deploy.plugins.deformable_sample import reference as deformable_sample_reference
from dat_deploy.plugins.neighborhood_attention import reference as neighborhood_attention_reference
from dat_deploy.plugins.window_attention import reference as window_attention_reference

__all__ = ["FUSED", "REFERENCE", "Operators", "with_operators"]


class Operators(NamedTuple):
    """One function each; parts of a network that call them hold them as `operators`."""

    deformable_sample: Callable[..., Tensor]
    deformable_attention: Callable[..., Tensor]
    window_attention: Callable[..., Tensor]
    neighborhood_attention: Callable[..., Tensor]


REFERENCE = Operators(
    deformable_sample_reference.deformable_sample,
    deformable_attention_reference.deformable_attention,
    window_attention_reference.window_attention,
    neighborhood_attention_reference.neighborhood_attention,
)
FUSED = Operators(
    plugins.deformable_sample, plugins.deformable_attention, plugins.window_attention, plugins.neighborhood_attention
)


def with_operators(module: nn.Module, operators: Operators) -> nn.Module:
    """The same network on other operators; weights are shared, until one of the two is moved or cast."""
    shared: dict[int, nn.Parameter | Tensor] = {}
    for parameter in module.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        shared[id(buffer)] = buffer.detach()
    copied = copy.deepcopy(module, shared)
    for part in copied.modules():
        if hasattr(part, "operators"):
            part.operators = operators  # type: ignore[assignment]  # torch knows modules and tensors alone
    return copied
