"""An operator that nobody but its folder and its name in OPERATORS knows, all the way: a script, run by its test.

`toy_sample` has attributes of kinds that none of the package's own operators has, and a frame of its own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import dat_deploy.plugins as plugins
from dat_deploy.plugins import operator as operators

plugins.__path__.append(str(Path(__file__).parent))  # the folder
operators.OPERATORS = plugins.OPERATORS = (*operators.OPERATORS, "toy_sample")  # the name

SIZES = {"B": 2, "H": 4, "W": 6, "C": 3}
ATTRIBUTES: dict[str, Any] = {"slope": 0.5, "steps": [2.0, -1.5]}


def exported() -> Any:
    """A network of the operator between two convolutions, as a graph whose operator is a node; and the network."""
    import onnxscript.optimizer
    import torch
    from onnx_ir.passes import common as passes

    from dat_deploy.export import onnx_model
    from dat_deploy.export.cleanup import name_results

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset, self.value = torch.nn.Conv2d(3, 2, 1), torch.nn.Conv2d(3, 3, 1)
            self.scale_table = torch.nn.Parameter(torch.randn(3))

        def forward(self, image: Any) -> Any:
            locations = self.offset(image).tanh().permute(0, 2, 3, 1)
            value = self.value(image).permute(0, 2, 3, 1)
            return plugins.toy_sample(value, locations, self.scale_table, 0.5, [2.0, -1.5]) * 2

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, image: Any) -> Any:
            return self.attention(image)

    torch.manual_seed(0)
    network, image = Network().eval(), torch.randn(2, 3, 4, 6)
    with torch.no_grad(), onnx_model._quiet():
        program = torch.onnx.export(
            network, (image,), dynamo=True, optimize=False, verbose=False, opset_version=18, input_names=["image"],
            output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table=onnx_model._translations(),
        )  # fmt: skip
        model = program.model
        model.functions.clear()
        onnxscript.optimizer.fold_constants(model)
        onnxscript.optimizer.remove_unused_nodes(model)
        onnx_model._set_opset(model, 18)
        onnx_model._name_after_modules(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        name_results(model)
        return model, image, network(image)


def run(model: Any, feeds: dict[str, Any]) -> Any:
    import onnx_ir as ir
    import onnxruntime

    proto = model if isinstance(model, bytes) else ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in feeds.items()})[0]


def walk() -> dict[str, Any]:
    """Everything but TensorRT's ahead-of-time plugins."""
    import onnx_ir as ir
    import torch

    from dat_deploy.engine.tensorrt.library import import_tensorrt
    from dat_deploy.export.lowering import lower
    from dat_deploy.export.precision import cast_graph
    from dat_deploy.export.records import operator_records
    from dat_deploy.export.subgraph import operator_model
    from dat_deploy.plugins.eager import LOCATIONS, eager_output, stress_inputs
    from dat_deploy.plugins.onnx_domain import operator_nodes
    from dat_deploy.plugins.operator import Operator, specification
    from dat_deploy.plugins.tensorrt import calls, registry
    from dat_deploy.plugins.tensorrt.node import Node

    found: dict[str, Any] = {"operators": list(operators.OPERATORS), "errors": {}}
    weights = {"scale_table": torch.randn(3)}
    names = ["value", "sampling_locations"]
    inputs = stress_inputs(specification("toy_sample"), names, SIZES, "pixels") | weights
    assert plugins.toy_sample is Operator("toy_sample").torch_operator
    arguments = (*inputs.values(), *ATTRIBUTES.values())
    found["opcheck"] = torch.library.opcheck(torch.ops.dat_deploy.toy_sample.default, arguments)

    for lowering in ("function", "gather", "gridsample", "hat"):
        model, image, expected = exported()
        (node,) = operator_nodes(model)
        found["attributes"] = {name: each.value for name, each in node.attributes.items()}
        lowered = lower(model, lowering)
        found["errors"][lowering] = float(abs(run(lowered, {"image": image}) - expected.numpy()).max())
    (record,) = operator_records(lowered.metadata_props)
    found["record"] = [record.operator, record.attributes, sorted(record.inputs), len(record.locations)]

    module = operator_model(lowered, record)
    for kind in LOCATIONS:
        stressed = stress_inputs(specification(record.operator), names, SIZES, kind)
        table = {
            "scale_table": torch.from_numpy(lowered.graph.initializers["attention.scale_table"].const_value.numpy())
        }
        exact = eager_output(record.operator, stressed | table, record.attributes)
        found["errors"][f"coordinates: {kind}"] = float(abs(run(module, stressed) - exact).max())
    swapped = {**stressed, "sampling_locations": stressed["sampling_locations"].flip(-1)}
    got = run(module, swapped)
    in_float64 = {name: value.double() for name, value in (stressed | table).items()}
    mistakes = Operator(record.operator).mistakes(in_float64, record.attributes)
    found["mistake"] = [label for label, output in mistakes if abs(got - output.numpy()).max() < 1e-5]

    model, image, expected = exported()
    half = cast_graph(model, "fp16")
    (node,) = operator_nodes(half)
    found["types"] = [value.dtype.name for value in node.inputs]
    lowered = lower(half, "function")
    found["errors"]["fp16"] = float(abs(run(lowered, {"image": image}) - expected.numpy()).max())

    trt = import_tensorrt("tensorrt-rtx")
    registry.register_plugins(trt)
    model, *_ = exported()
    serialized = ir.to_proto(lower(cast_graph(model, "fp16"), "plugin")).SerializeToString()
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    made: list[Node] = []
    remembered = Node.from_fields

    def from_fields(*arguments: Any) -> Node:
        made.append(remembered(*arguments))
        return made[-1]

    Node.from_fields = from_fields  # type: ignore[method-assign]
    assert parser.parse(serialized), calls.last_error()
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    (layer,) = (layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3)
    found["layer"] = [layer.get_output(0).dtype.name, list(layer.get_output(0).shape)]
    found["parsed"] = made[-1].attributes
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("image", (1, 3, 4, 6), (2, 3, 4, 6), (4, 3, 4, 6))
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    assert built is not None, calls.last_error()
    found["is_in_the_engine"] = b"toy_sample" in bytes(built)
    (creator,) = (each for each in trt.get_plugin_registry().all_creators if each.name == "toy_sample")
    plugin = creator.create_plugin("again", [*_fields(trt, ATTRIBUTES)], trt.TensorRTPhase.BUILD)
    restored = creator.create_plugin("", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    found["restored"] = restored.node.attributes
    return found


def ahead_of_time() -> dict[str, Any]:
    """What TensorRT's layer for plugins that are compiled ahead of time makes of its attributes."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tensorrt_harness import Planned, load_tensorrt, with_expressions

    trt = load_tensorrt()
    from dat_deploy.plugins.specification import Input
    from dat_deploy.plugins.tensorrt import registry

    registry.register_ahead_of_time(trt, 90)
    found: dict[str, Any] = {}
    shapes = [(2, 4, 6, 3), (2, 4, 6, 2), (3,), (2, 4, 6, 3)]
    assert shapes[0] == Input("B H W C").shape(SIZES)
    half, whole = trt.DataType.HALF, trt.DataType.FLOAT
    types = [half, whole, whole, half]

    def job(builder: Any, _: Any) -> None:
        planned = Planned(trt, builder, "toy_sample", ATTRIBUTES)
        found["output"] = [each.get_constant_value() for each in planned.describe(shapes[:-1], types[:-1])]
        largest = [(8, *shape[1:]) if len(shape) > 1 else shape for shape in shapes]
        found["tactics"] = list(planned.tactics(shapes, largest, types))
        planned.launch(1)
        name, ptx = planned.kernel()
        found["kernel"] = [name, "toy_sample_kernel" in ptx.decode(), "0fBFC00000" in ptx.decode()]  # -1.5

    with_expressions(trt, job)
    return found


def _fields(trt: Any, attributes: dict[str, Any]) -> Any:
    import numpy as np

    kept = [np.array(value, np.float32).reshape(-1) for value in attributes.values()]
    return trt.PluginFieldCollection(
        [trt.PluginField(name, each, trt.PluginFieldType.FLOAT32) for name, each in zip(attributes, kept, strict=True)]
    )


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
