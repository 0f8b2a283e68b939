"""Sampling locations as places in the picture."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["pixels_from_locations"]


def pixels_from_locations(
    locations: NDArray[np.float64], feature_map: tuple[int, int], image_size: tuple[int, int]
) -> NDArray[np.float64]:
    """Where on the picture a location on a feature map is.

    Args:
        locations: [..., 2], (y, x), -1 and 1 the centres of the map's first and last pixel.
        feature_map, image_size: (height, width).

    Returns:
        [..., 2] in pixels of the picture, (y, x), 0 the centre of the first pixel: -1 is the centre of the square of
        pixels under the map's first one, (stride - 1) / 2.
    """
    sides = np.array(feature_map)
    strides = np.array(image_size) / sides
    return np.asarray(((locations + 1) / 2 * (sides - 1) + 0.5) * strides - 0.5)
