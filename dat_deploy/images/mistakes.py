"""Known mistakes of preprocessing, each made on purpose; the first row of every table is right.

`diagnose` looks for the fewest that together explain what another pipeline made.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dat_deploy.images.preprocess import Preprocessing

__all__ = ["COLOURS", "EXPLAINED_UNITS", "FRAMES", "LAYOUTS", "NORMALISATIONS", "RESAMPLINGS", "Pipeline", "diagnose"]

# Mistakes explain an array if making them, too, leaves a difference that is rounding.
EXPLAINED_UNITS = 1.5

Array = NDArray[Any]
Floats = NDArray[np.floating[Any]]
Resample = Callable[[Image.Image, tuple[int, int]], Floats]  # to (width, height): [h, w, 3], 0 to 255
Frame = Callable[[tuple[int, int], Preprocessing], tuple[tuple[int, int], tuple[int, int]]]


def _pil(resampling: Image.Resampling) -> Resample:
    return lambda picture, size: np.asarray(picture.resize(size, resampling), dtype=np.float32)


def _float_resize(picture: Image.Image, size: tuple[int, int], shift: tuple[float, float] = (0.0, 0.0)) -> Floats:
    """PIL's bicubic without rounding to 8 bits, read `shift` (x, y) pixels of the picture further."""
    pad = 1 + math.ceil(max(map(abs, shift)))
    pixels = np.pad(np.asarray(picture, dtype=np.float32), ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    box = (pad + shift[0], pad + shift[1], pad + shift[0] + picture.width, pad + shift[1] + picture.height)
    whole = not any(shift)
    planes = []
    for channel in range(3):
        plane = pixels[pad:-pad, pad:-pad, channel] if whole else pixels[..., channel]
        resized = Image.fromarray(np.ascontiguousarray(plane)).resize(
            size, Image.Resampling.BICUBIC, None if whole else box
        )
        planes.append(np.asarray(resized))
    return np.stack(planes, axis=-1)


def _shifted(pixels: float) -> Resample:
    return lambda picture, size: _float_resize(picture, size, (pixels, pixels))


def _from_corners(picture: Image.Image, size: tuple[int, int]) -> Floats:
    """Bicubic at i·scale instead of (i + ½)·scale - ½."""
    return _float_resize(picture, size, ((1 - picture.width / size[0]) / 2, (1 - picture.height / size[1]) / 2))


def _taps(kernel: str, coordinates: str) -> Resample:
    """A resize that reads the nearest 1, 2 or 4 pixels a side, however far it scales down: no antialiasing."""

    def resample(picture: Image.Image, size: tuple[int, int]) -> Floats:
        samples = np.asarray(picture, dtype=np.float32)
        for axis, length in ((0, size[1]), (1, size[0])):
            samples = _resample_axis(samples, axis, length, kernel, coordinates)
        return samples

    return resample


def _resample_axis(samples: Floats, axis: int, length: int, kernel: str, coordinates: str) -> Floats:
    source = samples.shape[axis]
    i = np.arange(length)
    at = {
        "half-pixel": (i + 0.5) * source / length - 0.5,
        "asymmetric": i * source / length,
        "align-corners": i * (source - 1) / max(length - 1, 1),
    }[coordinates]
    first = np.floor(at).astype(int)
    t = (at - first)[:, None]  # distance behind the tap `first`
    if kernel == "nearest":
        taps, weights = first[:, None], np.ones((length, 1))
    elif kernel == "linear":
        taps, weights = first[:, None] + [0, 1], np.concatenate([1 - t, t], axis=1)
    else:  # Keys' cubic with a = -0.75, as OpenCV and torch have it
        a, distance = -0.75, np.abs(np.concatenate([t + 1, t, 1 - t, 2 - t], axis=1))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        taps, weights = first[:, None] + [-1, 0, 1, 2], np.where(distance <= 1, near, far)
    taps = np.clip(taps, 0, source - 1)
    shape = [1] * samples.ndim
    shape[axis] = length
    total: Floats = sum(
        np.take(samples, taps[:, k], axis=axis) * weights[:, k].astype(np.float32).reshape(shape)
        for k in range(taps.shape[1])
    )
    return total


RESAMPLINGS: tuple[tuple[str, Resample], ...] = (
    ("", _pil(Image.Resampling.BICUBIC)),
    ("bilinear resize instead of bicubic", _pil(Image.Resampling.BILINEAR)),
    ("nearest-neighbour resize instead of bicubic", _pil(Image.Resampling.NEAREST)),
    ("nearest-neighbour resize instead of bicubic", _taps("nearest", "asymmetric")),
    ("Lanczos resize instead of bicubic", _pil(Image.Resampling.LANCZOS)),
    ("resize in float instead of 8 bits, without clipping in between", _float_resize),
    ("bilinear resize without antialiasing (as cv2.INTER_LINEAR)", _taps("linear", "half-pixel")),
    ("bicubic resize without antialiasing (as cv2.INTER_CUBIC)", _taps("cubic", "half-pixel")),
    ("half-pixel shift in the resize (its first sample at the first pixel's centre)", _from_corners),
    ("half-pixel shift in the resize (to the right and down)", _shifted(-0.5)),
    ("half-pixel shift in the resize (to the left and up)", _shifted(0.5)),
    ("half-pixel shift in a bilinear resize without antialiasing", _taps("linear", "asymmetric")),
    ("half-pixel shift in a bilinear resize without antialiasing (align_corners)", _taps("linear", "align-corners")),
    ("half-pixel shift in a bicubic resize without antialiasing", _taps("cubic", "asymmetric")),
    ("half-pixel shift in a bicubic resize without antialiasing (align_corners)", _taps("cubic", "align-corners")),
)


def _centre(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[tuple[int, int], tuple[int, int]]:
    """`size`, and where a centre crop of it begins, both (x, y)."""
    height, width = preprocessing.image_size
    return size, (round((size[0] - width) / 2), round((size[1] - height) / 2))


def _covering(picture: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a picture of that size that covers `least` (height, width) and keeps its aspect ratio."""
    scale = max(least[1] / picture[0], least[0] / picture[1])
    return max(int(picture[0] * scale), least[1]), max(int(picture[1] * scale), least[0])


FRAMES: tuple[tuple[str, Frame], ...] = (
    ("", lambda _, how: _centre(how.resize_size[::-1], how)),
    ("aspect ratio kept in the resize", lambda size, how: _centre(_covering(size, how.resize_size), how)),
    ("no crop, resized to the network's size at once", lambda _, how: (how.image_size[::-1], (0, 0))),
    (
        "aspect ratio kept in the resize, and its short side is the network's",
        lambda size, how: _centre(_covering(size, how.image_size), how),
    ),
    ("crop of the corner instead of the centre", lambda _, how: (how.resize_size[::-1], (0, 0))),
)

# (samples in 0..255) · scale + shift, from mean and std, each [3]
NORMALISATIONS: tuple[tuple[str, Callable[[Floats, Floats], tuple[Floats, Floats]]], ...] = (
    ("", lambda mean, std: (1 / (255 * std), -mean / std)),
    ("missing normalisation (samples in 0..1)", lambda mean, _: (np.full(3, 1 / 255), 0 * mean)),
    ("missing normalisation (samples in 0..255)", lambda mean, _: (np.ones(3), 0 * mean)),
    ("samples not divided by 255 before mean and std", lambda mean, std: (1 / std, -mean / std)),
    ("mean and std not divided by 255", lambda mean, std: (1 / (255 * 255 * std), -mean / std)),
    ("mean subtracted and not divided by std", lambda mean, _: (np.full(3, 1 / 255), -mean)),
    ("mean 0.5 and std 0.5 instead of the network's", lambda mean, _: (np.full(3, 2 / 255), 0 * mean - 1)),
)
# Whether channels are swapped, and mean and std with them.
COLOURS = (
    ("", False, False),
    ("BGR instead of RGB", True, False),
    ("BGR instead of RGB, swapped after the normalisation", True, True),
)
# [B, 3, H, W] that holds channels-last data in its order
LAYOUTS = (("", False), ("reshaped from channels last instead of transposed", True))


@dataclass(frozen=True)
class Pipeline:
    """A pipeline with its mistakes: [3, H, W] of a picture."""

    mistakes: tuple[str, ...]
    resample: Resample
    frame: Frame
    scale: Floats
    shift: Floats
    swapped: bool
    reshaped: bool

    def samples(self, picture: Image.Image, preprocessing: Preprocessing) -> Floats:
        """[3, H, W], 0 to 255, before colours and normalisation go wrong."""
        size, (left, top) = self.frame(picture.size, preprocessing)
        height, width = preprocessing.image_size
        return self.resample(picture, size)[top : top + height, left : left + width].transpose(2, 0, 1)

    def __call__(self, picture: Image.Image, preprocessing: Preprocessing) -> Floats:
        samples = self.samples(picture, preprocessing)[:: -1 if self.swapped else 1]
        batch = samples * self.scale[:, None, None] + self.shift[:, None, None]
        return batch.transpose(1, 2, 0).reshape(batch.shape) if self.reshaped else batch

    def undone(self, batch: Array) -> Floats:
        """The samples [B, 3, H, W] from which colours and normalisation made `batch`."""
        if self.reshaped:
            count, channels, height, width = batch.shape
            batch = batch.reshape(count, height, width, channels).transpose(0, 3, 1, 2)
        samples = (batch - self.shift[:, None, None]) / self.scale[:, None, None]
        return samples[:, :: -1 if self.swapped else 1].astype(np.float32).clip(0, 255)


def _pipelines(preprocessing: Preprocessing) -> Iterator[list[Pipeline]]:
    """All, in groups that make the same samples."""
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    values = list(itertools.product(NORMALISATIONS, COLOURS, LAYOUTS))
    for (resampling, resample), (framing, frame) in itertools.product(RESAMPLINGS, FRAMES):
        group = []
        for (normalisation, function), (colour, swapped, with_mean), (layout, reshaped) in values:
            order = -1 if with_mean else 1
            scale, shift = function(mean[::order], std[::order])
            names = tuple(name for name in (resampling, framing, colour, normalisation, layout) if name)
            group.append(Pipeline(names, resample, frame, scale, shift, swapped, reshaped))
        yield group


def diagnose(
    batch: Array, pictures: Sequence[Image.Image], preprocessing: Preprocessing
) -> tuple[Pipeline, float] | None:
    """The pipeline of fewest mistakes that explains what another pipeline made.

    Args:
        batch: what it made, [B, 3, H, W]; pictures: of which, the first of them or all.
    Returns:
        the pipeline, and the largest difference that it leaves, in 8-bit levels, below `EXPLAINED_UNITS`; None if
        there is none, or none with a mistake.
    """
    undone: list[Floats] = []
    best: tuple[int, float, Pipeline] | None = None
    for group in _pipelines(preprocessing):
        undone = undone or [pipeline.undone(batch[: len(pictures)]) for pipeline in group]
        samples = np.stack([group[0].samples(picture, preprocessing) for picture in pictures]).clip(0, 255)
        for pipeline, theirs in zip(group, undone, strict=True):
            thinned = np.abs(theirs[..., ::8, ::8] - samples[..., ::8, ::8])
            if thinned.max() >= EXPLAINED_UNITS:  # most fail here, quickly
                continue
            left = float(np.abs(theirs - samples).max())
            if left < EXPLAINED_UNITS and (best is None or (len(pipeline.mistakes), left) < best[:2]):
                best = (len(pipeline.mistakes), left, pipeline)
    return None if best is None or not best[2].mistakes else (best[2], best[1])
