"""The most probable classes of image files, with any engine."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dat_deploy.images.labels import check_top_k, top_k
from dat_deploy.images.preprocess import check_images, preprocess_files
from dat_deploy.runners import EngineDescription, Runner, check_engine, open_runner

__all__ = ["Classification", "Prediction", "classify"]


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


def classify(
    images: Sequence[Path], engine: str | Runner, *, checkpoint: Path | None = None, top: int = 5
) -> Classification:
    """Classify image files, preprocessed as the engine's network was evaluated.

    Args:
        engine: `[RUNTIME:]TARGET`, see `open_runner`; or one that is open, and stays so.
        checkpoint: for `pytorch:VARIANT`.
        top: classes to return for each image.

    Raises:
        ImageError: if a file is not an image that can be read; nothing is classified then.
    """
    check_top_k(top)
    if isinstance(engine, str):
        check_engine(engine, checkpoint=checkpoint)
    check_images(images)
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(open_runner(engine, checkpoint=checkpoint)) if isinstance(engine, str) else engine
        inputs = preprocess_files(images, runner.description.preprocessing)
        best = top_k(runner.logits(inputs), runner.description.network.answer.class_names, top)
        predictions = tuple(tuple(Prediction(*entry) for entry in entries) for entries in best)
        return Classification(runner.description, tuple(images), predictions)
