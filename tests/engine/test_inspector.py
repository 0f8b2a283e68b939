"""What TensorRT's inspector says is read alike for 10.x and 11.x; on a machine without a GPU, what can be said is."""

import json
from pathlib import Path

from dat_deploy.engine.build import BuildReport
from dat_deploy.engine.inspector import inspect
from dat_deploy.engine.tensorrt.layers import count_types, fused_attention, layers_from_json

# As TensorRT 10 writes it, and 11, which has other names for tensors and types.
LAYERS_10 = {
    "Layers": [
        {
            "Name": "stages.0.attns.0/window_attention",
            "LayerType": "PluginV3",
            "Inputs": [
                {"Name": "a", "Dimensions": [1, 56, 56, 288], "Format/Datatype": "Row major linear FP16 format"}
            ],
            "Outputs": [
                {"Name": "b", "Dimensions": [1, 56, 56, 96], "Format/Datatype": "Row major linear FP16 format"}
            ],
            "PluginType": "window_attention",
        },
        {"Name": "stages.0.attns.0/window_attention [profile 1]", "LayerType": "PluginV3", "Inputs": [], "Outputs": []},
        {
            "Name": "__myl_Norm",
            "LayerType": "kgen",
            "Inputs": [{"Name": "b", "Format/Datatype": "Float"}],
            "Outputs": [{"Name": "c", "Format/Datatype": "Float"}],
            "TacticName": "__myl_Norm_0x1",
        },
        {
            "Name": "_gemm_mha_v2",
            "LayerType": "kgen",
            "Inputs": [],
            "Outputs": [{"Name": "d", "Format/Datatype": "BF16"}],
            "TacticName": "_gemm_mha_v2_0xab",
        },
        {"Name": "shape", "LayerType": "Shape", "Inputs": [], "Outputs": [{"Name": "e", "Format/Datatype": "Int64"}]},
        {"Name": "q", "LayerType": "kgen", "Inputs": [], "Outputs": [{"Name": "f", "Format/Datatype": "Int8"}]},
    ],
    "Bindings": ["image", "logits"],
}
LAYERS_11 = {
    "Layers": [
        {
            "Name": "stages.0.attns.0/window_attention",
            "LayerType": "PluginV3",
            "Inputs": [{"Name": "a", "Format": "Row major linear", "Datatype": "Half"}],
            "Outputs": [{"Name": "b", "Format": "Row major linear", "Datatype": "Half"}],
        },
        "a layer without details",
    ],
    "I/O Tensors": [{"Name": "image"}, {"Name": "logits"}],
}


def test_layers_of_tensorrt_10_are_read() -> None:
    layers = layers_from_json(json.dumps(LAYERS_10))
    assert [layer.precision for layer in layers] == ["fp16", "fp32", "bf16", "integer", "int8"]
    assert [layer.is_plugin for layer in layers] == [True, False, False, False, False]
    assert count_types(layers) == {"fp16": 1, "fp32": 1, "bf16": 1, "integer": 1, "int8": 1}
    assert fused_attention(layers) == 1
    assert layers[0].inputs == ("Row major linear FP16 format",)


def test_layers_of_tensorrt_11_are_read() -> None:
    plugin, bare = layers_from_json(json.dumps(LAYERS_11))
    assert plugin.is_plugin
    assert plugin.precision == "fp16"
    assert plugin.outputs == ("Row major linear Half",)
    assert (bare.name, bare.precision) == ("a layer without details", "unknown")


def test_an_engine_without_its_gpu_is_described_by_its_passport(built: BuildReport) -> None:
    found = inspect(built.path)
    assert found.passport == built.passport
    assert found.layers == built.passport.layers
    assert found.engine_layers == ()
    assert found.unseen is not None
    assert "needs an NVIDIA GPU" in found.unseen


def test_an_exported_file_is_counted(built: BuildReport) -> None:
    found = inspect(Path(built.path.with_suffix(".onnx")))
    assert found.passport is None
    assert found.metadata.precision == "fp16"
    assert found.layers["fp16"] > 0
    assert found.layers["fp32"] > 0
    assert found.layers["cast"] > 0
