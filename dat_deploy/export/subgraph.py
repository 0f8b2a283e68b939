"""Cut a part out of an exported file, whatever its lowering, as a smaller ONNX model of its own."""

import onnx_ir as ir

from dat_deploy.export.records import OperatorRecord

__all__ = ["model_up_to", "operator_model"]


def operator_model(model: ir.Model, record: OperatorRecord) -> bytes:
    """The operator that `record` names: inputs called like its parameters, one output, the file's own weights inside.

    Inputs and output are float32, whatever the file's precision; the part casts.

    Args:
        model: the file; it stays as it is.

    Returns:
        A serialised ONNX model with the file's opset and those of its functions that it calls.
    """
    graph = ir.convenience.extract(model.graph, list(record.inputs.values()), [record.output])
    names = {tensor: parameter for parameter, tensor in record.inputs.items()}
    for index, value in enumerate(graph.inputs):
        value.name = names[str(value.name)]
        if value.dtype != ir.DataType.FLOAT:
            float_input = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
            cast = ir.node("Cast", [float_input], {"to": value.dtype})
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            graph.insert_before(graph[0], cast)
            graph.inputs[index] = float_input
    return _serialized(model, graph)


def model_up_to(model: ir.Model, tensor: str) -> bytes:
    """Everything between the input `image` and one tensor, which is the only output, as float32.

    Args:
        model: the file; it stays as it is.

    Returns:
        A serialised ONNX model with the file's opset and those of its functions that it calls.
    """
    return _serialized(model, ir.convenience.extract(model.graph, ["image"], [tensor]))


def _serialized(model: ir.Model, graph: ir.Graph) -> bytes:
    """`graph`, a part of `model`, with its one output in float32."""
    (output,) = graph.outputs
    if output.dtype != ir.DataType.FLOAT:
        graph.append(cast := ir.node("Cast", [output], {"to": ir.DataType.FLOAT}))
        (result,) = cast.outputs
        result.dtype, result.shape = ir.DataType.FLOAT, output.shape
        graph.outputs[0] = result
    called = {node.op_identifier() for node in graph}
    functions = [function for function in model.functions.values() if function.identifier() in called]
    part = ir.Model(graph, ir_version=model.ir_version, functions=functions)
    part.opset_imports.update(model.opset_imports)
    serialized: bytes = ir.to_proto(part).SerializeToString()
    return serialized
