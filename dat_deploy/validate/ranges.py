"""What the tensors of a half-precision file hold, measured in float32: whether the type reaches so far, and so low."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from dat_deploy.export.precision import MOVES, value_types
from dat_deploy.plugins.onnx_domain import operator_nodes
from dat_deploy.precision import Precision
from dat_deploy.runners import Runner

__all__ = ["TensorRange", "half_ranges", "modules_to_keep", "widen"]

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class TensorRange:
    """Of one tensor that the file holds in half precision.

    Attributes:
        node: that makes it; modules: of that node, and of those that read it.
        largest: magnitude in float32, infinite or NaN as it is; flushed: the share of the sum of magnitudes that is in
            elements which the type rounds to zero.
    """

    node: str
    modules: tuple[str, ...]
    largest: float
    flushed: float


def half_ranges(
    runner: Runner, model: ir.Model, precision: Precision, images: NDArray[np.float32]
) -> list[TensorRange]:
    """Run a float32 copy of a half-precision file, and see what each tensor would have to hold; in graph order.

    Tensors that only move another's elements are left out.

    Args:
        runner: that takes graphs; model: the file, which stays as it is.
        images: [N, 3, H, W].
    """
    model = ir.from_proto(ir.to_proto(model))
    _inline(model)
    half = ir.DataType(precision.onnx_type)
    values = [
        value
        for value, dtype in value_types(model).items()
        if dtype == half and (node := value.producer()) is not None and node.op_type not in MOVES
    ]
    if not values:
        return []
    found = [(_name(value), _modules(value)) for value in values]
    widen(model, half)
    run = runner.open_graph(_with_statistics(model, values, precision))
    batch = runner.description.batch or len(images)
    starts = range(0, len(images), batch)
    rows = np.stack([run({"image": images[np.arange(first, first + batch) % len(images)]}) for first in starts])
    largest, total, flushed = rows.reshape(len(starts), -1, 3).astype(np.float64).transpose(2, 0, 1)
    largest = np.where(np.isfinite(total), largest, total).max(axis=0)  # NaN stays
    shares = np.divide(flushed.sum(axis=0), total.sum(axis=0), out=np.zeros(len(values)), where=total.sum(axis=0) > 0)
    return [TensorRange(*of, float(most), float(share)) for of, most, share in zip(found, largest, shares, strict=True)]


def modules_to_keep(ranges: Sequence[TensorRange]) -> list[str]:
    """Modules that, in float32, leave none of the tensors in half precision; at most four, or what is around them."""
    modules = list(dict.fromkeys(module for each in ranges for module in each.modules if module))
    while len(modules) > 4 and any("." in module for module in modules):
        deepest = max(module.count(".") for module in modules)
        modules = list(dict.fromkeys(m.rpartition(".")[0] if m.count(".") == deepest else m for m in modules))
    return [m for m in modules if not any(m.startswith(f"{other}.") for other in modules)]


def _inline(model: ir.Model) -> None:
    """Functions become their bodies, whose nodes are named after the node that was one."""
    for node in operator_nodes(model):
        function = ir.serde.deserialize_function(ir.serde.serialize_function(model.functions[node.op_identifier()]))
        function.name = str(node.name)
        for inner in function:
            inner.name = f"{node.name}/{inner.op_type}"
        model.functions[function.identifier()] = function
        node.op_type = function.name
    passes.InlinePass()(model)


def _name(value: ir.Value) -> str:
    node = value.producer()
    assert node is not None
    return str(node.name)


def _modules(value: ir.Value) -> tuple[str, ...]:
    nodes = [value.producer(), *(node for node, _ in value.uses())]
    # `stages.2.attns.1/window_attention/MatMul` is of the module before the first slash
    names = (str(node.name).partition("/") for node in nodes if node is not None)
    return tuple(dict.fromkeys(module if slash else "" for module, slash, _ in names))


def widen(model: ir.Model, half: ir.DataType) -> None:
    """In place of the half precision float32."""
    for weight in model.graph.initializers.values():
        if weight.dtype == half and weight.const_value is not None:
            weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float32), name=weight.name)
            weight.dtype = FLOAT
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT)
        if node.op_type == "Constant" and "value" in node.attributes:
            constant = node.attributes["value"].as_tensor()
            if constant.dtype == half:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(constant.numpy().astype(np.float32)))
        for value in node.outputs:
            if value.dtype == half:
                value.dtype = FLOAT


def _with_statistics(model: ir.Model, values: Sequence[ir.Value], precision: Precision) -> bytes:
    """The model with one output, [3 * N]: of each value the largest magnitude, the sum of all, of those too small."""
    import torch

    limits = torch.finfo(precision.dtype)
    graph = model.graph
    smallest = ir.Value(
        name="ranges/smallest", const_value=ir.tensor(np.float32(limits.smallest_normal * limits.eps / 2))
    )
    zero = ir.Value(name="ranges/zero", const_value=ir.tensor(np.float32(0)))
    one = ir.Value(name="ranges/one", const_value=ir.tensor(np.array([1], np.int64)))
    for constant in (smallest, zero, one):
        graph.register_initializer(constant)
    parts: list[ir.Value] = []

    def add(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        graph.append(node)
        node.outputs[0].name = f"ranges/{len(graph)}"
        return node.outputs[0]

    for value in values:
        magnitude = add("Abs", value)
        small = add("Where", add("Less", magnitude, smallest), magnitude, zero)
        for op_type, of in (("ReduceMax", magnitude), ("ReduceSum", magnitude), ("ReduceSum", small)):
            parts.append(add("Reshape", add(op_type, of, keepdims=0), one))
    result = add("Concat", *parts, axis=0)
    result.dtype, result.shape = FLOAT, ir.Shape([len(parts)])
    graph.outputs.clear()
    graph.outputs.append(result)
    model.functions.clear()
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized
