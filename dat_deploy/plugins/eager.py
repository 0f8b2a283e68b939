"""The operators in eager PyTorch, and inputs that bring out what one random input hides."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dat_deploy.plugins.operator import Operator
from dat_deploy.plugins.specification import Frame, Role, Specification

__all__ = ["LOCATIONS", "eager_output", "stress_inputs", "stress_locations"]

LOCATIONS = ("pixels", "half pixels", "border", "outside")


@torch.inference_mode()
def eager_output(
    operator: str,
    inputs: Mapping[str, Tensor],
    attributes: Mapping[str, Any],
    dtype: torch.dtype = torch.float64,
    of_locations: torch.dtype | None = None,
) -> NDArray[np.float64]:
    """What the reference of an operator gives.

    Args:
        inputs: all of them, by name.
        dtype: that it computes in, and its locations are in unless there is another, `of_locations`.
    """
    types = {Role.LOCATIONS: of_locations or dtype, Role.INDICES: torch.int64}
    roles = Operator(operator).specification.roles
    tensors = {name: tensor.to(types.get(roles[name], dtype)) for name, tensor in inputs.items()}
    output: NDArray[np.float64] = Operator(operator).reference(**tensors, **attributes).double().numpy()
    return output


def stress_inputs(
    specification: Specification, names: Iterable[str], sizes: Mapping[str, int], kind: str, seed: int = 0
) -> dict[str, Tensor]:
    """Some of an operator's inputs: standard normal, but for the sampling locations.

    Args:
        names: of inputs that lead with the batch.
        sizes: by the letters of the specification.
        kind: of LOCATIONS, see `stress_locations`.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        shape = specification.inputs[name].shape(sizes)
        if specification.roles[name] is not Role.LOCATIONS:
            found[name] = torch.randn(shape, generator=generator)
            continue
        assert specification.frame is not None
        found[name] = stress_locations(kind, shape, (sizes["H"], sizes["W"]), seed, specification.frame)
    return found


def stress_locations(
    kind: str, shape: tuple[int, ...], feature_map: tuple[int, int], seed: int, frame: Frame
) -> Tensor:
    """Sampling locations that a trained network seldom visits.

    Args:
        kind: `pixels`: centres of pixels, where both neighbours' weights are 0 and 1; `half pixels`: the middle between
            them, and half a pixel outside; `border`: the ends of the frame, and a hair to either side; `outside`: up to
            half the frame away from its ends, where some or all neighbours are zeros.
        shape: [..., 2].
        feature_map: (H, W) of the map that is sampled.

    Returns:
        float32, the last axis in the order of the frame.
    """
    generator = torch.Generator().manual_seed(seed)
    middle, half = (frame.low + frame.high) / 2, (frame.high - frame.low) / 2
    axes = {}
    for axis, size in zip("yx", feature_map, strict=True):
        if kind == "pixels":
            axes[axis] = frame.location(torch.randint(0, size, shape[:-1], generator=generator), size)
        elif kind == "half pixels":
            axes[axis] = frame.location(torch.randint(-1, size, shape[:-1], generator=generator) + 0.5, size)
        elif kind == "border":
            hair = torch.tensor([0.0, 1e-6, -1e-6, 1e-3, -1e-3])[torch.randint(0, 5, shape[:-1], generator=generator)]
            side = torch.randint(0, 2, shape[:-1], generator=generator) * 2.0 - 1.0
            axes[axis] = side * half + middle + hair
        elif kind == "outside":
            axes[axis] = (torch.rand(shape[:-1], generator=generator) * 4 - 2) * half + middle
        else:
            raise AssertionError(f"no such locations: {kind}")
    return torch.stack([axes[axis] for axis in frame.axes], dim=-1).float()
