"""The most probable classes of image files, with any engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dat_deploy.images.labels import check_top_k, top_k
from dat_deploy.images.preprocess import check_images, preprocess_files
from dat_deploy.runners import EngineDescription, Runner, check_engine, open_runner

__all__ = ["Classification", "Prediction", "classify", "logits_of"]


@dataclass(frozen=True)
class Prediction:
    """`probability` is from the softmax over all classes, 0 to 1."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Classification:
    """`predictions` has a tuple for each image, most probable first."""

    engine: EngineDescription
    images: tuple[Path, ...]
    predictions: tuple[tuple[Prediction, ...], ...]


def classify(images: Sequence[Path], engine: str, *, checkpoint: Path | None = None, top: int = 5) -> Classification:
    """Classify image files, preprocessed as the engine's network was evaluated.

    Args:
        engine: `[RUNTIME:]TARGET`, see `open_runner`.
        checkpoint: for `pytorch:VARIANT`.
        top: classes to return for each image.

    Raises:
        ImageError: if a file is not an image that can be read; nothing is classified then.
    """
    check_top_k(top)
    check_engine(engine, checkpoint=checkpoint)
    check_images(images)
    with open_runner(engine, checkpoint=checkpoint) as runner:
        inputs = preprocess_files(images, runner.description.preprocessing)
        best = top_k(logits_of(runner, inputs), runner.description.network.answer.class_names, top)
        predictions = tuple(tuple(Prediction(*entry) for entry in entries) for entries in best)
        return Classification(runner.description, tuple(images), predictions)


def logits_of(runner: Runner, images_nchw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits [B, classes] of any number of images from one on, in batches that the engine takes."""
    size = runner.description.least_batch
    logits = []
    for first in range(0, len(images_nchw), size):
        part = images_nchw[first : first + size]
        padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])  # a fixed batch's last call
        logits.append(runner(padded)[: len(part)])
    return np.concatenate(logits)
