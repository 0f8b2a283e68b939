"""The graph of an int8 file: which layers are quantized, and the nodes around them; see `quantize`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dat_deploy.errors import ExportError
from dat_deploy.export.records import operator_records

__all__ = ["coordinate_nodes", "insert_quantization", "linear_layers", "quantized_differently"]

LARGEST = 127  # of symmetric int8


def linear_layers(model: ir.Model) -> list[ir.Node]:
    """The nodes of `model` to quantize, in graph order."""
    operators = tuple(f"{record.name}/" for record in operator_records(model.metadata_props))
    coordinates = coordinate_nodes(model)
    return [
        node
        for node in model.graph
        if node.op_type in ("MatMul", "Gemm", "Conv")
        and not node.domain
        and not str(node.name).startswith(operators)
        and node not in coordinates
        and (weight := node.inputs[1]) is not None
        and weight.is_initializer()
        and not (node.op_type == "Conv" and _groups(node) > 1)
    ]


def coordinate_nodes(model: ir.Model) -> set[ir.Node]:
    """What computes the sampling locations: back from each operator, to the convolution of the offsets, and that."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    pending = [values.get(name) for record in operator_records(model.metadata_props) for name in record.locations]
    nodes: set[ir.Node] = set()
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        if node is not None and node not in nodes:
            nodes.add(node)
            if node.op_type != "Conv":
                pending += node.inputs
    return nodes


def quantized_differently(model: ir.Model) -> list[str]:
    """What of a file of `quantize` is not in the form that it writes; a sentence each."""
    differences = [f"{node.name} is not quantized" for node in linear_layers(model)]
    rounded = [node for node in coordinate_nodes(model) if any(_is_dequantized(value) for value in node.inputs)]
    return differences + [f"{node.name}, on the way to sampling locations, is quantized" for node in rounded]


def _is_dequantized(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _groups(node: ir.Node) -> int:
    return node.attributes["group"].as_int() if "group" in node.attributes else 1


def insert_quantization(model: ir.Model, layers: Sequence[ir.Node], ranges: dict[str, float]) -> None:
    """A pair before the data and int8 weights for each layer, for nobody else.

    Layers that read the same tensor could share a pair, but ONNX Runtime 1.31 then multiplies in float32.
    """
    graph = model.graph
    for node in layers:
        data, weight = node.inputs[:2]
        assert data is not None
        assert weight is not None
        module = str(node.name).rpartition("/")[0]
        scale = _scale(np.array(ranges[str(data.name)]), f"the input of {node.name}")
        parameters = _parameters(graph, f"{module}/input", scale)
        quantized = _add(node, "QuantizeLinear", [data, *parameters], f"{module}/QuantizeLinear", ir.DataType.INT8)
        name = f"{module}/DequantizeLinear"
        node.replace_input_with(0, _add(node, "DequantizeLinear", [quantized, *parameters], name, ir.DataType.FLOAT))
        node.replace_input_with(1, _quantized_weight(graph, node, weight, module))
        if not weight.uses() and not weight.is_graph_output():
            del graph.initializers[str(weight.name)]


def _quantized_weight(graph: ir.Graph, node: ir.Node, weight: ir.Value, module: str) -> ir.Value:
    assert weight.const_value is not None
    exact = weight.const_value.numpy()
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
    axis = 0 if node.op_type == "Conv" or transposed else exact.ndim - 1  # of the output channels
    others = tuple(i for i in range(exact.ndim) if i != axis)
    scale = _scale(np.abs(exact).max(axis=others), f"weight {weight.name}")
    levels = np.rint(exact / np.expand_dims(scale, others)).clip(-LARGEST, LARGEST).astype(np.int8)
    inputs = [_initializer(graph, f"{module}/weight", levels), *_parameters(graph, f"{module}/weight", scale)]
    return _add(node, "DequantizeLinear", inputs, f"{module}/DequantizeLinear_2", ir.DataType.FLOAT, axis=axis)


def _scale(largest: NDArray[Any], what: str) -> NDArray[np.float32]:
    """Of one step; 1 where everything is zero, since a scale must be positive."""
    if not np.isfinite(largest).all():
        raise ExportError(f"{what} is not finite, so it has no range in int8. Validate the fp32 file first.")
    scale = (largest / LARGEST).astype(np.float32)
    return np.where(scale > 0, scale, np.float32(1))


def _parameters(graph: ir.Graph, name: str, scale: NDArray[np.float32]) -> list[ir.Value]:
    zero_point = np.zeros(scale.shape, np.int8)
    return [_initializer(graph, f"{name}/scale", scale), _initializer(graph, f"{name}/zero_point", zero_point)]


def _initializer(graph: ir.Graph, name: str, values: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(values)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def _add(
    reader: ir.Node, op_type: str, inputs: Sequence[ir.Value], name: str, dtype: ir.DataType, **attributes: int
) -> ir.Value:
    """The result of a new node before `reader`, of the shape of its first input."""
    node = ir.node(op_type, inputs, attributes, name=name)
    (result,) = node.outputs
    result.name, result.shape, result.dtype = name, inputs[0].shape, dtype
    assert reader.graph is not None
    reader.graph.insert_before(reader, node)
    return result
