"""IPluginV3 in Python, for TensorRT and TensorRT-RTX.

The engine needs this package and Triton where it runs. Each launch goes to TensorRT's stream and allocates nothing, so
a CUDA graph captures it, and replaying that has no Python in it. Triton compiles at the first launch of a shape: run it
once before capturing.
"""

import contextlib
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dat_deploy.errors import UnsupportedError
from dat_deploy.plugins.launch import Configuration, Launch
from dat_deploy.plugins.operator import specification
from dat_deploy.plugins.specification import Kind
from dat_deploy.plugins.tensorrt.calls import count_launch, recorded
from dat_deploy.plugins.tensorrt.node import (
    NAMESPACE,
    TYPES,
    VERSION,
    Dtypes,
    Node,
    Shapes,
    check_programs,
    numbered,
)
from dat_deploy.plugins.tuning import tuned_configuration

__all__ = ["creator"]


class _Pointer:
    """As much of a tensor as a Triton kernel takes: an address on the GPU, and the type of what is there."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.address


def _on_stream(stream: int) -> contextlib.AbstractContextManager[Any]:
    """Launches inside of it go to this CUDA stream.

    Raises:
        UnsupportedError: if torch cannot use the GPU that TensorRT uses.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"torch {torch.__version__} sees no GPU, and the plugins launch through it; install torch for CUDA."
        )
    return torch.cuda.stream(torch.cuda.ExternalStream(stream))  # type: ignore[no-untyped-call]  # torch's


@functools.lru_cache(maxsize=4096)
def _launch(node: Node, shapes: Shapes, dtypes: Dtypes, tactic: int) -> Launch:
    """The launch by the configuration of this tactic; else by that which was measured to be the fastest, or the first.

    A tactic that there is not was chosen by another version, in an engine built then.
    """
    problem, kernel = node.problem(shapes, dtypes), node.kernel
    configurations = kernel.configurations(problem)
    chosen: Configuration | None = numbered(configurations).get(tactic)
    if chosen is None:
        beside = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
        chosen = tuned_configuration(node.operator, problem, beside)
    launch: Launch = kernel.launch(problem, chosen if chosen in configurations else configurations[0])
    check_programs(str(node), launch)
    return launch


def _enqueue(
    node: Node, shapes: Shapes, dtypes: Dtypes, tactic: int, inputs: Sequence[int], output: int, stream: int
) -> None:
    """Launch the kernel on addresses of the GPU; nothing is allocated."""
    launch = _launch(node, shapes, dtypes, tactic)
    if launch.programs == 0:  # an empty batch
        return
    pointers = {
        name: _Pointer(address, dtype)
        for name, address, dtype in zip(node.specification.inputs, inputs, dtypes, strict=True)
    }
    with _on_stream(stream):
        launch.kernel[launch.grid](
            *(pointers[name] for name in launch.inputs),
            *launch.scalars.values(),
            _Pointer(output, dtypes[0]),
            **launch.constants,
            **launch.options,
        )
    count_launch(node.operator)


class _Expression:
    """TensorRT's expression for a dimension, with the arithmetic of `output_shape`."""

    def __init__(self, trt: Any, builder: Any, expression: Any) -> None:
        self.trt, self.builder, self.expression = trt, builder, expression

    def _with(self, operation: Any, other: "_Expression | int") -> "_Expression":
        right = self.builder.constant(other) if isinstance(other, int) else other.expression
        return _Expression(self.trt, self.builder, self.builder.operation(operation, self.expression, right))

    def __mul__(self, other: "_Expression | int") -> "_Expression":
        return self._with(self.trt.DimensionOperation.PROD, other)

    def __add__(self, other: "_Expression | int") -> "_Expression":
        return self._with(self.trt.DimensionOperation.SUM, other)

    def __sub__(self, other: "_Expression | int") -> "_Expression":
        return self._with(self.trt.DimensionOperation.SUB, other)

    def __floordiv__(self, other: "_Expression | int") -> "_Expression":
        return self._with(self.trt.DimensionOperation.FLOOR_DIV, other)


def _shapes_but_for_the_batch(node: Node, inputs: Sequence[Any]) -> Shapes | None:
    """With some batch where that is dynamic; None if another dimension is."""
    shapes = [[dim.get_constant_value() if dim.is_constant() else -1 for dim in dims] for dims in inputs]
    roles = node.specification.roles.values()
    of_images = [shape for role, shape in zip(roles, shapes, strict=True) if role.leads_with_batch and shape]
    batch = next((shape[0] for shape in of_images if shape[0] >= 0), 1)
    for shape in of_images:
        if shape[0] < 0:
            shape[0] = batch
    return None if any(dim < 0 for shape in shapes for dim in shape) else tuple(map(tuple, shapes))


def _dtypes(descriptions: Sequence[Any]) -> Dtypes:
    return tuple(TYPES[description.type.name] for description in descriptions)


def _shapes(descriptions: Sequence[Any]) -> Shapes:
    return tuple(tuple(description.dims) for description in descriptions)


class _Plugin:
    """The methods that TensorRT calls on an IPluginV3; `_plugin_class` adds TensorRT's own bases."""

    def __init__(self, trt: Any, node: Node, tactic: int = 0) -> None:
        for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
            base.__init__(self)
        self.trt, self.node, self.tactic = trt, node, tactic
        self.plugin_name = node.operator
        self.plugin_version, self.plugin_namespace, self.num_outputs = VERSION, NAMESPACE, 1
        self.configurations: list[Configuration] = []
        self.fields = _Fields(trt, node.specification.attributes, node.attributes)

    def get_capability_interface(self, kind: Any) -> "_Plugin":
        return self

    def clone(self) -> "_Plugin":
        clone = type(self)(self.trt, self.node, self.tactic)
        clone.configurations = self.configurations
        return clone

    def attach_to_context(self, resources: Any) -> "_Plugin":
        return self.clone()

    @recorded
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        self.node.check_types([TYPES.get(each.name) for each in input_types])
        return [input_types[0]]

    @recorded
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        self.node.check_ranks([len(dims) for dims in inputs])
        known = _shapes_but_for_the_batch(self.node, inputs)
        if known is not None:
            self.node.problem(known, (torch.float32,) * len(known))  # types are checked elsewhere; any will do
        expressions = [[_Expression(self.trt, builder, dim) for dim in dims] for dims in inputs]
        output = self.node.specification.shape_of_output(expressions, self.node.attributes)
        dims = self.trt.DimsExprs(len(output))
        for i, dim in enumerate(output):
            dims[i] = dim.expression
        return [dims]

    @recorded
    def supports_format_combination(self, position: int, descriptions: Sequence[Any], num_inputs: int) -> bool:
        first, this = (TYPES.get(descriptions[i].desc.type.name) for i in (0, position))
        is_linear = descriptions[position].desc.format == self.trt.TensorFormat.LINEAR
        return bool(is_linear and first is not None and this in self.node.takes(position, first))

    @recorded
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Refuses what cannot run at the sizes of a profile."""
        dtypes = self.node.check_types([TYPES.get(each.desc.type.name) for each in inputs])
        for bound in ("opt", "max"):
            shapes = tuple(tuple(getattr(each, bound)) for each in inputs)
            problem = self.node.problem(shapes, dtypes)
            _launch(self.node, shapes, dtypes, self.tactic)
            if bound == "opt":
                self.configurations = self.node.kernel.configurations(problem)

    def get_valid_tactics(self) -> list[int]:
        return list(numbered(self.configurations))

    def set_tactic(self, tactic: int) -> None:
        self.tactic = tactic

    @recorded
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        _launch(self.node, _shapes(inputs), _dtypes(inputs), self.tactic)  # looked up by each enqueue

    @recorded
    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        _enqueue(self.node, _shapes(input_desc), _dtypes(input_desc), self.tactic, inputs, outputs[0], stream)

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        return 0

    def get_fields_to_serialize(self) -> Any:
        return self.fields.collection


class _Creator:
    """Makes the plugins of one operator; `_creator_class` adds TensorRT's own base."""

    def __init__(self, trt: Any, operator: str) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.trt = trt
        self.name, self.plugin_version, self.plugin_namespace = operator, VERSION, NAMESPACE
        self.fields = _Fields(trt, specification(operator).attributes)
        self.field_names = self.fields.collection

    @recorded
    def create_plugin(self, name: str, fields: Sequence[Any], phase: Any) -> Any:
        """From the attributes of a node, or from what an engine holds of them."""
        values = {field.name: field.data for field in fields}
        return _plugin_class(self.trt)(self.trt, Node.from_fields(self.name, values, name))


class _Fields:
    """TensorRT's `collection` of fields, which holds addresses alone: what is there must live as long as it is read."""

    def __init__(self, trt: Any, kinds: Mapping[str, Kind], values: Sequence[Any] | None = None) -> None:
        """Without values it is what a creator declares."""
        self._arrays, self._fields = [], []
        for i, (name, kind) in enumerate(kinds.items()):
            self._arrays.append(_array(kind, () if values is None else values[i]))
            self._fields.append(trt.PluginField(name, self._arrays[-1], getattr(trt.PluginFieldType, kind.field)))
        self.collection = trt.PluginFieldCollection(self._fields)


def _array(kind: Kind, value: Any) -> Any:
    """What TensorRT keeps of an attribute."""
    if kind.element is str:
        return np.frombuffer(value.encode() if value else b"", np.int8)
    return np.array(value if isinstance(value, tuple) else [value], kind.field.lower())


@functools.cache
def _plugin_class(trt: Any) -> type[_Plugin]:
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    return types.new_class("Plugin", (_Plugin, *bases))


@functools.cache
def _creator_class(trt: Any) -> type[_Creator]:
    return types.new_class("Creator", (_Creator, trt.IPluginCreatorV3One))


def creator(trt: Any, operator: str) -> Any:
    """What TensorRT's registry takes for an operator."""
    return _creator_class(trt)(trt, operator)
