"""Both sides on a folder of images: top-1 and top-5, which images flip, how far the logits are apart."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dat_deploy.errors import DatDeployError, ImageError, VerificationError
from dat_deploy.images.data_set import DataSet
from dat_deploy.images.preprocess import preprocess, read_image
from dat_deploy.runners import EngineDescription, Runner
from dat_deploy.validate.check import Check
from dat_deploy.validate.gates import Gates
from dat_deploy.validate.statistics import mcnemar_p, wilson_interval
from dat_deploy.validate.tolerance import Tolerance

__all__ = ["Accuracy", "Flip", "Share", "Side", "accuracy_rows", "compare_on_data"]

CHUNK = 128  # images that one side is through with before the other starts: taking turns, their threads would collide

NEVER = np.iinfo(np.int64).max  # the rank of the right class where there is no order

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Share:
    """`count` of `images`, with the 95 % confidence interval (Wilson) of the share in percent."""

    count: int
    images: int
    percent: float
    low: float
    high: float

    @classmethod
    def of(cls, right: NDArray[np.bool_]) -> "Share":
        count, images = int(right.sum()), len(right)
        low, high = wilson_interval(count, images)
        return cls(count, images, 100 * count / images, 100 * low, 100 * high)


@dataclass(frozen=True)
class Side:
    """Right answers of one side."""

    top1: Share
    top5: Share

    @property
    def images(self) -> int:
        return self.top1.images


@dataclass(frozen=True)
class Flip:
    """An image that the two sides classify differently.

    Attributes:
        label: its class, if it has one; reference, engine: what the two sides say.
        reference_margin: by how much the reference prefers its answer to the engine's, in logits; engine_margin: by
            how much the engine prefers its own. Small margins flip by rounding, large ones do not.
    """

    image: Path
    label: str | None
    reference: str
    engine: str
    reference_margin: float
    engine_margin: float


@dataclass(frozen=True)
class Accuracy:
    """What a data set says.

    Attributes:
        engine, reference: right answers; None without labels.
        only_engine, only_reference: images that one side alone gets right; mcnemar_p: see `mcnemar_p`.
        agreement: images on which the first classes are the same.
        largest_error, mean_error, p999_error: of the absolute differences of all logits.
        scaled_error: the largest in the scales of the classes, see `Tolerance`.
        least_cosine: of the angles between the two sides' logits of an image.
        not_finite: images for which the engine gives NaN or infinity; they count as wrong, and as flips.
        unreadable: files that are no image, and why; they are left out of all the rest.
        seconds: spent in `engine`, `reference`, `decode` (reading and preprocessing) and `own` (the comparison).
    """

    data: DataSet
    images: int
    engine: Side | None
    reference: Side | None
    only_engine: int
    only_reference: int
    mcnemar_p: float | None
    agreement: Share
    flips: tuple[Flip, ...]
    scaled_error: float
    largest_error: float
    mean_error: float
    p999_error: float
    least_cosine: float
    not_finite: int
    unreadable: tuple[tuple[Path, str], ...]
    seconds: dict[str, float] = field(compare=False)


def compare_on_data(
    runner: Runner,
    reference: Runner,
    about: EngineDescription,
    data: DataSet,
    scale: Callable[[Logits], Tolerance] = lambda _: Tolerance.absolute(0.0, ""),
    *,
    strict: bool = False,
    progress: Callable[[int, int], None] = lambda count, total: None,
) -> Accuracy:
    """Run both sides over the images.

    Args:
        about: the engine at the image size of the comparison; its preprocessing is that of both sides.
        scale: of the classes, from the reference's logits [N, classes]; by default 1.
        strict: let an image that cannot be read be an error.
        progress: called with the number of images done, and of all.

    Raises:
        DatDeployError: if no image can be read.
        ImageError: see `strict`.
        VerificationError: if the reference itself gives NaN or infinity.
    """
    start = time.perf_counter()
    seconds = {"engine": 0.0, "reference": 0.0, "decode": 0.0}
    unreadable: list[tuple[Path, str]] = []
    positions: list[int] = []
    engine_parts: list[Logits] = []
    reference_parts: list[Logits] = []
    for indices, images in _chunks(about, data, unreadable, seconds, strict=strict):
        engine_parts.append(_timed(runner, images, seconds, "engine"))
        expected = _timed(reference, images, seconds, "reference")
        finite = _finite(expected)
        if not finite.all():
            raise VerificationError(
                f"{reference.description.name} itself gives NaN or infinity for {data.images[indices[finite.argmin()]]}"
                f", so no engine can be judged by it. Check the checkpoint."
            )
        reference_parts.append(expected)
        positions += indices
        progress(indices[-1] + 1, len(data.images))
    if not positions:
        raise DatDeployError(f"none of the {len(unreadable)} images of '{data.folder}' can be read: {unreadable[0][1]}")
    answers = np.concatenate(reference_parts)
    accuracy = _compared(about, data, positions, np.concatenate(engine_parts), answers, unreadable, scale(answers))
    seconds["own"] = time.perf_counter() - start - sum(seconds.values())
    accuracy.seconds.update(seconds)
    return accuracy


def _timed(runner: Runner, images: NDArray[np.float32], seconds: dict[str, float], side: str) -> Logits:
    start = time.perf_counter()
    logits = runner.in_batches(images)["logits"]
    seconds[side] += time.perf_counter() - start
    return logits


def accuracy_rows(accuracy: Accuracy, gates: Gates, tolerance: Tolerance) -> list[Check]:
    """What was found, held to the gates; `tolerance` is of the logits."""
    rows = []

    def row(name: str, error: float, limit: float, detail: str, unit: str, basis: str = "the gate") -> None:
        rows.append(Check("data", name, None, error, limit, detail, unit, name == "logits on data", basis))

    if accuracy.engine is not None and accuracy.reference is not None:
        for name, engine, reference, gate in (
            ("top-1", accuracy.engine.top1, accuracy.reference.top1, "top1_drop"),
            ("top-5", accuracy.engine.top5, accuracy.reference.top5, "top5_drop"),
        ):
            detail = (
                f"{engine.percent:.2f}% ({engine.low:.2f} to {engine.high:.2f}), PyTorch {reference.percent:.2f}% "
                f"({reference.low:.2f} to {reference.high:.2f})"
            )
            if name == "top-1":
                detail += f", McNemar's p {accuracy.mcnemar_p:.2g}"
            loss = 100 * max(0, reference.count - engine.count) / accuracy.images
            row(f"{name} lost", loss, _of_images(gates, gate, accuracy.images), detail, "points")
    agreement = accuracy.agreement
    disagreeing = 100 * (agreement.images - agreement.count) / agreement.images
    detail = f"{agreement.images - agreement.count} of {agreement.images} flip"
    if accuracy.flips and math.isfinite(accuracy.flips[0].reference_margin):
        detail += f", the surest by {accuracy.flips[0].reference_margin:.2g} logits"
    row("images that flip", disagreeing, _of_images(gates, "disagreement", agreement.images), detail, "%")
    detail = f"mean {accuracy.mean_error:.1e}, p99.9 {accuracy.p999_error:.1e}"
    if accuracy.not_finite:
        detail = f"NaN or infinity for {accuracy.not_finite} images"
    row("logits on data", accuracy.scaled_error, tolerance.allowed, detail, tolerance.unit, tolerance.basis)
    row("cosine on data", 1 - accuracy.least_cosine, gates.cosine_distance, f"least {accuracy.least_cosine:.8f}", "")
    if accuracy.unreadable:
        total = accuracy.images + len(accuracy.unreadable)
        names = ", ".join(path.name for path, _ in accuracy.unreadable[:3])
        detail = f"{len(accuracy.unreadable)} of {total} left out: {names}{' ...' * (len(accuracy.unreadable) > 3)}"
        row("unreadable images", 100 * len(accuracy.unreadable) / total, gates.unreadable, detail, "%")
    return rows


def _of_images(gates: Gates, name: str, images: int) -> float:
    """The gate in percent of so many images; by default one image, at least."""
    gate: float = getattr(gates, name)
    return gate if name in gates.exact else max(gate, 100 / images)


def _chunks(
    about: EngineDescription,
    data: DataSet,
    unreadable: list[tuple[Path, str]],
    seconds: dict[str, float],
    *,
    strict: bool,
) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """Indices into the data set and the network's input, at most CHUNK images at a time."""
    for first in range(0, len(data.images), CHUNK):
        start = time.perf_counter()
        indices: list[int] = []
        arrays: list[NDArray[np.float32]] = []
        for index, path in enumerate(data.images[first : first + CHUNK], first):
            try:
                arrays.append(preprocess(read_image(path), about.preprocessing))
                indices.append(index)
            except ImageError as error:
                if strict:
                    raise
                unreadable.append((path, str(error)))
        images = np.stack(arrays) if arrays else np.empty(0, np.float32)
        seconds["decode"] += time.perf_counter() - start
        if indices:
            yield indices, images


def _compared(
    about: EngineDescription,
    data: DataSet,
    indices: list[int],
    engine: Logits,
    reference: Logits,
    unreadable: list[tuple[Path, str]],
    scale: Tolerance,
) -> Accuracy:
    names = about.network.answer.class_names
    finite = _finite(engine)
    first = reference.argmax(axis=1)
    # what is not finite has no first class, and so agrees with nothing
    of_engine = np.where(finite, np.where(finite[:, None], engine, 0).argmax(axis=1), -1)
    rows = np.arange(len(indices))
    flips = []
    for row in rows[of_engine != first]:
        answer = int(of_engine[row])
        index = indices[row]
        label = None if data.labels is None else names[data.labels[index]]
        preferred = engine_preferred = math.nan
        if answer >= 0:
            preferred = float(reference[row, first[row]] - reference[row, answer])
            engine_preferred = float(engine[row, answer] - engine[row, first[row]])
        answer_name = names[answer] if answer >= 0 else "NaN"
        flips.append(Flip(data.images[index], label, names[first[row]], answer_name, preferred, engine_preferred))
    of_both: tuple[Side | None, Side | None] = (None, None)
    only_engine = only_reference = 0
    if data.labels is not None:
        labels = np.array(data.labels)[indices]
        ranks, reference_ranks = np.where(finite, _rank(engine, labels), NEVER), _rank(reference, labels)
        of_both = (
            Side(Share.of(ranks < 1), Share.of(ranks < 5)),
            Side(Share.of(reference_ranks < 1), Share.of(reference_ranks < 5)),
        )
        only_engine = int(((ranks < 1) & (reference_ranks >= 1)).sum())
        only_reference = int(((reference_ranks < 1) & (ranks >= 1)).sum())
    errors = np.abs(engine[finite] - reference[finite])
    p999 = float(np.quantile(errors, 0.999)) if errors.size else float("nan")
    return Accuracy(
        data=data,
        images=len(indices),
        engine=of_both[0],
        reference=of_both[1],
        only_engine=only_engine,
        only_reference=only_reference,
        mcnemar_p=None if data.labels is None else mcnemar_p(only_engine, only_reference),
        agreement=Share.of(of_engine == first),
        flips=tuple(sorted(flips, key=_surest_first)),
        scaled_error=scale.error(engine, reference) if finite.all() else float("nan"),
        largest_error=float(errors.max()) if finite.all() else float("nan"),
        mean_error=float(errors.mean()) if errors.size else float("nan"),
        p999_error=p999,
        least_cosine=float(_cosines(engine, reference).min()) if finite.all() else float("nan"),
        not_finite=int((~finite).sum()),
        unreadable=tuple(unreadable),
        seconds={},
    )


def _surest_first(flip: Flip) -> float:
    return -math.inf if math.isnan(flip.reference_margin) else -flip.reference_margin


def _finite(logits: Logits) -> NDArray[np.bool_]:
    """Which images have no NaN and no infinity."""
    return np.asarray(np.isfinite(logits).all(axis=1))


def _rank(logits: Logits, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes come before the right one; ties in the order of the index, as argmax has it."""
    right = logits[np.arange(len(labels)), labels][:, None]
    before = np.arange(logits.shape[1]) < labels[:, None]
    return np.asarray(((logits > right) | ((logits == right) & before)).sum(axis=1))


def _cosines(first: Logits, second: Logits) -> NDArray[np.float64]:
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    return np.where(lengths > 0, (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1), both_zero.astype(np.float64))
