"""The preprocessing graph gives bit for bit what `preprocess` gives, for pictures of any size and content."""

import hashlib
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from PIL import Image

from dat_deploy.images.photographs import photographs
from dat_deploy.images.preprocess import Preprocessing, golden_picture, golden_sha256, preprocess, read_image
from dat_deploy.networks.dat.variants import VARIANTS
from dat_deploy.serving.triton.preprocessing_graph import preprocessing_graph

PREPROCESSINGS = {
    "tiny": VARIANTS["tiny"].preprocessing,  # 224 of 256
    "base-384": VARIANTS["base-384"].preprocessing,  # 384 of 438
    "pp-base-384": VARIANTS["pp-base-384"].preprocessing,  # no crop
    "demo": VARIANTS["demo"].preprocessing,  # enlarges Fashion-MNIST
    "odd": Preprocessing((33, 7), (36, 10), mean=(0.1, 0.2, 0.3), std=(0.3, 1.0, 7.0)),  # odd margins
}
SIZES = [(1, 1), (1, 9), (5, 1), (2, 3), (28, 28), (37, 53), (224, 224), (256, 256), (333, 517), (64, 1000), (600, 400)]
SESSIONS: dict[Preprocessing, ort.InferenceSession] = {}


def graph(preprocessing: Preprocessing, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    if preprocessing not in SESSIONS:
        model = preprocessing_graph(preprocessing).SerializeToString()
        SESSIONS[preprocessing] = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (image,) = SESSIONS[preprocessing].run(None, {"pixels": pixels})
    assert image.dtype == np.float32
    return image  # type: ignore[no-any-return]  # untyped call


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS.values(), ids=PREPROCESSINGS)
def test_noise_and_hard_edges_of_any_size_come_out_to_the_bit(preprocessing: Preprocessing) -> None:
    rng = np.random.default_rng(0)
    for height, width in SIZES:
        noise = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        noise[1] = 255 * (noise[1] > 127)  # overshoots black and white
        expected = [preprocess(Image.fromarray(pixels), preprocessing) for pixels in noise]
        np.testing.assert_array_equal(graph(preprocessing, noise), expected, err_msg=f"{height}x{width}")


def test_photographs_come_out_to_the_bit() -> None:
    for preprocessing in (PREPROCESSINGS["tiny"], PREPROCESSINGS["base-384"]):
        for path in photographs(6):
            picture = read_image(path)
            image = graph(preprocessing, np.asarray(picture)[None])
            np.testing.assert_array_equal(image[0], preprocess(picture, preprocessing), err_msg=path.name)


def test_a_picture_of_a_camera_comes_out_to_the_bit() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    expected = preprocess(Image.fromarray(pixels), PREPROCESSINGS["tiny"])
    np.testing.assert_array_equal(graph(PREPROCESSINGS["tiny"], pixels[None])[0], expected)


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS.values(), ids=PREPROCESSINGS)
def test_the_golden_picture_has_the_hash_that_every_exported_file_carries(preprocessing: Preprocessing) -> None:
    image = graph(preprocessing, np.asarray(golden_picture())[None])[0]
    assert hashlib.sha256(image.astype("<f4").tobytes()).hexdigest() == golden_sha256(preprocessing)


def test_mean_and_std_keep_every_bit() -> None:
    third = replace(PREPROCESSINGS["demo"], mean=(1 / 3, 0.1, 1e-9), std=(1 / 3, 0.7, 1e-3))
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    np.testing.assert_array_equal(graph(third, pixels)[0], preprocess(Image.fromarray(pixels[0]), third))
