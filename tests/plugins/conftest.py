"""Inputs that the tests of the operators and of their kernels share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dat_deploy.networks.dat.model import reference_points


def _place(kind: str, shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "network":
        offsets = torch.randn(*shape, 2, generator=generator).tanh() * 2 / torch.tensor(shape[-2:])
        return reference_points(*shape[-2:], half_pixel=True) + offsets
    axes = []
    for side in size:
        index = torch.randint(-1, side, shape, generator=generator).float()
        span = max(side - 1, 1)
        axes.append(
            {
                "pixels": index.clamp(min=0) / span * 2 - 1,
                "half pixels": (index + 0.5) / span * 2 - 1,
                "border": torch.where(index > side / 2, 1.0, -1.0) + 1e-6 * index,
                "outside": torch.rand(shape, generator=generator) * 6 - 3,
            }[kind]
        )
    return torch.stack(axes, dim=-1)


@pytest.fixture
def locations() -> Callable[[str, tuple[int, ...], tuple[int, int]], Tensor]:
    """[..., 2] with sampling locations on pixels, half pixels, the border, outside, or where a network puts them."""
    return _place
