"""Does a pipeline give the network what it was evaluated with? Another resize or order of channels fails silently.

Three sides: this package; upstream's evaluation written out with PIL, sharing no code with it; and arrays that users'
own pipelines made. Differences are in units of one 8-bit level, 1/255 of a sample before mean and std; beside them
stands what they do to the labels, and which known mistakes explain them.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dat_deploy.errors import ExportError, ImageError, ShapeError, UnsupportedError, VerificationError
from dat_deploy.files import atomic_output, check_output
from dat_deploy.images.arrays import describe_array, read_npy
from dat_deploy.images.mistakes import diagnose
from dat_deploy.images.photographs import photographs
from dat_deploy.images.preprocess import (
    FORMATS,
    Preprocessing,
    check_images,
    golden_picture,
    golden_sha256,
    preprocess,
    preprocess_files,
    read_image,
)
from dat_deploy.runners import EngineDescription, EngineOutline, Runner, check_engine, engine_metadata, open_runner

__all__ = [
    "GOLDEN",
    "TOLERANCE_UNITS",
    "Flip",
    "PipelineComparison",
    "PreprocessingReport",
    "check_preprocessing",
    "preprocess_for_engine",
    "write_golden_picture",
]

# Right pipelines differ by rounding: torchvision's resize of 8-bit tensors is 1 unit off PIL's at most, and decoders of
# JPEG are 1 unit off each other. The mildest mistake, a resize in float that does not clip to 8 bits in between, is 14
# units off on the golden picture, and 3 on a photograph.
TOLERANCE_UNITS = 2.0
GOLDEN = "golden picture"

Array = NDArray[Any]
Floats = NDArray[np.floating[Any]]
Source = Path | None  # an image file, or None for the golden picture


@dataclass(frozen=True)
class Flip:
    """An image whose most probable class changes, by name."""

    image: str
    expected: str
    found: str


@dataclass(frozen=True)
class PipelineComparison:
    """One pipeline beside this package.

    Attributes:
        name: `PIL written out`, or the array's file.
        images: how many were compared.
        looks_like: what an array seems to hold; empty of PIL.
        max_units, mean_units: of the differences between samples, in 8-bit levels; over_1: the share above one level.
        flips: of the compared images; None of a backbone, which names no classes.
        mistakes: the fewest that together explain the difference; none where none were needed, or found.
        explanation: what is wrong with it, and how that is known; empty if it passed.
        images_elsewhere, flips_elsewhere: photographs that an array does not hold, and their flips if the same mistakes
            are made on them.
        tolerance_units: the largest `max_units` that passes.
    """

    name: str
    images: int
    looks_like: str
    max_units: float
    mean_units: float
    over_1: float
    flips: tuple[Flip, ...] | None
    mistakes: tuple[str, ...]
    explanation: str
    images_elsewhere: int
    flips_elsewhere: tuple[Flip, ...]
    tolerance_units: float

    @property
    def passed(self) -> bool:
        return self.max_units <= self.tolerance_units and not self.flips and not self.mistakes


@dataclass(frozen=True)
class PreprocessingReport:
    """What `check_preprocessing` saw; `notes` is what the user must know beside it.

    Attributes:
        golden_here: SHA-256 of the golden picture as this installation preprocesses it.
        golden_expected: as the engine's file says; None for PyTorch, which has no file.
    """

    engine: EngineDescription
    golden_here: str
    golden_expected: str | None
    comparisons: tuple[PipelineComparison, ...]
    notes: tuple[str, ...]

    @property
    def golden_passed(self) -> bool:
        return self.golden_expected in (None, self.golden_here)

    @property
    def passed(self) -> bool:
        trained = self.engine.network.preprocessing
        return (
            self.golden_passed
            and self.engine.preprocessing == trained
            and all(each.passed for each in self.comparisons)
        )

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        name = self.engine.name
        if self.engine.preprocessing != self.engine.network.preprocessing:
            return (
                f"{name} says another preprocessing than its network was trained with: {self.engine.preprocessing}. "
                f"Export it again."
            )
        if not self.golden_passed:
            return (
                f"this installation preprocesses otherwise than the one that exported {name}: the golden picture gives "
                f"sha256 {self.golden_here[:12]}, not {str(self.golden_expected)[:12]}. Install a released Pillow and "
                f"NumPy, or export it again here."
            )
        failures = [each for each in self.comparisons if not each.passed]
        if not failures:
            worst = max(each.max_units for each in self.comparisons)
            return (
                f"{', '.join(each.name for each in self.comparisons)}: as {name} was evaluated, at most {worst:.2f} "
                f"units of 1/255 apart, and no label flips."
            )
        first = failures[0]
        flips = "" if first.flips is None else f", {len(first.flips)} of {first.images} labels flip"
        return (
            f"{first.name} is not what {name} was evaluated with: samples are up to {first.max_units:.2f} units of "
            f"1/255 off where {first.tolerance_units:g} are allowed{flips}; {first.explanation}."
        )

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        for comparison, row in zip(self.comparisons, fields["comparisons"], strict=True):
            row["passed"] = comparison.passed
        return {"passed": self.passed, "verdict": self.verdict, **fields}

    def raise_if_failed(self) -> None:
        """Raises VerificationError with the verdict unless everything agreed."""
        if not self.passed:
            raise VerificationError(self.verdict)


def check_preprocessing(
    engine: str,
    *,
    images: Sequence[Path] | None = None,
    arrays: Sequence[Path] | None = None,
    checkpoint: Path | None = None,
    tolerance_units: float = TOLERANCE_UNITS,
) -> PreprocessingReport:
    """Compare this package's preprocessing with PIL written out, and with what users' own pipelines made.

    Args:
        engine: `[RUNTIME:]TARGET`, see `open_runner`.
        images: that the arrays hold, in their order; without any, arrays hold the golden picture alone (see
            `write_golden_picture`), and the photographs of scikit-image are looked at beside it.
        arrays: .npy files, [B, 3, H, W], or [3, H, W] of one image; each is another pipeline's output for all images.
        checkpoint: for `pytorch:VARIANT`.
        tolerance_units: the largest difference that passes, in 8-bit levels.

    Returns:
        The report, passed or failed; `raise_if_failed` turns a failure into an error.

    Raises:
        ImageError: if an image or an array cannot be read.
        ShapeError: if an array has another shape than the engine takes, or holds another number of images.
        ExportError: if the engine's file does not say what the golden picture gives.
    """
    metadata = engine_metadata(engine)
    if metadata is not None and not metadata.golden_sha256:
        raise ExportError(
            f"{engine} has no golden_sha256 in its metadata, so nothing says what its preprocessing gave where it was "
            f"exported; dat-deploy {metadata.version} made it before there was one. Export it again."
        )
    outline = check_engine(engine, checkpoint=checkpoint)
    check_images(images or ())
    notes = []
    sources: list[Source] = list(images) if images else [None]
    elsewhere: list[Source] = []
    if not images:
        try:
            elsewhere += photographs()
        except UnsupportedError as error:
            notes.append(f"the golden picture alone was compared: {error}")
    outputs = [_read_array(Path(path), sources, outline) for path in arrays or ()]  # before anything takes time
    with open_runner(engine, checkpoint=checkpoint) as runner:
        about = runner.description
        judge = _Judge(runner, sources, elsewhere, tolerance_units)
        rows = [judge.compare_pil()]
        rows += [judge.compare(str(path), array) for path, array in zip(arrays or (), outputs, strict=True)]
    if not judge.names:
        notes.append(f"{about.name} is a backbone: it names no classes, so no flips were counted.")
    elif "random weights" in about.weights_source:
        notes.append(f"the engine holds {about.weights_source}, so its labels and their flips mean little.")
    return PreprocessingReport(
        engine=about,
        golden_here=golden_sha256(about.preprocessing if metadata is None else metadata.preprocessing),
        golden_expected=None if metadata is None else metadata.golden_sha256,
        comparisons=tuple(rows),
        notes=tuple(notes),
    )


def preprocess_for_engine(
    images: Sequence[Path], engine: str, *, output: Path | None = None, force: bool = False
) -> NDArray[np.float32]:
    """What an engine takes for `images`, [B, 3, H, W] float32; the engine is not opened.

    Args:
        engine: `[RUNTIME:]TARGET`, see `open_runner`.
        output: also write it to this .npy file; force: replace that if it exists.

    Raises:
        ImageError: if an image cannot be read.
    """
    if output is not None:
        check_output(output, force=force)
    about = engine_metadata(engine) or check_engine(engine)
    batch = preprocess_files(images, about.preprocessing)
    if output is not None:
        with atomic_output(output, force=force) as temporary, temporary.open("wb") as file:
            np.save(file, batch, allow_pickle=False)
    return batch


def write_golden_picture(output: Path, *, force: bool = False) -> None:
    """The golden picture as PNG, for users' own pipelines.

    Raises:
        OutputError: as `atomic_output`.
    """
    with atomic_output(output, force=force) as temporary:
        golden_picture().save(temporary, "PNG")


def _picture(source: Source) -> Image.Image:
    return golden_picture() if source is None else read_image(source)


def _name(source: Source) -> str:
    return GOLDEN if source is None else str(source)


def _written_out(source: Source, preprocessing: Preprocessing) -> Floats:
    """Upstream's evaluation, [3, H, W]: open, convert, resize, crop the centre, scale, normalise.

    It shares no code with `preprocess`, and computes in float64. As `read_image`, it obeys EXIF orientation; samples of
    more than 8 bits, which PIL's own conversion clips, it leaves to `read_image`.
    """
    if source is None:
        picture = golden_picture()
    else:
        with Image.open(source, formats=FORMATS) as file:
            mode = file.mode
            with contextlib.suppress(Exception):  # damaged EXIF is no reason to refuse the picture
                ImageOps.exif_transpose(file, in_place=True)
            picture = read_image(source) if mode[0] in "IF" else file.convert("RGBA").convert("RGB")
    (height, width), (resize_height, resize_width) = preprocessing.image_size, preprocessing.resize_size
    left, top = round((resize_width - width) / 2), round((resize_height - height) / 2)
    for size in ((resize_width, picture.height), (resize_width, resize_height)):  # the width first, in any Pillow
        picture = picture.resize(size, resample=Image.Resampling.BICUBIC)
    picture = picture.crop((left, top, left + width, top + height))
    planes = []
    for plane, mean, std in zip(picture.split(), preprocessing.mean, preprocessing.std, strict=True):
        planes.append((np.asarray(plane) / 255.0 - mean) / std)
    return np.stack(planes)


# Users' arrays.


@dataclass(frozen=True)
class _PipelineOutput:
    """An array as [B, 3, H, W]; layout: the mistake that this undid, if any."""

    batch: Array
    looks_like: str
    layout: str = ""


def _read_array(path: Path, sources: Sequence[Source], about: EngineOutline) -> _PipelineOutput:
    """Raises ImageError if the file holds no array of finite numbers, ShapeError if it is of another shape."""
    array = read_npy(path)
    height, width = about.image_size
    what = "the golden picture" if None in sources else _images(len(sources))
    batch, layout = array[None] if array.ndim == 3 else array, ""
    if batch.ndim == 4 and batch.shape[1:] != (3, height, width) and batch.shape[1:] == (height, width, 3):
        batch, layout = batch.transpose(0, 3, 1, 2), "channels last instead of [B, 3, H, W]"
    if batch.ndim != 4 or batch.shape[1:] != (3, height, width):
        raise ShapeError(
            f"array '{path}' has shape {list(array.shape)}; {about.name} takes [{len(sources)}, 3, {height}, {width}] "
            f"for {what}. Resize and crop to {height}x{width} first."
        )
    if len(batch) != len(sources):
        raise ShapeError(
            f"array '{path}' holds {_images(len(batch))} and is compared with {what}. Put into it what your pipeline "
            f"makes of exactly these, in their order."
        )
    for source, image in zip(sources, batch, strict=True):
        if not np.isfinite(image).all():
            raise ImageError(
                f"array '{path}' holds NaN or infinity for {_name(source)}; accepted are finite numbers. Look for a "
                f"division by a std of zero."
            )
    return _PipelineOutput(
        np.array(batch), describe_array(array, about.preprocessing, channels_last=bool(layout)), layout
    )


def _images(count: int) -> str:
    return f"{count} {'image' if count == 1 else 'images'}"


class _Judge:
    """Compares what pipelines gave with what this package gives, and the labels of an engine for both.

    Args:
        sources: the images that arrays hold; elsewhere: those that they do not.
    """

    def __init__(self, runner: Runner, sources: list[Source], elsewhere: list[Source], tolerance_units: float) -> None:
        self.names = runner.description.network.answer.class_names
        self.preprocessing = runner.description.preprocessing
        self.runner, self.sources, self.elsewhere = runner, sources, elsewhere
        self.tolerance_units = tolerance_units
        self.ours = self._batch(lambda source: preprocess(_picture(source), self.preprocessing), sources + elsewhere)
        self.labels = self._labels(self.ours)

    def compare_pil(self) -> PipelineComparison:
        batch = self._batch(lambda source: _written_out(source, self.preprocessing), self.sources + self.elsewhere)
        row = self._row("PIL written out", batch)
        return (
            row
            if row.passed
            else replace(row, explanation="this package or Pillow is damaged here, install both again")
        )

    def compare(self, name: str, output: _PipelineOutput) -> PipelineComparison:
        row = replace(self._row(name, output.batch), looks_like=output.looks_like)
        layout = (output.layout,) if output.layout else ()
        if row.passed and not layout:
            return row
        if row.max_units <= self.tolerance_units:
            why = f"explained by {output.layout}" if layout else "rounding flips labels of images between two classes"
            return replace(row, mistakes=layout, explanation=why)
        diagnosis = diagnose(output.batch, [_picture(source) for source in self.sources[:2]], self.preprocessing)
        if diagnosis is None:
            why = "no known mistake explains it"
            return replace(
                row, mistakes=layout, explanation=f"{output.layout}, and beside that {why}" if layout else why
            )
        pipeline, left_units = diagnosis
        mistakes = layout + pipeline.mistakes
        why = f"explained by {' and '.join(mistakes)}, within {left_units:.2f} units"
        if not self.elsewhere:
            return replace(row, mistakes=mistakes, explanation=why)
        batch = self._batch(lambda source: pipeline(_picture(source), self.preprocessing), self.elsewhere)
        flips = self._flips(batch, len(self.sources)) or ()
        return replace(row, mistakes=mistakes, explanation=why, images_elsewhere=len(batch), flips_elsewhere=flips)

    def _row(self, name: str, batch: Array) -> PipelineComparison:
        std = np.array(self.preprocessing.std)[:, None, None]
        units = np.abs(batch - self.ours[: len(batch)].astype(np.float64)) * std * 255
        flips = self._flips(batch, 0)
        return PipelineComparison(
            name=name,
            images=len(batch),
            looks_like="",
            max_units=float(units.max()),
            mean_units=float(units.mean()),
            over_1=float((units > 1).mean()),
            flips=flips,
            mistakes=(),
            explanation="",
            images_elsewhere=0,
            flips_elsewhere=(),
            tolerance_units=self.tolerance_units,
        )

    def _flips(self, batch: Array, first: int) -> tuple[Flip, ...] | None:
        """Of `batch`, whose images are those from `first` on."""
        if not self.names:
            return None
        images = (self.sources + self.elsewhere)[first : first + len(batch)]
        rows = zip(images, self.labels[first:], self._labels(batch), strict=False)
        return tuple(Flip(_name(image), old, new) for image, old, new in rows if old != new)

    def _labels(self, batch: Array) -> list[str]:
        if not self.names:
            return []
        logits = self.runner.logits(batch.astype(np.float32))
        return [self.names[row.argmax()] if np.isfinite(row).all() else "nothing (NaN)" for row in logits]

    def _batch(self, pipeline: Callable[[Source], Array], sources: Sequence[Source]) -> NDArray[np.float32]:
        return np.stack([pipeline(source) for source in sources]).astype(np.float32)
