"""From an image file to the network's input: one meaning for validation, benchmark and serving. No torch.

The meaning is that of upstream's evaluation (LeapLabTHU/DAT, data/build.py: torchvision on PIL images): RGB, resize the
8-bit picture bicubically to an exact size, crop the centre, scale to 0..1, normalise. Reading goes further than
upstream's `convert("RGB")` in two ways: EXIF orientation is applied, and samples of more than 8 bits are scaled rather
than clipped. As upstream, alpha is dropped, not composited: a transparent pixel shows the colour stored under it.
"""

import hashlib
import io
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from dat_deploy.errors import ImageError, ShapeError, UnsupportedError

__all__ = [
    "FORMATS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_IMAGE_PIXELS",
    "Preprocessing",
    "check_images",
    "golden_picture",
    "golden_sha256",
    "image_files",
    "image_from_bytes",
    "preprocess",
    "preprocess_files",
    "read_image",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # PIL's other readers see no untrusted file
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_JPEG_SCANS = 100  # of a progressive picture; usual are 10, and each costs a pass over all pixels
MAX_IMAGE_PIXELS = 89_478_485  # PIL's default, a quarter of a GiB in RGB; a lower Image.MAX_IMAGE_PIXELS is kept

_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262  # 0: white is zero

# PIL warns about bombs and damaged metadata; silencing it changes the process's filters, so one thread at a time.
_warnings_lock = threading.Lock()


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an RGB picture before the network sees it, as data; it travels in the ONNX file's metadata.

    Attributes:
        image_size: (height, width) in pixels of the crop, which is the network's input.
        resize_size: (height, width) in pixels before the crop; the aspect ratio is not kept.
        mean, std: per channel, on samples in 0..1.
    Raises:
        ShapeError: if a size is not positive or the crop is larger than the resized picture.
        UnsupportedError: if the values are none that this version carries out.
    """

    image_size: tuple[int, int]
    resize_size: tuple[int, int]
    interpolation: str = "bicubic"
    crop: str = "center"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    color: str = "RGB"

    def __post_init__(self) -> None:
        (height, width), (resize_height, resize_width) = self.image_size, self.resize_size
        if not (0 < height <= resize_height and 0 < width <= resize_width):
            raise ShapeError(
                f"preprocessing crops {height}x{width} out of {resize_height}x{resize_width}; a crop needs positive "
                f"sides, none larger than the resized picture's. Mend image_size or resize_size."
            )
        for field, accepted in (("interpolation", "bicubic"), ("crop", "center"), ("color", "RGB")):
            if getattr(self, field) != accepted:
                raise UnsupportedError(
                    f"preprocessing has {field} {getattr(self, field)!r}; this version carries out {accepted!r} only. "
                    f"Update dat-deploy, or preprocess the images yourself."
                )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise UnsupportedError(
                f"preprocessing has mean {self.mean} and std {self.std}; accepted are finite numbers, std above 0. "
                f"Mend the model's metadata."
            )


def image_files(folder: Path) -> list[Path]:
    """All images in a folder at any depth, by their names' endings, sorted by their paths; hidden ones are not seen.

    Raises:
        ImageError: if there is no such folder, it cannot be listed, or holds none.
    """
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise ImageError(f"'{folder}' {what}; name a folder of images, at any depth.")

    def refuse(error: OSError) -> None:
        raise ImageError(f"cannot list '{error.filename}' ({_reason(error)}). Check its permissions.") from error

    files: list[Path] = []
    real_folders: set[str] = set()  # a link may lead back to a folder above
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(parent) in real_folders:
            folders.clear()
            continue
        real_folders.add(os.path.realpath(parent))
        files += [path for path in (Path(parent, name) for name in names) if _is_visible_image(path, folder)]
    if not files:
        raise ImageError(
            f"folder '{folder}' holds no images; accepted are files that end in {', '.join(SUFFIXES)}, at any depth."
        )
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _is_visible_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file, upright, in 8-bit RGB.

    The first frame of an animation or of a multi-page file. Greyscale, palette, 1-bit and CMYK pictures are converted
    as PIL does it; alpha is dropped. 12- and 16-bit greyscale is scaled to 8 bits; of 16-bit colour PIL keeps the high
    byte. Float samples are read as 0..1 where none exceeds 1, as 0..255 otherwise. Thread-safe, one decode at a time.

    Raises:
        ImageError: if there is no such file, it cannot be opened or decoded, or has more than `MAX_IMAGE_PIXELS`; the
            size is taken from the header, before any pixel is decoded.
    """
    path = Path(path)
    with _opened(path) as file, _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _decode(file, str(path))


def check_images(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse early, before anything slow is loaded, files that `read_image` cannot open or does not know.

    Raises:
        ImageError: as `read_image`, but for what only decoding shows.
    """
    for path in map(Path, paths):
        with _opened(path) as file, _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _header(file, str(path), MAX_IMAGE_PIXELS)


def _opened(path: Path) -> BinaryIO:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ImageError(f"image '{path}' is {kind}; accepted are {_formats()} files. Name the image files.")
        if status.st_size == 0:
            raise ImageError(f"image '{path}' is empty; accepted are {_formats()} files. Copy it again.")
        return path.open("rb")
    except FileNotFoundError as error:
        raise ImageError(f"image '{path}' does not exist; accepted are {_formats()} files. Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ImageError(
            f"image '{path}' cannot be opened ({_reason(error)}); it must be a readable file. "
            f"Check the path and its permissions."
        ) from error


def image_from_bytes(content: bytes, name: str, *, most_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """As `read_image`, for an image that is in memory.

    Args:
        name: what it is called in messages.
        most_pixels: that it may have; more than `MAX_IMAGE_PIXELS` are refused in any case.

    Raises:
        ImageError: as `read_image`.
    """
    if not content:
        raise ImageError(f"image '{name}' is empty; accepted are {_formats()} files.")
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _decode(io.BytesIO(content), name, most_pixels)


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Resize, crop, normalise.

    Returns:
        [3, H, W] float32, bit for bit what torchvision's Resize, CenterCrop, ToTensor, Normalize give for a PIL image
        with every Pillow before 13.0.
    Raises:
        ImageError: if the image has no agreed conversion to RGB.
    """
    height, width = preprocessing.image_size
    resize_height, resize_width = preprocessing.resize_size
    rgb = _rgb_from_image(image, "image")
    # In two calls: in one, Pillow 13 resizes a tall picture's height first, up to 12 levels off what was trained with.
    wide = rgb.resize((resize_width, rgb.height), Image.Resampling.BICUBIC)
    resized = wide.resize((resize_width, resize_height), Image.Resampling.BICUBIC)
    top = round((resize_height - height) / 2.0)
    left = round((resize_width - width) / 2.0)
    samples = np.asarray(resized, dtype=np.float32)[top : top + height, left : left + width]  # H, W, 3
    mean, std = np.asarray((preprocessing.mean, preprocessing.std), dtype=np.float32)
    normalised = (samples / np.float32(255) - mean) / std
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def preprocess_files(paths: Sequence[str | os.PathLike[str]], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """The files' pictures as one batch.

    Returns:
        [B, 3, H, W] float32, in the order of `paths`.
    Raises:
        ImageError: if one of them cannot be read.
    """
    batch = np.empty((len(paths), 3, *preprocessing.image_size), dtype=np.float32)
    for slot, path in zip(batch, paths, strict=True):
        slot[:] = preprocess(read_image(path), preprocessing)
    return batch


def golden_picture() -> Image.Image:
    """A picture, 320 wide and 240 high, that comes out differently for every mistake in preprocessing.

    Made by integer arithmetic alone. Its gradients show a shift of half a pixel and another mean or std; the rings of
    a zone plate, whose frequency rises to the limit, another resize; checks and edges of pure colours another order of
    channels, and a resize that does not clip to 8 bits; and no part of it is like its mirror image, or like another
    part, so that another crop or aspect ratio shows, too.
    """
    y, x = np.mgrid[0:240, 0:320]
    pixels = np.stack([x * 255 // 319, y * 255 // 239, 255 - (x + 2 * y) * 255 // 797], axis=-1)  # H, W, 3
    pixels[24:120, 24:152] = (((x - 88) ** 2 + (y - 72) ** 2) % 256)[24:120, 24:152, None]
    pixels[40:104, 176:296] = (255 * np.stack([(x + y) % 2, x // 2 % 2, y // 3 % 2], axis=-1))[40:104, 176:296]
    colour = x // 20  # bars of black, red, green, ... white, two pixels in the middle of each inverted
    bars = 255 * np.stack([colour & 1, colour >> 1 & 1, colour >> 2 & 1], axis=-1)
    pixels[136:176, 40:280] = np.where((x % 20 // 2 == 5)[..., None], 255 - bars, bars)[136:176, 40:280]
    slanted = (2 * x + 3 * y) // 24 % 3
    pixels[184:224, 48:272] = (255 * np.stack([slanted == 0, slanted == 1, slanted == 2], axis=-1))[184:224, 48:272]
    return Image.fromarray(pixels.astype(np.uint8))


def golden_sha256(preprocessing: Preprocessing) -> str:
    """SHA-256 of the golden picture, preprocessed: its [3, H, W] float32 in little-endian bytes.

    It is the same on every machine where Pillow resizes 8-bit samples in fixed point, with weights that are computed in
    float64 and rounded to 22 bits, and where NumPy divides and subtracts float32 as IEEE 754 says: every release from
    Pillow 11.0 and NumPy 2.0 on, with whatever SIMD instructions. An installation that gives another hash (a fork such
    as Pillow-SIMD, a release to come) gives other images to the network, too.
    """
    return hashlib.sha256(preprocess(golden_picture(), preprocessing).astype("<f4").tobytes()).hexdigest()


def _header(file: BinaryIO, path: str, most_pixels: int) -> Image.Image:
    """The picture before it is decoded, of a format that is read and not too large."""
    limit = min(most_pixels, MAX_IMAGE_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_IMAGE_PIXELS)
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:  # PIL's message starts with the count
        count = re.search(r"\d+", str(error))
        raise _too_large(path, count.group() if count else f"more than {limit}", limit) from error
    except Exception as error:  # a reader raises whatever its parsing runs into
        file.seek(0)
        raise ImageError(
            f"image '{path}' is no image that can be read: it starts with {file.read(8)!r}; accepted are {_formats()} "
            f"files. Convert it to PNG or JPEG, or copy it again."
        ) from error
    if image.width * image.height > limit:
        raise _too_large(path, str(image.width * image.height), limit)
    return image


def _decode(file: BinaryIO, path: str, most_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    image = _header(file, path, most_pixels)
    if image.format == "JPEG":
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
        if scans > MAX_JPEG_SCANS:
            raise ImageError(
                f"image '{path}' has {scans} scans; accepted are at most {MAX_JPEG_SCANS}, so that a small file cannot "
                f"take minutes. Save it again."
            )
    try:
        image.load()
    except Exception as error:  # as above
        raise ImageError(
            f"image '{path}' cannot be decoded ({_reason(error)}); it must be a whole, undamaged {image.format} file. "
            f"Copy it again."
        ) from error
    method = _TRANSPOSE_OF_ORIENTATION.get(_orientation(image))
    rgb = _rgb_from_image(image, f"image '{path}'")
    return rgb.copy() if method is None else rgb.transpose(method)  # a copy lets go of the file


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8 in a sound file. Not ImageOps.exif_transpose: damaged EXIF makes that raise."""
    try:
        orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata is no reason to refuse the picture
        return 1
    return orientation


def _rgb_from_image(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_from_wide_samples(image, name).convert("RGB")
    try:
        if image.mode == "P":  # straight to RGB, PIL warns about palettes with alpha
            image = image.convert("RGBA")
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"{name} has colour mode {image.mode}, which has no conversion to RGB; accepted are RGB, greyscale, "
            f"palette and CMYK pictures. Convert it to RGB."
        ) from error


def _grey_from_wide_samples(image: Image.Image, name: str) -> Image.Image:
    """Mode I;16*, I or F to L. PIL's own convert clips at 255, which turns a 16-bit picture white."""
    samples = np.asarray(image).astype(np.float64)
    lowest, highest = float(samples.min()), float(samples.max())
    tiff_tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        white, highest_accepted = (1.0, 255.0) if highest <= 1 else (255.0, 255.0)
    elif image.mode == "I":  # 16-bit PPM; a TIFF in this mode is signed or has 32 bits, so its white is anyone's guess
        white, highest_accepted = 65535.0, -math.inf if tiff_tags else 65535.0
    else:
        white = highest_accepted = 2.0 ** tiff_tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0] - 1  # 12 bits or 16
    if not (lowest >= 0 and highest <= highest_accepted):  # NaN fails both
        kind = "float" if image.mode == "F" else "integer"
        raise ImageError(
            f"{name} has {kind} samples from {lowest:g} to {highest:g}, and which of them is white is not defined; "
            f"accepted are unsigned 8- and 16-bit samples, floats in 0..1 or 0..255. Convert it to 8 bits."
        )
    if image.mode.startswith("I;16") and tiff_tags.get(_TIFF_PHOTOMETRIC) == 0:
        samples = white - samples  # PIL inverts these only up to 8 bits
    return Image.fromarray(np.rint(samples * (255 / white)).astype(np.uint8))


def _too_large(path: str, pixels: str, limit: int) -> ImageError:
    return ImageError(
        f"image '{path}' has {pixels} pixels; accepted are at most {limit}, so that a small file cannot fill the "
        f"memory. Scale it down first."
    )


def _formats() -> str:
    return f"{', '.join(FORMATS[:-1])} and {FORMATS[-1]}"


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
