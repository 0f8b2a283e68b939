"""Lowerings: what the deformable operators become in the file.

    function     nodes of domain dat_deploy, each carrying its meaning as a function of standard operators
    plugin       the same nodes without bodies, for an engine that must not silently fall back
    gather       inlined; bilinear reads as Pad + Gather + multiply-add
    gridsample   inlined; two GridSample nodes a deformable block
    hat          inlined; bilinear reads as products with hat functions, no gather of data at all

`lower` works on any file whose operators are still nodes, with or without bodies.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir
import onnxscript
import onnxscript.optimizer
from onnx_ir.passes import common as passes

from dat_deploy.export.cleanup import name_results, remove_identity_slices
from dat_deploy.export.options import already_inlined, check_lowering
from dat_deploy.export.precision import polymorphic_body, value_types
from dat_deploy.export.records import PROPERTY, OperatorRecord
from dat_deploy.plugins.onnx_domain import DOMAIN_NAME, DOMAIN_VERSION, operator_nodes
from dat_deploy.plugins.operator import OPERATORS, Operator, specification
from dat_deploy.plugins.specification import PLUGIN_ATTRIBUTES

__all__ = ["function_bodies", "lower"]

# In elements: a larger constant is cheaper as the few nodes that make it. But `hat` is for what cannot gather, and the
# bias of the neighborhoods is gathered from its table: 6.5 million elements in stage 0 of pp-base-384.
_FOLD_LIMITS = {"gather": 1 << 20, "gridsample": 1 << 20, "hat": 1 << 23}


def function_bodies(lowering: str, opset_version: int, *, polymorphic: bool = False) -> list[onnx.FunctionProto]:
    """One flat FunctionProto an operator, with every attribute that its nodes carry declared.

    Args:
        polymorphic: for nodes of any floating-point type, not of float32 alone; see `polymorphic_body`.
    """
    bodies = []
    for name in OPERATORS:
        module = Operator(name).onnx_function
        body = _flattened(module.BODIES[lowering], module.HELPERS)
        body.name = name
        body.attribute.extend(PLUGIN_ATTRIBUTES)
        del body.opset_import[:]
        body.opset_import.append(onnx.helper.make_opsetid("", opset_version))
        bodies.append(polymorphic_body(body) if polymorphic else body)
    return bodies


def lower(model: ir.Model, lowering: str) -> ir.Model:
    """Give the operators of `model` the form that `lowering` names; `model` itself is changed.

    Args:
        model: a graph whose operators are nodes of domain dat_deploy, with or without bodies.

    Raises:
        ExportError: if there is no such lowering, or the operators of `model` are already inlined.
    """
    check_lowering(lowering)
    nodes = operator_nodes(model)
    if not nodes and PROPERTY in model.metadata_props:  # else it was traced now, and has none
        raise already_inlined()
    boundaries = [_Boundary.of(node) for node in nodes]
    model.functions.clear()
    if lowering != "plugin":
        op_types = {node.op_type for node in nodes}
        types = value_types(model)
        operators = {node: types[value] for node in nodes if (value := node.inputs[0]) is not None}
        polymorphic = set(operators.values()) != {ir.DataType.FLOAT}
        bodies = function_bodies(lowering, model.opset_imports[""], polymorphic=polymorphic)
        bodies = [body for body in bodies if body.name in op_types]
        if lowering == "function":
            model.functions.update({body.identifier(): body for body in map(ir.serde.deserialize_function, bodies)})
        else:
            _inline(model, operators, {body.name: body for body in bodies}, _FOLD_LIMITS[lowering])
    model.metadata_props[PROPERTY] = json.dumps([asdict(boundary.record()) for boundary in boundaries])
    return model


@dataclass(frozen=True)
class _Boundary:
    """The tensors around an operator while the graph changes: results get other names, but keep their reader."""

    name: str
    operator: str
    attributes: dict[str, Any]
    inputs: dict[str, ir.Value]
    reader: ir.Node
    reader_index: int

    @classmethod
    def of(cls, node: ir.Node) -> "_Boundary":
        inputs = {
            parameter: value
            for parameter, value in zip(specification(node.op_type).inputs, node.inputs, strict=True)
            if value is not None and not value.is_initializer()
        }
        attributes = {name: each.value for name, each in node.attributes.items() if name not in PLUGIN_ATTRIBUTES}
        reader, index = next(iter(node.outputs[0].uses()))
        return cls(str(node.name), node.op_type, attributes, inputs, reader, index)

    def record(self) -> OperatorRecord:
        output = self.reader.inputs[self.reader_index]
        assert output is not None
        inputs = {parameter: str(value.name) for parameter, value in self.inputs.items()}
        return OperatorRecord(self.name, self.operator, self.attributes, inputs, str(output.name))


def _inline(
    model: ir.Model, operators: dict[ir.Node, ir.DataType], bodies: dict[str, onnx.FunctionProto], fold_limit: int
) -> None:
    """Each operator becomes its body, node names prefixed with the operator's, what is constant folded away.

    Args:
        operators: with the type of their first input.
    """
    for node, dtype in operators.items():
        function = ir.serde.deserialize_function(bodies[node.op_type])
        function.name = str(node.name)
        for inner in function:
            if inner.op_type == "CastLike" and inner.inputs[1] is function.inputs[0]:
                inner.op_type = "Cast"
                inner.attributes["to"] = ir.AttrInt64("to", dtype)
                inner.resize_inputs(1)
            inner.name = f"{node.name}/{inner.op_type}"
        model.functions[function.identifier()] = function
        node.op_type = function.name
    passes.InlinePass()(model)
    passes.ShapeInferencePass()(model)
    onnxscript.optimizer.fold_constants(
        model, onnx_shape_inference=True, input_size_limit=fold_limit, output_size_limit=fold_limit
    )
    remove_identity_slices(model)
    onnxscript.optimizer.remove_unused_nodes(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    name_results(model)
    model.opset_imports.pop(DOMAIN_NAME, None)


def _flattened(body: onnxscript.OnnxFunction, helpers: Iterable[onnxscript.OnnxFunction]) -> onnx.FunctionProto:
    """`body` with the helper functions that it calls inlined, since TensorRT keys functions by name alone."""
    proto = body.to_function_proto()
    call = onnx.helper.make_node(proto.name, proto.input, proto.output, domain=DOMAIN_NAME)
    call.attribute.extend(onnx.helper.make_attribute(name, 1) for name in proto.attribute)
    unknown = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in proto.input]
    result = onnx.helper.make_tensor_value_info(proto.output[0], onnx.TensorProto.FLOAT, None)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(DOMAIN_NAME, DOMAIN_VERSION)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([call], "call", unknown, [result]),
        functions=[proto, *(helper.to_function_proto() for helper in helpers)],
        opset_imports=opsets,
    )
    inlined = onnx.inliner.inline_selected_functions(model, [(DOMAIN_NAME, proto.name)], exclude=True)
    flat: onnx.FunctionProto
    (flat,) = (function for function in inlined.functions if function.name == proto.name)
    return flat
