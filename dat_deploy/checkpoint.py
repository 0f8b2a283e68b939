"""Official `.pth` or `.safetensors` -> the weights of `dat_deploy.model.DAT`; nothing in a file is executed.

The only file that knows upstream's key names. A `.pth` is a pickle, and a pickle is a program. It is disassembled
first, which names every Python object it asks for and every storage it claims to have; whatever a checkpoint does not
need is refused before anything is loaded. Only then does torch's restricted unpickler (`weights_only=True`) read it.
The configuration that official checkpoints carry, a yacs `CfgNode`, becomes an `OrderedDict` and is dropped.
"""

import hashlib
import io
import itertools
import math
import pickletools
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file as save_safetensors
from torch import Tensor

from dat_deploy.errors import CheckpointError
from dat_deploy.files import atomic_output
from dat_deploy.model import DAT
from dat_deploy.plugins.window_attention.reference import relative_position_index, shifted_window_mask
from dat_deploy.variants import PATCH_SIZE, VARIANTS, Variant, get_variant

__all__ = [
    "Weights",
    "convert_checkpoint",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "model_from_weights",
    "official_state_dict_shapes",
    "seeded_weights",
]

PICKLE_LIMIT_BYTES = 16 * 2**20  # the pickle of `base` with its optimizer's state has about 0.2 MB
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
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BUFFERS = (".relative_position_index", ".attn_mask")
# Upstream wraps LayerNorm (`norm`) and the MLP (`chunk`), and numbers the members of nn.Sequential.
RENAMES = (
    (r"^patch_proj\.0\.", "patch_proj.conv."),
    (r"^patch_proj\.1\.norm\.", "patch_proj.norm."),
    (r"^down_projs\.(\d)\.0\.", r"down_projs.\1.linear."),
    (r"^down_projs\.(\d)\.1\.norm\.", r"down_projs.\1.norm."),
    (r"^(cls_norm|.*\.layer_norms\.\d+)\.norm\.", r"\1."),
    (r"\.chunk\.", "."),
    (r"\.rpe_table$", ".relative_position_bias_table"),
    (r"\.conv_offset\.0\.", ".conv_offset.depthwise."),
    (r"\.conv_offset\.1\.norm\.", ".conv_offset.norm."),
    (r"\.conv_offset\.3\.", ".conv_offset.pointwise."),
)


@dataclass(frozen=True)
class Weights:
    """The parameters of one network.

    Attributes:
        state_dict: float32, with the names and shapes of `dat_deploy.model.DAT`.
        sha256: of the names, types, shapes and bytes in sorted order, so it does not depend on the kind of file.
        source: the checkpoint's file name, or "seeded random weights (seed 0)".
        notes: what the user must be told, one sentence each.
    """

    state_dict: dict[str, Tensor]
    sha256: str
    source: str
    notes: tuple[str, ...] = ()


def load_model(
    name_or_variant: str | Variant,
    checkpoint: Path | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    fused: bool = False,
) -> DAT:
    """The network in eval mode, without gradients; seeded random weights if there is no checkpoint.

    Args:
        image_size: (height, width) in pixels, where it is not the variant's own.
        fused: see `DAT`.

    Raises:
        CheckpointError: see `load_checkpoint`.
        ShapeError: if the image size does not fit the variant.
        VariantError: if there is no such variant.
    """
    variant = get_variant(name_or_variant) if isinstance(name_or_variant, str) else name_or_variant
    if image_size is not None:
        variant = variant.with_image_size(*image_size)
    return model_from_weights(load_weights(variant, checkpoint), variant, fused=fused)


def model_from_weights(weights: Weights, variant: Variant, *, fused: bool = False) -> DAT:
    """The second half of `load_model`, for a caller that wants `sha256` and `notes` too; the tensors are shared."""
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        model = DAT(variant, fused=fused)
    model.load_state_dict(weights.state_dict, assign=True)
    return model.eval().requires_grad_(False)


def load_weights(variant: Variant, checkpoint: Path | None = None) -> Weights:
    """Those of the checkpoint, or seeded random ones without."""
    return seeded_weights(variant) if checkpoint is None else load_checkpoint(checkpoint, variant)


def load_checkpoint(path: Path, variant: Variant) -> Weights:
    """Read a checkpoint of this variant, bias tables resized if its image size is not the trained one.

    Args:
        path: `{"model": state_dict, ...}`, `{"state_dict": ...}` or a bare state dict, with or without the prefix
            `module.`, as torch.save writes it (zip or legacy); or `.safetensors`. float16 and bfloat16 become float32.

    Raises:
        CheckpointError: if the file is unreadable, damaged, asks for code, belongs to another variant, or holds
            weights that are not finite.
    """
    return _weights_from_official(path, _official_parameters(path, _read_tensors(path), variant), variant)


def convert_checkpoint(path: Path, output: Path, *, force: bool = False) -> tuple[Variant, Weights]:
    """Rewrite a checkpoint as `.safetensors`, under the official parameter names, as float32.

    Returns:
        The variant that the file was recognised as, and its weights.

    Raises:
        CheckpointError: as `load_checkpoint`, or if no variant fits.
        OutputError: if the output exists and `force` is not given, or cannot be written.
    """
    tensors = _read_tensors(path)
    variant = _fitting_variant(tensors)
    if variant is None:
        raise CheckpointError(f"{path} fits no variant: {', '.join(VARIANTS)}.")
    parameters = _official_parameters(path, tensors, variant)
    weights = _weights_from_official(path, parameters, variant)
    metadata = {"format": "pt", "variant": variant.name, "source": path.name, "sha256": weights.sha256}
    with atomic_output(output, force=force) as temporary:
        save_safetensors(parameters, temporary, metadata)
    return variant, weights


def seeded_weights(variant: Variant, seed: int = 0) -> Weights:
    """Random weights for a meaningful numerical test: activations keep their scale, samples leave their grid points.

    They depend on NumPy alone; each tensor's on the seed, its name and its shape.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in DAT(variant).state_dict().items()}
    state_dict = {}
    for name, shape in shapes.items():
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = generator.standard_normal(shape, dtype=np.float32)
        if re.search(r"norms?(\.\d+)?\.weight$", name):
            values = 1 + np.float32(0.1) * values
        elif name.endswith(".bias"):
            values *= np.float32(0.05)
        elif name.endswith(".relative_position_bias_table"):
            values *= np.float32(0.5)
        else:
            gain = 0.3 if name.endswith(".conv_offset.pointwise.weight") else 1.0
            values *= np.float32(gain / math.sqrt(math.prod(shape[1:])))
        state_dict[name] = torch.from_numpy(values)
    return Weights(state_dict, _sha256(state_dict), f"seeded random weights (seed {seed})")


def official_state_dict_shapes(variant: Variant) -> dict[str, tuple[int, ...]]:
    """Names and shapes of upstream's state dict at the trained size, in its order, buffers included."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    widths = [stage.channels for stage in variant.stages]
    layer("patch_proj.0", widths[0], 3, PATCH_SIZE, PATCH_SIZE)
    layer("patch_proj.1.norm", widths[0])
    for i, stage in enumerate(variant.stages):
        c, ws, side = stage.channels, stage.window_size, _trained_side(variant, i)
        for j in range(2 * len(stage.blocks)):
            layer(f"stages.{i}.layer_norms.{j}.norm", c)
        for j in range(len(stage.blocks)):
            layer(f"stages.{i}.mlps.{j}.chunk.linear1", c * variant.mlp_ratio, c)
            layer(f"stages.{i}.mlps.{j}.chunk.linear2", c, c * variant.mlp_ratio)
        for j, letter in enumerate(stage.blocks):
            name = f"stages.{i}.attns.{j}"
            if letter == "D":
                group, kernel = c // stage.offset_groups, stage.offset_kernel_size
                shapes[f"{name}.rpe_table"] = (stage.heads, 2 * side - 1, 2 * side - 1)
                layer(f"{name}.conv_offset.0", group, 1, kernel, kernel)
                layer(f"{name}.conv_offset.1.norm", group)
                shapes[f"{name}.conv_offset.3.weight"] = (2, group, 1, 1)
                for projection in ("proj_q", "proj_k", "proj_v", "proj_out"):
                    layer(f"{name}.{projection}", c, c, 1, 1)
                continue
            shapes[f"{name}.relative_position_bias_table"] = ((2 * ws - 1) ** 2, stage.heads)
            shapes[f"{name}.relative_position_index"] = (ws**2, ws**2)
            if letter == "S":
                shapes[f"{name}.attn_mask"] = ((side // ws) ** 2, ws**2, ws**2)
            layer(f"{name}.proj_qkv", 3 * c, c)
            layer(f"{name}.proj_out", c, c)
    for i, (narrow, wide) in enumerate(itertools.pairwise(widths)):
        shapes[f"down_projs.{i}.0.weight"] = (wide, narrow, 2, 2)
        layer(f"down_projs.{i}.1.norm", wide)
    layer("cls_norm.norm", widths[-1])
    layer("cls_head", variant.classes, widths[-1])
    return shapes


# --- from a file to tensors under upstream's names ---


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the state dict as the file has it, without the prefix `module.`."""
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; name the checkpoint file in it.")
        if path.exists() and not path.is_file():  # a pipe or a device would block
            raise CheckpointError(f"{path} is not a regular file.")
        with path.open("rb") as file:
            content = _read_content(path, file, path.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error

    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
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
    prefixed = all(name.startswith("module.") for name in content)
    return {name.removeprefix("module.") if prefixed else name: tensor.detach() for name, tensor in content.items()}


def _read_content(path: Path, file: BinaryIO, size_bytes: int) -> object:
    head = file.read(9)
    file.seek(0)
    if not head:
        raise CheckpointError(f"{path} is empty.")
    if path.suffix == ".safetensors" or (head[8:] == b"{" and int.from_bytes(head[:8], "little") < size_bytes):
        try:
            return load_safetensors(file.read())
        except (SafetensorError, KeyError) as error:  # KeyError: a type that safetensors' torch side does not know
            raise CheckpointError(f"{path} is not a readable safetensors file: {_first_line(error)}.") from error
    if head.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(file) as archive:
                _inspect_zip(path, archive, size_bytes)
        except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or incomplete: {_first_line(error)}.") from error
    elif head.startswith(b"\x80"):
        _inspect_legacy(path, file, size_bytes)
    else:
        raise CheckpointError(f"{path} is not a checkpoint: neither torch.save nor safetensors wrote it.")
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
    claimed: dict[str, int] = {}
    for i in range(5):
        value, storages = _inspect_pickle(path, stream)
        if i == 0 and value != LEGACY_MAGIC:
            raise CheckpointError(f"{path} is a plain pickle, not a checkpoint that torch.save wrote.")
        claimed.update(storages)
    claimed_bytes = sum(claimed.values())
    if claimed_bytes > size_bytes:
        raise CheckpointError(
            f"refused to load {path}: it claims {claimed_bytes} bytes of storage, and the file has {size_bytes}."
        )


class _Global(str):
    """The full name of a Python object that a pickle asks for, where the object itself would be on the stack."""

    __slots__ = ()


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
                    stack.append(tuple(popped))
                case "GLOBAL" | "INST":
                    stack.append(_allowed_global(path, *str(argument).split(" ", 1)))
                case "STACK_GLOBAL":
                    stack.append(_allowed_global(path, *popped))
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


# --- from tensors under upstream's names to weights ---


def _official_parameters(path: Path, tensors: dict[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """The parameters as float32 copies under upstream's names, after every check; buffers are checked and dropped."""
    _check_names_and_shapes(path, tensors, variant)
    parameters = {}
    for name in official_state_dict_shapes(variant):
        if name not in tensors:
            continue  # an absent buffer
        tensor = tensors[name]
        if name.endswith(BUFFERS):
            _check_buffer(path, name, tensor, variant)
        elif tensor.dtype in FLOAT_TYPES:
            parameters[name] = tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True).resolve_neg()
        else:
            raise CheckpointError(f"{path} has {name} in {_type_name(tensor)}; weights are floating-point numbers.")
    broken = [name for name, tensor in parameters.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path} has NaN or infinite weights in {_enumerate(broken)}.")
    return parameters


def _weights_from_official(path: Path, parameters: dict[str, Tensor], variant: Variant) -> Weights:
    """Upstream's names and shapes to the model's, tables resized to the variant's image size."""
    state_dict: dict[str, Tensor] = {}
    notes: dict[str, None] = {}  # in order, each once
    for official_name, tensor in parameters.items():
        name = official_name
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name.startswith("down_projs.") and tensor.ndim == 4:  # a 2x2 convolution is a product over its four pixels
            tensor = tensor.permute(0, 2, 3, 1).flatten(1).contiguous()
        elif tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)
        elif official_name.endswith(".rpe_table"):
            stage = int(official_name.split(".")[1])
            size = [2 * side - 1 for side in variant.feature_map(stage)]
            if list(tensor.shape[1:]) != size:
                old = _sides(tensor.shape[1:])
                tensor = F.interpolate(tensor[None], size=size, mode="bicubic", align_corners=False)[0]
                notes[f"stage {stage}: bias tables resized from {old} to {_sides(size)} (bicubic)"] = None
        state_dict[name] = tensor
    return Weights(state_dict, _sha256(state_dict), path.name, tuple(notes))


def _check_names_and_shapes(path: Path, tensors: dict[str, Tensor], variant: Variant) -> None:
    if _fits(tensors, variant):
        return
    head = tensors.get("cls_head.weight")
    if head is not None and head.ndim == 2 and _fits(tensors, replace(variant, classes=head.shape[0])):
        raise CheckpointError(
            f"{path} classifies into {head.shape[0]} classes and variant '{variant.name}' into {variant.classes}. "
            "Heads of another size are not supported."
        )
    expected = official_state_dict_shapes(variant)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing = [
        f"{name} ({_sides(shape)})"
        for name, shape in expected.items()
        if name not in shapes and not name.endswith(BUFFERS)
    ]
    extra = [f"{_plain(name)} ({_sides(shape)})" for name, shape in shapes.items() if name not in expected]
    other = [
        f"{name} is {_sides(shapes[name])} instead of {_sides(shape)}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    labelled = (("missing: ", missing), ("unknown: ", extra), ("", other))
    differences = "; ".join(f"{label}{_enumerate(names)}" for label, names in labelled if names)
    fitting = _fitting_variant(tensors)
    advice = (
        f"It fits variant '{fitting.name}'; use --variant {fitting.name}."
        if fitting
        else f"It fits none of: {', '.join(VARIANTS)}."
    )
    raise CheckpointError(f"{path} is not a checkpoint of variant '{variant.name}': {differences}. {advice}")


def _fits(tensors: dict[str, Tensor], variant: Variant) -> bool:
    """Whether names and shapes are those of the variant; buffers may be absent."""
    expected = official_state_dict_shapes(variant)
    return all(name in tensors or name.endswith(BUFFERS) for name in expected) and all(
        tuple(tensor.shape) == expected.get(name) for name, tensor in tensors.items()
    )


def _fitting_variant(tensors: dict[str, Tensor]) -> Variant | None:
    return next((variant for variant in VARIANTS.values() if _fits(tensors, variant)), None)


def _check_buffer(path: Path, name: str, tensor: Tensor, variant: Variant) -> None:
    """Upstream stores what this code computes; a checkpoint with other values was trained as another network."""
    i = int(name.split(".")[1])
    stage, side = variant.stages[i], _trained_side(variant, i)
    computed = (
        relative_position_index(stage.window_size)
        if name.endswith(".relative_position_index")
        else shifted_window_mask(side, side, stage.window_size, stage.shift_size)
    )
    if not torch.equal(tensor, computed.to(tensor.dtype)):
        raise CheckpointError(
            f"{path} has another {name} than variant '{variant.name}' computes; its windows would see other pixels."
        )


def _trained_side(variant: Variant, stage: int) -> int:
    """Side of the stage's feature map at the size the checkpoint was trained for."""
    return replace(variant, image_size=(variant.trained_size, variant.trained_size)).feature_map(stage)[0]


def _sha256(state_dict: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {_type_name(tensor)} {_sides(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _sides(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _quote(text: object) -> str:
    return f"'{_plain(text)}'"


def _plain(text: object) -> str:
    """Text from a file on one line, not endless, and without control characters for the terminal."""
    plain = str(text).encode("unicode_escape").decode()
    return plain if len(plain) <= 120 else f"{plain[:117]}..."


def _enumerate(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _first_line(error: Exception) -> str:
    """Never torch's advice to load again with weights_only=False, which is part of some of its messages."""
    message = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    line = message.splitlines()[0].strip().rstrip(".")
    return "torch refuses it" if "weights_only" in line else line
