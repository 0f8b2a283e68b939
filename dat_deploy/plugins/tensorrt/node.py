"""One node of an operator, as both forms of the plugins see it: what it takes, and what its kernel is to compute."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from dat_deploy.errors import ShapeError, UnsupportedError
from dat_deploy.plugins.dispatch import KERNEL_DTYPES, LARGEST_HEAD_DIM, require_countable
from dat_deploy.plugins.launch import Configuration, Launch, Problem
from dat_deploy.plugins.operator import Operator
from dat_deploy.plugins.specification import PLUGIN_ATTRIBUTES, Role, Specification
from dat_deploy.precision import PRECISIONS

__all__ = ["NAMESPACE", "TYPES", "VERSION", "Dtypes", "Node", "Shapes", "check_programs", "numbered"]

NAMESPACE, VERSION = PLUGIN_ATTRIBUTES.values()
LARGEST_INT32 = 2**31 - 1

Shapes = tuple[tuple[int, ...], ...]
Dtypes = tuple[torch.dtype, ...]

# By the names of trt.DataType.
TYPES = {row.tensorrt: row.dtype for row in PRECISIONS.values() if row.is_exported} | {"INT64": torch.int64}


@dataclass(frozen=True)
class Node:
    """One node of an operator.

    Attributes:
        operator: one of OPERATORS.
        attributes: their values, in the order of the specification.
        name: of the node, for messages; empty if it is not known.
    """

    operator: str
    attributes: tuple[Any, ...]
    name: str = ""

    @classmethod
    def from_fields(cls, operator: str, fields: Mapping[str, Any], name: str = "") -> "Node":
        """From the attributes of an ONNX node.

        Raises:
            ShapeError: if one is missing, unknown or of another kind.
        """
        takes = Operator(operator).specification.attributes
        where = f"{name or 'a node'} ({operator})"
        if set(fields) != set(takes):
            raise ShapeError(
                f"{where} has the attributes {sorted(fields)}; it takes {sorted(takes)}. "
                f"Export the file again with this version of dat-deploy."
            )
        values = []
        for attribute, kind in takes.items():
            try:
                values.append(kind.value(fields[attribute]))
            except ValueError as error:
                raise ShapeError(f"{where} has {attribute} = {error}") from None
        return cls(operator, tuple(values), name)

    @property
    def specification(self) -> Specification:
        return Operator(self.operator).specification

    @property
    def kernel(self) -> ModuleType:
        return Operator(self.operator).kernel

    @property
    def fields(self) -> dict[str, Any]:
        return dict(zip(self.specification.attributes, self.attributes, strict=True))

    def takes(self, position: int, first: torch.dtype) -> Dtypes:
        """The types that the input at a position may have, the first one's given; the output's come after the last."""
        if position == 0:
            return KERNEL_DTYPES
        match [*self.specification.roles.values(), Role.DATA][position]:
            case Role.DATA:
                return (first,)
            case Role.LOCATIONS:
                return (torch.float32,)
            case Role.INDICES:
                return (torch.int64,)
        return tuple(dict.fromkeys((first, torch.float32)))

    def check_ranks(self, ranks: Sequence[int]) -> None:
        """Raises ShapeError unless it takes as many inputs, of as many dimensions each."""
        inputs = {name: each.rank for name, each in self.specification.inputs.items()}
        if list(ranks) != list(inputs.values()):
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
                    f"{self} got {name} of {_spelled(dtype)}{beside}; it takes {' or '.join(map(_name, takes))}."
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _spelled(dtype: torch.dtype | None) -> str:
    return _name(dtype) if dtype in KERNEL_DTYPES else "a type without a kernel"


@functools.lru_cache(maxsize=4096)
def _problem(name: str, attributes: tuple[Any, ...], shapes: Shapes, dtypes: Dtypes) -> Problem:
    """See Node.problem. The torch operator runs on tensors without data, for the sake of its checks."""
    operator, specified = Operator(name), Operator(name).specification
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, dtypes, strict=True)]
    with torch.inference_mode():
        output = operator.torch_operator(*tensors, *attributes)
    require_countable(specified, [*shapes, output.shape])
    element_bytes = [dtype.itemsize for dtype in dtypes]
    problem: Problem = operator.kernel.problem(*specified.problem_arguments(shapes, attributes, element_bytes))
    if problem.get("head_dim", 1) > LARGEST_HEAD_DIM:
        raise UnsupportedError(
            f"{name} got heads of {problem['head_dim']} channels; its kernel takes up to {LARGEST_HEAD_DIM}. "
            'Build without plugins: `build(lowering="gather")`'
        )
    return problem


def numbered(configurations: list[Configuration]) -> dict[int, Configuration]:
    """TensorRT's custom tactics. Which is the best depends on the batch, so their numbers must not."""
    ordered = sorted(configurations, key=repr)
    return dict(enumerate(ordered, start=1))


def check_programs(operator: str, launch: Launch) -> None:
    if launch.programs > LARGEST_INT32:
        raise ShapeError(
            f"{operator} would take {launch.programs} programs; a launch has up to {LARGEST_INT32}. Split the batch."
        )
