"""Cut one operator out of an exported file, whatever its lowering, as a small ONNX model of its own."""

import onnx_ir as ir

from dat_deploy.export.lowering import OperatorRecord

__all__ = ["operator_model"]


def operator_model(model: ir.Model, record: OperatorRecord) -> bytes:
    """The operator that `record` names: inputs called like its parameters, one output, the file's own weights inside.

    Args:
        model: the file; it stays as it is.

    Returns:
        A serialised ONNX model with the file's opset and functions.
    """
    graph = ir.convenience.extract(model.graph, list(record.inputs.values()), [record.output])
    names = {tensor: parameter for parameter, tensor in record.inputs.items()}
    for value in graph.inputs:
        value.name = names[str(value.name)]
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    part.opset_imports.update(model.opset_imports)
    serialized: bytes = ir.to_proto(part).SerializeToString()
    return serialized
