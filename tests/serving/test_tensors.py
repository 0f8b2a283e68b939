"""The tensors that are computed from the metadata alone are those of the file and of what ONNX Runtime gives."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from dat_deploy.errors import ExportError
from dat_deploy.export import export
from dat_deploy.metadata import read_metadata
from dat_deploy.networks.dat.variants import VARIANTS, StageConfig, Variant
from dat_deploy.serving.tensors import TensorSpec, input_spec, output_specs

NEIGHBORHOOD: dict[str, Any] = {"neighborhood_size": 7}
DEFORMABLE: dict[str, Any] = {"offset_range_factor": -1.0, "offset_kernel_size": 5, "offset_stride": 2}
MINI = replace(  # takes images of any size, and exports quickly to a file of one
    VARIANTS["pp-tiny"],
    name="mini",
    stages=(
        StageConfig(16, "N", 1, **NEIGHBORHOOD),
        StageConfig(32, "N", 1, **NEIGHBORHOOD),
        StageConfig(32, "D", 2, offset_groups=2, **DEFORMABLE),
        StageConfig(64, "N", 2, **NEIGHBORHOOD),
    ),
)
EXPORTS: dict[str, tuple[Variant, dict[str, Any]]] = {
    "backbone with sampled points, batch 2": (
        VARIANTS["demo"],
        {"features": (1, 3), "sampling_locations": True, "batch": 2},
    ),
    "rectangular, half precision": (
        MINI,
        {"image_size": (96, 160), "sampling_locations": True, "precision": "fp16"},
    ),
}


def check(path: Path) -> None:
    metadata = read_metadata(path)
    graph = onnx.load(path).graph
    image = input_spec(metadata)
    outputs = output_specs(metadata, [output.name for output in graph.output])
    for spec, value in zip((image, *outputs), (*graph.input, *graph.output), strict=True):
        dims = value.type.tensor_type.shape.dim
        assert value.name == spec.name
        assert onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) == "FLOAT"
        assert spec.datatype == "FP32"
        assert tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims) == spec.shape
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch = metadata.batch or 2
    results = session.run(None, {"image": np.zeros((batch, 3, *metadata.image_size), np.float32)})
    for spec, result in zip(outputs, results, strict=True):
        assert result.dtype == np.float32
        assert result.shape == (batch, *spec.shape[1:]), spec


@pytest.mark.parametrize(("network", "options"), EXPORTS.values(), ids=EXPORTS)
def test_the_tensors_are_those_of_the_graph(network: Variant, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    export(network, path, **options)
    check(path)


def test_the_tensors_of_demo_are_those_of_the_graph(demo_onnx: Path) -> None:
    check(demo_onnx)


def test_the_shapes_are_those_that_are_known(demo_onnx: Path) -> None:
    metadata = read_metadata(demo_onnx)
    assert input_spec(metadata) == TensorSpec("image", "FP32", (-1, 3, 64, 64))
    assert output_specs(metadata, ["logits", "sampling_locations_2_1", "attention_1_1"]) == (
        TensorSpec("logits", "FP32", (-1, 10)),
        TensorSpec("sampling_locations_2_1", "FP32", (-1, 2, 4, 4, 2)),
        TensorSpec("attention_1_1", "FP32", (-1, 1, 4, 4)),
    )
    backbone = replace(metadata, network=VARIANTS["tiny"].as_backbone([1, 3]), batch=8)
    assert output_specs(backbone, ["feature_map_1", "feature_map_3"]) == (
        TensorSpec("feature_map_1", "FP32", (8, 192, 28, 28)),
        TensorSpec("feature_map_3", "FP32", (8, 768, 7, 7)),
    )
    free = replace(metadata, network=VARIANTS["pp-tiny"], dynamic_image_size=True)
    assert input_spec(free) == TensorSpec("image", "FP32", (-1, 3, -1, -1))
    assert output_specs(free, ["attention_1_1"]) == (TensorSpec("attention_1_1", "FP32", (-1, 2, -1, -1)),)


@pytest.mark.parametrize(
    "name", ["", "logit", "feature_map_0", "feature_map_9", "attention_0_0", "attention_2", "attention_1_01"]
)
def test_a_name_that_is_no_output_is_refused(name: str, demo_onnx: Path) -> None:
    with pytest.raises(ExportError) as caught:
        output_specs(read_metadata(demo_onnx), ["logits", name])
    assert str(caught.value) == (
        f"'{name}' is no output of demo; its outputs are logits, and on request sampling_locations_1_1 and "
        f"attention_1_1, sampling_locations_2_1 and attention_2_1, sampling_locations_2_3 and attention_2_3, "
        f"sampling_locations_3_0 and attention_3_0. Export it again."
    )


def test_importing_it_loads_neither_torch_nor_a_server_nor_a_client() -> None:
    code = (
        "import dat_deploy.serving.tensors, sys; print(sorted({'torch', 'ray', 'tritonclient', 'onnxruntime'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603  # fixed
    assert done.stdout.strip() == "[]"
