"""Whether a file holds the weights of its checkpoint: its tensors are named after the parameters of the network."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from dat_deploy.validate.tolerance import ulp

__all__ = ["WeightErrors", "weight_errors"]


# Half a step is rounding to the nearest; what is computed here is float64, and scales of int8 are float32.
ROUNDED = 0.501


@dataclass(frozen=True)
class WeightErrors:
    """What was found of a network's parameters in a file.

    Attributes:
        compared: how many of them there are; off: names of those that are not the nearest that their type holds.
        worst: of these, by `steps`: units in the last place, or int8's steps.
    """

    compared: int
    off: tuple[str, ...]
    worst: str
    steps: float


def weight_errors(model: ir.Model, parameters: Mapping[str, torch.Tensor]) -> WeightErrors:
    """Compare each parameter with the tensor that has its name, or that its layer multiplies with."""
    errors = {}
    for name, parameter in parameters.items():
        exact = parameter.detach().double().numpy()
        found = [float((np.abs(values - exact) / step).max(initial=0)) for values, step in _stored(model, name, exact)]
        if found:  # a square one may be there as it is or transposed
            errors[name] = min(found, key=lambda error: math.inf if math.isnan(error) else error)
    off = {name: error for name, error in errors.items() if not error <= ROUNDED}
    worst = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name], default="")
    return WeightErrors(len(errors), tuple(off), worst, off.get(worst, 0.0))


def _stored(
    model: ir.Model, name: str, exact: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The tensor in the shape of the parameter, and at each element the step to the next number."""
    initializers, (module, _, leaf) = model.graph.initializers, name.rpartition(".")
    direct = _array(initializers.get(name))
    if direct is not None and direct.shape == exact.shape:
        yield direct.astype(np.float64), ulp(direct)
        return
    if leaf != "weight":
        return
    product = _array(initializers.get(f"{module}/MatMul/input_1"))
    if product is not None and product.T.shape == exact.shape:
        yield product.T.astype(np.float64), ulp(product.T)
    levels, scale = _array(initializers.get(f"{module}/weight")), _array(initializers.get(f"{module}/weight/scale"))
    if levels is None or scale is None:
        return
    for each in (levels, levels.T):
        if each.shape == exact.shape and len(scale) == len(exact):
            step = np.broadcast_to(scale.astype(np.float64).reshape(-1, *[1] * (exact.ndim - 1)), exact.shape)
            yield each * step, step


def _array(value: ir.Value | None) -> NDArray[Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()
