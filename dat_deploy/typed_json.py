"""Values fresh from JSON, checked against annotations."""

import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["plain", "typed"]


def plain(value: Any) -> Any:
    """What `typed` reads back: dataclasses as dicts, without optional fields that have their default.

    So what was written before there were such fields comes out as it was.
    """
    if is_dataclass(value) and not isinstance(value, type):
        kept = [f for f in fields(value) if not (f.metadata.get("optional") and getattr(value, f.name) == f.default)]
        return {field.name: plain(getattr(value, field.name)) for field in kept}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def typed(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`: dataclasses, tuples, dicts, unions with None, scalars.

    A field of a dataclass may be absent if it says so, `field(default=..., metadata={"optional": True})`. Where the
    type of one depends on others, the dataclass tells it: `field_types(values) -> {name: type}`.

    Args:
        where: what `value` is called in messages.

    Raises:
        ValueError: if it is of another type, or lacks a field that is not marked `optional`.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        if hasattr(kind, "field_types"):
            hints |= kind.field_types(value)
        names = [field.name for field in fields(kind)]
        absent = {field.name for field in fields(kind) if field.metadata.get("optional")} - set(value)
        if set(value) | absent != set(names):
            wrong = ", ".join(sorted((set(value) | absent) ^ set(names)))
            raise ValueError(f"{where} lacks, or should not have: {wrong}")
        return kind(**{name: typed(hints[name], value[name], f"{where}.{name}") for name in names if name in value})
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(typed(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {key: typed(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    elif origin is types.UnionType:
        return None if value is None else typed(arguments[0], value, where)
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{where} is {value!r:.60} and should be {kind}")
