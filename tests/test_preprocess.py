import contextlib
import io
import struct
import sys
import threading
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
from PIL import Image, ImageOps

from dat_deploy.errors import ImageError, ShapeError, UnsupportedError
from dat_deploy.images import preprocess as module
from dat_deploy.images.photographs import photographs
from dat_deploy.images.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    preprocess,
    preprocess_files,
    read_image,
)
from dat_deploy.networks.dat.variants import VARIANTS

TINY = VARIANTS["tiny"].preprocessing
FORMATS = "BMP, GIF, JPEG, PNG, PPM, TIFF and WEBP"


def picture(width: int = 24, height: int = 16) -> Image.Image:
    """Smooth, so that lossy formats keep it, and different in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = x * 200 / max(width - 1, 1) + 20, y * 200 / max(height - 1, 1) + 20
    return Image.fromarray(np.stack([red, green, (red + green) / 3], axis=-1).astype(np.uint8))


def error_of(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path)
    return str(caught.value)


def difference(first: Image.Image, second: Image.Image) -> int:
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def one_row_tiff(samples: bytes, width: int, bits: int, photometric: int) -> bytes:
    """Little-endian, uncompressed, one strip, one sample a pixel: what PIL reads and cannot write."""
    # width, height, bits, compression, photometric, strip offset, samples a pixel, rows a strip, strip byte count
    entries = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(samples)}
    directory = b"".join(struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value) for tag, value in entries.items())
    padded = samples + b"\0" * (len(samples) % 2)
    return (
        b"II*\0" + struct.pack("<I", 8 + len(padded)) + padded + struct.pack("<H", len(entries)) + directory + bytes(4)
    )


# The preprocessing as data.


@pytest.mark.parametrize(
    ("name", "resize", "size"),
    [("tiny", 256, 224), ("base-384", 438, 384), ("pp-tiny", 256, 224), ("pp-base-384", 384, 384)],
)
def test_a_variant_has_upstreams_evaluation(name: str, resize: int, size: int) -> None:
    assert VARIANTS[name].preprocessing == Preprocessing(
        image_size=(size, size),
        resize_size=(resize, resize),
        interpolation="bicubic",
        crop="center",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        color="RGB",
    )


@pytest.mark.parametrize(
    ("image_size", "resize_size"), [((448, 448), (512, 512)), ((224, 448), (256, 512)), ((672, 224), (768, 256))]
)
def test_another_image_size_keeps_the_cropped_share_of_each_side(
    image_size: tuple[int, int], resize_size: tuple[int, int]
) -> None:
    preprocessing = VARIANTS["tiny"].with_image_size(*image_size).preprocessing
    assert (preprocessing.image_size, preprocessing.resize_size) == (image_size, resize_size)


def test_a_crop_larger_than_the_resized_picture_is_refused() -> None:
    with pytest.raises(ShapeError) as caught:
        Preprocessing(image_size=(224, 224), resize_size=(256, 223))
    assert str(caught.value) == (
        "preprocessing crops 224x224 out of 256x223; a crop needs positive sides, none larger than the resized "
        "picture's. Mend image_size or resize_size."
    )


@pytest.mark.parametrize(("field", "accepted"), [("interpolation", "bicubic"), ("crop", "center"), ("color", "RGB")])
def test_values_that_are_not_carried_out_are_refused(field: str, accepted: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        replace(TINY, **{field: "other"})
    assert str(caught.value) == (
        f"preprocessing has {field} 'other'; this version carries out '{accepted}' only. "
        f"Update dat-deploy, or preprocess the images yourself."
    )


def test_a_zero_std_is_refused() -> None:
    with pytest.raises(UnsupportedError) as caught:
        replace(TINY, std=(0.2, 0.0, 0.2))
    assert str(caught.value) == (
        "preprocessing has mean (0.485, 0.456, 0.406) and std (0.2, 0.0, 0.2); accepted are finite numbers, std above "
        "0. Mend the model's metadata."
    )


# From a picture to the input.


@pytest.mark.parametrize("name", VARIANTS)
def test_a_photograph_gives_what_pil_and_numpy_written_out_give(name: str) -> None:
    size, resize = VARIANTS[name].image_size[0], VARIANTS[name].resize_size
    path = photographs(1)[0]
    got = preprocess(read_image(path), VARIANTS[name].preprocessing)

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((resize, resize), Image.Resampling.BICUBIC))
    edge = (resize - size) // 2
    expected = np.empty((3, size, size))
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        crop = pixels[edge : edge + size, edge : edge + size, channel].astype(np.float64)
        expected[channel] = (crop / 255 - mean) / std

    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    # Three float32 roundings (divide, subtract, divide by 0.22), each at most 2^-24 of a number below 2.7.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_the_aspect_ratio_is_not_kept() -> None:
    wide = picture(60, 20)
    square = wide.resize((256, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(preprocess(wide, TINY), preprocess(square, TINY))


def test_a_tall_picture_is_resized_along_its_width_first_whatever_pillow_prefers() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 400, 3), dtype=np.uint8)
    wide = Image.fromarray(noise).resize((256, 600), Image.Resampling.BICUBIC)
    both = wide.resize((256, 256), Image.Resampling.BICUBIC)  # one side alone has no order
    np.testing.assert_array_equal(preprocess(Image.fromarray(noise), TINY), preprocess(both, TINY))


@pytest.mark.parametrize(("resize", "first"), [(224, 0), (225, 0), (227, 2), (229, 2), (256, 16)], ids=str)
def test_the_crop_starts_where_torchvisions_centre_crop_does(resize: int, first: int) -> None:
    # int(round((resize - 224) / 2)); Python rounds halves to even, so 0.5 -> 0, 1.5 -> 2, 2.5 -> 2
    columns = np.broadcast_to(np.arange(resize, dtype=np.uint8)[None, :, None], (resize, resize, 3))
    preprocessing = Preprocessing((224, 224), (resize, resize), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    array = preprocess(Image.fromarray(np.ascontiguousarray(columns)), preprocessing)
    assert round(float(array[0, 0, 0]) * 255) == first


def test_a_rectangular_input_has_height_before_width() -> None:
    assert preprocess(picture(), Preprocessing((32, 64), (40, 80))).shape == (3, 32, 64)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_mirrored_picture_gives_the_mirrored_input(name: str) -> None:
    preprocessing = VARIANTS[name].preprocessing
    image = read_image(photographs(2)[1])
    array, mirrored = (preprocess(each, preprocessing) for each in (image, ImageOps.mirror(image)))
    # PIL's fixed-point resize may round a mirrored kernel the other way: one 8-bit level, over the smallest std.
    np.testing.assert_allclose(mirrored, array[:, :, ::-1], rtol=0, atol=1.01 / 255 / min(IMAGENET_STD))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 7), (5000, 1), (223, 257)])
def test_any_size_of_picture_is_taken(width: int, height: int) -> None:
    array = preprocess(picture(width, height), TINY)
    assert array.shape == (3, 224, 224)
    assert np.isfinite(array).all()


def test_a_picture_in_memory_is_converted_like_a_file() -> None:
    grey = picture().convert("L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    assert np.array_equal(preprocess(wide, TINY), preprocess(grey, TINY))
    assert np.array_equal(preprocess(grey, TINY), preprocess(grey.convert("RGB"), TINY))


def test_files_become_one_batch_in_their_order() -> None:
    paths = photographs(3)
    batch = preprocess_files(paths, TINY)
    assert (batch.shape, batch.dtype) == ((3, 3, 224, 224), np.float32)
    for slot, path in zip(batch, paths, strict=True):
        assert np.array_equal(slot, preprocess(read_image(path), TINY))


def test_no_files_become_an_empty_batch() -> None:
    assert preprocess_files([], TINY).shape == (0, 3, 224, 224)


# Formats and colour modes.


@pytest.mark.parametrize(
    ("suffix", "tolerance"),
    # GIF: 256 colours for 384; JPEG, WEBP: lossy, with chroma at half size
    [("bmp", 0), ("gif", 8), ("jpg", 10), ("png", 0), ("ppm", 0), ("tif", 0), ("webp", 16)],
)
def test_each_format_gives_the_picture(tmp_path: Path, suffix: str, tolerance: int) -> None:
    path = tmp_path / f"picture.{suffix}"
    picture().save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (24, 16))
    assert difference(image, picture()) <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int, suffix: str) -> None:
    # What the camera stores so that a viewer which obeys the tag shows `upright`.
    upright = np.asarray(picture())
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"rotated.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert difference(read_image(path), picture()) <= {"png": 0, "tif": 0, "jpg": 10, "webp": 16}[suffix]
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(read_image(path)), np.asarray(ImageOps.exif_transpose(image)))


def test_16_bit_pictures_are_rotated_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "wide.png"
    Image.fromarray(np.array([[0, 65535], [0, 0]], dtype=np.uint16)).save(path, exif=exif)
    assert np.asarray(read_image(path))[..., 0].tolist() == [[0, 0], [0, 255]]


def test_damaged_exif_leaves_the_picture_as_stored(tmp_path: Path) -> None:
    path = tmp_path / "damaged.png"
    picture().save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage")
    assert difference(read_image(path), picture()) == 0


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_a_16_bit_gradient_is_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    gradient = np.linspace(0, 65535, 1024).round().astype(np.uint16)[None]
    path = tmp_path / f"gradient.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 1024 1 65535\n" + gradient.astype(">u2").tobytes())
    else:
        Image.fromarray(gradient).save(path)
    row = np.asarray(read_image(path))[0]
    assert np.array_equal(row, np.rint(gradient[0] / 257)[:, None].repeat(3, axis=1))
    assert (np.diff(row[:, 0].astype(int)) >= 0).all()
    assert np.unique(row).size == 256


def test_a_big_endian_16_bit_tiff_is_scaled(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (3, 1), np.array([0, 257 * 7, 65535], dtype=">u2").tobytes())
    image.save(tmp_path / "big.tif")
    assert np.asarray(read_image(tmp_path / "big.tif"))[0, :, 0].tolist() == [0, 7, 255]


def test_a_12_bit_tiff_is_scaled_from_4095(tmp_path: Path) -> None:
    (tmp_path / "12.tif").write_bytes(one_row_tiff(bytes.fromhex("000 800 fff fff".replace(" ", "")), 4, 12, 1))
    assert np.asarray(read_image(tmp_path / "12.tif"))[0, :, 0].tolist() == [0, 128, 255, 255]


def test_a_16_bit_tiff_whose_white_is_zero_is_inverted(tmp_path: Path) -> None:
    samples = np.array([0, 257 * 55, 65535], dtype="<u2").tobytes()
    (tmp_path / "inverted.tif").write_bytes(one_row_tiff(samples, 3, 16, 0))
    assert np.asarray(read_image(tmp_path / "inverted.tif"))[0, :, 0].tolist() == [255, 200, 0]


def test_16_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    samples = np.array([[0x12FF, 0x3400, 0xFFFF]], dtype=">u2")
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + samples.tobytes())), (b"IEND", b"")]
    (tmp_path / "wide.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    assert read_image(tmp_path / "wide.png").getpixel((0, 0)) == (0x12, 0x34, 0xFF)


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_float_tiffs_are_read_in_0_to_1_and_in_0_to_255(tmp_path: Path, white: float) -> None:
    Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32) * np.float32(white)).save(tmp_path / "float.tif")
    assert np.asarray(read_image(tmp_path / "float.tif"))[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize(
    ("samples", "description"),
    [
        (np.array([[0, 256]], dtype=np.float32), "float samples from 0 to 256"),
        (np.array([[-0.5, 1]], dtype=np.float32), "float samples from -0.5 to 1"),
        (np.array([[np.nan, 1]], dtype=np.float32), "float samples from nan to nan"),
        (np.array([[0, 255]], dtype=np.int32), "integer samples from 0 to 255"),
    ],
    ids=["float-above-255", "float-negative", "float-nan", "int32"],
)
def test_samples_without_a_defined_white_are_refused(tmp_path: Path, samples: np.ndarray, description: str) -> None:
    path = tmp_path / "wide.tif"
    Image.fromarray(samples).save(path)
    assert error_of(path) == (
        f"image '{path}' has {description}, and which of them is white is not defined; accepted are unsigned 8- and "
        f"16-bit samples, floats in 0..1 or 0..255. Convert it to 8 bits."
    )


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("L", "jpg"), ("LA", "png"), ("1", "png"), ("1", "tif"), ("1", "pbm")]
)
def test_grey_pictures_have_three_equal_channels(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"grey.{suffix}"
    grey = picture().convert(mode)
    grey.save(path)
    pixels = np.asarray(read_image(path))
    assert (pixels == pixels[..., :1]).all()
    assert difference(read_image(path), grey.convert("L").convert("RGB")) <= (4 if suffix == "jpg" else 0)


def few_colours() -> Image.Image:
    return picture().quantize(16).convert("RGB")


@pytest.mark.parametrize(
    ("suffix", "transparency"),
    [("png", None), ("png", 0), ("png", bytes(range(16))), ("gif", None), ("gif", 0)],
    ids=["png-opaque", "png-one-colour", "png-alpha-table", "gif-opaque", "gif-one-colour"],
)
def test_a_palette_picture_is_the_same_picture(tmp_path: Path, suffix: str, transparency: int | bytes | None) -> None:
    path = tmp_path / f"palette.{suffix}"
    options = {} if transparency is None else {"transparency": transparency}
    few_colours().quantize(16).save(path, **options)
    assert difference(read_image(path), few_colours()) == 0


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_alpha_is_dropped_as_upstream_drops_it(tmp_path: Path, suffix: str) -> None:
    image = picture()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    path = tmp_path / f"alpha.{suffix}"
    image.save(path)
    assert difference(read_image(path), picture()) == 0


@pytest.mark.parametrize("suffix", ["tif", "jpg"])  # PIL writes CMYK JPEGs as Adobe does: inverted, with its marker
def test_cmyk_is_the_same_picture(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cmyk.{suffix}"
    picture().convert("CMYK").save(path, quality=95)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    assert difference(read_image(path), picture()) <= {"tif": 1, "jpg": 12}[suffix]


def test_a_mode_that_does_not_convert_is_refused() -> None:
    with pytest.raises(ImageError) as caught:
        preprocess(Image.new("La", (4, 4)), TINY)
    assert str(caught.value) == (
        "image has colour mode La, which has no conversion to RGB; accepted are RGB, greyscale, palette and CMYK "
        "pictures. Convert it to RGB."
    )


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def test_the_picture_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "gone.png"
    picture().save(path)
    image = read_image(str(path))
    path.unlink()
    assert difference(image, picture()) == 0


# Files that cannot be read.


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing.jpg"
    assert error_of(path) == f"image '{path}' does not exist; accepted are {FORMATS} files. Check the path."


def test_a_directory_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path) == (
        f"image '{tmp_path}' is a directory; accepted are {FORMATS} files. Name the image files."
    )


def test_a_device_is_refused_without_reading_it() -> None:
    assert error_of(Path("/dev/zero")) == (
        f"image '/dev/zero' is not a regular file; accepted are {FORMATS} files. Name the image files."
    )


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert error_of(path) == f"image '{path}' is empty; accepted are {FORMATS} files. Copy it again."


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.png"
    picture().save(path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # not chmod, which does not stop root
    assert error_of(path) == (
        f"image '{path}' cannot be opened (Permission denied); it must be a readable file. "
        f"Check the path and its permissions."
    )


def test_a_null_byte_in_the_path_is_an_image_error() -> None:
    assert error_of(Path("a\0b")) == (
        "image 'a\0b' cannot be opened (embedded null byte); it must be a readable file. "
        "Check the path and its permissions."
    )


def test_a_text_file_called_jpg_is_named_by_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("hello world, not a picture")
    assert error_of(path) == (
        f"image '{path}' is no image that can be read: it starts with b'hello wo'; accepted are {FORMATS} files. "
        f"Convert it to PNG or JPEG, or copy it again."
    )


def test_a_format_outside_the_list_is_refused_although_pil_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture().save(path, format="TGA")
    assert "is no image that can be read" in error_of(path)


def test_a_truncated_jpeg_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    buffer = io.BytesIO()
    picture(400, 300).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[:-500])
    with Image.open(path) as image, pytest.raises(OSError, match="truncated") as reason:
        image.load()
    assert error_of(path) == (
        f"image '{path}' cannot be decoded ({reason.value}); it must be a whole, undamaged JPEG file. Copy it again."
    )


@pytest.mark.parametrize(
    ("side", "pixels"),
    [(50_000, 2_500_000_000), (10_000, 100_000_000)],
    ids=["where-pil-raises", "where-pil-only-warns"],
)
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, side: int, pixels: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_claims(side, side))
    assert error_of(path) == (
        f"image '{path}' has {pixels} pixels; accepted are at most 89478485, so that a small file cannot fill the "
        f"memory. Scale it down first."
    )


def test_the_limit_is_the_last_size_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    picture(24, 16).save(path)
    monkeypatch.setattr(module, "MAX_IMAGE_PIXELS", 24 * 16)
    assert read_image(path).size == (24, 16)
    monkeypatch.setattr(module, "MAX_IMAGE_PIXELS", 24 * 16 - 1)
    assert error_of(path).startswith(f"image '{path}' has 384 pixels; accepted are at most 383,")


@pytest.mark.parametrize("limit", [300, 100], ids=["where-pil-warns", "where-pil-raises"])
def test_a_lower_limit_of_pil_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = tmp_path / "picture.png"
    picture(24, 16).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert error_of(path).startswith(f"image '{path}' has 384 pixels; accepted are at most {limit},")


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "png", "ppm", "tif", "webp"])
def test_damaged_files_give_a_picture_or_an_image_error(tmp_path: Path, suffix: str) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, Image.registered_extensions()[f".{suffix}"])
    whole = buffer.getvalue()
    generator = np.random.default_rng(0)
    path = tmp_path / f"damaged.{suffix}"
    for trial in range(60):
        data = np.frombuffer(whole, dtype=np.uint8).copy()
        data[generator.integers(0, len(data), 3)] = generator.integers(0, 256, 3)
        path.write_bytes(data[: generator.integers(1, len(data))].tobytes() if trial % 2 else data.tobytes())
        with contextlib.suppress(ImageError):
            assert read_image(path).mode == "RGB"


# Living in a process with others.


def test_warning_filters_are_left_as_they_were_by_many_threads(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture().save(path)
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [read_image(path) for _ in range(20)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, dat_deploy.images.preprocess; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603 - our own interpreter and code
