"""One operator at one shape, what it must do at least, and the shapes of the networks. Needs no torch.

The work of an operator is counted alike for all implementations: FLOPs are the two matrix products of attention, bytes
are each input read once and the output written once, exponentials are one a score.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from dat_deploy.networks.dat.variants import Variant
from dat_deploy.plugins.operator import specification

__all__ = ["BAR", "Case", "of_network", "of_stage"]

BAR = ("base-384", 2, 64)  # the network, stage (from 0) and batch of the project's targets


@dataclass(frozen=True)
class Case:
    """One operator at one shape; the fields mean what they mean in `variants.StageConfig`.

    Attributes:
        sampled: (Hk, Wk); table: (Th, Tw). Those of other operators are 0.
    """

    operator: str
    batch: int
    height: int
    width: int
    channels: int
    heads: int
    sampled: tuple[int, int] = (0, 0)
    groups: int = 0
    table: tuple[int, int] = (0, 0)
    half_pixel: bool = False
    window_size: int = 0
    shift_size: int = 0
    kernel_size: int = 0

    @property
    def shape(self) -> str:
        """All that tells it from other cases of the operator, but for the batch."""
        (rows, columns), (high, wide) = self.sampled, self.table
        parts = [
            f"{self.height}x{self.width}x{self.channels}",
            self.heads and f"{self.heads} heads",
            self.groups and f"{rows}x{columns} points in {self.groups} groups",
            high and f"table {high}x{wide}, {'half pixel' if self.half_pixel else 'corners'}",
            self.window_size and f"windows of {self.window_size}",
            self.shift_size and f"shifted by {self.shift_size}",
            self.kernel_size and f"neighbors {self.kernel_size}x{self.kernel_size}",
        ]
        return ", ".join(filter(None, parts))

    @property
    def output_shape(self) -> tuple[int, ...]:
        if self.operator == "deformable_sample":
            return self.batch, math.prod(self.sampled), self.channels
        return self.batch, self.height, self.width, self.channels

    @property
    def attributes(self) -> dict[str, int]:
        """What the operator takes beside tensors, in order."""
        if self.operator == "deformable_attention":
            return {"num_heads": self.heads, "half_pixel_queries": self.half_pixel}
        if self.operator == "window_attention":
            return {"num_heads": self.heads, "window_size": self.window_size, "shift_size": self.shift_size}
        if self.operator == "neighborhood_attention":
            return {"num_heads": self.heads, "kernel_size": self.kernel_size, "dilation": 1}
        return {}

    @property
    def exponentials(self) -> int:
        """One a score; a sample has no scores."""
        keys = math.prod(self.sampled) or self.window_size**2 or self.kernel_size**2  # of each query
        return self.batch * self.height * self.width * keys * self.heads

    @property
    def flops(self) -> int:
        """Of q · k and of the weighted sum of values, two each multiply-add; of a sample, its four multiply-adds."""
        if self.operator == "deformable_sample":
            return 8 * self.batch * math.prod(self.sampled) * self.channels
        return 4 * self.exponentials * self.channels // self.heads

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the names of the operator's arguments, in order."""
        pixels, side = (self.batch, self.height, self.width), 2 * (self.window_size or self.kernel_size) - 1
        if self.window_size:
            return {"qkv": (*pixels, 3 * self.channels), "relative_position_bias_table": (side**2, self.heads)}
        if self.kernel_size:
            shapes = {"qkv": (*pixels, 3 * self.channels), "padding_qkv": (3 * self.channels,)}
            return shapes | {"relative_position_bias_table": (self.heads, side, side)}
        locations = {"sampling_locations": (self.batch, self.groups, *self.sampled, 2)}
        if self.operator == "deformable_sample":
            return {"value": (*pixels, self.channels)} | locations
        keys = (self.batch, math.prod(self.sampled), self.channels)
        attention = {"query": (*pixels, self.channels), "key": keys, "value": keys} | locations
        return attention | {"relative_position_bias_table": (self.heads, *self.table)}

    @property
    def bytes_moved(self) -> int:
        """Of what ships: float16, but for locations and tables in float32. Of a sampled map at most the four pixels
        around each point are read."""
        moved = 2 * math.prod(self.output_shape)
        for name, shape in self.inputs.items():
            moved += math.prod(shape) * (4 if specification(self.operator).roles[name].stays_float32 else 2)
        if self.operator == "deformable_sample":
            unread = max(0, self.height * self.width - 4 * math.prod(self.sampled))
            moved -= 2 * self.batch * unread * self.channels
        return moved


def of_stage(variant: Variant, index: int, batch: int) -> Iterator[Case]:
    """The operators of a stage (from 0)."""
    stage, (height, width) = variant.stages[index], variant.feature_map(index)
    attention = functools.partial(
        Case, batch=batch, height=height, width=width, channels=stage.channels, heads=stage.heads
    )
    if "D" in stage.blocks:
        sampled, groups = stage.sampled_map(height, width), stage.offset_groups
        table, half_pixel = variant.bias_table(index), variant.half_pixel_queries
        yield attention("deformable_attention", sampled=sampled, groups=groups, table=table, half_pixel=half_pixel)
        yield attention("deformable_sample", heads=0, sampled=sampled, groups=groups)
    if "L" in stage.blocks:
        yield attention("window_attention", window_size=stage.window_size)
    if "S" in stage.blocks:
        yield attention("window_attention", window_size=stage.window_size, shift_size=stage.shift_size)
    if "N" in stage.blocks:
        yield attention("neighborhood_attention", kernel_size=stage.neighborhood_size)


def of_network(variant: Variant, batch: int) -> list[Case]:
    """Each once."""
    return list(dict.fromkeys(case for i in range(len(variant.stages)) for case in of_stage(variant, i, batch)))
