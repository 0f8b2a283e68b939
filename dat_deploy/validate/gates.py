"""What an engine may lose before it fails; every gate has a default for the precision, and can be set."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from dat_deploy.errors import DatDeployError
from dat_deploy.precision import PRECISIONS

__all__ = ["OF_DATA", "OF_LABELS", "Gates", "check_gates", "default_gates"]

OF_LABELS = ("top1_drop", "top5_drop")
OF_DATA = (*OF_LABELS, "disagreement", "cosine_distance", "unreadable")


@dataclass(frozen=True)
class Gates:
    """The largest value of each that passes.

    Attributes:
        top1_drop, top5_drop: percentage points that the engine is below PyTorch on labelled images. By default a single
            image never fails: with fewer than a few hundred images one is more than the points allowed.
        disagreement: percent of the images on which the two sides' first classes differ.
        cosine_distance: 1 less the cosine of the angle between the two sides' logits, of the worst image.
        unreadable: percent of the images that cannot be read.
        batch_spread: difference between the answers to one image in any slot of any batch; None for the tolerance
            of the outputs.
        repeats: difference between the answers of repeated runs; 0 asks for the same bits.
        drift_px: pixels of its feature map by which a sampling location may differ; None for four times what
            rounding moves it in eager PyTorch at most.
        exact: the gates that were set, which hold for a single image, too.
    """

    top1_drop: float
    top5_drop: float
    disagreement: float
    cosine_distance: float
    unreadable: float = 1.0
    batch_spread: float | None = None
    repeats: float = 0.0
    drift_px: float | None = None
    exact: tuple[str, ...] = ()


def check_gates(changes: Mapping[str, float] | None) -> dict[str, float]:
    """`changes` with `_` between words.

    Raises:
        DatDeployError: if there is no such gate, or a value is negative or not a number.
    """
    names = [field.name for field in fields(Gates) if field.name != "exact"]
    gates = {}
    for name, value in (changes or {}).items():
        field = name.replace("-", "_")
        if field not in names:
            listing = ", ".join(name.replace("_", "-") for name in names)
            raise DatDeployError(f"there is no gate '{name}'; gates are {listing}.")
        if not value >= 0:  # nor NaN
            raise DatDeployError(f"gate '{name}' got {value}; it takes the largest value that passes, from 0 on.")
        gates[field] = value
    return gates


def default_gates(precision: str, changes: Mapping[str, float] | None = None) -> Gates:
    """Those of a precision, with `changes` by name, `-` or `_` between words; raises as `check_gates`."""
    exact = check_gates(changes)
    return Gates(**{**PRECISIONS[precision].gates, **exact}, exact=tuple(exact))
