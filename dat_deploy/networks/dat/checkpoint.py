"""Official `.pth` or `.safetensors` -> the weights of `dat_deploy.networks.dat.model.DAT`.

The only file that knows upstream's key names. How a file that nobody vouches for is read:
`dat_deploy.networks.untrusted`.
"""

import itertools
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as save_safetensors
from torch import Tensor

from dat_deploy.errors import CheckpointError, VariantError
from dat_deploy.files import atomic_output
from dat_deploy.networks.dat.model import DAT
from dat_deploy.networks.dat.variants import LARGEST, PATCH_SIZE, VARIANTS, Variant
from dat_deploy.networks.family import Weights, find_network
from dat_deploy.networks.untrusted import plain_text, read_tensors
from dat_deploy.plugins.window_attention.reference import relative_position_index, shifted_window_mask

__all__ = [
    "convert_checkpoint",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "model_from_weights",
    "official_state_dict_shapes",
    "save_checkpoint",
    "seeded_weights",
]

SHIPPED = "the weights that ship with dat-deploy (demo.safetensors)"
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BUFFERS = (".relative_position_index", ".attn_mask")
# Upstream wraps LayerNorm (`norm`) and the MLP (`chunk`), and numbers the members of nn.Sequential.
RENAMES = (
    (r"^patch_proj\.0\.", "patch_proj.conv."),
    (r"^patch_proj\.1\.norm\.", "patch_proj.norm."),
    (r"^patch_proj\.3\.", "patch_proj.conv2."),
    (r"^patch_proj\.4\.norm\.", "patch_proj.norm2."),
    (r"^down_projs\.(\d)\.0\.", r"down_projs.\1.conv."),
    (r"^down_projs\.(\d)\.1\.norm\.", r"down_projs.\1.norm."),
    (r"^(cls_norm|norms\.\d|.*\.layer_norms\.\d+)\.norm\.", r"\1."),
    (r"\.chunk\.", "."),
    (r"\.(linear[12])\.0\.", r".\1."),
    (r"\.dwc\.", ".depthwise."),
    (r"\.qkv\.", ".proj_qkv."),
    (r"\.proj\.", ".proj_out."),
    (r"\.(rpe_table|rpb)$", ".relative_position_bias_table"),
    (r"\.conv_offset\.0\.", ".conv_offset.depthwise."),
    (r"\.conv_offset\.1\.norm\.", ".conv_offset.norm."),
    (r"\.conv_offset\.3\.", ".conv_offset.pointwise."),
)


def load_model(
    name_or_variant: str | Variant,
    checkpoint: Path | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    features: Sequence[int] | None = None,
    fused: bool = False,
) -> DAT:
    """The network in eval mode, without gradients; without a checkpoint, see `load_weights`.

    Args:
        name_or_variant, image_size, features: see `find_network`.
        fused: see `DAT`.

    Raises:
        CheckpointError: see `load_checkpoint`.
        ShapeError: if the image size does not fit the variant.
        VariantError: if there is no such variant.
    """
    variant = find_network(name_or_variant, image_size=image_size, features=features)
    if not isinstance(variant, Variant):
        raise VariantError(f"'{variant.name}' is no network of DAT; its family makes it: networks.family.family_of.")
    return model_from_weights(load_weights(variant, checkpoint), variant, fused=fused)


def model_from_weights(weights: Weights, variant: Variant, *, fused: bool = False, sampled_points: bool = False) -> DAT:
    """The second half of `load_model`, for a caller that wants `sha256` and `notes` too; the tensors are shared."""
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        model = DAT(variant, fused=fused, sampled_points=sampled_points)
    model.load_state_dict(weights.state_dict, assign=True)
    return model.eval().requires_grad_(False)


def load_weights(variant: Variant, checkpoint: Path | None = None) -> Weights:
    """Those of the checkpoint; without one those that ship (of `demo`), or seeded random ones."""
    if checkpoint is not None:
        return load_checkpoint(checkpoint, variant)
    demo = VARIANTS["demo"]
    if (variant.name, variant.stages, variant.classes) != (demo.name, demo.stages, demo.classes):
        return seeded_weights(variant)
    with resources.as_file(resources.files("dat_deploy").joinpath("data/demo.safetensors")) as path:
        return replace(load_checkpoint(path, variant), source=SHIPPED)


def load_checkpoint(path: Path, variant: Variant) -> Weights:
    """Read a checkpoint of this variant, bias tables resized if its image size is not the trained one.

    Args:
        path: `{"model": state_dict, ...}`, `{"state_dict": ...}` or a bare state dict, with or without the prefix
            `module.`, as torch.save writes it (zip or legacy); or `.safetensors`. float16 and bfloat16 become float32.
            A detector or segmenter (LeapLabTHU/DAT-Detection, DAT-Segmentation) has the network under `backbone.`;
            the rest of it is left out.
        variant: a backbone also takes a checkpoint of classification; its output LayerNorms then do nothing but
            normalise.

    Raises:
        CheckpointError: if the file is unreadable, damaged, asks for code, belongs to another variant, or holds
            weights that are not finite.
    """
    tensors, notes = _network_tensors(read_tensors(path), variant)
    return _weights_from_official(path, _official_parameters(path, tensors, variant), variant, notes)


def convert_checkpoint(path: Path, output: Path, *, force: bool = False) -> tuple[Variant, Weights]:
    """Rewrite a checkpoint as `.safetensors`, under the official parameter names, as float32.

    Returns:
        The variant that the file was recognised as, and its weights.

    Raises:
        CheckpointError: as `load_checkpoint`, or if no variant fits.
        OutputError: if the output exists and `force` is not given, or cannot be written.
    """
    content = read_tensors(path)
    fitting = _fitting_variants(content)
    if not fitting:
        raise CheckpointError(f"{path} fits no variant: {', '.join(VARIANTS)}.")
    variant = fitting[0]
    tensors, notes = _network_tensors(content, variant)
    notes += tuple(
        f"the checkpoint fits {other.name} as well, which differs in its image size" for other in fitting[1:]
    )
    if not variant.features and variant.classes != VARIANTS[variant.name].classes:
        notes += (f'it has {variant.classes} classes: export it with `variant="FILE.yaml"` that says num_classes',)
    parameters = _official_parameters(path, tensors, variant)
    weights = _weights_from_official(path, parameters, variant, notes)
    metadata = {"format": "pt", "variant": variant.name, "source": path.name, "sha256": weights.sha256}
    with atomic_output(output, force=force) as temporary:
        temporary.write_bytes(save_safetensors(parameters, metadata))  # save_file's errors are no OSError
    return variant, weights


def save_checkpoint(model: DAT, path: Path, *, force: bool = False) -> None:
    """Write a network of the size it was trained for as `.safetensors`, under the official parameter names."""
    state_dict = model.state_dict()
    parameters = {}
    for name, shape in official_state_dict_shapes(model.variant).items():
        if name.endswith(BUFFERS):
            continue
        own = _model_name(name, shape)
        tensor = state_dict[own]
        if own.endswith(".linear.weight"):
            tensor = tensor.reshape(shape[0], 2, 2, shape[1]).permute(0, 3, 1, 2)
        parameters[name] = tensor.reshape(shape).contiguous()
    with atomic_output(path, force=force) as temporary:
        temporary.write_bytes(save_safetensors(parameters, {"format": "pt", "variant": model.variant.name}))


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
        if re.search(r"norm(s|2)?(\.\d+)?\.weight$", name):
            values = 1 + np.float32(0.1) * values
        elif name.endswith(".bias"):
            values *= np.float32(0.05)
        elif name.endswith(".relative_position_bias_table"):
            values *= np.float32(0.5)
        else:
            # what is added to features at full scale would double their variance in every block
            small = r"\.conv_offset\.pointwise\.weight$|\.local_perception_units\.|mlps\.\d+\.depthwise\."
            gain = 0.3 if re.search(small, name) else 1.0
            values *= np.float32(gain / math.sqrt(math.prod(shape[1:])))
        state_dict[name] = torch.from_numpy(values)
    return Weights(state_dict, f"seeded random weights (seed {seed})")


def official_state_dict_shapes(variant: Variant) -> dict[str, tuple[int, ...]]:
    """Names and shapes of upstream's state dict at the trained size, in its order, buffers included."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    widths = [stage.channels for stage in variant.stages]
    if variant.overlapping_patches:
        for first, (narrow, wide) in ((0, (3, widths[0] // 2)), (3, (widths[0] // 2, widths[0]))):
            layer(f"patch_proj.{first}", wide, narrow, 3, 3)
            layer(f"patch_proj.{first + 1}.norm", wide)
    else:
        layer("patch_proj.0", widths[0], 3, PATCH_SIZE, PATCH_SIZE)
        layer("patch_proj.1.norm", widths[0])
    for i, stage in enumerate(variant.stages):
        c, hidden, ws, side = (
            stage.channels,
            stage.channels * variant.mlp_ratio,
            stage.window_size,
            _trained_side(variant, i),
        )
        for j in range(2 * len(stage.blocks)):
            layer(f"stages.{i}.layer_norms.{j}.norm", c)
        for j in range(len(stage.blocks)):
            if stage.depthwise_mlp:
                layer(f"stages.{i}.mlps.{j}.linear1.0", hidden, c, 1, 1)
                layer(f"stages.{i}.mlps.{j}.linear2.0", c, hidden, 1, 1)
                layer(f"stages.{i}.mlps.{j}.dwc", hidden, 1, 3, 3)
            else:
                layer(f"stages.{i}.mlps.{j}.chunk.linear1", hidden, c)
                layer(f"stages.{i}.mlps.{j}.chunk.linear2", c, hidden)
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
            elif letter == "N":
                table = 2 * stage.neighborhood_size - 1
                shapes[f"{name}.rpb"] = (stage.heads, table, table)
                layer(f"{name}.qkv", 3 * c, c)
                layer(f"{name}.proj", c, c)
            else:
                shapes[f"{name}.relative_position_bias_table"] = ((2 * ws - 1) ** 2, stage.heads)
                shapes[f"{name}.relative_position_index"] = (ws**2, ws**2)
                if letter == "S":
                    shapes[f"{name}.attn_mask"] = ((side // ws) ** 2, ws**2, ws**2)
                layer(f"{name}.proj_qkv", 3 * c, c)
                layer(f"{name}.proj_out", c, c)
        if stage.local_perception:
            for j in range(len(stage.blocks)):
                layer(f"stages.{i}.local_perception_units.{j}", c, 1, 3, 3)
    kernel = 3 if variant.overlapping_patches else 2
    for i, (narrow, wide) in enumerate(itertools.pairwise(widths)):
        shapes[f"down_projs.{i}.0.weight"] = (wide, narrow, kernel, kernel)
        layer(f"down_projs.{i}.1.norm", wide)
    if variant.features:
        for i, width in enumerate(widths):
            layer(f"norms.{i}.norm", width)
    else:
        layer("cls_norm.norm", widths[-1])
        layer("cls_head", variant.classes, widths[-1])
    return shapes


# --- from tensors under upstream's names to weights ---


def _network_tensors(tensors: dict[str, Tensor], variant: Variant) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of the network alone, out of a detector, segmenter or classifier; and what to tell of the rest."""
    notes = []
    inside = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    if inside:
        outside = [name for name in tensors if not name.startswith("backbone.")]
        parts = dict.fromkeys("EMA copies" if name.startswith("ema_") else name.split(".")[0] for name in outside)
        if parts:
            notes.append(f"left out of the checkpoint: {_enumerate([plain_text(part) for part in parts])}")
        tensors = inside
    if variant.features and not _output_norms(tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("cls_norm.", "cls_head."))}
        for i in variant.features:
            tensors[f"norms.{i}.norm.weight"] = torch.ones(variant.stages[i].channels)
            tensors[f"norms.{i}.norm.bias"] = torch.zeros(variant.stages[i].channels)
        notes.append(
            "the checkpoint has no output LayerNorms (norms.0 to norms.3), as one of classification has none; "
            "they get weight 1 and bias 0"
        )
    return tensors, tuple(notes)


def _output_norms(tensors: dict[str, Tensor]) -> list[int]:
    """The stages whose output LayerNorms a backbone's checkpoint has; a detector's has those that its neck uses."""
    prefixes = ("", "backbone.")
    return [i for i in range(4) if any(f"{prefix}norms.{i}.norm.weight" in tensors for prefix in prefixes)]


def _official_parameters(path: Path, tensors: dict[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """The parameters as float32 copies under upstream's names, after every check; buffers are checked and dropped."""
    _check_names_and_shapes(path, tensors, variant)
    parameters = {}
    for name in official_state_dict_shapes(variant):
        if name not in tensors:
            continue  # a buffer, or a norm of a stage that is not asked for
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


def _weights_from_official(
    path: Path, parameters: dict[str, Tensor], variant: Variant, remarks: tuple[str, ...]
) -> Weights:
    """Upstream's names and shapes to the model's, tables resized to the variant's image size."""
    state_dict: dict[str, Tensor] = {}
    notes = dict.fromkeys(remarks)  # in order, each once
    unused = tuple(f"norms.{i}." for i in range(len(variant.stages)) if i not in variant.features)
    for official_name, tensor in parameters.items():
        if official_name.startswith(unused):
            continue
        name = _model_name(official_name, tensor.shape)
        if name.endswith(".linear.weight"):
            tensor = tensor.permute(0, 2, 3, 1).flatten(1).contiguous()
        elif tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)
        elif official_name.endswith(".rpe_table"):
            stage = int(official_name.split(".")[1])
            size = list(variant.bias_table(stage))
            if list(tensor.shape[1:]) != size:
                old = _sides(tensor.shape[1:])
                tensor = F.interpolate(tensor[None], size=size, mode="bicubic", align_corners=False)[0]
                notes[f"stage {stage}: bias tables resized from {old} to {_sides(size)} (bicubic)"] = None
        state_dict[name] = tensor
    return Weights(state_dict, path.name, tuple(notes))


def _model_name(official_name: str, shape: Sequence[int]) -> str:
    name = official_name
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    if name.startswith("down_projs.") and tuple(shape[2:]) == (2, 2):  # a product over its four pixels
        name = name.replace(".conv.", ".linear.")
    return name


def _check_names_and_shapes(path: Path, tensors: dict[str, Tensor], variant: Variant) -> None:
    if _fits(tensors, variant):
        return
    if not variant.features and _fits(tensors, _with_head_of(tensors, variant)):
        classes = tensors["cls_head.weight"].shape[0]
        raise CheckpointError(
            f"{path} classifies into {classes} classes and variant '{variant.name}' into {variant.classes}. "
            f'Give its own configuration instead: `variant="FILE.yaml"` with num_classes: {classes}.'
        )
    expected = official_state_dict_shapes(variant)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing = [
        f"{name} ({_sides(shape)})"
        for name, shape in expected.items()
        if name not in shapes and name not in _optional(variant)
    ]
    extra = [f"{plain_text(name)} ({_sides(shape)})" for name, shape in shapes.items() if name not in expected]
    other = [
        f"{name} is {_sides(shapes[name])} instead of {_sides(shape)}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    groups = (("missing: ", missing), ("unknown: ", extra), ("", other))
    differences = "; ".join(f"{label}{_enumerate(names)}" for label, names in groups if names)
    fitting = _fitting_variants(tensors)
    names = " or ".join(f"'{other.name}'" for other in fitting)
    options = " or ".join(f"`variant={other.name!r}`" for other in fitting)
    if not fitting:
        advice = f"It fits none of: {', '.join(VARIANTS)}."
    elif fitting[0].features:
        advice = f"It is a backbone of {names}, without a head; use {options}, with `features={fitting[0].features}`."
    elif fitting[0].classes != VARIANTS[fitting[0].name].classes:
        advice = (
            f'It fits variant {names} but for its {fitting[0].classes} classes; use `variant="FILE.yaml"` '
            f"with num_classes: {fitting[0].classes}."
        )
    else:
        advice = f"It fits variant {names}; use {options}."
    raise CheckpointError(f"{path} is not a checkpoint of variant '{variant.name}': {differences}. {advice}")


def _fits(tensors: dict[str, Tensor], variant: Variant) -> bool:
    """Whether names and shapes are those of the variant."""
    expected, optional = official_state_dict_shapes(variant), _optional(variant)
    return all(name in tensors or name in optional for name in expected) and all(
        tuple(tensor.shape) == expected.get(name) for name, tensor in tensors.items()
    )


def _optional(variant: Variant) -> set[str]:
    """What a checkpoint may lack: buffers, and the output LayerNorms of stages that are not asked for."""
    unused = tuple(f"norms.{i}." for i in range(len(variant.stages)) if i not in variant.features)
    return {name for name in official_state_dict_shapes(variant) if name.endswith(BUFFERS) or name.startswith(unused)}


def _with_head_of(tensors: dict[str, Tensor], variant: Variant) -> Variant:
    """The variant with as many classes as the checkpoint's head, if it has one."""
    head = tensors.get("cls_head.weight")
    if head is None or head.ndim != 2 or head.shape[0] == variant.classes or not 1 <= head.shape[0] <= LARGEST:
        return variant
    return replace(variant, classes=head.shape[0], class_names=())


def _fitting_variants(tensors: dict[str, Tensor]) -> list[Variant]:
    """Those whose names and shapes are in the checkpoint: backbones if it has output LayerNorms, else classifiers."""
    features = _output_norms(tensors)
    candidates = [
        variant.as_backbone(features) if features else _with_head_of(tensors, variant) for variant in VARIANTS.values()
    ]
    return [variant for variant in candidates if _fits(_network_tensors(tensors, variant)[0], variant)]


def _check_buffer(path: Path, name: str, tensor: Tensor, variant: Variant) -> None:
    """Upstream stores what this code computes; a checkpoint with other values was trained as another network."""
    i = int(name.split(".")[1])
    stage, side = variant.stages[i], _trained_side(variant, i)
    expected = (
        relative_position_index(stage.window_size)
        if name.endswith(".relative_position_index")
        else shifted_window_mask(side, side, stage.window_size, stage.shift_size)
    )
    if not torch.equal(tensor, expected.to(tensor.dtype)):
        raise CheckpointError(
            f"{path} has another {name} than variant '{variant.name}' computes; its windows would see other pixels."
        )


def _trained_side(variant: Variant, stage: int) -> int:
    """Side of the stage's feature map at the size the checkpoint was trained for."""
    return replace(variant, image_size=(variant.trained_size, variant.trained_size)).feature_map(stage)[0]


def _sides(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _enumerate(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
