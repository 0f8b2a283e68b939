"""How far apart two sides' sampling locations are, in pixels of the map that they are read from."""

import numpy as np
import pytest

from dat_deploy.networks.dat.variants import VARIANTS
from dat_deploy.validate.drift import block_drift

MAP = (8, 12)  # of the third stage, for images of 128x192
NETWORK = VARIANTS["pp-tiny"].with_image_size(16 * MAP[0], 16 * MAP[1])
BLOCK = next(block for block in NETWORK.sampled_blocks if block.name == "stages.2.attns.1")


@pytest.mark.parametrize(("axis", "pixels"), [(0, 1.0), (1, 1.0), (0, 3.0), (1, 3.0)])
def test_a_shift_by_whole_pixels_of_an_axis_is_so_many_pixels(axis, pixels):
    """Corners are aligned, so that -1 to 1 is one pixel less than the map has; the map is no square."""
    assert NETWORK.feature_map(2) == MAP
    first = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 5, 2)).astype(np.float32)
    second = first.copy()
    second[..., axis] += 2 * pixels / (MAP[axis] - 1)
    distances = BLOCK.distances_px(first, second)
    assert distances.shape == (2, 3, 4, 5)
    np.testing.assert_allclose(distances, pixels, rtol=1e-5)


def test_a_shift_along_both_axes_is_the_length_of_the_diagonal():
    first = np.zeros((1, 1, 1, 1, 2), np.float32)
    second = first + np.float32([2 * 3 / (MAP[0] - 1), 2 * 4 / (MAP[1] - 1)])
    np.testing.assert_allclose(BLOCK.distances_px(first, second), 5.0, rtol=1e-5)


def test_a_block_is_told_by_median_p99_and_largest():
    first = np.zeros((1, 1, 1, 100, 2), np.float32)
    second = first.copy()
    second[..., 0] = 2 * np.arange(100) / (MAP[0] - 1)  # 0 to 99 px
    row = block_drift(BLOCK, first, second, 10.0)
    assert (row.points, row.allowed) == (100, 10.0)
    np.testing.assert_allclose([row.median, row.p99, row.largest], [49.5, 98.01, 99.0], rtol=1e-4)
    second[..., 0, 0] = np.nan
    assert np.isnan(block_drift(BLOCK, first, second, 10.0).largest)
