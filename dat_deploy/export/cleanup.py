"""Graph passes that the export needs and onnxscript's optimizer lacks. Each returns whether it changed anything."""

import numpy as np
import onnx_ir as ir

__all__ = ["constant_reshape_shapes", "name_results", "remove_identity_slices"]


def constant_reshape_shapes(model: ir.Model) -> bool:
    """Reshape to a shape of which one part is computed (the batch): write -1 for it, and the computation goes."""
    modified = False
    for node in model.graph:
        if node.op_type != "Reshape" or node.inputs[1] is None:
            continue
        shape = node.inputs[1].producer()
        if shape is None or shape.op_type != "Concat":
            continue
        parts = [_integers(value) for value in shape.inputs]
        if parts.count(None) != 1 or any(part is not None and (0 in part or -1 in part) for part in parts):
            continue
        sizes = [size for part in parts for size in (part if part is not None else [-1])]
        result = node.outputs[0].shape
        if result is None or len(result) != len(sizes):
            continue  # what is computed may be more than one size
        constant = ir.Value(name=f"{node.name}/shape", const_value=ir.tensor(np.array(sizes, dtype=np.int64)))
        constant.dtype, constant.shape = ir.DataType.INT64, ir.Shape([len(sizes)])
        model.graph.register_initializer(constant)
        node.replace_input_with(1, constant)
        node.attributes.pop("allowzero", None)
        modified = True
    return modified


def remove_identity_slices(model: ir.Model) -> bool:
    """Drop Slices that keep everything and Concat inputs that are empty: what a roll by nothing leaves behind."""
    modified = False
    for node in list(model.graph):
        replacement = None
        if node.op_type == "Slice" and _keeps_everything(node):
            replacement = node.inputs[0]
        elif node.op_type == "Concat":
            inputs = [value for value in node.inputs if value is not None and not _is_empty(value)]
            if not inputs or len(inputs) == len(node.inputs):
                continue
            if len(inputs) == 1:
                replacement = inputs[0]
            else:
                node.resize_inputs(len(inputs))
                for index, value in enumerate(inputs):
                    node.replace_input_with(index, value)
                modified = True
        if replacement is not None and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], replacement)
            model.graph.remove(node, safe=True)
            modified = True
    return modified


def name_results(model: ir.Model) -> bool:
    """Results are called like the node that makes them; constants of no module, like the node that reads them."""
    modified = False
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for index, value in enumerate(node.outputs):
            name = node.name if index == 0 else f"{node.name}:{index}"
            if value not in outputs and value.name != name:
                value.name = name
                modified = True
    for name, value in list(model.graph.initializers.items()):
        reader, index = next(iter(value.uses()), (None, 0))
        if reader is not None and "." not in name:
            value.name = f"{reader.name}/input_{index}"
            modified = True
    return modified


def _integers(value: ir.Value | None) -> list[int] | None:
    """The elements of a constant, flat; None for what is computed or absent."""
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None else constant.numpy().flatten().tolist()


def _slice_range(node: ir.Node) -> tuple[int, int, int] | None:
    """(size, start, end) of a Slice of step 1 along one axis of known size, bounds resolved; None for any other."""
    data, *bounds = node.inputs
    shape = None if data is None else data.shape
    starts, ends, axes, steps = (_integers(bounds[i]) if i < len(bounds) else None for i in range(4))
    has_steps = len(bounds) > 3 and bounds[3] is not None
    if shape is None or starts is None or ends is None or axes is None or (has_steps and steps != [1]):
        return None
    if len(axes) != 1 or not isinstance(size := shape[axes[0]], int):
        return None
    start, end = (bound + size if bound < 0 else bound for bound in (starts[0], ends[0]))
    return size, min(start, size), min(end, size)


def _keeps_everything(node: ir.Node) -> bool:
    bounds = _slice_range(node)
    return bounds is not None and bounds[1] == 0 and bounds[2] == bounds[0]


def _is_empty(value: ir.Value) -> bool:
    if value.shape is not None and 0 in value.shape:
        return True
    producer = value.producer()
    if producer is None or producer.op_type != "Slice":
        return False
    bounds = _slice_range(producer)
    return bounds is not None and bounds[1] >= bounds[2]
