"""Checkpoints by name, shape and value: what official files hold arrives in the model, and nothing else passes.

How a file is read, and the files of upstream's training script: `test_untrusted.py`.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dat_deploy.errors import CheckpointError, OutputError, VariantError
from dat_deploy.networks.dat.checkpoint import (
    Weights,
    convert_checkpoint,
    load_checkpoint,
    load_model,
    load_weights,
    official_state_dict_shapes,
    seeded_weights,
)
from dat_deploy.networks.dat.model import DAT
from dat_deploy.networks.dat.variants import RELEASED, VARIANTS, StageConfig, Variant

GOLDEN = Path(__file__).parent / "golden"

MINI = replace(
    VARIANTS["tiny"],
    name="mini",
    classes=5,
    stages=(
        StageConfig(8, "LS", 1, 7),
        StageConfig(16, "LS", 1, 7),
        StageConfig(32, "LD", 2, 7, offset_groups=2, offset_kernel_size=5, offset_range_factor=2.0),
        StageConfig(64, "LD", 4, 7, offset_groups=2, offset_kernel_size=3, offset_range_factor=2.0),
    ),
)


def computed_buffer(name: str, shape: tuple[int, ...]) -> Tensor:
    """The buffers of windows of 7 as upstream defines them, by another road: pixel by pixel."""
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij"))
    if name.endswith("index"):
        return (y[:, None] - y + 6) * 13 + (x[:, None] - x + 6)
    side = int(shape[0] ** 0.5) * 7
    painted = torch.zeros(side, side)
    for i, rows in enumerate((slice(0, -7), slice(-7, -4), slice(-4, None))):
        for j, columns in enumerate((slice(0, -7), slice(-7, -4), slice(-4, None))):
            painted[rows, columns] = 3 * i + j
    windows = torch.stack([window.flatten() for row in painted.split(7) for window in row.split(7, dim=1)])
    return torch.where(windows[:, :, None] == windows[:, None, :], 0.0, -100.0)


def official_tensors(variant: Variant) -> dict[str, Tensor]:
    """A state dict with upstream's names; its values tell the tensors apart."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: computed_buffer(name, shape)
        if name.endswith(("relative_position_index", "attn_mask"))
        else torch.randn(shape, generator=generator)
        for name, shape in official_state_dict_shapes(variant).items()
    }


def hollow_tensors(variant: Variant) -> dict[str, Tensor]:
    """Names and shapes of a real variant in a file of some kilobytes: each tensor is one repeated zero."""
    return {
        name: torch.zeros(1).expand(shape)
        for name, shape in official_state_dict_shapes(variant).items()
        if not name.endswith(("relative_position_index", "attn_mask"))
    }


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"model": tensors, "epoch": 299}, path)
    return path


def refusal(path: Path, variant: Variant = MINI) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, variant)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return official_tensors(MINI)


@pytest.fixture(scope="module")
def weights(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return load_checkpoint(save(tmp_path_factory.mktemp("official") / "mini.pth", tensors), MINI)


# --- what an official file holds arrives ---


@pytest.mark.parametrize("name", RELEASED)
def test_official_names_shapes_types_and_order_are_those_of_the_manifest(name: str) -> None:
    manifest = json.loads((GOLDEN / "manifests" / f"{name}.json").read_text())["state_dict"]
    shapes = official_state_dict_shapes(VARIANTS[name])
    assert list(shapes.items()) == [(key, tuple(shape)) for key, (shape, _) in manifest.items()]
    integers = {key for key, (_, dtype) in manifest.items() if dtype != "float32"}
    assert integers == {key for key in shapes if key.endswith("relative_position_index")}


def test_a_golden_checkpoint_gives_the_official_logits(
    golden_checkpoint: Path, deterministic_weights: ModuleType
) -> None:
    model = load_model("tiny", golden_checkpoint)
    with torch.inference_mode():
        logits = model(deterministic_weights.images((224, 224)))
    with np.load(GOLDEN / "tiny.npz") as golden:
        np.testing.assert_allclose(logits.numpy(), golden["logits"], rtol=0, atol=2e-5)


def test_every_parameter_of_the_model_is_loaded_as_float32(weights: Weights) -> None:
    with torch.device("meta"):
        expected = DAT(MINI).state_dict()
    assert {k: v.shape for k, v in weights.state_dict.items()} == {k: v.shape for k, v in expected.items()}
    assert {tensor.dtype for tensor in weights.state_dict.values()} == {torch.float32}
    assert weights.source == "mini.pth"
    assert weights.notes == ()


def test_downsampling_is_the_official_convolution(weights: Weights, tensors: dict[str, Tensor]) -> None:
    model = load_model(MINI)
    model.load_state_dict(weights.state_dict)
    x = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = F.conv2d(x.permute(0, 3, 1, 2), tensors["down_projs.0.0.weight"], stride=2).permute(0, 2, 3, 1)
    expected = F.layer_norm(expected, (16,), tensors["down_projs.0.1.norm.weight"], tensors["down_projs.0.1.norm.bias"])
    torch.testing.assert_close(model.down_projs[0](x), expected)


@pytest.mark.parametrize("form", ["legacy", "safetensors", "parameters", "without_buffers", "not_contiguous"])
def test_every_form_of_file_gives_the_same_weights_and_hash(
    form: str, weights: Weights, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "mini.pth"
    match form:
        case "legacy":
            torch.save(tensors, path, _use_new_zipfile_serialization=False)
        case "safetensors":
            save_file(tensors, path)
        case "parameters":
            torch.save({k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in tensors.items()}, path)
        case "without_buffers":
            torch.save({k: v for k, v in tensors.items() if "_mask" not in k and "_index" not in k}, path)
        case "not_contiguous":
            torch.save({k: v.mT.contiguous().mT if v.ndim > 1 else v for k, v in tensors.items()}, path)
    loaded = load_checkpoint(path, MINI)
    assert loaded.sha256 == weights.sha256
    assert all(torch.equal(loaded.state_dict[name], tensor) for name, tensor in weights.state_dict.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_converted_to_float32(
    dtype: torch.dtype, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "mini.pth"
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}, path)
    loaded = load_checkpoint(path, MINI).state_dict["cls_head.weight"]
    assert torch.equal(loaded, tensors["cls_head.weight"].to(dtype).float())


def test_the_hash_changes_with_one_bit_and_with_a_name(
    weights: Weights, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "mini.pth"
    bias = tensors["cls_head.bias"].clone()
    bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
    torch.save(tensors | {"cls_head.bias": bias}, path)
    changed = load_checkpoint(path, MINI).sha256
    first, second = "stages.0.attns.0.proj_out.bias", "stages.0.attns.1.proj_out.bias"
    torch.save(tensors | {first: tensors[second], second: tensors[first]}, path)
    swapped = load_checkpoint(path, MINI).sha256
    assert len({weights.sha256, changed, swapped}) == 3
    assert len(weights.sha256) == 64


def test_bias_tables_are_resized_for_another_image_size_with_a_note(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(tmp_path / "mini.pth", tensors)
    loaded = load_checkpoint(path, MINI.with_image_size(448, 224))
    assert loaded.notes == (
        "stage 2: bias tables resized from 27x27 to 55x27 (bicubic)",
        "stage 3: bias tables resized from 13x13 to 27x13 (bicubic)",
    )
    table = tensors["stages.2.attns.1.rpe_table"]
    expected = F.interpolate(table[None], (55, 27), mode="bicubic", align_corners=False)[0]
    assert torch.equal(loaded.state_dict["stages.2.attns.1.relative_position_bias_table"], expected)
    model = load_model(MINI, path, image_size=(448, 224))
    assert model(torch.zeros(1, 3, 448, 224)).shape == (1, 5)


# --- the model and seeded weights ---


def test_a_loaded_model_is_ready_for_inference_and_shares_the_weights(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    model = load_model(MINI, save(tmp_path / "mini.pth", tensors))
    assert not model.training
    assert {(p.requires_grad, p.device.type) for p in model.parameters()} == {(False, "cpu")}
    assert torch.equal(model.cls_head.bias, tensors["cls_head.bias"])


def test_seeded_weights_repeat_and_differ_by_seed() -> None:
    first = seeded_weights(MINI)
    assert first.sha256 == seeded_weights(MINI).sha256 != seeded_weights(MINI, seed=1).sha256
    assert first.source == "seeded random weights (seed 0)"
    assert seeded_weights(MINI, seed=1).source == "seeded random weights (seed 1)"
    assert load_weights(MINI).sha256 == first.sha256
    np.testing.assert_allclose(  # written down, so that a change of the recipe or of NumPy's stream is seen
        first.state_dict["cls_head.bias"].numpy(),
        [0.0312055778, 0.000466428901, 0.030610729, 0.0122789703, 0.083675243],
        rtol=1e-6,
    )


def test_seeded_weights_have_the_scales_of_a_meaningful_network() -> None:
    state = seeded_weights(VARIANTS["tiny"]).state_dict
    scale = {name: (float(tensor.mean()), float(tensor.std())) for name, tensor in state.items()}
    expected = {
        "stages.3.mlps.0.linear1.weight": (0, 768**-0.5),
        "down_projs.2.linear.weight": (0, (4 * 384) ** -0.5),
        "stages.2.attns.1.conv_offset.depthwise.weight": (0, 1 / 5),
        "stages.2.attns.1.conv_offset.pointwise.weight": (0, 0.3 * 128**-0.5),
        "stages.3.layer_norms.0.weight": (1, 0.1),
        "cls_norm.weight": (1, 0.1),
        "patch_proj.norm.weight": (1, 0.1),
        "stages.2.attns.1.conv_offset.norm.weight": (1, 0.1),
        "stages.3.layer_norms.0.bias": (0, 0.05),
        "cls_head.bias": (0, 0.05),
        "stages.2.attns.0.relative_position_bias_table": (0, 0.5),
        "stages.2.attns.1.relative_position_bias_table": (0, 0.5),
    }
    for name, (mean, std) in expected.items():
        slack = 4 / state[name].numel() ** 0.5  # four standard errors
        assert scale[name] == (pytest.approx(mean, abs=slack * std), pytest.approx(std, rel=slack)), name


@pytest.mark.parametrize("name", ["tiny", "pp-tiny"])
def test_a_seeded_network_samples_away_from_its_grid_and_tells_images_apart(name: str) -> None:
    model = load_model(name)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(images)
        outputs, sampled = model.forward_features(images)
    assert logits.isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 0.1
    assert all(0.1 < features.std() < 20 for features in outputs)
    for points in sampled.values():
        assert points.locations.std(dim=0).max() > 0.01  # offsets depend on the image
        assert (points.locations.abs() < 1).double().mean() > 0.5  # most are not clamped


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(VariantError, match="no variant 'tinny'"):
        load_model("tinny")


# --- converting ---


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "mini", MINI)


@pytest.mark.usefixtures("registered")
def test_a_converted_file_holds_official_names_and_the_same_weights(
    weights: Weights, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    source, output = save(tmp_path / "mini.pth", tensors), tmp_path / "mini.safetensors"
    variant, converted = convert_checkpoint(source, output)
    assert (variant.name, converted.sha256) == ("mini", weights.sha256)
    assert load_checkpoint(output, MINI).sha256 == weights.sha256
    with safe_open(output, "pt") as file:
        assert set(file.keys()) == {name for name in tensors if "_index" not in name and "_mask" not in name}
        assert file.metadata() == {
            "format": "pt",
            "variant": "mini",
            "source": "mini.pth",
            "sha256": weights.sha256,
        }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mini.pth", "mini.safetensors"]


@pytest.mark.usefixtures("registered")
def test_converting_replaces_a_file_only_with_force(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    source, output = save(tmp_path / "mini.pth", tensors), tmp_path / "out.safetensors"
    output.write_text("mine")
    with pytest.raises(OutputError, match="exists; pass `force=True` to replace it"):
        convert_checkpoint(source, output)
    assert output.read_text() == "mine"
    convert_checkpoint(source, output, force=True)
    load_checkpoint(output, MINI)


def test_converting_what_fits_no_variant_is_refused_and_writes_nothing(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save(tmp_path / "mini.pth", tensors)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(path, tmp_path / "out.safetensors")
    assert str(caught.value) == f"{path} fits no variant: {', '.join(VARIANTS)}."
    assert [p.name for p in tmp_path.iterdir()] == ["mini.pth"]


# --- a checkpoint of another network ---

TWINS = {"pp-base", "pp-base-384"}  # the same tensors; they differ in their image size


@pytest.mark.parametrize("actual", VARIANTS)
def test_a_checkpoint_of_another_variant_names_the_one_it_fits(actual: str, tmp_path: Path) -> None:
    """Whichever variant was wanted, the tensors are tried as every one, and none but theirs is named."""
    wanted = next(name for name in VARIANTS if not {name, actual} <= TWINS and name != actual)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": hollow_tensors(VARIANTS[actual])}, path)
    advice = f". It fits variant '{actual}'; use `variant='{actual}'`."
    if actual in TWINS:
        advice = ". It fits variant 'pp-base' or 'pp-base-384'; use `variant='pp-base'` or `variant='pp-base-384'`."
    assert refusal(path, VARIANTS[wanted]).endswith(advice)


def test_a_checkpoint_of_another_variant_names_tensors_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "small.pth"
    torch.save({"model": hollow_tensors(VARIANTS["small"])}, path)
    assert refusal(path, VARIANTS["tiny"]) == (
        f"{path} is not a checkpoint of variant 'tiny': unknown: stages.2.layer_norms.12.norm.weight (384), "
        "stages.2.layer_norms.12.norm.bias (384), stages.2.layer_norms.13.norm.weight (384) and 207 more. "
        "It fits variant 'small'; use `variant='small'`."
    )


def test_missing_unknown_and_misshapen_tensors_are_all_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mini.pth"
    changed = {**tensors, "temperature\n\x1b[2J": torch.zeros(()), "cls_norm.norm.bias": torch.zeros(3)}
    del changed["cls_norm.norm.weight"]
    torch.save(changed, path)
    assert refusal(path) == (
        f"{path} is not a checkpoint of variant 'mini': missing: cls_norm.norm.weight (64); "
        "unknown: temperature\\n\\x1b[2J (); cls_norm.norm.bias is 3 instead of 64. "
        f"It fits none of: {', '.join(VARIANTS)}."
    )


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "finetuned.pth"
    torch.save({"model": hollow_tensors(replace(VARIANTS["tiny"], classes=10))}, path)
    assert refusal(path, VARIANTS["tiny"]) == (
        f"{path} classifies into 10 classes and variant 'tiny' into 1000. Give its own configuration "
        'instead: `variant="FILE.yaml"` with num_classes: 10.'
    )


@pytest.mark.parametrize("buffer", ["stages.1.attns.0.relative_position_index", "stages.0.attns.1.attn_mask"])
def test_a_buffer_with_other_values_is_refused(buffer: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mini.pth"
    torch.save(tensors | {buffer: tensors[buffer].roll(1, -1)}, path)
    assert refusal(path) == (
        f"{path} has another {buffer} than variant 'mini' computes; its windows would see other pixels."
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    value: float, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "mini.pth"
    broken = {"cls_head.bias": torch.full((5,), value), "cls_norm.norm.bias": torch.full((64,), value)}
    torch.save(tensors | broken, path)
    assert refusal(path) == f"{path} has NaN or infinite weights in cls_norm.norm.bias, cls_head.bias."


def test_integer_weights_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mini.pth"
    torch.save(tensors | {"cls_head.bias": torch.zeros(5, dtype=torch.int32)}, path)
    assert refusal(path) == f"{path} has cls_head.bias in int32; weights are floating-point numbers."


def test_loading_and_converting_refuse_a_hostile_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"model": tensors, "hook": os.system}, path)
    for read in (lambda: load_checkpoint(path, MINI), lambda: convert_checkpoint(path, tmp_path / "out.safetensors")):
        with pytest.raises(CheckpointError, match=r"asks for the Python object '.*system', which a checkpoint does"):
            read()


# --- backbones ---

BACKBONE = MINI.as_backbone((0, 1, 2, 3))


def detector(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """As mmdetection saves one."""
    state = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    state |= {"neck.fpn_convs.0.conv.weight": torch.zeros(3), "roi_head.bbox_head.fc_cls.weight": torch.zeros(2)}
    return {"meta": {"epoch": 12, "CLASSES": ("person", "bicycle")}, "state_dict": state, "optimizer": {"state": {}}}


def test_the_backbone_of_a_detector_loads_with_its_output_norms(tmp_path: Path) -> None:
    tensors = official_tensors(BACKBONE)
    path = tmp_path / "mask_rcnn.pth"
    torch.save(detector(tensors), path)
    weights = load_checkpoint(path, BACKBONE)
    assert weights.notes == ("left out of the checkpoint: neck, roi_head",)
    for stage in range(4):
        assert torch.equal(weights.state_dict[f"norms.{stage}.weight"], tensors[f"norms.{stage}.norm.weight"])
    assert not any(name.startswith("cls_") for name in weights.state_dict)
    model = load_model(BACKBONE, path)
    assert len(model(torch.zeros(1, 3, 224, 224))) == 4


def test_a_backbone_of_some_stages_leaves_the_other_norms_out(tmp_path: Path) -> None:
    path = save(tmp_path / "backbone.pth", official_tensors(BACKBONE))
    norms = [name for name in load_checkpoint(path, MINI.as_backbone((1, 2))).state_dict if name.startswith("norms.")]
    assert norms == ["norms.1.weight", "norms.1.bias", "norms.2.weight", "norms.2.bias"]


def test_a_classifier_becomes_a_backbone_and_the_note_says_what_its_norms_are(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save(tmp_path / "mini.pth", tensors)
    weights = load_checkpoint(path, BACKBONE)
    assert weights.notes == (
        "the checkpoint has no output LayerNorms (norms.0 to norms.3), as one of classification has none; "
        "they get weight 1 and bias 0",
    )
    assert all(
        torch.equal(weights.state_dict[f"norms.{i}.weight"], torch.ones(c)) for i, c in enumerate((8, 16, 32, 64))
    )


def test_a_backbone_does_not_classify(tmp_path: Path) -> None:
    path = tmp_path / "detector.pth"
    torch.save(detector(hollow_tensors(VARIANTS["pp-tiny"].as_backbone((0, 1, 2, 3)))), path)
    assert refusal(path, VARIANTS["pp-tiny"]).endswith(
        "It is a backbone of 'pp-tiny', without a head; use `variant='pp-tiny'`, with `features=(0, 1, 2, 3)`."
    )


def test_a_detector_is_converted_without_its_other_parts(tmp_path: Path) -> None:
    path = tmp_path / "detector.pth"
    variant = VARIANTS["tiny"].as_backbone((0, 1, 2, 3))
    torch.save(detector(hollow_tensors(variant)), path)
    found, weights = convert_checkpoint(path, tmp_path / "backbone.safetensors")
    assert found == variant
    assert load_checkpoint(tmp_path / "backbone.safetensors", variant).sha256 == weights.sha256


def test_a_checkpoint_that_fits_two_variants_is_converted_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "pp.pth"
    torch.save({"model": hollow_tensors(VARIANTS["pp-base"])}, path)
    variant, weights = convert_checkpoint(path, tmp_path / "pp.safetensors")
    assert variant.name == "pp-base"
    assert weights.notes == ("the checkpoint fits pp-base-384 as well, which differs in its image size",)


def test_a_detector_has_the_norms_that_its_neck_uses(tmp_path: Path) -> None:
    """RetinaNet's of DAT-Detection start at stage 1: `out_indices=(1, 2, 3)`."""
    variant = VARIANTS["pp-tiny"]
    tensors = hollow_tensors(variant.as_backbone((0, 1, 2, 3)))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("norms.0.")}
    path = tmp_path / "retinanet.pth"
    torch.save(detector(tensors), path)
    assert load_checkpoint(path, variant.as_backbone((1, 2, 3))).notes == (
        "left out of the checkpoint: neck, roi_head",
    )
    load_checkpoint(path, variant.as_backbone((2,)))
    found, _ = convert_checkpoint(path, tmp_path / "backbone.safetensors")
    assert found == variant.as_backbone((1, 2, 3))
    assert refusal(path, variant.as_backbone((0, 1))) == (
        f"{path} is not a checkpoint of variant 'pp-tiny': missing: norms.0.norm.weight (64), norms.0.norm.bias (64). "
        "It is a backbone of 'pp-tiny', without a head; use `variant='pp-tiny'`, with `features=(1, 2, 3)`."
    )


def test_the_averaged_copies_of_a_detector_are_one_part_of_what_is_left_out(tmp_path: Path) -> None:
    content = detector(hollow_tensors(BACKBONE))
    content["state_dict"] |= {f"ema_backbone_{i}": torch.zeros(1) for i in range(5)}
    torch.save(content, tmp_path / "ema.pth")
    assert load_checkpoint(tmp_path / "ema.pth", BACKBONE).notes == (
        "left out of the checkpoint: neck, roi_head, EMA copies",
    )


def test_a_classifier_of_other_classes_is_no_backbone(tmp_path: Path) -> None:
    path = tmp_path / "finetuned.pth"
    torch.save({"model": hollow_tensors(replace(VARIANTS["pp-tiny"], classes=10))}, path)
    assert refusal(path, VARIANTS["tiny"]).endswith(
        "It fits variant 'pp-tiny' but for its 10 classes; use `variant=\"FILE.yaml\"` with num_classes: 10."
    )
    variant, weights = convert_checkpoint(path, tmp_path / "finetuned.safetensors")
    assert (variant.features, variant.classes) == ((), 10)
    assert weights.notes == ('it has 10 classes: export it with `variant="FILE.yaml"` that says num_classes',)
    with safe_open(tmp_path / "finetuned.safetensors", "pt") as file:
        assert file.get_slice("cls_head.weight").get_shape() == [10, 512]
