"""Fashion-MNIST (Xiao et al., arXiv 1708.07747; MIT licence): 60,000 and 10,000 labelled pictures of 28×28.

Debian carries it as `dataset-fashion-mnist`. `make fashion-mnist` unpacks that package, without installing it, and runs
this file, which writes the test pictures in ImageFolder layout, data/fashion-mnist/test/Ankle boot/00000.png and so on,
and every hundredth training picture, to calibrate with, into data/fashion-mnist/calibration.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dat_deploy.networks.dat.variants import VARIANTS

CLASSES = VARIANTS["demo"].class_names
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PREFIXES = {"train": "train", "test": "t10k"}


def load(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures [N, 28, 28] and their classes [N]; exits with one sentence if the files are not there."""
    prefix = PREFIXES[split]
    try:
        pictures = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    except (OSError, EOFError) as error:
        sys.exit(
            f"error: cannot read Fashion-MNIST in {folder} ({error}). Install Debian's dataset-fashion-mnist, or run: "
            f"make fashion-mnist"
        )
    return (
        np.frombuffer(pictures, np.uint8, offset=16).reshape(-1, 28, 28),  # after an IDX header of four int32
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
    )


def write_image_folder(folder: Path, output: Path, split: str, step: int = 1) -> None:
    """Every `step`-th picture as a PNG file, in a folder for each class; what is there already is replaced."""
    pictures, labels = load(folder, split)
    for name in CLASSES:
        (output / _folder(name)).mkdir(parents=True, exist_ok=True)
    for index in range(0, len(labels), step):
        Image.fromarray(pictures[index]).save(output / _folder(CLASSES[labels[index]]) / f"{index:05}.png")


def _folder(name: str) -> str:
    return name.replace("/", "-")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the four .gz files")
    parser.add_argument("--output", type=Path, default=Path("data/fashion-mnist"))
    arguments = parser.parse_args()
    write_image_folder(arguments.data, arguments.output / "test", "test")
    write_image_folder(arguments.data, arguments.output / "calibration", "train", step=100)
    print(f"{arguments.output}: 10,000 pictures in test, 600 in calibration, in {len(CLASSES)} folders each")
