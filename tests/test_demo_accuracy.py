"""What the README's table of accuracy promises, on 10,000 real labelled pictures (`make test-all` unpacks them)."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data" / "fashion-mnist"


@pytest.fixture(scope="module")
def rows():
    if not (DATA / "test").is_dir():
        pytest.skip("the pictures are not here: make fashion-mnist")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import accuracy
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    names = accuracy.VARIANTS["demo"].class_names
    data = accuracy.open_data_set(DATA / "test", names)
    assert len(data.images) == 10_000
    return accuracy.measure(data, DATA / "calibration")


@pytest.mark.slow
def test_demo_is_right_on_nine_of_ten_pictures_and_no_precision_loses_more_than_it_may(rows):
    assert rows[0].top1 >= 90
    allowed = {"fp32": 0.0, "fp16": 0.1, "bf16": 0.1, "int8": 1.0}
    assert [row for row in rows if row.drop > allowed[row.precision]] == []
    assert {row.precision for row in rows} >= {"fp32", "fp16", "int8"}


@pytest.mark.slow
def test_every_lowering_agrees_with_pytorch_on_every_picture(rows):
    exact = {row.engine: row.flips for row in rows if row.precision == "fp32"}
    assert {f"ONNX Runtime, `{lowering}`" for lowering in ("function", "gather", "gridsample", "hat")} <= set(exact)
    assert set(exact.values()) == {0}
