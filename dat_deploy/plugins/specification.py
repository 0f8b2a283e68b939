"""What is known of an operator: torch, ONNX, TensorRT, precisions, checks and `bisect` read it from here alone."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

__all__ = [
    "BOOL",
    "FLOAT",
    "FLOATS",
    "INT",
    "INTS",
    "PLUGIN_ATTRIBUTES",
    "STRING",
    "Frame",
    "Input",
    "Kind",
    "Role",
    "Specification",
    "shape_without_projection",
]

# TensorRT picks the plugin by these two attributes of a node; every node carries them.
PLUGIN_ATTRIBUTES = {"plugin_namespace": "dat_deploy", "plugin_version": "1"}


class Role(Enum):
    """What an input is to its operator.

    Attributes:
        DATA: leads with the batch; in the type of the node.
        WEIGHT: one for all images, in the type of the node; a kernel takes it in float32, too.
        TABLE: one for all images, read between its entries; a file has it in float32 whatever the type of the node, a
            kernel takes it in either.
        LOCATIONS: where the operator reads; leads with the batch, and is float32 in every precision.
        INDICES: int64, one for all images.
    """

    DATA = "data"
    WEIGHT = "weight"
    TABLE = "table"
    LOCATIONS = "locations"
    INDICES = "indices"

    @property
    def leads_with_batch(self) -> bool:
        return self in (Role.DATA, Role.LOCATIONS)

    @property
    def stays_float32(self) -> bool:
        """In an exported file of any precision."""
        return self in (Role.LOCATIONS, Role.TABLE)


@dataclass(frozen=True)
class Input:
    """An input of an operator.

    Attributes:
        dims: a letter for each dimension, or a number, or a number of times a letter: `B H W 3C`.
    """

    dims: str
    role: Role = Role.DATA

    @property
    def rank(self) -> int:
        return len(self.dims.split())

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """With sizes by letter."""
        parts = [re.fullmatch(r"(\d*)(\w*)", dim) for dim in self.dims.split()]
        return tuple(int(part[1] or 1) * (sizes[part[2]] if part[2] else 1) for part in parts if part)


@dataclass(frozen=True)
class Kind:
    """Of an attribute.

    Attributes:
        element: its type in Python, or that of each element of a list.
        onnx: in `onnx.AttributeProto.AttributeType`.
        field: in `tensorrt.PluginFieldType`.
        words: what it takes, for messages.
    """

    element: type
    onnx: str
    field: str
    words: str
    is_list: bool = False

    def value(self, raw: Any) -> Any:
        """As the operator takes it, a list as a tuple.

        Args:
            raw: a number, a text, or anything like an array of numbers or of the bytes of a text.

        Raises:
            ValueError: if it is of another kind.
        """
        import numpy as np

        if self.element is str:
            return raw if isinstance(raw, str) else np.asarray(raw).tobytes().decode()
        array = np.asarray(raw)
        if array.size == 0 and self.is_list:
            return ()
        is_number = array.dtype.kind in ("biuf" if self.element is float else "biu")
        if not is_number or not (self.is_list or array.size == 1):
            raise ValueError(f"{raw!r}; it takes {self.words}.")
        values = array.ravel().tolist()
        if self.element is bool and values[0] not in (0, 1):
            raise ValueError(f"{values[0]}; it takes {self.words}.")
        return tuple(map(self.element, values)) if self.is_list else self.element(values[0])


INT = Kind(int, "INT", "INT32", "one integer")
BOOL = Kind(bool, "INT", "INT32", "0 or 1")
FLOAT = Kind(float, "FLOAT", "FLOAT32", "one number")
INTS = Kind(int, "INTS", "INT32", "integers", is_list=True)
FLOATS = Kind(float, "FLOATS", "FLOAT32", "numbers", is_list=True)
STRING = Kind(str, "STRING", "CHAR", "a text")


@dataclass(frozen=True)
class Frame:
    """How sampling locations count.

    Attributes:
        low, high: the location of the centres of the first and the last pixel of an axis; without `align_corners`, of
            the map's edges.
        axes: the order of the coordinates in the last axis of the locations.
    """

    low: float
    high: float
    align_corners: bool
    axes: tuple[str, str]

    def location(self, pixel: Any, size: int) -> Any:
        """Of a pixel of an axis, counted from 0; fractions are between the centres."""
        span = self.high - self.low
        return (pixel / max(size - 1, 1) if self.align_corners else (pixel + 0.5) / size) * span + self.low


def shape_without_projection(qkv: Sequence[Any], *_: Sequence[Any], **__: Any) -> tuple[Any, ...]:
    """The output shape of an operator on query, key and value side by side: [B, H, W, 3C] -> [B, H, W, C]."""
    return qkv[0], qkv[1], qkv[2], qkv[3] // 3


@dataclass(frozen=True)
class Specification:
    """An operator, as all else sees it.

    Attributes:
        name: of the operator, of its folder and of its ONNX nodes.
        inputs, attributes: by name, in the order of the torch operator's arguments.
        output_shape: called like the operator with shapes in place of tensors. Any dimension may be an expression with
            +, -, * and //. The output has the type of the first input.
        sized_by: the inputs whose shapes the kernel's `problem` takes, in order.
        frame: of the sampling locations, if it has any.
    """

    name: str
    inputs: Mapping[str, Input]
    attributes: Mapping[str, Kind]
    output_shape: Callable[..., tuple[Any, ...]]
    sized_by: tuple[str, ...]
    frame: Frame | None = None

    @property
    def roles(self) -> dict[str, Role]:
        """Of the inputs."""
        return {name: each.role for name, each in self.inputs.items()}

    def named(self, *roles: Role) -> list[str]:
        """The inputs of these roles."""
        return [name for name, role in self.roles.items() if role in roles]

    def shape_of_output(self, shapes: Sequence[Any], attributes: Sequence[Any]) -> tuple[Any, ...]:
        """From those of the inputs and the values of the attributes, both in order."""
        return self.output_shape(*shapes, **dict(zip(self.attributes, attributes, strict=True)))

    def problem_arguments(
        self, shapes: Sequence[Sequence[int]], attributes: Sequence[Any], element_bytes: Sequence[int]
    ) -> tuple[Any, ...]:
        """What the kernel's `problem` takes: sizes, attributes, and bytes an element of the first input and of tables.

        Args:
            shapes, element_bytes: of the inputs, in order.
        """
        by_name = dict(zip(self.inputs, zip(shapes, element_bytes, strict=True), strict=True))
        tables = [by_name[name][1] for name in self.named(Role.TABLE)]
        return (*(by_name[name][0] for name in self.sized_by), *attributes, element_bytes[0], *tables)
