"""Precision lives in the graph: which nodes compute in float16 or bfloat16, and which stay in float32.

What stays: LayerNormalization and means, and everything that computes where the points are sampled, from the
convolution of the offsets on. In the operators' bodies all stays but the two products of attention.
"""

import abc
import difflib
import fnmatch
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from dat_deploy.errors import ExportError
from dat_deploy.export.census import TypeRule, type_rule
from dat_deploy.export.options import check_precision
from dat_deploy.plugins.onnx_domain import DOMAIN_NAME, operator_nodes
from dat_deploy.plugins.operator import specification
from dat_deploy.plugins.specification import Role
from dat_deploy.precision import EXPORTED, PRECISIONS

__all__ = ["MOVES", "cast_graph", "is_within", "nodes_in_another_precision", "polymorphic_body", "value_types"]

FLOAT = ir.DataType.FLOAT
_NAMES = {ir.DataType(PRECISIONS[name].onnx_type): name for name in EXPORTED}

# Computes nothing, so it has the type of its data, whatever that is.
MOVES = frozenset({
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip

_PRODUCT_SCALE = 8.0

_Types = dict[ir.Value, ir.DataType]


def cast_graph(model: ir.Model, precision: str, *, fp32: Sequence[str] = (), no_fp32: Sequence[str] = ()) -> ir.Model:
    """Bring a float32 graph to a lower precision; `model` itself is changed, its inputs and outputs stay float32.

    Args:
        model: a graph whose operators are nodes of domain dat_deploy, without bodies.
        precision: one of `precision.EXPORTED`.
        fp32: modules that stay in float32 with all below them, such as `stages.3`; each part may be a shell glob:
            `stages.*.attns.1`.
        no_fp32: modules, likewise, in which nothing stays in float32 by default; `fp32` wins where both name one.

    Raises:
        ExportError: if there is no such precision or module, if `no_fp32` names one where nothing stays in float32,
            or if a weight is too large for the precision.
    """
    check_precision(precision, fp32, no_fp32)
    half = ir.DataType(PRECISIONS[precision].onnx_type)
    if half == FLOAT:
        return model
    types = value_types(model)
    islands = _islands(model, types, half, fp32, no_fp32)
    _GraphRetyping(model, types, half, islands).run()
    return model


def polymorphic_body(body: onnx.FunctionProto) -> onnx.FunctionProto:
    """A flat float32 body made fit for nodes of any type: all in float32, but the products of data with data.

    Those are the two of the attention, query with key and probabilities with value; they are computed in the type of
    the first input, as is the output. Products with interpolation weights or selections are not of this kind. Sampling
    locations and bias tables come in float32 whatever the node's type. One body serves all types, since TensorRT and
    OpenVINO know one a name.

    The product of query with key is made of a query that is 2^3 times smaller, and multiplied up again in float32: its
    softmax is representable whatever it is, but float16 ends at 65504. More would round small queries to zero.
    """
    function = ir.serde.deserialize_function(body)
    _BodyRetyping(function).run()
    return ir.serde.serialize_function(function)


def nodes_in_another_precision(
    model: ir.Model,
    precision: str,
    locations: Sequence[str],
    *,
    fp32: Sequence[str] = (),
    no_fp32: Sequence[str] = (),
) -> list[str]:
    """The nodes of an exported graph, of any lowering, that compute in another precision than they should.

    Args:
        precision: that the products should have, one of `precision.EXPORTED`; fp32, no_fp32: see `export`.
        locations: names of the tensors of sampling locations, which nothing may round.

    Returns:
        A sentence each.
    """
    types = value_types(model)
    sources = [value for node in model.graph for value in node.outputs if value.name in locations]
    coordinates = _sources(sources, types)
    half = ir.DataType(PRECISIONS[precision].onnx_type)
    if half == FLOAT:
        return [
            f"{node.name} computes in {_NAMES[types[value]]}"
            for node in model.graph
            for value in node.outputs
            if types[value] in _NAMES and types[value] != FLOAT
        ]
    wrong = [
        f"{value.name}, a tensor of sampling locations, is {_NAMES[types[value]]}"
        for value in sources
        if types[value] != FLOAT
    ]
    for node in model.graph:
        if node.op_type not in ("LayerNormalization", "MatMul", "Gemm", "Conv"):
            continue
        input_type = types[node.inputs[0]] if node.inputs[0] is not None else FLOAT
        stays = node.op_type == "LayerNormalization" or node in coordinates
        stays = stays and not any(is_within(_module(node), pattern) for pattern in no_fp32)
        stays = stays or any(is_within(_module(node), pattern) for pattern in fp32)
        stays = stays or half not in _allowed_types(node.op_type, model.opset_imports[""])
        has_weight = node.op_type == "LayerNormalization" or any(
            v is not None and v.is_initializer() for v in node.inputs
        )
        if has_weight and input_type != (FLOAT if stays else half):
            wrong.append(f"{node.name} computes in {_NAMES[input_type]}")
    return wrong


def _islands(
    model: ir.Model, types: _Types, half: ir.DataType, fp32: Sequence[str], no_fp32: Sequence[str]
) -> set[ir.Node]:
    """The nodes that stay in float32, because they do by default, or are told to, or ONNX lacks them in `half`."""
    nodes = [node for node in model.graph if any(types[value] == FLOAT for value in node.outputs)]
    prefixes = {prefix for node in nodes for prefix in _prefixes(_module(node))}
    default = {node for node in nodes if node.op_type in ("LayerNormalization", "ReduceMean")}
    default |= _coordinate_path(model, types)
    opset = model.opset_imports[""]
    islands = {node for node in nodes if not node.domain and half not in _allowed_types(node.op_type, opset)}
    for pattern in (*fp32, *no_fp32):
        if not any(is_within(module, pattern) for module in prefixes):
            parameter = "fp32" if pattern in fp32 else "no_fp32"
            raise ExportError(f"`{parameter}` '{pattern}' names no module of this network. {_hint(pattern, prefixes)}")
    for pattern in no_fp32:
        if not any(is_within(_module(node), pattern) for node in default):
            names = {prefix for node in default for prefix in _prefixes(_module(node))}
            raise ExportError(
                f"`no_fp32` '{pattern}' names modules in which nothing is in float32 by default. "
                f"{_hint(pattern, names)}"
            )
    islands |= {node for node in default if not any(is_within(_module(node), pattern) for pattern in no_fp32)}
    return islands | {node for node in nodes if any(is_within(_module(node), pattern) for pattern in fp32)}


def _coordinate_path(model: ir.Model, types: _Types) -> set[ir.Node]:
    """What computes the sampling locations: back from each operator, to the convolution of the offsets, without it."""
    return _sources(
        (
            value
            for node in operator_nodes(model)
            for role, value in zip(specification(node.op_type).roles.values(), node.inputs, strict=True)
            if role is Role.LOCATIONS and value is not None
        ),
        types,
    )


def _sources(values: Iterable[ir.Value], types: _Types) -> set[ir.Node]:
    """The nodes of float32 that compute the values, back to a convolution, without it."""
    nodes: set[ir.Node] = set()
    pending = list(values)
    while pending:
        node = pending.pop().producer()
        if node is not None and node.op_type != "Conv" and node not in nodes:
            nodes.add(node)
            pending += [value for value in node.inputs if value is not None and types[value] == FLOAT]
    return nodes


def _module(node: ir.Node) -> str:
    """`stages.2.attns.1` of `stages.2.attns.1/MatMul`; empty for a node of the network itself."""
    return str(node.name).rpartition("/")[0]


def _prefixes(module: str) -> Iterable[str]:
    parts = module.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def is_within(module: str, pattern: str) -> bool:
    """Whether `pattern` names the module or one around it, a glob for each part of its name."""
    parts, globs = module.split("."), pattern.split(".")
    return len(parts) >= len(globs) and all(map(fnmatch.fnmatchcase, parts, globs))


def _hint(pattern: str, modules: set[str]) -> str:
    near = difflib.get_close_matches(pattern, sorted(modules), n=3, cutoff=0.4)
    top = sorted({module.partition(".")[0] for module in modules if module})
    return (f"Did you mean {' or '.join(near)}? " if near else "") + f"Modules are in: {', '.join(top)}."


def _allowed_types(op_type: str, opset_version: int) -> frozenset[int]:
    return type_rule(op_type, opset_version).allowed


def _output_type(node: ir.Node, types: _Types, opset_version: int) -> ir.DataType:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "Constant":
        (name,) = node.attributes
        if name == "value":
            return node.attributes[name].as_tensor().dtype
        return FLOAT if name.startswith("value_float") else ir.DataType.INT64
    rule = TypeRule(0, None) if node.domain else type_rule(node.op_type, opset_version)
    if rule.fixed is not None:
        return ir.DataType(rule.fixed)
    assert rule.like is not None, f"no type for the result of {node.op_type}"
    value = node.inputs[rule.like]
    assert value is not None
    return types[value]


def value_types(model: ir.Model) -> _Types:
    """The element type of every value, from those of the graph's inputs and weights on."""
    graph = model.graph
    types = {value: value.dtype or ir.DataType.UNDEFINED for value in (*graph.inputs, *graph.initializers.values())}
    return _with_results(types, graph, model.opset_imports[""])


def _with_results(types: _Types, nodes: Iterable[ir.Node], opset_version: int) -> _Types:
    for node in nodes:
        types.update(dict.fromkeys(node.outputs, _output_type(node, types, opset_version)))
    return types


class _Retyping(abc.ABC):
    """One walk over the nodes that brings what each reads to the type it computes in.

    A value is converted once for each type that is asked of it.

    Attributes:
        types: of every value, kept up to date along the walk; in a body `half` stands for whatever type a node has.
    """

    def __init__(self, graph: ir.Graph, types: _Types, half: ir.DataType) -> None:
        self.graph = graph
        self.types = types
        self.half = half
        self._conversions: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for node in list(self.graph):
            inputs = {i: value for i, value in enumerate(node.inputs) if value is not None and self._is_float(value)}
            if not inputs or node.op_type in ("Cast", "Shape"):
                continue  # takes any type as it is
            dtypes = self.input_types(node, list(inputs.values()))
            for index, dtype in zip(inputs, dtypes, strict=True):
                node.replace_input_with(index, self.converted(inputs[index], dtype, node))
            for value in filter(self._is_float, node.outputs):
                self.types[value] = dtypes[0]
        for index, value in enumerate(self.graph.outputs):
            self.convert_output(index, value)

    def _is_float(self, value: ir.Value) -> bool:
        return self.types[value] in (FLOAT, self.half)

    def converted(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        """`value` in another type, for `reader` and those after it."""
        if self.types[value] == dtype:
            return value
        key = (value, dtype)
        if key not in self._conversions:
            self._conversions[key] = self.convert(value, dtype, reader)
            self.types[self._conversions[key]] = dtype
        return self._conversions[key]

    def type_of_data(self, values: Sequence[ir.Value]) -> ir.DataType:
        """Of what a node moves; constants have the type that is asked of them."""
        types = {self.types[value] for value in values if not value.is_initializer()}
        return FLOAT if FLOAT in types else self.half

    @abc.abstractmethod
    def input_types(self, node: ir.Node, values: Sequence[ir.Value]) -> list[ir.DataType]:
        """The type of each floating-point input; the result has that of the first."""

    @abc.abstractmethod
    def convert(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        """A new value of another type, made before `reader`."""

    @abc.abstractmethod
    def convert_output(self, index: int, value: ir.Value) -> None:
        """Give an output the type that it must have."""


class _GraphRetyping(_Retyping):
    def __init__(self, model: ir.Model, types: _Types, half: ir.DataType, islands: set[ir.Node]) -> None:
        super().__init__(model.graph, types, half)
        self.islands = islands
        self.names = {str(node.name) for node in model.graph}

    def run(self) -> None:
        super().run()
        for (weight, _), copy in self._conversions.items():
            name = weight.name
            if weight.is_initializer() and not weight.uses():
                del self.graph.initializers[str(name)]
                copy.name = name
        for value, dtype in self.types.items():
            value.dtype = dtype

    def input_types(self, node: ir.Node, values: Sequence[ir.Value]) -> list[ir.DataType]:
        if node in self.islands:
            return [FLOAT] * len(values)
        if node.domain == DOMAIN_NAME:
            roles = specification(node.op_type).roles.values()
            return [FLOAT if role.stays_float32 else self.half for role in roles if role is not Role.INDICES]
        dtype = self.type_of_data(values) if node.op_type in MOVES else self.half
        return [dtype] * len(values)

    def convert(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        if value.is_initializer():
            return self._converted_weight(value, dtype, reader)
        # named after the module that is in float32 for the sake of this Cast
        made_in = value.producer()
        return self._cast(value, dtype, reader if dtype == FLOAT or made_in is None else made_in, reader)

    def convert_output(self, index: int, value: ir.Value) -> None:
        node = value.producer()
        if self.types[value] == FLOAT or node is None:
            return
        result = self._cast(value, FLOAT, node, None)
        self.types[result] = FLOAT
        value.name, result.name = node.name, value.name
        self.graph.outputs[index] = result

    def _cast(self, value: ir.Value, dtype: ir.DataType, namesake: ir.Node, reader: ir.Node | None) -> ir.Value:
        module = _module(namesake)
        name = numbered = f"{module}/Cast" if module else "Cast"
        count = 1
        while numbered in self.names:
            count += 1
            numbered = f"{name}_{count}"
        self.names.add(numbered)
        node = ir.node("Cast", [value], {"to": dtype}, name=numbered)
        (result,) = node.outputs
        result.name, result.shape = numbered, value.shape
        if reader is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(reader, node)
        return result

    def _converted_weight(self, weight: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        assert weight.const_value is not None
        exact = weight.const_value.numpy()
        with np.errstate(over="ignore"):
            rounded = exact.astype(dtype.numpy())
        if not np.isfinite(rounded[np.isfinite(exact)]).all():
            largest = np.abs(exact[np.isfinite(exact)]).max()
            with np.errstate(over="ignore"):
                reaching = [name for wider, name in _NAMES.items() if np.isfinite(largest.astype(wider.numpy()))]
            raise ExportError(
                f"weight '{weight.name}' holds {largest:.4g}, which {dtype.name.lower()} does not reach. Keep its "
                f'module in float32 with `fp32=["{_module(reader)}"]`, or export with '
                f'`precision="{reaching[-1]}"`.'
            )
        copy = ir.Value(name=f"{weight.name}/{dtype.name.lower()}", const_value=ir.tensor(rounded))
        copy.dtype, copy.shape = dtype, weight.shape
        self.graph.register_initializer(copy)
        return copy


class _BodyRetyping(_Retyping):
    def __init__(self, function: ir.Function) -> None:
        roles = dict(zip(function.inputs, specification(function.name).roles.values(), strict=True))
        inputs = {value: ir.DataType.INT64 if role is Role.INDICES else FLOAT for value, role in roles.items()}
        types = _with_results(inputs, function, function.opset_imports[""])
        half = ir.DataType.FLOAT16
        self.first = function.inputs[0]
        self.carries_data = {value for value, role in roles.items() if role in (Role.DATA, Role.WEIGHT)}
        types.update(dict.fromkeys(self.carries_data, half))
        super().__init__(function.graph, types, half)

    def run(self) -> None:
        super().run()
        for node in list(self.graph):
            widening = [
                reader
                for reader, _ in node.outputs[0].uses()
                if reader.op_type == "Cast" and reader.attributes["to"].as_int() == FLOAT
            ]
            if node.op_type == "MatMul" and self.types[node.outputs[0]] == self.half and widening:
                self._scale_product(node, widening)

    def _scale_product(self, product: ir.Node, widening: Sequence[ir.Node]) -> None:
        """Of a first factor that is rounded from float32; what widens the result scales it back."""
        first = product.inputs[0]
        rounding = None if first is None else first.producer()
        if rounding is None or rounding.op_type != "CastLike":
            return
        exact = rounding.inputs[0]
        assert exact is not None
        rounding.replace_input_with(0, self._scaled(exact, 1 / _PRODUCT_SCALE, rounding, before=True))
        for cast in widening:
            (wide,) = cast.outputs
            readers = list(wide.uses())
            scaled = self._scaled(wide, _PRODUCT_SCALE, cast, before=False)
            for reader, index in readers:
                reader.replace_input_with(index, scaled)

    def _scaled(self, value: ir.Value, factor: float, place: ir.Node, *, before: bool) -> ir.Value:
        constant = ir.node("Constant", [], {"value_float": factor})
        product = ir.node("Mul", [value, constant.outputs[0]])
        insert = self.graph.insert_before if before else self.graph.insert_after
        insert(place, [constant, product])
        self.types.update({constant.outputs[0]: FLOAT, product.outputs[0]: FLOAT})
        return product.outputs[0]

    def input_types(self, node: ir.Node, values: Sequence[ir.Value]) -> list[ir.DataType]:
        carrying = [value in self.carries_data for value in values]
        if any(carrying):
            self.carries_data.update(filter(self._is_float, node.outputs))
        if node.op_type in MOVES:
            return [self.type_of_data(values)] * len(values)
        is_product_of_data = node.op_type == "MatMul" and all(carrying)
        return [self.half if is_product_of_data else FLOAT] * len(values)

    def convert(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node | None) -> ir.Value:
        node = ir.node("Cast", [value], {"to": FLOAT}) if dtype == FLOAT else ir.node("CastLike", [value, self.first])
        (result,) = node.outputs
        self.types[result] = dtype
        if reader is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(reader, node)
        return result

    def convert_output(self, index: int, value: ir.Value) -> None:
        if self.types[value] != self.half:
            self.graph.outputs[index] = self.convert(value, self.half, None)
