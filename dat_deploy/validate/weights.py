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
        if not parameter.is_floating_point():
            continue
        exact = parameter.detach().float().numpy()
        found = [_steps(values, scale, exact) for values, scale in _stored(model, name, exact.shape)]
        if found:  # a square one may be there as it is or transposed
            errors[name] = min(found, key=lambda error: math.inf if math.isnan(error) else error)
    off = {name: error for name, error in errors.items() if not error <= ROUNDED}
    worst = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name], default="")
    return WeightErrors(len(errors), tuple(off), worst, off.get(worst, 0.0))


def _steps(values: NDArray[Any], scale: NDArray[np.float32] | None, exact: NDArray[np.float32]) -> float:
    """How far the furthest element is off, in steps of its type; `scale` of int8, one a channel."""
    if scale is not None:
        step = scale.astype(np.float64).reshape(-1, *[1] * (exact.ndim - 1))
        return float(np.abs(values - exact / step).max(initial=0))
    if np.array_equal(values, exact.astype(values.dtype)):
        return 0.0
    return float((np.abs(values.astype(np.float64) - exact) / ulp(values)).max(initial=0))


def _stored(
    model: ir.Model, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[NDArray[Any], NDArray[np.float32] | None]]:
    """The tensor in the shape of the parameter, and the scales of int8."""
    initializers, (module, _, leaf) = model.graph.initializers, name.rpartition(".")
    direct = _array(initializers.get(name))
    if direct is not None and direct.shape == shape:
        yield direct, None
        return
    if leaf != "weight":
        return
    product = _array(initializers.get(f"{module}/MatMul/input_1"))
    if product is not None and product.T.shape == shape:
        yield product.T, None
    levels, scale = _array(initializers.get(f"{module}/weight")), _array(initializers.get(f"{module}/weight/scale"))
    if levels is None or scale is None:
        return
    for each in (levels, levels.T):
        if each.shape == shape and len(scale) == len(each):
            yield each, scale


def _array(value: ir.Value | None) -> NDArray[Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()
