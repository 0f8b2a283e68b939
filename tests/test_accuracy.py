"""What validate says of a folder of images: counts that can be checked by hand, and what is wrong in one sentence."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dat_deploy.errors import DatDeployError, ImageError, VerificationError
from dat_deploy.images.data_set import DataSet, open_data_set
from dat_deploy.networks.dat.variants import VARIANTS
from dat_deploy.runners import EngineDescription, Runner
from dat_deploy.validate.accuracy import compare_on_data

SMALL = replace(VARIANTS["demo"], image_size=(32, 32), resize_size=32, classes=7, class_names=tuple("abcdefg"))
BATCH = 8


class TableRunner(Runner):
    """Gives each image the logits that stand in a table under the grey of its first pixel."""

    def __init__(self, table: dict[int, list[float]], name: str = "table.onnx", batch: int | None = None) -> None:
        self.table = table
        self.sizes: list[int] = []
        self.description = EngineDescription(
            name=name,
            runtime="onnxruntime",
            runtime_version="1",
            device="cpu",
            precision="fp32",
            network=SMALL,
            outputs=("logits",),
            batch=batch,
            dynamic_image_size=False,
            lowering="function",
            threads=1,
            weights_sha256="0" * 64,
            weights_source="seeded random weights (seed 0)",
            preprocessing=SMALL.preprocessing,
        )

    def _run(self, images_nchw):
        about = self.description.preprocessing
        self.sizes.append(len(images_nchw))
        greys = np.rint((images_nchw[:, 0, 0, 0] * about.std[0] + about.mean[0]) * 255).astype(int)
        return {"logits": np.array([self.table[grey] for grey in greys], np.float32)}

    def close(self) -> None:
        pass


def one_hot(index: int, height: float = 5.0) -> list[float]:
    return [height if i == index else i / 100 for i in range(7)]


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    """Ten pictures of classes a and b, each of a grey of its own: 0 to 4 are a, 10 to 14 b."""
    for grey in (*range(5), *range(10, 15)):
        path = tmp_path / ("a" if grey < 10 else "b") / f"{grey:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), grey, np.uint8)).save(path)
    return open_data_set(tmp_path, SMALL.class_names)


RIGHT = {grey: one_hot(0 if grey < 10 else 1) for grey in (*range(5), *range(10, 15))}


def test_shares_flips_margins_and_errors_are_those_counted_by_hand(data: DataSet) -> None:
    # the reference errs on 0; the engine is right there, wrong on 1 (barely) and on 10 (by far, out of the first five)
    reference = TableRunner(RIGHT | {0: one_hot(6)})
    last = [6.0, -9.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    engine = TableRunner(RIGHT | {1: [5.0, 5.5, 0.02, 0.03, 0.04, 0.05, 0.06], 10: last})
    found = compare_on_data(engine, reference, engine.description, data)
    assert (found.images, found.not_finite, found.unreadable) == (10, 0, ())
    assert found.engine is not None
    assert found.reference is not None
    assert (found.engine.top1.count, found.engine.top5.count) == (8, 9)
    assert (found.reference.top1.count, found.reference.top5.count) == (9, 9)
    assert found.engine.top1.percent == 80
    assert (found.engine.top1.low, found.engine.top1.high) == pytest.approx((49.0162, 94.3318), abs=1e-3)
    assert (found.only_engine, found.only_reference) == (1, 2)
    assert found.mcnemar_p == 1.0  # 1 against 2 of 3: 2 * (1 + 3) / 8
    assert found.agreement.count == 7
    assert [(flip.image.name, flip.label, flip.reference, flip.engine) for flip in found.flips] == [
        ("00.png", "a", "g", "a"),
        ("10.png", "b", "b", "a"),
        ("01.png", "a", "a", "b"),
    ]
    margins = {flip.image.name: (flip.reference_margin, flip.engine_margin) for flip in found.flips}
    assert margins["01.png"] == pytest.approx((5.0 - 0.01, 0.5), abs=1e-6)
    assert margins["10.png"] == pytest.approx((5.0, 15.0), abs=1e-6)
    assert margins["00.png"] == pytest.approx((5.0, 5.0 - 0.06), abs=1e-6)
    assert found.largest_error == 14.0
    assert found.mean_error == pytest.approx(_errors(engine, reference).mean(), abs=1e-6)
    assert found.p999_error == pytest.approx(np.quantile(_errors(engine, reference), 0.999), abs=1e-5)
    a, b = np.array(one_hot(1)), np.array(last)
    assert found.least_cosine <= float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) + 1e-6


def _errors(engine: TableRunner, reference: TableRunner) -> np.ndarray:
    return np.array([np.abs(np.subtract(engine.table[g], reference.table[g])) for g in RIGHT])


def test_an_engine_of_a_fixed_batch_gets_full_batches_alone(data: DataSet) -> None:
    engine, reference = TableRunner(RIGHT, batch=4), TableRunner(RIGHT)
    found = compare_on_data(engine, reference, engine.description, data)
    assert found.agreement.count == found.images == 10
    assert engine.sizes == [4, 4, 4]
    assert reference.sizes == [8, 8]


def test_without_labels_there_is_agreement_and_no_accuracy(data: DataSet) -> None:
    engine = TableRunner(RIGHT | {1: one_hot(3)})
    found = compare_on_data(engine, TableRunner(RIGHT), engine.description, replace(data, labels=None))
    assert (found.engine, found.reference, found.mcnemar_p) == (None, None, None)
    assert found.agreement.count == 9
    assert found.flips[0].label is None


def test_nan_in_the_engine_is_counted_as_wrong_and_as_a_flip(data: DataSet) -> None:
    engine = TableRunner(RIGHT | {1: [math.nan] * 7, 2: [math.inf, *[0.0] * 6]})
    found = compare_on_data(engine, TableRunner(RIGHT), engine.description, data)
    assert found.not_finite == 2
    assert found.engine is not None
    assert (found.engine.top1.count, found.engine.top5.count, found.agreement.count) == (8, 8, 8)
    assert {flip.engine for flip in found.flips} == {"NaN"}
    assert math.isnan(found.largest_error)
    assert math.isnan(found.least_cosine)


def test_nan_in_the_reference_ends_the_comparison(data: DataSet) -> None:
    engine, reference = TableRunner(RIGHT), TableRunner(RIGHT | {12: [math.nan] * 7}, name="pytorch:small")
    with pytest.raises(VerificationError) as caught:
        compare_on_data(engine, reference, engine.description, data)
    assert str(caught.value) == (
        f"pytorch:small itself gives NaN or infinity for {data.folder}/b/12.png, so no engine can be judged by it. "
        f"Check the checkpoint."
    )


def test_a_corrupt_image_is_counted_and_named_and_fatal_only_if_asked(data: DataSet) -> None:
    corrupt = data.folder / "a" / "03.png"
    corrupt.write_bytes(corrupt.read_bytes()[:40])
    engine = TableRunner(RIGHT)
    found = compare_on_data(engine, TableRunner(RIGHT), engine.description, data)
    assert found.images == found.agreement.count == 9
    ((path, reason),) = found.unreadable
    assert path == corrupt
    assert str(corrupt) in reason
    with pytest.raises(ImageError, match=r"03\.png"):
        compare_on_data(engine, TableRunner(RIGHT), engine.description, data, strict=True)


def test_a_folder_of_corrupt_images_is_an_error(data: DataSet) -> None:
    for path in data.images:
        path.write_bytes(b"no picture")
    engine = TableRunner(RIGHT)
    with pytest.raises(DatDeployError) as caught:
        compare_on_data(engine, TableRunner(RIGHT), engine.description, data)
    assert str(caught.value).startswith(f"none of the 10 images of '{data.folder}' can be read: image '")


def test_progress_and_times_cover_all_images(data: DataSet) -> None:
    seen: list[tuple[int, int]] = []
    engine = TableRunner(RIGHT)
    found = compare_on_data(
        engine, TableRunner(RIGHT), engine.description, data, progress=lambda done, of: seen.append((done, of))
    )
    assert seen == [(10, 10)]
    assert set(found.seconds) == {"engine", "reference", "decode", "own"}
    assert all(value >= 0 for value in found.seconds.values())
