"""Class names, and the best classes of a batch of logits.

`data/imagenet_classes.txt` has a name a line in ILSVRC2012 order: the class's first WordNet 3.0 lemma (© Princeton
University, under `data/WORDNET_LICENSE.txt`); where that is not unique or misleads, another lemma or a hint in
brackets: "crane (bird)".
"""

import functools
from collections.abc import Sequence
from importlib import resources

import numpy as np
from numpy.typing import ArrayLike

from dat_deploy.errors import ShapeError, VerificationError

__all__ = ["check_top_k", "imagenet_class_names", "top_k"]


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """The 1000 names in the order of a checkpoint's logits: 0 is tench, 999 is toilet tissue."""
    text = resources.files("dat_deploy").joinpath("data/imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def check_top_k(k: int) -> None:
    """Raises ShapeError unless `top_k` takes `k`."""
    if k < 1:
        raise ShapeError(f"top_k got k = {k}; it takes 1 or more. Ask for at least one class.")


def top_k(logits: ArrayLike, names: Sequence[str], k: int = 5) -> list[list[tuple[int, str, float]]]:
    """The `k` most probable classes of each image, or all classes where there are fewer.

    Args:
        logits: [B, classes].
        names: of the classes.
    Returns:
        per image (index, name, probability), falling; ties in the order of the index. The softmax is in float64.
    Raises:
        ShapeError: if `logits` is not [B, classes], or `k` is below 1.
        VerificationError: if a logit is NaN or infinite, so that no order means anything.
    """
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ShapeError(f"logits have shape {values.shape}; top_k takes [B, classes]. Add the batch axis.")
    if values.shape[1] != len(names):
        raise ShapeError(f"logits are of {values.shape[1]} classes and there are {len(names)} names. Name each class.")
    check_top_k(k)
    for image, row in enumerate(values):
        if not np.isfinite(row).all():
            raise VerificationError(
                f"logits of image {image} hold NaN or infinity; they must be finite. "
                f"Find the first wrong layer with: `validate()`"
            )
    exponentials = np.exp(values - values.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)  # B, classes
    best = np.argsort(-values, axis=1, kind="stable")[:, :k]  # B, k
    return [
        [(int(index), names[index], float(row[index])) for index in indices]
        for row, indices in zip(probabilities, best, strict=True)
    ]
