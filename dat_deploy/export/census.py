"""What the nodes of a written file compute in, told from its protobuf; loads neither torch nor a graph library."""

import functools
from collections import Counter
from dataclasses import dataclass

import onnx

from dat_deploy.precision import EXPORTED, FULL, PRECISIONS

__all__ = ["PrecisionCensus", "TypeRule", "precision_census", "type_rule"]


@dataclass(frozen=True)
class PrecisionCensus:
    """What a graph computes in, counted from its nodes; nodes that compute in integers do not count.

    Attributes:
        nodes: precision -> operator -> number of nodes; a node of several types has that of its first input, one that
            reads data and weights that were dequantized computes in the type of these.
        casts: from one of the precisions to another, of quantization too; they do not count as nodes.
        islands: groups of connected float32 nodes.
    """

    nodes: dict[str, dict[str, int]]
    casts: int
    islands: int

    def count(self, precision: str) -> int:
        return sum(self.nodes.get(precision, {}).values())

    def share(self, precision: str) -> float:
        """Of all nodes that compute in floating point."""
        return self.count(precision) / max(1, sum(map(self.count, self.nodes)))

    def __str__(self) -> str:
        """`precision: fp16 412 nodes (81%), fp32 96 (19%) in 31 islands, 90 casts`."""
        full, lower = FULL.name, [name for name in self.nodes if name != FULL.name]
        if not lower:
            return f"precision: {full} {self.count(full)} nodes"
        parts = [f"{name} {self.count(name)} nodes ({self.share(name):.0%})" for name in lower]
        parts.append(f"{full} {self.count(full)} ({self.share(full):.0%}) in {self.islands} islands")
        return f"precision: {', '.join(parts)}, {self.casts} casts"


def precision_census(model: onnx.ModelProto) -> PrecisionCensus:
    """Count nodes by the type they compute in, which follows from the types of inputs, weights and Casts alone."""
    types = _value_types(model)
    names = {PRECISIONS[name].onnx_type: name for name in EXPORTED}
    nodes: dict[str, Counter[str]] = {}
    casts = 0
    producers: dict[str, int] = {}  # value -> the node that made it, by its place
    group: dict[int, int] = {}  # node of float32 -> another of its island; one a group is its own
    for place, node in enumerate(model.graph.node):
        input_types = [types[value] for value in node.input if value and types[value] in names]
        output_types = [types[value] for value in node.output if types[value] in names]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or (
            node.op_type == "Cast" and input_types and output_types
        ):
            casts += 1
        elif output_types:
            makers = [model.graph.node[producers[value]] for value in node.input[:2] if value in producers]
            precision = _of_dequantized(makers, types) or names[(input_types or output_types)[0]]
            nodes.setdefault(precision, Counter())[node.op_type] += 1
            if precision == FULL.name:
                group[place] = place
                for value in node.input:
                    before = producers.get(value) if types.get(value) == FULL.onnx_type else None
                    if before in group:
                        group[_representative(group, before)] = place
        producers.update(dict.fromkeys(node.output, place))
    islands = sum(node == other for node, other in group.items())
    return PrecisionCensus({name: dict(counts) for name, counts in sorted(nodes.items())}, casts, islands)


def _of_dequantized(makers: list[onnx.NodeProto], types: dict[str, int]) -> str | None:
    """The precision of a node whose data and weights were dequantized for it; a bias may stay as it was."""
    if len(makers) < 2 or any(maker.op_type != "DequantizeLinear" for maker in makers):
        return None
    quantized = {row.onnx_type: row.name for row in PRECISIONS.values() if not row.is_exported}
    return quantized.get(types[makers[1].input[0]], next(iter(quantized.values())))  # uint8 counts as int8


def _representative(group: dict[int, int], node: int) -> int:
    while group[node] != node:
        group[node] = node = group[group[node]]
    return node


@dataclass(frozen=True)
class TypeRule:
    """The type of an operator's first output, in numbers of onnx.TensorProto.

    Attributes:
        like: the input that it is like; fixed: or itself; None of both where only an attribute says it.
        allowed: the types it may have.
    """

    like: int | None
    fixed: int | None
    allowed: frozenset[int] = frozenset()


@functools.cache
def type_rule(op_type: str, opset_version: int) -> TypeRule:
    """Of a standard operator, from ONNX's schemas."""
    schema = onnx.defs.get_schema(op_type, opset_version, "")
    constraints = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    letter = schema.outputs[0].type_str
    numbers = dict(onnx.TensorProto.DataType.items())
    texts = (text[len("tensor(") : -1].upper() for text in constraints.get(letter, [letter]))
    types = frozenset(numbers[text] for text in texts if text in numbers)
    like = next((index for index, parameter in enumerate(schema.inputs) if parameter.type_str == letter), None)
    fixed = next(iter(types)) if like is None and len(types) == 1 else None
    return TypeRule(like, fixed, types)


def _value_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value, from those of the graph's inputs and weights on."""
    opset_version = next(entry.version for entry in model.opset_import if not entry.domain)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    types |= {weight.name: weight.data_type for weight in model.graph.initializer}
    for node in model.graph.node:
        types.update(dict.fromkeys(node.output, _output_type(node, types, opset_version)))
    return types


def _output_type(node: onnx.NodeProto, types: dict[str, int], opset_version: int) -> int:
    if node.op_type == "Cast":
        return int(next(attribute.i for attribute in node.attribute if attribute.name == "to"))
    if node.op_type == "Constant":
        (attribute,) = node.attribute
        if attribute.name == "value":
            return int(attribute.t.data_type)
        is_float = attribute.name.startswith("value_float")
        return int(onnx.TensorProto.FLOAT if is_float else onnx.TensorProto.INT64)
    rule = TypeRule(0, None) if node.domain else type_rule(node.op_type, opset_version)
    if rule.fixed is not None:
        return rule.fixed
    assert rule.like is not None, f"no type for the result of {node.op_type}"
    return types[node.input[rule.like]]
