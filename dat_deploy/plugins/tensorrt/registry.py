"""The four operators as TensorRT plugins, in two forms over the launches that the torch operators make.

- `register_plugins`: IPluginV3 in Python, for TensorRT and TensorRT-RTX. The engine needs this package and Triton where
  it runs. Each launch goes to TensorRT's stream and allocates nothing, so a CUDA graph captures it, and replaying that
  has no Python in it. Triton compiles at the first launch of a shape: run it once before capturing.
- `register_ahead_of_time`: the kernels' PTX goes into the engine, which then needs nothing but TensorRT. Only the batch
  may be dynamic: what is compiled in depends on all other sizes.

`trt` is the imported module everywhere: `tensorrt` or `tensorrt_rtx`. A registry holds one form at a time, under the
same names; registering one takes the other out. What a plugin refuses is raised inside TensorRT, which prints it and
tells its caller only that the plugin failed: `last_error()` has the exception.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from dat_deploy.errors import ShapeError, UnsupportedError
from dat_deploy.plugins.dispatch import KERNEL_DTYPES, LARGEST_HEAD_DIM, LARGEST_IMAGE
from dat_deploy.plugins.launch import Configuration, Launch, Problem
from dat_deploy.plugins.tuning import tuned_configuration

__all__ = [
    "OPERATORS",
    "Node",
    "PluginSpecification",
    "deregister_plugins",
    "last_error",
    "launch_counts",
    "reasons_against_ahead_of_time",
    "reasons_against_plugins",
    "register_ahead_of_time",
    "register_plugins",
    "specification",
]

OPERATORS = ("deformable_sample", "deformable_attention", "window_attention", "neighborhood_attention")
NAMESPACE, VERSION = "dat_deploy", "1"  # as onnx_domain.PLUGIN_ATTRIBUTES has them
FLOAT32_INPUTS = ("sampling_locations",)
TABLES = ("padding_qkv", "relative_position_bias_table")  # one for all images
LARGEST_INT32 = 2**31 - 1
LARGEST_SHARED_MEMORY = 48 * 1024  # bytes; TensorRT does not ask the driver for more

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Shapes = tuple[tuple[int, ...], ...]
Dtypes = tuple[torch.dtype, ...]

_TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}  # by the names of trt.DataType
_TYPE_NAMES = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}  # in AutoTuneCombination


@dataclass(frozen=True)
class PluginSpecification:
    """What a plugin is made of beside its kernel.

    Attributes:
        name: of the operator, of its folder and of its ONNX nodes.
        operator: the torch operator. Run on tensors without data, it says which shapes it takes.
        inputs: the ranks of the tensors by their names, in order.
        attributes: the types of the attributes by their names, in order; of a node all are INT.
        output_shape: from the shapes of the inputs, of which any dimension may be an expression with * and //.
        sized_by: the inputs whose shapes the kernel's `problem` takes, in order.
    """

    name: str
    operator: Callable[..., torch.Tensor]
    inputs: Mapping[str, int]
    attributes: Mapping[str, type]
    output_shape: Callable[..., tuple[Any, ...]]
    sized_by: tuple[str, ...]

    @property
    def kernel(self) -> types.ModuleType:
        """Its kernel module; importing that imports Triton."""
        return importlib.import_module(f"dat_deploy.plugins.{self.name}.kernel")


@functools.cache
def specification(name: str) -> PluginSpecification:
    """The specification of one of OPERATORS."""
    found: PluginSpecification = importlib.import_module(f"dat_deploy.plugins.{name}.trt_plugin").SPECIFICATION
    return found


@dataclass(frozen=True)
class Node:
    """One node of an operator.

    Attributes:
        operator: one of OPERATORS.
        attributes: their values, in the order of the specification.
        name: of the node, for messages; empty if it is not known.
    """

    operator: str
    attributes: tuple[int, ...]
    name: str = ""

    @classmethod
    def from_fields(cls, operator: str, fields: Mapping[str, Any], name: str = "") -> "Node":
        """From the attributes of an ONNX node.

        Raises:
            ShapeError: if one is missing, unknown or not an integer that it takes.
        """
        takes = specification(operator).attributes
        where = f"{name or 'a node'} ({operator})"
        if set(fields) != set(takes):
            raise ShapeError(
                f"{where} has the attributes {sorted(fields)}; it takes {sorted(takes)}. "
                f"Export the file again with this version of dat-deploy."
            )
        values = []
        for attribute, kind in takes.items():
            value = np.asarray(fields[attribute])
            if value.size != 1 or value.dtype.kind != "i":
                raise ShapeError(f"{where} has {attribute} = {fields[attribute]!r}; it takes one integer.")
            if kind is bool and value.item() not in (0, 1):
                raise ShapeError(f"{where} has {attribute} = {value.item()}; it takes 0 or 1.")
            values.append(int(value.item()))
        return cls(operator, tuple(values), name)

    @property
    def specification(self) -> PluginSpecification:
        return specification(self.operator)

    @property
    def fields(self) -> dict[str, int]:
        return dict(zip(self.specification.attributes, self.attributes, strict=True))

    def takes(self, position: int, first: torch.dtype) -> Dtypes:
        """The types that the input at a position may have, the first one's given; the output's come after the last."""
        name = (*self.specification.inputs, "output")[position]
        if position == 0:
            return KERNEL_DTYPES
        if name in FLOAT32_INPUTS:
            return (torch.float32,)
        return tuple(dict.fromkeys((first, torch.float32))) if name in TABLES else (first,)

    def check_ranks(self, ranks: Sequence[int]) -> None:
        """Raises ShapeError unless it takes as many inputs, of as many dimensions each."""
        inputs = self.specification.inputs
        if tuple(ranks) != tuple(inputs.values()):
            takes = ", ".join(f"{name} of {rank}" for name, rank in inputs.items())
            raise ShapeError(f"{self} got inputs of {list(ranks)} dimensions; it takes {takes}.")

    def check_types(self, dtypes: Sequence[torch.dtype | None]) -> Dtypes:
        """The types of the inputs, if it takes them.

        Args:
            dtypes: None stands for any that no kernel takes.

        Raises:
            ShapeError: if it does not.
        """
        inputs = self.specification.inputs
        if len(dtypes) != len(inputs):
            raise ShapeError(f"{self} got {len(dtypes)} inputs; it takes {len(inputs)}: {', '.join(inputs)}.")
        first = dtypes[0] if dtypes[0] in KERNEL_DTYPES else KERNEL_DTYPES[0]
        assert first is not None
        checked = []
        for position, (name, dtype) in enumerate(zip(inputs, dtypes, strict=True)):
            takes = self.takes(position, first)
            if dtype not in takes:
                beside = f" beside {next(iter(inputs))} of {_spelled(dtypes[0])}" if position else ""
                raise ShapeError(
                    f"{self} got {name} of {_spelled(dtype)}{beside}; it takes {' or '.join(map(_spelled, takes))}."
                )
            checked.append(dtype)
        return tuple(checked)

    def problem(self, shapes: Shapes, dtypes: Dtypes) -> Problem:
        """What the kernel is to compute, after every check that the torch operator makes, and those of the launch.

        Raises:
            ShapeError: if the operator does not take these shapes, or an image has too many elements.
            UnsupportedError: if the heads are larger than the kernels hold.
        """
        try:
            return _problem(self.operator, self.attributes, shapes, dtypes)
        except (ShapeError, UnsupportedError) as error:
            raise type(error)(f"{self.name}: {error}" if self.name else str(error)) from None

    def __str__(self) -> str:
        return f"{self.name}: {self.operator}" if self.name else self.operator


def _spelled(dtype: torch.dtype | None) -> str:
    return "a type without a kernel" if dtype is None else str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def _problem(operator: str, attributes: tuple[int, ...], shapes: Shapes, dtypes: Dtypes) -> Problem:
    """See Node.problem. The torch operator runs on tensors without data, for the sake of its checks."""
    specified = specification(operator)
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, dtypes, strict=True)]
    values = [kind(value) for kind, value in zip(specified.attributes.values(), attributes, strict=True)]
    with torch.inference_mode():
        output = specified.operator(*tensors, *values)
    for name, shape in zip((*specified.inputs, "output"), (*shapes, output.shape), strict=True):
        elements = math.prod(shape if name in TABLES else shape[1:])
        if elements > LARGEST_IMAGE:
            raise ShapeError(f"{operator} got {elements} elements of {name} an image; it takes up to {LARGEST_IMAGE}.")
    by_name = dict(zip(specified.inputs, shapes, strict=True))
    sizes = (by_name[name] for name in specified.sized_by)
    table_bytes = [
        dtype.itemsize
        for name, dtype in zip(specified.inputs, dtypes, strict=True)
        if name == "relative_position_bias_table"
    ]
    problem: Problem = specified.kernel.problem(*sizes, *attributes, dtypes[0].itemsize, *table_bytes)
    if problem.get("head_dim", 1) > LARGEST_HEAD_DIM:
        raise UnsupportedError(
            f"{operator} got heads of {problem['head_dim']} channels; its kernel takes up to {LARGEST_HEAD_DIM}. "
            f"Build without plugins: dat-deploy build --lowering gather"
        )
    return problem


def _numbered(configurations: list[Configuration]) -> dict[int, Configuration]:
    """TensorRT's custom tactics. Which is the best depends on the batch, so their numbers must not."""
    ordered = sorted(configurations, key=repr)
    return dict(enumerate(ordered, start=1))


def _check_programs(operator: str, launch: Launch) -> None:
    if launch.programs > LARGEST_INT32:
        raise ShapeError(
            f"{operator} would take {launch.programs} programs; a launch has up to {LARGEST_INT32}. Split the batch."
        )


# What is known of the plugins in this process.

_lock = threading.Lock()
_registering = threading.RLock()
_launches = dict.fromkeys(OPERATORS, 0)
_error: Exception | None = None


def launch_counts() -> dict[str, int]:
    """How many kernels the IPluginV3 plugins have launched in this process, by operator.

    A run whose counts do not grow did not go through them; the replay of a CUDA graph does not count. What was compiled
    ahead of time runs without Python and is not counted.
    """
    with _lock:
        return dict(_launches)


def last_error() -> Exception | None:
    """The latest exception inside a plugin, which TensorRT's caller never sees; once told, it is forgotten.

    Call it where TensorRT reports a failure: after a parse, a build, or an execution.
    """
    global _error
    with _lock:
        error, _error = _error, None
    return error


def _recorded(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """TensorRT turns what is raised into an error status; before that, keep it for `last_error`."""

    @functools.wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        global _error
        try:
            return method(*args, **kwargs)
        except Exception as error:
            with _lock:
                _error = error
            raise

    return call


# Which of it works where.


def _version(trt: Any) -> tuple[int, int]:
    major, minor, *_ = str(trt.__version__).split(".")
    return int(major), int(minor)


def _is_rtx(trt: Any) -> bool:
    return str(trt.__name__).startswith("tensorrt_rtx")


def _reasons_against_both(trt: Any) -> list[str]:
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton is not installed, which compiles the kernels; install it with: pip install triton")
    name, (least, end) = ("TensorRT-RTX", ((1, 7), (2, 0))) if _is_rtx(trt) else ("TensorRT", ((10, 10), (12, 0)))
    if not least <= _version(trt) < end:
        reasons.append(f"{name} {trt.__version__} is not supported; it takes {least[0]}.{least[1]} to below {end[0]}")
    return reasons


def reasons_against_plugins(trt: Any) -> list[str]:
    """Why `register_plugins` cannot work here, a sentence each; none if it can."""
    return _reasons_against_both(trt)


def reasons_against_ahead_of_time(trt: Any) -> list[str]:
    """Why `register_ahead_of_time` cannot work here, a sentence each; none if it can."""
    reasons = _reasons_against_both(trt)
    if _is_rtx(trt):
        reasons.append("TensorRT-RTX takes no plugins that are compiled ahead of time")
    elif _version(trt) == (10, 14):
        reasons.append(
            f"TensorRT {trt.__version__} cannot build plugins that are compiled ahead of time, no 10.14 can; "
            f"use 10.16 or later"
        )
    return reasons


def _require_none(reasons: list[str], what: str) -> None:
    if reasons:
        raise UnsupportedError(f"{what} cannot be registered: {'; '.join(reasons)}.")


# The registry: one creator an operator, of either form.

_python_creators: dict[str, dict[str, Any]] = {}  # by trt.__name__; the registry keeps no reference of its own
_ahead_of_time_creators: dict[str, Any] = {}


def _own(trt: Any, name: str) -> list[Any]:
    """The creators of this package for an operator, of both forms."""
    ahead_of_time = None if _is_rtx(trt) else _ahead_of_time_creators.get(name)
    made = (_python_creators.get(trt.__name__, {}).get(name), ahead_of_time)
    return [creator for creator in made if creator is not None]


def _registered(trt: Any, name: str) -> Any:
    """The creator that has an operator's place in the registry, or None; `get_creator` would log that as an error."""
    wanted = (name, NAMESPACE, VERSION)
    for creator in trt.get_plugin_registry().all_creators:
        if tuple(getattr(creator, each, None) for each in ("name", "plugin_namespace", "plugin_version")) == wanted:
            return creator
    return None


def _remove(trt: Any, name: str, *, keep: Any = None) -> None:
    """Empty an operator's place in the registry, unless it holds `keep`.

    Raises:
        UnsupportedError: if it holds a plugin of someone else, or TensorRT does not let go of it.
    """
    registry = trt.get_plugin_registry()
    current = _registered(trt, name)
    if current is None or current is keep:
        return
    if not any(current is creator for creator in _own(trt, name)) or not registry.deregister_creator(current):
        raise UnsupportedError(
            f"another plugin is registered as {NAMESPACE}::{name}, and it cannot be taken out; "
            f"use a process of its own for each."
        )


def _register(trt: Any, name: str, creator: Any) -> None:
    _remove(trt, name, keep=creator)
    if _registered(trt, name) is None and not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
        raise UnsupportedError(f"TensorRT {trt.__version__} does not take the plugin {NAMESPACE}::{name}.")


def register_plugins(trt: Any) -> None:
    """Let TensorRT's parser and its engines run the four operators through Triton; again is no error.

    Forgets `last_error`. Takes what `register_ahead_of_time` registered out of the registry.

    Raises:
        UnsupportedError: for each of `reasons_against_plugins`, or if someone else's plugins have the names.
    """
    _require_none(reasons_against_plugins(trt), "the plugins")
    last_error()
    with _registering:
        creators = _python_creators.setdefault(trt.__name__, {})
        for name in OPERATORS:
            if name not in creators:
                creators[name] = _creator_class(trt)(trt, name)
            _register(trt, name, creators[name])


def deregister_plugins(trt: Any) -> None:
    """Take the plugins of either form out of the registry: nodes are then read as the ONNX functions they carry.

    Raises:
        UnsupportedError: if someone else's plugins have the names.
    """
    for name in OPERATORS:
        _remove(trt, name)


# Form 1: IPluginV3.


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
    problem, kernel = node.problem(shapes, dtypes), node.specification.kernel
    configurations = kernel.configurations(problem)
    chosen: Configuration | None = _numbered(configurations).get(tactic)
    if chosen is None:
        beside = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
        chosen = tuned_configuration(node.operator, problem, beside)
    launch: Launch = kernel.launch(problem, chosen if chosen in configurations else configurations[0])
    _check_programs(str(node), launch)
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
    with _lock:
        _launches[node.operator] += 1


class _Expression:
    """TensorRT's expression for a dimension, with the arithmetic of `output_shape`."""

    def __init__(self, trt: Any, builder: Any, expression: Any) -> None:
        self.trt, self.builder, self.expression = trt, builder, expression

    def _with(self, operation: Any, other: "_Expression | int") -> "_Expression":
        right = self.builder.constant(other) if isinstance(other, int) else other.expression
        return _Expression(self.trt, self.builder, self.builder.operation(operation, self.expression, right))

    def __mul__(self, other: "_Expression | int") -> "_Expression":
        return self._with(self.trt.DimensionOperation.PROD, other)

    def __floordiv__(self, other: "_Expression | int") -> "_Expression":
        return self._with(self.trt.DimensionOperation.FLOOR_DIV, other)


def _shapes_but_for_the_batch(node: Node, inputs: Sequence[Any]) -> Shapes | None:
    """With some batch where that is dynamic; None if another dimension is."""
    shapes = [[dim.get_constant_value() if dim.is_constant() else -1 for dim in dims] for dims in inputs]
    names = node.specification.inputs
    batches = [shape[0] for name, shape in zip(names, shapes, strict=True) if name not in TABLES and shape]
    batch = next((known for known in batches if known >= 0), 1)
    for name, shape in zip(names, shapes, strict=True):
        if name not in TABLES and shape and shape[0] < 0:
            shape[0] = batch
    return None if any(dim < 0 for shape in shapes for dim in shape) else tuple(map(tuple, shapes))


def _dtypes(descriptions: Sequence[Any]) -> Dtypes:
    return tuple(_TYPES[description.type.name] for description in descriptions)


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
        self.fields = _Fields(trt, {name: [value] for name, value in node.fields.items()})

    def get_capability_interface(self, kind: Any) -> "_Plugin":
        return self

    def clone(self) -> "_Plugin":
        clone = type(self)(self.trt, self.node, self.tactic)
        clone.configurations = self.configurations
        return clone

    def attach_to_context(self, resources: Any) -> "_Plugin":
        return self.clone()

    @_recorded
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        self.node.check_types([_TYPES.get(each.name) for each in input_types])
        return [input_types[0]]

    @_recorded
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        self.node.check_ranks([len(dims) for dims in inputs])
        known = _shapes_but_for_the_batch(self.node, inputs)
        if known is not None:
            self.node.problem(known, (torch.float32,) * len(known))  # types are checked elsewhere; any will do
        expressions = [[_Expression(self.trt, builder, dim) for dim in dims] for dims in inputs]
        output = self.node.specification.output_shape(*expressions)
        dims = self.trt.DimsExprs(len(output))
        for i, dim in enumerate(output):
            dims[i] = dim.expression
        return [dims]

    @_recorded
    def supports_format_combination(self, position: int, descriptions: Sequence[Any], num_inputs: int) -> bool:
        first, this = (_TYPES.get(descriptions[i].desc.type.name) for i in (0, position))
        is_linear = descriptions[position].desc.format == self.trt.TensorFormat.LINEAR
        return bool(is_linear and first is not None and this in self.node.takes(position, first))

    @_recorded
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Refuses what cannot run at the sizes of a profile."""
        dtypes = self.node.check_types([_TYPES.get(each.desc.type.name) for each in inputs])
        for bound in ("opt", "max"):
            shapes = tuple(tuple(getattr(each, bound)) for each in inputs)
            problem = self.node.problem(shapes, dtypes)
            _launch(self.node, shapes, dtypes, self.tactic)
            if bound == "opt":
                self.configurations = self.node.specification.kernel.configurations(problem)

    def get_valid_tactics(self) -> list[int]:
        return list(_numbered(self.configurations))

    def set_tactic(self, tactic: int) -> None:
        self.tactic = tactic

    @_recorded
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        _launch(self.node, _shapes(inputs), _dtypes(inputs), self.tactic)  # looked up by each enqueue

    @_recorded
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
        self.fields = _Fields(trt, {name: [] for name in specification(operator).attributes})
        self.field_names = self.fields.collection

    @_recorded
    def create_plugin(self, name: str, fields: Sequence[Any], phase: Any) -> Any:
        """From the attributes of a node, or from what an engine holds of them."""
        values = {field.name: field.data for field in fields}
        return _plugin_class(self.trt)(self.trt, Node.from_fields(self.name, values, name))


class _Fields:
    """TensorRT's `collection` of fields, which holds addresses alone: what is there must live as long as it is read."""

    def __init__(self, trt: Any, values: Mapping[str, list[int]]) -> None:
        self._arrays = [np.array(value, np.int32) for value in values.values()]
        kind = trt.PluginFieldType.INT32
        self._fields = [trt.PluginField(name, array, kind) for name, array in zip(values, self._arrays, strict=True)]
        self.collection = trt.PluginFieldCollection(self._fields)


@functools.cache
def _plugin_class(trt: Any) -> type[_Plugin]:
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    return types.new_class("Plugin", (_Plugin, *bases))


@functools.cache
def _creator_class(trt: Any) -> type[_Creator]:
    return types.new_class("Creator", (_Creator, trt.IPluginCreatorV3One))


# Form 2: quickly deployable plugins, compiled ahead of time.


@dataclass(frozen=True)
class _Target:
    """The GPU that engines are built for; `aot_impl` is registered once a process, and reads it."""

    architecture: int
    ptx_version: int | None


_target: _Target | None = None


def register_ahead_of_time(trt: Any, architecture: int, ptx_version: int | None = None) -> None:
    """Let TensorRT's parser compile the four operators into the engines it builds; again, for another GPU, is no error.

    The image size of an engine must be fixed, only its batch may be dynamic. Networks are created with
    the flag PREFER_AOT_PYTHON_PLUGINS. Forgets `last_error`. Takes what `register_plugins` registered out of the
    registry.

    Args:
        trt: `tensorrt`; TensorRT-RTX has no such plugins.
        architecture: of the GPU that will run the engine, 90 for sm_90.
        ptx_version: 88 for PTX 8.8, which drivers of CUDA 12.9 and later take; None for the newest that Triton knows.

    Raises:
        UnsupportedError: for each of `reasons_against_ahead_of_time`, for an unknown architecture, or if someone
            else's plugins have the names.
    """
    global _target
    _require_none(reasons_against_ahead_of_time(trt), "plugins that are compiled ahead of time")
    from dat_deploy.plugins.ptx import ARCHITECTURES

    if architecture not in ARCHITECTURES:
        known = ", ".join(map(str, ARCHITECTURES))
        raise UnsupportedError(f"the kernels cannot be compiled for architecture {architecture}; it takes {known}.")
    last_error()
    _target = _Target(architecture, ptx_version)
    for name in OPERATORS:
        if name in _ahead_of_time_creators:
            _register(trt, name, _ahead_of_time_creators[name])
            continue
        _remove(trt, name)
        _define(importlib.import_module("tensorrt.plugin"), name)
        _ahead_of_time_creators[name] = _registered(trt, name)


def _define(trtp: Any, name: str) -> None:
    """Register an operator with `tensorrt.plugin`, which checks the signatures of the three functions."""
    specified = specification(name)
    tensors = dict.fromkeys(specified.inputs, trtp.TensorDesc)
    attributes = dict.fromkeys(specified.attributes, int)
    outputs = {"outputs": tuple[trtp.TensorDesc]}

    @_recorded
    def describe(*inputs: Any, **fields: int) -> Any:
        node = Node.from_fields(name, fields)
        node.check_ranks([each.ndim for each in inputs])
        node.check_types([_TYPES.get(each.dtype.name) for each in inputs])
        return trtp.from_shape_expr(specified.output_shape(*(each.shape_expr for each in inputs)), inputs[0].dtype)

    @_recorded
    def autotune(*arguments: Any) -> list[Any]:
        node, inputs = _node_and_inputs(name, arguments[:-1])
        return [_combination(trtp, node, inputs)]

    @_recorded
    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:
        node, inputs = _node_and_inputs(name, arguments[:-2])
        return _implementation(trtp, node, inputs, arguments[-1])

    implemented = tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]
    identifier = f"{NAMESPACE}::{name}"
    trtp.register(identifier)(_typed(describe, {**tensors, **attributes}, trtp.TensorDesc))
    trtp.autotune(identifier)(_typed(autotune, {**tensors, **attributes, **outputs}, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(identifier)(_typed(implement, {**tensors, **attributes, **outputs, "tactic": int}, implemented))


def _typed(function: Callable[..., Any], parameters: Mapping[str, Any], returned: Any) -> Callable[..., Any]:
    """With the signature that `tensorrt.plugin` reads by `inspect`; only the specification knows it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(signature, return_annotation=returned)  # type: ignore[attr-defined]  # see inspect.signature
    return function


def _node_and_inputs(name: str, arguments: Sequence[Any]) -> tuple[Node, Sequence[Any]]:
    """From the positional arguments: `TensorDesc`s, and after them attributes in the order of the specification."""
    specified = specification(name)
    inputs, values = arguments[: len(specified.inputs)], arguments[len(specified.inputs) :]
    return Node.from_fields(name, dict(zip(specified.attributes, values, strict=True))), inputs


def _static_shapes(node: Node, inputs: Sequence[Any], bound: str) -> Shapes:
    """With the batch of the profile's `opt` or `max` where it is dynamic.

    Raises:
        ShapeError: if anything but the batch is dynamic.
    """
    for name, each in zip(node.specification.inputs, inputs, strict=True):
        shape = tuple(each.shape)
        if -1 in (shape if name in TABLES else shape[1:]):
            raise ShapeError(
                f"{node} got {name} of shape {list(shape)}; compiled ahead of time, it takes a dynamic batch and no "
                f"other dynamic size. Fix the image size, or build with the Python plugins."
            )
    return tuple(tuple(getattr(each.shape, bound)) if each.shape.is_dynamic else tuple(each.shape) for each in inputs)


@functools.lru_cache(maxsize=4096)
def _compiled(node: Node, shapes: Shapes, dtypes: Dtypes, configuration: Configuration, target: _Target) -> Any:
    """The PTX for these shapes and any batch.

    Raises:
        UnsupportedError: if the kernel needs scratch memory, or more shared memory than TensorRT gives it.
    """
    from dat_deploy.plugins.ptx import compile_launch

    launch = node.specification.kernel.launch(node.problem(shapes, dtypes), configuration)
    types = dict(zip((*node.specification.inputs, "output"), (*dtypes, dtypes[0]), strict=True))
    compiled = compile_launch(launch, types, target.architecture, ptx_version=target.ptx_version)
    shared_memory_bytes = compiled.shared_memory_bytes + compiled.static_shared_memory_bytes
    if shared_memory_bytes > LARGEST_SHARED_MEMORY:
        raise UnsupportedError(
            f"{node} for sm_{target.architecture} needs {shared_memory_bytes} bytes of shared memory; "
            f"TensorRT gives a plugin {LARGEST_SHARED_MEMORY}. Use another configuration."
        )
    return compiled


def _with_batch_of_one(node: Node, shapes: Shapes) -> Shapes:
    named = zip(node.specification.inputs, shapes, strict=True)
    return tuple(shape if name in TABLES else (1, *shape[1:]) for name, shape in named)


def _combination(trtp: Any, node: Node, inputs: Sequence[Any]) -> Any:
    """The types at hand, linear, and every configuration that compiles within TensorRT's limits as a tactic.

    Raises:
        UnsupportedError: if none does.
    """
    assert _target is not None
    dtypes = node.check_types([_TYPES.get(each.dtype.name) for each in inputs])
    shapes = _static_shapes(node, inputs, "opt")
    node.problem(_static_shapes(node, inputs, "max"), dtypes)
    alone = _with_batch_of_one(node, shapes)
    tactics, refusal = [], None
    for tactic, configuration in _numbered(
        node.specification.kernel.configurations(node.problem(shapes, dtypes))
    ).items():
        try:
            _compiled(node, alone, dtypes, configuration, _target)
            tactics.append(tactic)
        except UnsupportedError as error:
            refusal = error
    if refusal is not None and not tactics:
        raise refusal
    types = ",".join(_TYPE_NAMES[dtype] for dtype in (*dtypes, dtypes[0]))
    return trtp.AutoTuneCombination(types, "LINEAR", tactics)


def _implementation(trtp: Any, node: Node, inputs: Sequence[Any], tactic: int) -> tuple[str, str, Any, Any]:
    """The kernel and its launch, of which the grid and the scalars are expressions of the batch.

    They are `launch` itself, computed on TensorRT's expression for the batch in place of a number.
    """
    assert _target is not None
    dtypes = node.check_types([_TYPES.get(each.dtype.name) for each in inputs])
    shapes, largest = _static_shapes(node, inputs, "opt"), _static_shapes(node, inputs, "max")
    kernel, problem = node.specification.kernel, node.problem(shapes, dtypes)
    configurations = kernel.configurations(problem)
    configuration = _numbered(configurations).get(tactic, configurations[0])
    _check_programs(str(node), kernel.launch(node.problem(largest, dtypes), configuration))
    compiled = _compiled(node, _with_batch_of_one(node, shapes), dtypes, configuration, _target)

    batch = inputs[0].shape_expr[0]
    launch = kernel.launch({**problem, "batch": batch}, configuration)
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x = launch.programs
    parameters.block_x = launch.block[0]
    parameters.shared_mem = compiled.shared_memory_bytes
    scalars = trtp.SymIntExprs(len(launch.scalars))
    for i, value in enumerate(launch.scalars.values()):
        scalars[i] = trtp.SymInt32(value)
    return compiled.name, compiled.ptx, parameters, scalars
