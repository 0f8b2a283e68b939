"""Which implementation of the operators a network in PyTorch calls."""

import copy
from types import SimpleNamespace

from torch import Tensor, nn

from dat_deploy.networks.family import Block, Step
from dat_deploy.plugins.operator import OPERATORS, Operator

__all__ = ["FUSED", "REFERENCE", "Operators", "operator_weights", "with_operators"]

# A function by each operator's name; parts of a network that call operators hold one as `operators`.
Operators = SimpleNamespace

REFERENCE = Operators(**{name: Operator(name).reference for name in OPERATORS})
FUSED = Operators(**{name: Operator(name).torch_operator for name in OPERATORS})


def with_operators(module: nn.Module, operators: Operators) -> nn.Module:
    """The same network on other operators; weights are shared, until one of the two is moved or cast."""
    shared: dict[int, nn.Parameter | Tensor] = {}
    for parameter in module.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        shared[id(buffer)] = buffer.detach()
    copied = copy.deepcopy(module, shared)
    for part in copied.modules():
        if isinstance(getattr(part, "operators", None), Operators):
            part.operators = operators  # type: ignore[assignment]  # torch knows modules and tensors alone
    return copied


def operator_weights(module: nn.Module, block: Block, step: Step) -> dict[str, Tensor]:
    """The inputs of a step's operator that are parameters of a network."""
    part = module.get_submodule(block.name)
    return {name: part.get_parameter(parameter).data for name, parameter in step.weights}
