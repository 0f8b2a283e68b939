"""Arrays of preprocessed images that other programs wrote."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dat_deploy.errors import ImageError
from dat_deploy.images.preprocess import Preprocessing

__all__ = ["describe_array", "read_npy"]

Array = NDArray[Any]


def read_npy(path: Path) -> Array:
    """A .npy file's array of real numbers, mapped into memory; nothing is unpickled.

    Raises:
        ImageError: if it is no whole .npy file, or holds something else.
    """
    form = np.lib.format
    try:
        if not path.is_file():
            raise ImageError(f"array '{path}' does not exist, or is no file; accepted are .npy files. Check the path.")
        with path.open("rb") as file:
            old = form.read_magic(file) == (1, 0)
            dtype = (form.read_array_header_1_0 if old else form.read_array_header_2_0)(file)[2]
        if dtype.kind in "fiu":
            array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
            return array
    except (OSError, ValueError, EOFError) as error:
        raise ImageError(
            f"array '{path}' is no whole .npy file ({' '.join(str(error).split())}); accepted is what numpy.save "
            f"writes. Save the array again."
        ) from error
    content = "Python objects, which only pickle could read" if dtype.hasobject else f"elements of type {dtype}"
    raise ImageError(
        f"array '{path}' holds {content}; accepted are arrays of float32. Save it with: numpy.save(file, "
        f"array.astype('float32'))"
    )


def describe_array(array: Array, preprocessing: Preprocessing, *, channels_last: bool) -> str:
    """Its type, shape and range in words, and what that range looks like beside what `preprocessing` gives."""
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    lowest, highest = float(array.min()), float(array.max())
    black, white = float((-mean / std).min()), float(((1 - mean) / std).max())
    if array.dtype.kind != "f" or (lowest >= 0 and highest > 2 * white):
        kind = "8-bit samples, not normalised"
    elif lowest >= 0 and highest <= 1:
        kind = "samples in 0..1, not normalised"
    elif black - 1 <= lowest and highest <= white + 1:  # a resize that does not clip oversteps a little
        kind = "normalised samples"
    else:
        kind = f"not normalised with this mean and std, which give {black:.2f} to {white:.2f}"
    layout = ", channels last" if channels_last else ""
    return f"{array.dtype} {list(array.shape)}{layout}, from {lowest:.2f} to {highest:.2f}: {kind}"
