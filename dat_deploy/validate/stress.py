"""Images that bring out what one random image hides."""

import numpy as np

from dat_deploy.runners.base import Images

__all__ = ["stress_images"]


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
