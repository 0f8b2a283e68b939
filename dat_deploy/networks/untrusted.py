"""Tensors from a file that a stranger made: `.pth` or `.safetensors`. Nothing in it is executed.

A `.pth` is a pickle, and a pickle is a program; whoever made the file chose every byte of it. It must not run code,
reach another file, have more memory set aside than its size justifies, or send control characters to the terminal.
Every refusal is a `CheckpointError`. Four layers:

1. The container. A regular file, its kind told by its first bytes (or the ending `.safetensors`). An archive must be as
   torch.save writes it: not compressed, each name once and inside the folder, sizes within the file's, checksums right.
2. The pickle is disassembled, not run. Every Python object that it names must be one of `ALLOWED_GLOBALS`, and no
   storage may claim more bytes than the file holds.
3. torch's restricted unpickler (`weights_only=True`) loads it; it would refuse code even if layer 2 let it through.
   The configuration that training scripts add, a yacs `CfgNode`, becomes an `OrderedDict` and is dropped.
4. What comes out must be names and tensors, nothing else.

Not covered: weights that are wrong on purpose, a file that changes while it is read, processor time, and errors in the
native code of torch and safetensors.
"""

import io
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from dat_deploy.errors import CheckpointError
from dat_deploy.networks.checkpoint_file import open_checkpoint

__all__ = ["plain_text", "read_tensors"]

PICKLE_LIMIT_BYTES = 16 * 2**20  # the pickle of `base` with its optimizer's state has about 0.2 MB
TUPLE_LIMIT = 1000  # objects in a tuple and the tuples in it, each time it is met; a shape has five
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that torch < 1.6 wrote
STORAGE_ITEM_BYTES = {
    "torch.BFloat16Storage": 2,
    "torch.BoolStorage": 1,
    "torch.ByteStorage": 1,
    "torch.CharStorage": 1,
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.IntStorage": 4,
    "torch.LongStorage": 8,
    "torch.ShortStorage": 2,
}
# Less than torch's own list, which has `bytearray` (one call allocates any amount) and sparse and quantised tensors.
ALLOWED_GLOBALS = {
    "builtins.set",  # __deprecated_keys__ of a CfgNode
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "yacs.config.CfgNode",
    *STORAGE_ITEM_BYTES,
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the state dict, which may be bare or under "model" or "state_dict", without the prefix `module.`.

    Names, types, shapes and values are the file's own. A few bytes can be a tensor of any shape, one number repeated:
    compare the shape before copying it.

    Raises:
        CheckpointError: if the file cannot be read, is damaged, asks for code, or holds no state dict.
    """
    with open_checkpoint(path) as (file, kind):
        content = _read_content(path, file, kind, path.stat().st_size)

    if isinstance(content, dict):
        content = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds an object of type '{type(content).__name__}', not a state dict.")
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no tensors, neither in itself nor under 'model' or 'state_dict'.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} has the entry {_quote(name)} of type '{type(value).__name__}' among its tensors; "
                "a state dict has names and tensors only."
            )
    prefix = "module." if all(name.startswith("module.") for name in content) else ""  # DataParallel adds it
    return {name.removeprefix(prefix): tensor.detach() for name, tensor in content.items()}


def _read_content(path: Path, file: BinaryIO, kind: str, size_bytes: int) -> object:
    if kind == "safetensors":
        try:
            return load_safetensors(file.read())
        except (SafetensorError, KeyError) as error:  # KeyError: a type that safetensors' torch side does not know
            raise CheckpointError(f"{path} is not a readable safetensors file: {_first_line(error)}.") from error
    if kind == "zip":
        try:
            with zipfile.ZipFile(file) as archive:
                _inspect_zip(path, archive, size_bytes)
        except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or incomplete: {_first_line(error)}.") from error
    else:
        _inspect_legacy(path, file, size_bytes)
    file.seek(0)
    try:
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a damaged pickle raises inside torch is open-ended
        raise CheckpointError(f"{path} is damaged or incomplete: {_first_line(error)}.") from error


def _inspect_zip(path: Path, archive: zipfile.ZipFile, size_bytes: int) -> None:
    """Refuse an archive that torch.save did not write as it is, or whose pickle `_inspect_pickle` refuses."""
    records = {record.filename: record for record in archive.infolist()}
    for name in records:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise CheckpointError(f"refused to load {path}: its member {_quote(name)} leaves the archive's folder.")
    if len(records) != len(archive.infolist()):
        raise CheckpointError(f"refused to load {path}: two of its members have one name.")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
        raise CheckpointError(f"refused to load {path}: it is compressed, which torch.save never does.")
    declared_bytes = sum(record.file_size for record in records.values())
    if declared_bytes > size_bytes:
        raise CheckpointError(
            f"refused to load {path}: its members declare {declared_bytes} bytes, and the file has {size_bytes}."
        )
    folder = next(iter(records), "").split("/")[0]
    if f"{folder}/constants.pkl" in records:
        raise CheckpointError(f"{path} is a TorchScript program; a state dict written by torch.save is needed.")
    pickled = records.get(f"{folder}/data.pkl")
    if pickled is None:
        raise CheckpointError(f"{path} is a zip archive that torch.save did not write.")
    if pickled.file_size > PICKLE_LIMIT_BYTES:
        raise CheckpointError(
            f"refused to load {path}: its pickle has {pickled.file_size} bytes, and {PICKLE_LIMIT_BYTES} are the limit."
        )
    _, storages = _inspect_pickle(path, io.BytesIO(archive.read(pickled)))
    for key, claimed_bytes in storages:
        record = records.get(f"{folder}/data/{key}")
        held_bytes = record.file_size if record else 0
        if claimed_bytes > held_bytes:
            raise CheckpointError(
                f"refused to load {path}: it claims {claimed_bytes} bytes for storage {_quote(key)}, "
                f"which has {held_bytes}."
            )
    if (damaged := archive.testzip()) is not None:  # torch.load does not compare checksums
        raise CheckpointError(f"{path} is damaged: the checksum of {_quote(damaged)} is wrong. Download it again.")


def _inspect_legacy(path: Path, file: BinaryIO, size_bytes: int) -> None:
    """Legacy files are five pickles in a row (magic, version, system, object, storage keys), then the raw storages."""
    stream = io.BytesIO(file.read(PICKLE_LIMIT_BYTES))
    claims: set[tuple[str, int]] = set()  # a storage that is claimed twice, with two sizes, counts twice
    for i in range(5):
        value, storages = _inspect_pickle(path, stream)
        if i == 0 and value != LEGACY_MAGIC:
            raise CheckpointError(f"{path} is a plain pickle, not a checkpoint that torch.save wrote.")
        claims.update(storages)
    claimed_bytes = sum(storage_bytes for _, storage_bytes in claims)
    if claimed_bytes > size_bytes:
        raise CheckpointError(
            f"refused to load {path}: it claims {claimed_bytes} bytes of storage, and the file has {size_bytes}."
        )


class _Global(str):
    """The full name of a Python object that a pickle asks for, where the object itself would be on the stack."""

    __slots__ = ()


class _Tuple(tuple[object, ...]):
    """A tuple that knows how many objects it is when written out; tuples may share their members."""

    size: int


def _inspect_pickle(path: Path, stream: io.BytesIO) -> tuple[object, list[tuple[str, int]]]:
    """Disassemble one pickle and run nothing.

    The stack is followed just far enough to know strings, numbers, tuples and globals; all else is None.

    Returns:
        The pickle's value where it is one of those, and (key, claimed bytes) of each reference to a storage.

    Raises:
        CheckpointError: if it asks for a Python object that a checkpoint does not need, or cannot be disassembled.
    """
    stack: list[object] = []
    marks: list[int] = []
    memo: dict[object, object] = {}
    storages: list[tuple[str, int]] = []
    protocol: object = 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            needs_mark = pickletools.markobject in opcode.stack_before
            start = marks.pop() if needs_mark else len(stack)
            if opcode.name == "POP" and marks and marks[-1] == start:  # POP may also drop a mark
                marks.pop()
                continue
            start -= len(opcode.stack_before) - 2 * needs_mark  # the mark and the slice above it count as two
            if start < (marks[-1] if marks else 0):
                raise IndexError("the stack is empty")
            popped = stack[start:]
            del stack[start:]
            match opcode.name:
                case "PROTO":
                    protocol = argument
                case "MARK":
                    marks.append(len(stack))
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = popped[0]
                    stack += popped
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(_small_tuple(popped))
                case "GLOBAL" | "INST":
                    stack.append(_allowed_global(path, *str(argument).split(" ", 1)))
                case "STACK_GLOBAL":
                    stack.append(_allowed_global(path, *(part if isinstance(part, str) else None for part in popped)))
                case "EXT1" | "EXT2" | "EXT4":
                    _allowed_global(path, "copyreg extension", argument)
                case "BINPERSID":
                    storages.append(_claimed_storage(popped[0]))
                    stack.append(None)
                case "STOP":
                    break
                case _:
                    stack += [argument] * len(opcode.stack_after)  # a constant's value, or None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete: its pickle is not one that torch.save writes."
        ) from error
    if protocol != 2:
        raise CheckpointError(
            f"{path} has pickle protocol {protocol}; only torch.save's own, 2, can be read without running code."
        )
    return popped[0], storages


def _small_tuple(items: list[object]) -> _Tuple:
    """Python hashes and prints tuples by recursion: a few bytes can make that endless, or overflow the stack."""
    result = _Tuple(items)
    result.size = 1 + sum(item.size if isinstance(item, _Tuple) else 1 for item in items)
    if result.size > TUPLE_LIMIT:
        raise ValueError("a tuple of too many objects")
    return result


def _allowed_global(path: Path, module: object, attribute: object) -> _Global:
    name = f"{'builtins' if module == '__builtin__' else module}.{attribute}"
    if name not in ALLOWED_GLOBALS:
        raise CheckpointError(
            f"refused to load {path}: it asks for the Python object {_quote(name)}, which a checkpoint does not need. "
            "If you trust its source, save its state dict alone, with torch.save or safetensors."
        )
    return _Global(name)


def _claimed_storage(persistent_id: object) -> tuple[str, int]:
    match persistent_id:
        case ("storage", _Global() as name, str(key), _, int(items), *_) if 0 <= items < 2**48:
            return key, items * STORAGE_ITEM_BYTES[name]
    raise ValueError("not a storage")


def _quote(text: object) -> str:
    return f"'{plain_text(text)}'"


def plain_text(text: object) -> str:
    """Text from such a file on one line, not endless, and without control characters for the terminal."""
    plain = str(text).encode("unicode_escape").decode()
    return plain if len(plain) <= 120 else f"{plain[:117]}..."


def _first_line(error: Exception) -> str:
    """Never torch's advice to load again with weights_only=False, which is part of some of its messages."""
    message = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    line = message.splitlines()[0].strip().rstrip(".")
    return "torch refuses it" if "weights_only" in line else line
