"""Quickly deployable plugins: the kernels' PTX goes into the engine, which then needs nothing but TensorRT.

Only the batch may be dynamic: what is compiled in depends on all other sizes.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dat_deploy.errors import ShapeError, UnsupportedError
from dat_deploy.plugins.launch import Configuration
from dat_deploy.plugins.operator import specification
from dat_deploy.plugins.specification import Kind
from dat_deploy.plugins.tensorrt.calls import recorded
from dat_deploy.plugins.tensorrt.node import NAMESPACE, TYPES, Dtypes, Node, Shapes, check_programs, numbered
from dat_deploy.precision import precision_of_dtype

__all__ = ["define", "set_target"]

LARGEST_SHARED_MEMORY = 48 * 1024  # bytes; TensorRT does not ask the driver for more


@dataclass(frozen=True)
class _Target:
    """The GPU that engines are built for; `aot_impl` is registered once a process, and reads it."""

    architecture: int
    ptx_version: int | None


_target: _Target | None = None


def set_target(architecture: int, ptx_version: int | None) -> None:
    """For what is built from now on.

    Raises:
        UnsupportedError: for an unknown architecture.
    """
    global _target
    from dat_deploy.plugins.ptx import ARCHITECTURES

    if architecture not in ARCHITECTURES:
        known = ", ".join(map(str, ARCHITECTURES))
        raise UnsupportedError(f"the kernels cannot be compiled for architecture {architecture}; it takes {known}.")
    _target = _Target(architecture, ptx_version)


def define(name: str) -> None:
    """Register an operator with `tensorrt.plugin`, which checks the signatures of the three functions."""
    trtp: Any = importlib.import_module("tensorrt.plugin")
    specified = specification(name)
    tensors = dict.fromkeys(specified.inputs, trtp.TensorDesc)
    attributes = {each: _annotation(kind) for each, kind in specified.attributes.items()}
    outputs = {"outputs": tuple[trtp.TensorDesc]}

    @recorded
    def describe(*inputs: Any, **fields: Any) -> Any:
        node = Node.from_fields(name, fields)
        node.check_ranks([each.ndim for each in inputs])
        node.check_types([TYPES.get(each.dtype.name) for each in inputs])
        shape = specified.shape_of_output([each.shape_expr for each in inputs], node.attributes)
        return trtp.from_shape_expr(shape, inputs[0].dtype)

    @recorded
    def autotune(*arguments: Any) -> list[Any]:
        node, inputs = _node_and_inputs(name, arguments[:-1])
        return [_combination(trtp, node, inputs)]

    @recorded
    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:
        node, inputs = _node_and_inputs(name, arguments[:-2])
        return _implementation(trtp, node, inputs, arguments[-1])

    implemented = tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]
    identifier = f"{NAMESPACE}::{name}"
    trtp.register(identifier)(_typed(describe, {**tensors, **attributes}, trtp.TensorDesc))
    trtp.autotune(identifier)(_typed(autotune, {**tensors, **attributes, **outputs}, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(identifier)(_typed(implement, {**tensors, **attributes, **outputs, "tactic": int}, implemented))


def _annotation(kind: Kind) -> Any:
    """The types of the fields are those of IPluginV3, but that `tensorrt.plugin` has its own for a single number."""
    if kind.is_list:
        element: Any = getattr(np, kind.field.lower())
        return npt.NDArray[element]
    return int if kind.element is bool else kind.element


def _type_name(dtype: torch.dtype) -> str:
    """In an AutoTuneCombination."""
    return "INT64" if dtype == torch.int64 else precision_of_dtype(dtype).name.upper()


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
    for (name, role), each in zip(node.specification.roles.items(), inputs, strict=True):
        shape = tuple(each.shape)
        if -1 in (shape[1:] if role.leads_with_batch else shape):
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

    launch = node.kernel.launch(node.problem(shapes, dtypes), configuration)
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
    roles = node.specification.roles.values()
    return tuple((1, *shape[1:]) if role.leads_with_batch else shape for role, shape in zip(roles, shapes, strict=True))


def _combination(trtp: Any, node: Node, inputs: Sequence[Any]) -> Any:
    """The types at hand, linear, and every configuration that compiles within TensorRT's limits as a tactic.

    Raises:
        UnsupportedError: if none does.
    """
    assert _target is not None
    dtypes = node.check_types([TYPES.get(each.dtype.name) for each in inputs])
    shapes = _static_shapes(node, inputs, "opt")
    node.problem(_static_shapes(node, inputs, "max"), dtypes)
    alone = _with_batch_of_one(node, shapes)
    tactics, refusal = [], None
    for tactic, configuration in numbered(node.kernel.configurations(node.problem(shapes, dtypes))).items():
        try:
            _compiled(node, alone, dtypes, configuration, _target)
            tactics.append(tactic)
        except UnsupportedError as error:
            refusal = error
    if refusal is not None and not tactics:
        raise refusal
    types = ",".join(map(_type_name, (*dtypes, dtypes[0])))
    return trtp.AutoTuneCombination(types, "LINEAR", tactics)


def _implementation(trtp: Any, node: Node, inputs: Sequence[Any], tactic: int) -> tuple[str, str, Any, Any]:
    """The kernel and its launch, of which the grid and the scalars are expressions of the batch.

    They are `launch` itself, computed on TensorRT's expression for the batch in place of a number.
    """
    assert _target is not None
    dtypes = node.check_types([TYPES.get(each.dtype.name) for each in inputs])
    shapes, largest = _static_shapes(node, inputs, "opt"), _static_shapes(node, inputs, "max")
    kernel, problem = node.kernel, node.problem(shapes, dtypes)
    configurations = kernel.configurations(problem)
    configuration = numbered(configurations).get(tactic, configurations[0])
    check_programs(str(node), kernel.launch(node.problem(largest, dtypes), configuration))
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
