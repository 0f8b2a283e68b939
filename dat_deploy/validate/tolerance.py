"""What an output may differ by, in shares of what tells images apart.

Each class of logits, each channel of a map, each axis of points has a scale of its own: how far PyTorch's answers to
different images spread in it. An absolute number says nothing where answers are large or small, one number for all
classes nothing where some are switched off.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dat_deploy.precision import Precision

__all__ = ["TELLS_APART", "Tolerance", "spread_between", "ulp"]

# No tolerance may take more of the distance between two images' answers: from half of it on, one could be the other.
TELLS_APART = 1 / 3

Answers = NDArray[np.float32]


@dataclass(frozen=True)
class Tolerance:
    """Of one output.

    Attributes:
        scale: of each channel, in the units of the output, [C, 1, ...] to fit an answer; floor: what each may differ by
            besides, a few units in the last place.
        allowed: the largest error, in scales.
        basis: what `allowed` was derived from.
        unit: of errors: `spread`, or nothing where they are as they stand.
    """

    scale: NDArray[np.float64]
    floor: NDArray[np.float64]
    allowed: float
    basis: str
    unit: str = "spread"

    @classmethod
    def absolute(cls, allowed: float, basis: str) -> "Tolerance":
        return cls(np.ones(()), np.zeros(()), allowed, basis, unit="")

    def at(self, allowed: float, basis: str) -> "Tolerance":
        return replace(self, allowed=allowed, basis=basis)

    def error(self, answers: NDArray[Any], expected: NDArray[Any]) -> float:
        """The largest difference beyond the floor, in scales; NaN if either has one."""
        difference = np.abs(answers.astype(np.float64) - expected)
        return float((np.maximum(difference - self.floor, 0) / self.scale).max())

    def distances(self, answers: Answers, others: Answers) -> NDArray[np.float64]:
        """[N, M]: the root mean square of the differences in scales."""
        scaled, scaled_others = (
            (values.astype(np.float64) / self.scale).reshape(len(values), -1) for values in (answers, others)
        )
        return np.stack([np.sqrt(np.square(scaled_others - row).mean(axis=1)) for row in scaled])

    def capped(self, cap: float) -> "Tolerance":
        """Lowered, if need be, to what `cap` gives."""
        if not self.allowed > cap:
            return self
        basis = f"a third of the distance between images, less than {self.basis}"
        return self.at(max(cap, 0.0), basis)

    def cap(self, answers: Answers) -> float:
        """TELLS_APART of the distance from an image's answer to its nearest other, of the usual image, less the floor.

        Infinite of a single image, below 0 where only the floor parts them.
        """
        nearest = np.full(len(answers), np.inf)
        for i in range(len(answers)):
            for j in range(i):
                difference = np.abs(answers[i].astype(np.float64) - answers[j])
                allowed = ((TELLS_APART * difference - self.floor) / self.scale).max()
                nearest[[i, j]] = np.minimum(nearest[[i, j]], allowed)
        return float(np.median(nearest))


def spread_between(answers: Answers, channel_axis: int, precision: Precision, *, ulps: float) -> Tolerance:
    """A tolerance of nothing but `ulps`, on the scale of what parts the answers to different images.

    Args:
        answers: [N, ...] of N images.
        channel_axis: of one answer, see `networks.family.Output`.
        precision: that the answers were rounded to, in which ulps count.
    """
    exact = answers.astype(np.float64)
    others = tuple(axis for axis in range(exact.ndim) if axis != channel_axis + 1)
    spread = np.sqrt(exact.var(axis=0, keepdims=True).mean(axis=others, keepdims=True))[0]
    largest = np.abs(exact).max(axis=others, keepdims=True)[0]
    step = _step(largest, precision.torch if precision.is_half else "float32")
    return Tolerance(np.maximum(spread, step), ulps * step, 0.0, f"{ulps:g} units in the last place")


def ulp(values: NDArray[Any]) -> NDArray[np.float64]:
    """From each element to the next number of its type: the unit in the last place."""
    return _step(np.abs(values.astype(np.float64)), values.dtype.name)


def _step(magnitudes: NDArray[np.float64], type_name: str) -> NDArray[np.float64]:
    """The same of numbers of another type."""
    import torch

    limits = torch.finfo(getattr(torch, type_name))
    largest = np.maximum(magnitudes, limits.smallest_normal)
    return np.asarray(limits.eps * np.exp2(np.floor(np.log2(largest))))
