"""A row of what validate finds."""

import math
from dataclasses import dataclass

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Attributes:
        kind: of `CHECKS`, which found it.
        batch: images in the call; None where there is no batch to speak of.
        error: what was seen: the largest absolute difference, or what `unit` says, such as `spread`: so many times as
            much as answers to different images spread; None if the check could not run, `detail` then says why.
        tolerance: what it may be; basis: what that was derived from, empty where it is a rule.
        in_numbers: it is about the numbers that the engine gives, in which `bisect` finds the place.
    """

    kind: str
    name: str
    batch: int | None
    error: float | None
    tolerance: float
    detail: str
    unit: str = ""
    in_numbers: bool = False
    basis: str = ""

    @property
    def share(self) -> float:
        """The error as a share of what is allowed."""
        if self.error is None or self.error == 0:
            return 0.0
        return self.error / self.tolerance if self.tolerance else math.inf

    @property
    def passed(self) -> bool | None:
        """None if the check did not run."""
        return None if self.error is None else self.error <= self.tolerance  # NaN is not <= anything
