"""Inputs that bring out what one random image hides."""

import numpy as np
import torch

from dat_deploy.runners.base import Images

__all__ = ["LOCATIONS", "stress_images", "stress_locations"]


def stress_images(size: tuple[int, int]) -> dict[str, Images]:
    """Normalised images that no photograph resembles, each [1, 3, H, W].

    `zero` has no structure at all; `bright` is far outside what training saw; `checkerboard` alternates every pixel,
    so that a half-pixel shift flips its sign; `noise` is standard normal.
    """
    height, width = size
    y, x = np.mgrid[:height, :width]
    checkerboard = np.where((y + x) % 2, 2.0, -2.0)
    noise = np.random.default_rng(0).standard_normal((3, height, width))
    patterns = {
        "zero": np.zeros((3, height, width)),
        "bright": np.full((3, height, width), 8.0),
        "checkerboard": np.broadcast_to(checkerboard, (3, height, width)),
        "noise": noise,
    }
    return {name: np.ascontiguousarray(pattern[None], dtype=np.float32) for name, pattern in patterns.items()}


LOCATIONS = ("pixels", "half pixels", "border", "outside")


def stress_locations(kind: str, shape: tuple[int, ...], feature_map: tuple[int, int], seed: int) -> torch.Tensor:
    """Sampling locations that a trained network seldom visits.

    Args:
        kind: `pixels`: centres of pixels, where both neighbours' weights are 0 and 1; `half pixels`: the middle between
            them, and half a pixel outside; `border`: the first and last centres, and a hair to either side;
            `outside`: up to twice the map's extent away, where some or all neighbours are zeros.
        shape: [B, G, Hk, Wk, 2].
        feature_map: (H, W) of the map that is sampled.

    Returns:
        float32, last axis (y, x).
    """
    generator = torch.Generator().manual_seed(seed)
    axes = []
    for size in feature_map:
        last = max(size - 1, 1)
        if kind == "pixels":
            index = torch.randint(0, size, shape[:-1], generator=generator)
            axes.append(index / last * 2 - 1)
        elif kind == "half pixels":
            index = torch.randint(-1, size, shape[:-1], generator=generator)
            axes.append((index + 0.5) / last * 2 - 1)
        elif kind == "border":
            hair = torch.tensor([0.0, 1e-6, -1e-6, 1e-3, -1e-3])[torch.randint(0, 5, shape[:-1], generator=generator)]
            side = torch.randint(0, 2, shape[:-1], generator=generator) * 2.0 - 1.0
            axes.append(side + hair)
        elif kind == "outside":
            axes.append(torch.rand(shape[:-1], generator=generator) * 4 - 2)
        else:
            raise AssertionError(f"no such locations: {kind}")
    return torch.stack(axes, dim=-1).float()
