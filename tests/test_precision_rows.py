"""A precision is one row: what has no other mention of it exports, counts, names and judges it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dat_deploy.precision import EXPORTED, FULL, PRECISIONS, precision_in_words, precision_of_dtype

# The row is there before anything else reads the table, as if it stood in it.
NEW = """
import json, sys
from pathlib import Path
from dat_deploy import precision
precision.PRECISIONS["fp64"] = precision.Precision("fp64", "float64", "DOUBLE", "DOUBLE", {
    "top1_drop": 0.1, "top5_drop": 0.1, "disagreement": 0.5, "cosine_distance": 1e-6})
precision.EXPORTED += ("fp64",)
import onnx
from dat_deploy.api import export, inspect
from dat_deploy.engine.tensorrt.layers import layers_from_json
from dat_deploy.validate.gates import default_gates

path = Path(sys.argv[1], "demo.onnx")
report = export("demo", path, precision="fp64")
onnx.checker.check_model(onnx.load(path), full_check=True)
layer = {"Name": "x", "Outputs": [{"Format/Datatype": "Double"}]}
print(json.dumps([
    report.census.share("fp64"),
    str(report.census).split()[1],
    "fp64" in inspect(path).layers,
    default_gates("fp64").disagreement,
    layers_from_json(json.dumps({"Layers": [layer]}))[0].precision,
]))
"""


def test_a_new_precision_is_a_row(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NEW, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  # our own interpreter and code
    assert done.returncode == 0, done.stderr
    share, first, is_inspected, disagreement, of_layer = json.loads(done.stdout)
    assert share > 0.5
    assert (first, is_inspected, disagreement, of_layer) == ("fp64", True, 0.5, "fp64")


def test_what_follows_from_a_row() -> None:
    assert EXPORTED == ("fp32", "fp16", "bf16")
    assert [name for name, row in PRECISIONS.items() if row.is_half] == ["fp16", "bf16"]
    assert FULL.name == "fp32"
    for row in PRECISIONS.values():
        assert precision_of_dtype(row.dtype) is row
    assert [row.onnx_type for row in PRECISIONS.values()] == [1, 10, 16, 3]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("Row major linear FP16 format", "fp16"),
        ("Row major linear Half", "fp16"),
        ("BFloat16", "bf16"),
        ("BF16", "bf16"),
        ("Float", "fp32"),
        ("Channel major FP32 format", "fp32"),
        ("Row major linear INT8 format", "int8"),
        ("Int64", None),
    ],
)
def test_a_type_is_known_in_the_words_of_tensorrt(words: str, name: str | None) -> None:
    row = precision_in_words(words)
    assert (row and row.name) == name


def test_the_table_loads_neither_torch_nor_onnx() -> None:
    code = "import dat_deploy.precision, sys; print(sorted({'torch', 'onnx', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603  # fixed
    assert done.stdout == "[]\n"
