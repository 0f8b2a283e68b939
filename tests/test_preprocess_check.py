"""The preprocessing contract: the golden picture's hash, and pipelines of users' own, diagnosed by name.

The pipelines here are written with PIL, NumPy and torch, not with the tables that the diagnosis tries.
"""

import contextlib
import importlib.util
import io
import json
import pickle
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from dat_deploy import api, cli
from dat_deploy.engine.aotinductor import package as package_module
from dat_deploy.engine.backend import BuildRequest
from dat_deploy.engine.passport import Profile, write_engine
from dat_deploy.errors import DatDeployError, ExportError, ImageError, ShapeError, VerificationError
from dat_deploy.images import mistakes
from dat_deploy.images import preprocess as preprocess_module
from dat_deploy.images.labels import imagenet_class_names
from dat_deploy.images.photographs import photographs
from dat_deploy.images.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    golden_picture,
    golden_sha256,
    preprocess,
)
from dat_deploy.metadata import FileMetadata, read_metadata
from dat_deploy.networks.dat.variants import VARIANTS
from dat_deploy.runners import Runner, engine_metadata
from dat_deploy.runners.base import Images, describe
from dat_deploy.validate import preprocessing as module
from dat_deploy.validate.preprocessing import GOLDEN, PreprocessingReport, check_preprocessing

Array = NDArray[Any]
TINY = VARIANTS["tiny"].preprocessing
MEAN, STD = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
GOLDEN_SHA256 = {
    "tiny": "480aec5470133761c6e077b969d17c731de615e8c85b2e73afa218cd04576454",
    "base-384": "47e5f3992923cb529232905754185b64fd24ad102bd16c7f9660049b6a642477",
    "pp-base-384": "dc7742bd4c1d2c3e7a7ee89ba55d35757872aaa4808e4377832b39a61f51f6aa",
    "demo": "3041cb574d1ad1caa8e1e254d68b54c34358a81fcde1ac21668dd6ca278c0aaa",
}


# The golden picture.


@pytest.mark.parametrize(("name", "sha256"), GOLDEN_SHA256.items(), ids=list(GOLDEN_SHA256))
def test_the_golden_picture_gives_the_committed_hash(name: str, sha256: str) -> None:
    assert golden_sha256(VARIANTS[name].preprocessing) == sha256


STEPS_CHANGED = {
    "another mean": (lambda picture: picture, replace(TINY, mean=(0.5, 0.456, 0.406))),
    "another std": (lambda picture: picture, replace(TINY, std=(0.229, 0.224, 0.226))),
    "no normalisation": (lambda picture: picture, replace(TINY, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))),
    "no crop": (lambda picture: picture, replace(TINY, resize_size=(224, 224))),
    "another crop": (lambda picture: picture, replace(TINY, resize_size=(256, 257))),
    "BGR": (lambda picture: Image.merge("RGB", picture.split()[::-1]), TINY),
    "mirrored": (lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), TINY),
    "upside down": (lambda picture: picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM), TINY),
    "transposed": (lambda picture: picture.transpose(Image.Transpose.TRANSPOSE), TINY),
    "aspect ratio kept": (lambda picture: picture.crop((40, 0, 280, 240)), TINY),
    "bilinear": (lambda picture: picture.resize((256, 256), Image.Resampling.BILINEAR), TINY),
    "grey": (lambda picture: picture.convert("L").convert("RGB"), TINY),
}


@pytest.mark.parametrize(("change", "preprocessing"), STEPS_CHANGED.values(), ids=STEPS_CHANGED)
def test_the_hash_shows_a_step_that_is_changed(
    change: Callable[[Image.Image], Image.Image], preprocessing: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = change(golden_picture())
    monkeypatch.setattr(preprocess_module, "golden_picture", lambda: picture)
    assert golden_sha256(preprocessing) != GOLDEN_SHA256["tiny"]


def test_no_part_of_the_golden_picture_is_missed_by_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    right = np.asarray(golden_picture())
    assert right.shape == (240, 320, 3)
    for y, x, channel in [(20, 24, 0), (72, 88, 1), (70, 230, 2), (150, 150, 0), (200, 160, 1), (219, 295, 2)]:
        changed = right.copy()
        changed[y, x, channel] ^= 128
        monkeypatch.setattr(preprocess_module, "golden_picture", lambda c=changed: Image.fromarray(c))
        assert golden_sha256(TINY) != GOLDEN_SHA256["tiny"]


def test_the_golden_picture_is_written_as_it_is(tmp_path: Path) -> None:
    module.write_golden_picture(tmp_path / "golden.png")
    with Image.open(tmp_path / "golden.png") as picture:
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), np.asarray(golden_picture()))


# Files that say what it gives.


def with_golden(source: Path, path: Path, golden: str | None) -> Path:
    """A copy of the file that says another hash, or none."""
    model = onnx.load(source)
    (entry,) = (p for p in model.metadata_props if p.key == "dat_deploy.golden_sha256")
    if golden is None:
        model.metadata_props.remove(entry)
    else:
        entry.value = json.dumps(golden)
    onnx.save(model, path)
    return path


def test_an_exported_file_carries_the_hash_of_its_own_preprocessing(demo_onnx: Path) -> None:
    assert read_metadata(demo_onnx).golden_sha256 == GOLDEN_SHA256["demo"]


def test_a_package_carries_it_in_its_passport(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(package_module, "compile_package", lambda _, __, path, **___: path.write_bytes(b"compiled"))
    content, passport, _ = package_module.package_and_passport(
        VARIANTS["demo"],
        "fp32",
        BuildRequest(
            backend="aotinductor",
            profiles=(Profile.parse("1"),),
            variant="demo",
            device="cpu",
            command=("dat-deploy", "build"),
        ),
    )
    write_engine(tmp_path / "demo.pt2", content, passport)
    recorded = engine_metadata(str(tmp_path / "demo.pt2"))
    assert recorded is not None
    assert recorded.golden_sha256 == GOLDEN_SHA256["demo"]


# An engine that costs nothing: logits are products of the averages of 7x7 blocks with fixed numbers.


class Fake(Runner):
    def __init__(self, variant: str, features: tuple[int, ...] | None = None) -> None:
        network = VARIANTS[variant] if features is None else VARIANTS[variant].as_backbone(features)
        metadata = FileMetadata(
            network=network,
            batch=None,
            dynamic_image_size=False,
            lowering="function",
            precision="fp32",
            opset_version=18,
            preprocessing=network.preprocessing,
            class_names=(),
            weights_sha256="",
            weights_source="a test",
            version="0",
        )
        self.description = describe(
            metadata,
            f"pytorch:{variant}",
            None,
            outputs=("logits",) if features is None else ("stage_3",),
            runtime="fake",
            runtime_version="0",
            device="cpu",
            precision="fp32",
            threads=1,
        )
        self.weights = np.random.default_rng(5).standard_normal((147, network.classes))
        self.batches: list[Images] = []

    def _run(self, images_nchw: Images) -> dict[str, Images]:
        self.batches.append(images_nchw)
        averages = images_nchw.reshape(len(images_nchw), 3, 7, 32, 7, 32).mean(axis=(3, 5)).reshape(-1, 147)
        return {"logits": (averages @ self.weights).astype(np.float32)}

    def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    runner = Fake("tiny")
    monkeypatch.setattr(module, "open_runner", lambda *_, **__: runner)
    monkeypatch.setattr(module, "photographs", lambda: photographs(1))  # that are looked at beside the golden picture
    return runner


def check(array: Array, tmp_path: Path, **arguments: Any) -> PreprocessingReport:
    np.save(tmp_path / "mine.npy", array)
    return check_preprocessing("pytorch:tiny", arrays=[tmp_path / "mine.npy"], **arguments)


# A right pipeline passes.


def normalised(samples: Array) -> Array:
    """[H, W, 3] in 0..255 -> [3, H, W]."""
    return ((samples / 255 - MEAN) / STD).transpose(2, 0, 1).astype(np.float32)


def cropped(samples: Array, size: int = 224) -> Array:
    top, left = (samples.shape[0] - size) // 2, (samples.shape[1] - size) // 2
    return samples[top : top + size, left : left + size].astype(np.float64)


def resized(picture: Image.Image, size: tuple[int, int] = (256, 256), how: str = "BICUBIC") -> Array:
    return np.asarray(picture.resize(size, Image.Resampling[how]))


def right(picture: Image.Image) -> Array:
    return normalised(cropped(resized(picture)))


RIGHT = {
    "as it is": lambda picture: right(picture),
    "with the batch's axis": lambda picture: right(picture)[None],
    "in float64": lambda picture: right(picture).astype(np.float64),
    "in float16": lambda picture: right(picture).astype(np.float16),
    "in Fortran's order": lambda picture: np.asfortranarray(right(picture)),
    "big-endian": lambda picture: right(picture).astype(">f4"),
    "one unit off everywhere": lambda picture: right(picture) + 1 / (255 * STD[:, None, None]),
    "resized as an 8-bit tensor": lambda picture: normalised(
        cropped(
            F.interpolate(
                torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], (256, 256), mode="bicubic", antialias=True
            )[0]
            .permute(1, 2, 0)
            .numpy()
        )
    ),
}


@pytest.mark.parametrize("pipeline", RIGHT.values(), ids=RIGHT)
@pytest.mark.usefixtures("fake")
def test_a_right_array_passes(pipeline: Callable[[Image.Image], Array], tmp_path: Path) -> None:
    report = check(pipeline(golden_picture()), tmp_path)
    assert report.passed
    row = report.comparisons[1]
    assert (row.mistakes, row.explanation, row.flips) == ((), "", ())
    assert row.looks_like.endswith(": normalised samples")
    report.raise_if_failed()


@pytest.mark.usefixtures("fake")
def test_the_tolerance_is_two_units(tmp_path: Path) -> None:
    unit = 1 / (255 * STD[:, None, None])
    assert check(right(golden_picture()) + 1.99 * unit, tmp_path).passed
    assert not check(right(golden_picture()) + 2.01 * unit, tmp_path).passed
    assert check(right(golden_picture()) + 2.01 * unit, tmp_path, tolerance_units=2.1).passed


@pytest.mark.usefixtures("fake")
def test_units_are_8_bit_levels(tmp_path: Path) -> None:
    array = right(golden_picture())
    array[1, :, :112] += 3 / (255 * 0.224)
    row = check(array, tmp_path).comparisons[1]
    assert row.max_units == pytest.approx(3, abs=1e-4)
    assert (row.mean_units, row.over_1) == (pytest.approx(0.5, abs=1e-4), pytest.approx(1 / 6))


# Each known mistake is named.


def interpolated(picture: Image.Image, **how: Any) -> Array:
    samples = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    return cropped(F.interpolate(samples, (256, 256), **how)[0].permute(1, 2, 0).numpy())


def at_corners(picture: Image.Image) -> Array:
    """Bilinear at i * scale, as TensorFlow 1 and others had it."""
    samples = np.asarray(picture).astype(np.float64)
    for axis in (0, 1):
        at = np.arange(256) * samples.shape[axis] / 256
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, samples.shape[axis] - 1)
        part = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        samples = np.take(samples, low, axis) * (1 - part) + np.take(samples, high, axis) * part
    return cropped(samples)


def short_side(picture: Image.Image, side: int) -> tuple[int, int]:
    return tuple(side * length // min(picture.size) for length in picture.size)  # type: ignore[return-value]


def channels_first(samples: Array) -> Array:
    return samples.transpose(2, 0, 1).astype(np.float32)


MISTAKES: dict[str, tuple[Callable[[Image.Image], Array], tuple[str, ...]]] = {
    "BGR": (lambda p: normalised(cropped(resized(p))[..., ::-1]), ("BGR instead of RGB",)),
    "BGR after normalisation": (
        lambda p: right(p)[::-1],
        ("BGR instead of RGB, swapped after the normalisation",),
    ),
    "0..1": (
        lambda p: channels_first(cropped(resized(p)) / 255),
        ("missing normalisation (samples in 0..1)",),
    ),
    "0..255": (
        lambda p: channels_first(cropped(resized(p))),
        ("missing normalisation (samples in 0..255)",),
    ),
    "uint8": (
        lambda p: channels_first(cropped(resized(p))).astype(np.uint8),
        ("missing normalisation (samples in 0..255)",),
    ),
    "samples not divided by 255": (
        lambda p: channels_first((cropped(resized(p)) - MEAN) / STD),
        ("samples not divided by 255 before mean and std",),
    ),
    "mean and std not divided by 255": (
        lambda p: channels_first((cropped(resized(p)) / 255 - 255 * MEAN) / (255 * STD)),
        ("mean and std not divided by 255",),
    ),
    "no std": (
        lambda p: channels_first(cropped(resized(p)) / 255 - MEAN),
        ("mean subtracted and not divided by std",),
    ),
    "0.5": (
        lambda p: channels_first(cropped(resized(p)) / 127.5 - 1),
        ("mean 0.5 and std 0.5 instead of the network's",),
    ),
    "bilinear": (lambda p: normalised(cropped(resized(p, how="BILINEAR"))), ("bilinear resize instead of bicubic",)),
    "nearest": (
        lambda p: normalised(cropped(resized(p, how="NEAREST"))),
        ("nearest-neighbour resize instead of bicubic",),
    ),
    "nearest of torch": (
        lambda p: normalised(interpolated(p, mode="nearest")),
        ("nearest-neighbour resize instead of bicubic",),
    ),
    "Lanczos": (lambda p: normalised(cropped(resized(p, how="LANCZOS"))), ("Lanczos resize instead of bicubic",)),
    "float": (
        lambda p: normalised(interpolated(p, mode="bicubic", antialias=True)),
        ("resize in float instead of 8 bits, without clipping in between",),
    ),
    "bilinear without antialiasing": (
        lambda p: normalised(interpolated(p, mode="bilinear")),
        ("bilinear resize without antialiasing (as cv2.INTER_LINEAR)",),
    ),
    "bicubic without antialiasing": (
        lambda p: normalised(interpolated(p, mode="bicubic")),
        ("bicubic resize without antialiasing (as cv2.INTER_CUBIC)",),
    ),
    "bicubic without antialiasing, rounded": (
        lambda p: normalised(interpolated(p, mode="bicubic").clip(0, 255).round()),
        ("bicubic resize without antialiasing (as cv2.INTER_CUBIC)",),
    ),
    "aspect ratio kept": (
        lambda p: normalised(cropped(resized(p, short_side(p, 256)))),
        ("aspect ratio kept in the resize",),
    ),
    "aspect ratio kept, no margin": (
        lambda p: normalised(cropped(resized(p, short_side(p, 224)))),
        ("aspect ratio kept in the resize, and its short side is the network's",),
    ),
    "no crop": (
        lambda p: normalised(resized(p, (224, 224))),
        ("no crop, resized to the network's size at once",),
    ),
    "corner": (
        lambda p: normalised(resized(p)[:224, :224]),
        ("crop of the corner instead of the centre",),
    ),
    "corners aligned": (
        lambda p: normalised(interpolated(p, mode="bilinear", align_corners=True)),
        ("half-pixel shift in a bilinear resize without antialiasing (align_corners)",),
    ),
    "bicubic, corners aligned": (
        lambda p: normalised(interpolated(p, mode="bicubic", align_corners=True)),
        ("half-pixel shift in a bicubic resize without antialiasing (align_corners)",),
    ),
    "at the corners": (
        lambda p: normalised(at_corners(p)),
        ("half-pixel shift in a bilinear resize without antialiasing",),
    ),
    "channels last": (
        lambda p: right(p).transpose(1, 2, 0),
        ("channels last instead of [B, 3, H, W]",),
    ),
    "reshaped": (
        lambda p: right(p).transpose(1, 2, 0).reshape(3, 224, 224),
        ("reshaped from channels last instead of transposed",),
    ),
    "what OpenCV does if nobody thinks": (
        lambda p: normalised(interpolated(p, mode="bilinear").round()[..., ::-1]).transpose(1, 2, 0)[None],
        (
            "channels last instead of [B, 3, H, W]",
            "bilinear resize without antialiasing (as cv2.INTER_LINEAR)",
            "BGR instead of RGB",
        ),
    ),
    "all but the resize": (
        lambda p: cropped(resized(p)).astype(np.uint8)[..., ::-1],
        (
            "channels last instead of [B, 3, H, W]",
            "BGR instead of RGB",
            "missing normalisation (samples in 0..255)",
        ),
    ),
}


@pytest.mark.parametrize(("pipeline", "mistakes"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.usefixtures("fake")
def test_a_known_mistake_is_named(
    pipeline: Callable[[Image.Image], Array], mistakes: tuple[str, ...], tmp_path: Path
) -> None:
    report = check(pipeline(golden_picture()), tmp_path)
    assert not report.passed
    row = report.comparisons[1]
    assert row.mistakes == mistakes
    assert f"explained by {' and '.join(mistakes)}" in row.explanation
    assert report.verdict.endswith(f"; {row.explanation}.")
    with pytest.raises(VerificationError) as caught:
        report.raise_if_failed()
    assert str(caught.value) == report.verdict


@pytest.mark.parametrize("pixels", [0.5, -0.5])
@pytest.mark.usefixtures("fake")
def test_an_antialiased_resize_that_is_half_a_pixel_off_is_named(pixels: float, tmp_path: Path) -> None:
    def resize(plane: Array) -> Array:  # PIL's bicubic in float, out of a margin that repeats the border
        padded = Image.fromarray(np.pad(plane, 4, mode="edge"))
        box = (4 + pixels, 4 + pixels, 324 + pixels, 244 + pixels)
        return np.asarray(padded.resize((256, 256), Image.Resampling.BICUBIC, box))

    planes = np.asarray(golden_picture()).astype(np.float32).transpose(2, 0, 1)
    report = check(normalised(cropped(np.stack([resize(plane) for plane in planes], axis=-1))), tmp_path)
    (mistake,) = report.comparisons[1].mistakes
    assert mistake.startswith("half-pixel shift in the resize (")


@pytest.mark.parametrize(
    "row",
    [(0, i) for i in range(1, len(mistakes.RESAMPLINGS))] + [(1, i) for i in range(1, len(mistakes.FRAMES))],
    ids=lambda row: (mistakes.RESAMPLINGS, mistakes.FRAMES)[row[0]][row[1]][0],
)
@pytest.mark.usefixtures("fake")
def test_every_row_of_the_tables_is_told_from_every_other(row: tuple[int, int], tmp_path: Path) -> None:
    table, i = row
    resample = mistakes.RESAMPLINGS[i if table == 0 else 0]
    frame = mistakes.FRAMES[i if table == 1 else 0]
    pipeline = mistakes.Pipeline((), resample[1], frame[1], 1 / (255 * STD), -MEAN / STD, False, False)
    report = check(pipeline(golden_picture(), TINY).astype(np.float32), tmp_path)
    assert report.comparisons[1].mistakes == ((resample if table == 0 else frame)[0],)


@pytest.mark.usefixtures("fake")
def test_what_no_mistake_explains_is_said_to_be_that(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((3, 224, 224)).astype(np.float32)
    report = check(array, tmp_path)
    assert report.comparisons[1].mistakes == ()
    assert report.comparisons[1].explanation == "no known mistake explains it"
    report = check(array.transpose(1, 2, 0), tmp_path)
    assert report.comparisons[1].explanation == (
        "channels last instead of [B, 3, H, W], and beside that no known mistake explains it"
    )


LOOKS = {
    "uint8": (lambda a: np.full_like(a, 7, dtype=np.uint8), "uint8 [3, 224, 224], from 7.00 to 7.00: 8-bit samples"),
    "0..255": (lambda a: np.abs(a) * 80, "8-bit samples, not normalised"),
    "0..1": (lambda a: np.abs(a) / 3, "samples in 0..1, not normalised"),
    "beyond": (lambda a: a * 3, "not normalised with this mean and std, which give -2.12 to 2.64"),
    "channels last": (lambda a: a.transpose(1, 2, 0), "float32 [224, 224, 3], channels last, from -2.12 to 2.64"),
}


@pytest.mark.parametrize(("change", "words"), LOOKS.values(), ids=LOOKS)
@pytest.mark.usefixtures("fake")
def test_it_says_what_an_array_looks_like(change: Callable[[Array], Array], words: str, tmp_path: Path) -> None:
    assert words in check(change(right(golden_picture())), tmp_path).comparisons[1].looks_like


# Labels that flip are counted.


def test_flipped_labels_are_counted_and_named(fake: Fake, tmp_path: Path) -> None:
    images = photographs(4)
    arrays = np.stack([right(Image.open(path).convert("RGB")) for path in images])
    wrong = arrays[:, ::-1]

    def best(batch: Array) -> list[str]:
        return [imagenet_class_names()[i] for i in fake(np.ascontiguousarray(batch, np.float32)).argmax(axis=1)]

    flipped = [
        (str(path), old, new) for path, old, new in zip(images, best(arrays), best(wrong), strict=True) if old != new
    ]
    assert flipped
    report = check(wrong, tmp_path, images=images)
    row = report.comparisons[1]
    assert row.flips is not None
    assert [(flip.image, flip.expected, flip.found) for flip in row.flips] == flipped
    assert (row.images, row.images_elsewhere) == (4, 0)
    assert f"{len(flipped)} of 4 labels flip" in report.verdict
    assert check(arrays, tmp_path, images=images).passed


def test_a_label_that_flips_within_the_tolerance_fails(fake: Fake, tmp_path: Path) -> None:
    array = right(golden_picture())
    logits = fake(array[None])[0]
    first, second = np.argsort(-logits)[:2]
    # towards the second class by one unit at most, and the two classes made to lie close together
    direction = (fake.weights[:, second] - fake.weights[:, first]).reshape(3, 7, 7).repeat(32, 1).repeat(32, 2)
    step = np.sign(direction) / (255 * STD[:, None, None])
    fake.weights[:, second] *= 1 + (logits[first] - logits[second] - 1e-3) / logits[second]
    report = check((array + step).astype(np.float32), tmp_path)
    row = report.comparisons[1]
    assert row.max_units == pytest.approx(1, abs=1e-3)
    assert row.flips is not None
    assert [flip.image for flip in row.flips] == [GOLDEN]
    assert not report.passed
    assert row.explanation == "rounding flips labels of images between two classes"


@pytest.mark.usefixtures("fake")
def test_without_images_the_mistake_is_made_on_photographs_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "photographs", photographs)  # all
    row = check(right(golden_picture())[::-1], tmp_path).comparisons[1]
    assert (row.images, row.images_elsewhere) == (1, len(photographs()))
    named = {flip.image for flip in row.flips_elsewhere}
    assert named
    assert named <= {str(path) for path in photographs()}


def test_labels_that_are_nan_are_flips_and_not_classes(fake: Fake, tmp_path: Path) -> None:
    fake.weights = fake.weights * 1e37  # only what was not normalised overflows
    with np.errstate(all="ignore"):
        row = check(np.asarray(channels_first(cropped(resized(golden_picture())))), tmp_path).comparisons[1]
    assert row.flips is not None
    assert [flip.found for flip in row.flips] == ["nothing (NaN)"]


def test_a_backbone_has_differences_and_no_flips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "open_runner", lambda *_, **__: Fake("tiny", (3,)))
    report = check(right(golden_picture())[::-1], tmp_path)
    assert report.comparisons[1].flips is None
    assert report.comparisons[1].mistakes == ("BGR instead of RGB, swapped after the normalisation",)
    assert report.notes == ("pytorch:tiny is a backbone: it names no classes, so no flips were counted.",)
    assert "flip" not in report.verdict


def test_without_scikit_image_the_golden_picture_alone_is_compared(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "photographs", photographs)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "skimage" else find(name))
    report = check(right(golden_picture()), tmp_path)
    assert report.comparisons[0].images == 1
    assert report.notes == (
        "the golden picture alone was compared: the photographs come with scikit-image, which is not installed. "
        "Install it with: pip install 'dat-deploy[demo]'",
    )


# PIL written out agrees with the package, and shows a step that the package loses.


@pytest.mark.usefixtures("fake")
def test_pictures_of_every_kind_agree(tmp_path: Path) -> None:
    picture = golden_picture()
    exif = Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.quantize(64).save(tmp_path / "palette.png", transparency=0)
    picture.convert("L").save(tmp_path / "grey.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.convert("LA").save(tmp_path / "alpha.png")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(tmp_path / "wide.png")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.float32)).save(tmp_path / "float.tif")
    images = sorted(tmp_path.iterdir())
    report = check_preprocessing("pytorch:tiny", images=images)
    assert report.passed
    assert (report.comparisons[0].images, report.comparisons[0].looks_like) == (7, "")
    assert report.comparisons[0].max_units < 1e-3


STEPS_LOST: dict[str, Callable[[Image.Image, Preprocessing], Array]] = {
    "crop": lambda picture, how: preprocess(picture, replace(how, resize_size=how.image_size)),
    "mean": lambda picture, how: preprocess(picture, replace(how, mean=(0.0, 0.0, 0.0))),
    "std": lambda picture, how: preprocess(picture, replace(how, std=(1.0, 1.0, 1.0))),
    "RGB": lambda picture, how: preprocess(picture, how)[::-1],
    "bicubic": lambda picture, how: preprocess(picture.resize((256, 256), Image.Resampling.BILINEAR), how),
}


@pytest.mark.parametrize("lossy", STEPS_LOST.values(), ids=STEPS_LOST)
@pytest.mark.usefixtures("fake")
def test_a_package_that_loses_a_step_fails(
    lossy: Callable[[Image.Image, Preprocessing], Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "preprocess", lossy)
    report = check_preprocessing("pytorch:tiny")
    assert not report.passed
    assert report.verdict.startswith("PIL written out is not what pytorch:tiny was evaluated with: samples are up to ")
    assert report.verdict.endswith("; this package or Pillow is damaged here, install both again.")


# Bad input is one sentence.


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


ZEROS = np.zeros((3, 224, 224), np.float32)


def npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_that_claims_a_petabyte() -> bytes:
    claim = b"(3, 1099511627776, 224), }"
    return npy(ZEROS).replace(b"(3, 224, 224), }".ljust(len(claim)), claim)


BAD: dict[str, tuple[Callable[[Path], object], type[DatDeployError], str]] = {
    "missing": (
        lambda path: None,
        ImageError,
        "array '{path}' does not exist, or is no file; accepted are .npy files. Check the path.",
    ),
    "a folder": (
        lambda path: path.mkdir(),
        ImageError,
        "array '{path}' does not exist, or is no file; accepted are .npy files. Check the path.",
    ),
    "a picture": (
        lambda path: golden_picture().save(path, "PNG"),
        ImageError,
        "array '{path}' is no whole .npy file (the magic string is not correct; expected b'\\x93NUMPY', got "
        "b'\\x89PNG\\r\\n'); accepted is what numpy.save writes. Save the array again.",
    ),
    "empty": (
        lambda path: path.touch(),
        ImageError,
        "array '{path}' is no whole .npy file (EOF: reading magic string, expected 8 bytes got 0); accepted is what "
        "numpy.save writes. Save the array again.",
    ),
    "cut off": (
        lambda path: path.write_bytes(npy(ZEROS)[:-4]),
        ImageError,
        "array '{path}' is no whole .npy file (mmap length is greater than file size); accepted is what numpy.save "
        "writes. Save the array again.",
    ),
    "an array that claims a petabyte": (
        lambda path: path.write_bytes(npy_that_claims_a_petabyte()),
        ImageError,
        "array '{path}' is no whole .npy file (mmap length is greater than file size); accepted is what numpy.save "
        "writes. Save the array again.",
    ),
    "a pickle": (
        lambda path: path.write_bytes(pickle.dumps(Hostile(path.with_name("canary")))),
        ImageError,
        "array '{path}' is no whole .npy file (",
    ),
    "an array of objects": (
        lambda path: np.save(path, np.array([Hostile(path.with_name("canary"))]), allow_pickle=True),
        ImageError,
        "array '{path}' holds Python objects, which only pickle could read; accepted are arrays of float32. Save it "
        "with: numpy.save(file, array.astype('float32'))",
    ),
    "text": (
        lambda path: np.save(path, np.array(["a"])),
        ImageError,
        "array '{path}' holds elements of type <U1; accepted are arrays of float32. Save it with: numpy.save(file, "
        "array.astype('float32'))",
    ),
    "complex": (
        lambda path: np.save(path, ZEROS.astype(np.complex64)),
        ImageError,
        "array '{path}' holds elements of type complex64; accepted are arrays of float32. Save it with: "
        "numpy.save(file, array.astype('float32'))",
    ),
    "no images": (
        lambda path: np.save(path, ZEROS[None][:0]),
        ShapeError,
        "array '{path}' holds 0 images and is compared with the golden picture. Put into it what your pipeline makes "
        "of exactly these, in their order.",
    ),
    "a scalar": (
        lambda path: np.save(path, np.float32(1)),
        ShapeError,
        "array '{path}' has shape []; pytorch:tiny takes [1, 3, 224, 224] for the golden picture. Resize and crop to "
        "224x224 first.",
    ),
    "another size": (
        lambda path: np.save(path, np.zeros((1, 3, 256, 256), np.float32)),
        ShapeError,
        "array '{path}' has shape [1, 3, 256, 256]; pytorch:tiny takes [1, 3, 224, 224] for the golden picture. Resize "
        "and crop to 224x224 first.",
    ),
    "four channels": (
        lambda path: np.save(path, np.zeros((4, 224, 224), np.float32)),
        ShapeError,
        "array '{path}' has shape [4, 224, 224]; pytorch:tiny takes [1, 3, 224, 224] for the golden picture. Resize "
        "and crop to 224x224 first.",
    ),
    "two images for one": (
        lambda path: np.save(path, np.stack([ZEROS, ZEROS])),
        ShapeError,
        "array '{path}' holds 2 images and is compared with the golden picture. Put into it what your pipeline makes "
        "of exactly these, in their order.",
    ),
    "NaN": (
        lambda path: np.save(path, np.where(np.arange(224) == 100, np.float32("nan"), ZEROS)),
        ImageError,
        "array '{path}' holds NaN or infinity for golden picture; accepted are finite numbers. Look for a division by "
        "a std of zero.",
    ),
}


@pytest.mark.parametrize(("make", "kind", "sentence"), BAD.values(), ids=BAD)
def test_a_bad_array_is_one_whole_sentence(
    make: Callable[[Path], object], kind: type[DatDeployError], sentence: str, fake: Fake, tmp_path: Path
) -> None:
    path = tmp_path / "bad.npy"
    make(path)
    with pytest.raises(DatDeployError) as caught:
        check_preprocessing("pytorch:tiny", arrays=[path])
    assert type(caught.value) is kind
    assert caught.value.exit_code == 1
    whole = sentence.replace("{path}", str(path))
    assert str(caught.value) == whole if whole.endswith((".", ")")) else str(caught.value).startswith(whole)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()
    assert fake.batches == []  # before anything takes time


@pytest.mark.usefixtures("fake")
def test_an_array_of_one_image_for_two_is_told(tmp_path: Path) -> None:
    with pytest.raises(ShapeError) as caught:
        check(ZEROS, tmp_path, images=photographs(2))
    assert str(caught.value) == (
        f"array '{tmp_path}/mine.npy' holds 1 image and is compared with 2 images. Put into it what your pipeline "
        f"makes of exactly these, in their order."
    )


@pytest.mark.usefixtures("fake")
def test_a_missing_image_is_named() -> None:
    with pytest.raises(ImageError) as caught:
        check_preprocessing("pytorch:tiny", images=[Path("missing.png")])
    assert str(caught.value).startswith("image 'missing.png' does not exist; ")


def test_an_engine_without_the_hash_is_told(demo_onnx: Path, tmp_path: Path) -> None:
    path = with_golden(demo_onnx, tmp_path / "old.onnx", None)
    with pytest.raises(ExportError) as caught:
        check_preprocessing(str(path))
    assert str(caught.value) == (
        f"{path} has no golden_sha256 in its metadata, so nothing says what its preprocessing gave where it was "
        f"exported; dat-deploy {read_metadata(path).version} made it before there was one. Export it again."
    )


# The command.


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def last(self) -> list[str]:
        return shlex.split(self.out.splitlines()[-1])


Run = Callable[..., Outcome]


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["dat-deploy", "preprocess", *map(str, words)])
        capfd.readouterr()
        with signals_kept(), pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, *capfd.readouterr())

    return run


def test_what_the_package_wrote_is_right_and_what_is_bgr_is_exit_code_2(
    run: Run, demo_batch_3_onnx: Path, tmp_path: Path
) -> None:
    demo_onnx, images, output = demo_batch_3_onnx, photographs(4), tmp_path / "out.npy"
    outcome = run(*images, "--engine", demo_onnx, "--output", output)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{output}: float32 [4, 3, 64, 64], from ")
    named = [word for path in images for word in ("--image", str(path))]
    words = ["dat-deploy", "preprocess", "--check", "--engine", str(demo_onnx), *named, "--array", "YOURS.npy"]
    assert outcome.last == ["next:", *words]

    outcome = run(*words[2:-1], output)  # the fixed batch is 3, the images are 4
    assert (outcome.code, outcome.err) == (0, "")
    assert "0.00  0.000    0.0%      0  ok" in outcome.out
    assert "sha256 3041cb574d1a, as its file says" in outcome.out
    assert outcome.last == ["next:", "dat-deploy", "validate", "--engine", str(demo_onnx)]

    bgr = tmp_path / "bgr.npy"
    np.save(bgr, np.load(output)[:, ::-1])
    outcome = run(*words[2:-1], output, "--array", bgr, "--json", tmp_path / "report.json")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith(f"error: {bgr} is not what {demo_onnx} was evaluated with: samples are up to ")
    assert "; explained by BGR instead of RGB, swapped after the normalisation, within 0.00 units." in outcome.err
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["passed"], f"error: {written['verdict']}\n") == (False, outcome.err)
    assert [row["passed"] for row in written["comparisons"]] == [True, True, False]


def test_an_installation_that_preprocesses_otherwise_is_exit_code_2(run: Run, demo_onnx: Path, tmp_path: Path) -> None:
    path = with_golden(demo_onnx, tmp_path / "other.onnx", "ab" * 32)
    outcome = run("--check", "--engine", path)
    assert outcome.code == 2
    assert outcome.err == (
        f"error: this installation preprocesses otherwise than the one that exported {path}: the golden picture gives "
        f"sha256 3041cb574d1a, not abababababab. Install a released Pillow and NumPy, or export it again here.\n"
    )
    assert "sha256 3041cb574d1a, NOT as its file says" in outcome.out


def test_the_golden_picture_leads_to_the_check(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "golden.png"
    outcome = run("--golden", path, "--engine", "demo.onnx", "--json", tmp_path / "golden.json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.last[1:] == ["dat-deploy", "preprocess", "--check", "--engine", "demo.onnx", "--array", "YOURS.npy"]
    assert json.loads((tmp_path / "golden.json").read_text()) == {"golden": str(path)}
    outcome = run("--golden", path)
    assert (outcome.code, outcome.err) == (
        1,
        f"error: {path} exists; pass --force to replace it, or choose another name.\n",
    )


USAGE = {
    "nothing to do": (
        ["--engine", "x.onnx"],
        "preprocess takes one of --check, --output FILE.npy and --golden FILE.png.",
    ),
    "two things": (
        ["--check", "--golden", "x.png", "--engine", "x.onnx"],
        "preprocess takes one of --check, --output FILE.npy and --golden FILE.png.",
    ),
    "no engine": (["--check"], "preprocess needs --engine, which says how; such as --engine tiny.onnx."),
    "no images": (
        ["--output", "x.npy", "--engine", "x.onnx"],
        "--output is for the arrays of images; name image files.",
    ),
    "array without check": (
        ["a.png", "--output", "x.npy", "--engine", "x.onnx", "--array", "y.npy"],
        "--array is what --check compares; add --check, or leave it out.",
    ),
    "checkpoint of a file": (
        ["--check", "--engine", "x.onnx", "--checkpoint", "y.pth"],
        "--checkpoint is for pytorch:VARIANT, but x.onnx holds its own; leave the option out.",
    ),
}


@pytest.mark.parametrize(("words", "sentence"), USAGE.values(), ids=USAGE)
def test_options_that_do_not_go_together_are_told(words: list[str], sentence: str, run: Run) -> None:
    outcome = run(*words)
    assert (outcome.code, outcome.out, outcome.err) == (1, "", f"error: {sentence}\n")


def test_the_library_has_both_under_the_commands_name(tmp_path: Path) -> None:
    images = photographs(2)
    array = api.preprocess(images, "pytorch:tiny", output=tmp_path / "x.npy")
    assert np.array_equal(array, np.load(tmp_path / "x.npy"))
    assert array.shape == (2, 3, 224, 224)
    assert api.check_preprocessing is check_preprocessing
