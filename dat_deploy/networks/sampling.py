"""Sampling locations as places in the picture."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SampledBlock", "reference_axis"]


def reference_axis(indices: Any, size: int, *, half_pixel: bool) -> Any:
    """Where the points of the sampled grid are along one of its axes, before any offset.

    Args:
        indices: 0 to size - 1, an array or a tensor.
        half_pixel: True for DAT, the centres of the grid, `(i + 0.5) / Hk · 2 - 1`; False for DAT+ and DAT++,
            `(i + 0.5) / (Hk - 1) · 2 - 1`, of which the last runs past +1. Both were trained so.
    """
    return (indices + 0.5) / (size if half_pixel else size - 1) * 2 - 1


@dataclass(frozen=True)
class SampledBlock:
    """A block that reads a feature map at points of its own, and the outputs that tell which.

    In a location, (y, x), -1 and 1 are the centres of the map's first and last pixel.

    Attributes:
        name: of its module, `stages.2.attns.1`; stage, block: its place, by which its outputs are named.
        channels, feature_map: of the map, its (H, W); sampled_map: (Hk, Wk) of the points of each of its `groups`.
        image_size: (height, width).
        half_pixel: see `reference_axis`.
        is_clamped: the sum of reference points and offsets is, to [-1, 1].
    """

    name: str
    stage: int
    block: int
    channels: int
    groups: int
    feature_map: tuple[int, int]
    sampled_map: tuple[int, int]
    image_size: tuple[int, int]
    half_pixel: bool
    is_clamped: bool

    @property
    def locations(self) -> str:
        """The output [B, groups, Hk, Wk, 2]; given on request."""
        return f"sampling_locations_{self.stage}_{self.block}"

    @property
    def attention(self) -> str:
        """The output [B, groups, Hk, Wk], the share that each point receives; given with the locations."""
        return f"attention_{self.stage}_{self.block}"

    @property
    def borders(self) -> NDArray[np.float64]:
        """(top, left), (bottom, right) in pixels of the image; sampling beyond mixes in zeros."""
        return self.pixels(np.array([[-1, -1], [1, 1]]))

    def sizes(self, batch: int) -> dict[str, int]:
        """Of the inputs of its operators, by the letters of their specifications."""
        (height, width), (rows, columns) = self.feature_map, self.sampled_map
        points = {"G": self.groups, "Hk": rows, "Wk": columns, "Ns": rows * columns}
        return {"B": batch, "H": height, "W": width, "C": self.channels} | points

    def reference_points(self) -> NDArray[np.float32]:
        """[Hk, Wk, 2], what offsets are added to."""
        y, x = (
            reference_axis(np.arange(side, dtype=np.float32), side, half_pixel=self.half_pixel)
            for side in self.sampled_map
        )
        return np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)

    def unmoved(self) -> NDArray[np.float64]:
        """[Hk, Wk, 2], the locations where every offset is 0."""
        points = self.reference_points().astype(np.float64)
        return points.clip(-1, 1) if self.is_clamped else points  # as the network does with the sum

    def pixels(self, locations: NDArray[Any]) -> NDArray[np.float64]:
        """Locations in pixels of the image, (y, x), 0 the centre of the first.

        So -1 is the centre of the square of the image's pixels under the map's first one, (stride - 1) / 2.
        """
        sides = np.array(self.feature_map)
        strides = np.array(self.image_size) / sides
        return np.asarray(((locations.astype(np.float64) + 1) / 2 * (sides - 1) + 0.5) * strides - 0.5)

    @property
    def extent_px(self) -> float:
        """From one corner of the feature map to the opposite, in its pixels: two points are no further apart in it."""
        return math.hypot(self.feature_map[0] - 1, self.feature_map[1] - 1)

    def distances_px(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
        """[..., 2] locations twice -> [...], in pixels of the feature map: -1 to 1 are H - 1 of them."""
        height, width = self.feature_map
        steps = (first.astype(np.float64) - second) * np.array([(height - 1) / 2, (width - 1) / 2])
        return np.asarray(np.hypot(steps[..., 0], steps[..., 1]))
