"""Loading checkpoints: what official files hold arrives in the model, and nothing in a hostile file runs."""

import builtins
import importlib
import importlib.util
import io
import json
import os
import pickle
import shlex
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dat_deploy import checkpoint
from dat_deploy.checkpoint import (
    Weights,
    convert_checkpoint,
    load_checkpoint,
    load_model,
    load_weights,
    official_state_dict_shapes,
    seeded_weights,
)
from dat_deploy.errors import CheckpointError, OutputError, VariantError
from dat_deploy.model import DAT
from dat_deploy.variants import VARIANTS, StageConfig, Variant

GOLDEN = Path(__file__).parent / "golden"
ADVICE = "If you trust its source, save its state dict alone, with torch.save or safetensors."

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


def yacs_config() -> dict[str, Any]:
    """What the official files carry; only the class's name and how it is pickled matter (yacs 0.1.8: NEWOBJ, BUILD)."""

    class CfgNode(dict[str, Any]):
        def __init__(self, content: dict[str, Any]) -> None:
            super().__init__(content)
            self.__dict__.update({"__immutable__": True, "__deprecated_keys__": set(), "__renamed_keys__": {}})

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    return CfgNode({"BASE": [""], "DATA": CfgNode({"IMG_SIZE": 224, "MEAN": (0.5, 0.4)}), "AMP": True})


def save_official(path: Path, tensors: dict[str, Tensor], *, legacy: bool = False, **more: Any) -> Path:
    """A file as upstream's training script writes it; yacs exists only while it is written."""
    config = yacs_config()
    module = types.ModuleType("yacs.config")
    module.CfgNode = type(config)  # type: ignore[attr-defined]
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    content = {"model": OrderedDict(tensors), "config": config, "epoch": 299, "optimizer": optimizer, **more}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert "yacs" not in sys.modules
    return path


def rewrite_zip(path: Path, edit: Callable[[str, bytes], tuple[str, bytes]], compression: int = 0) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [edit(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


def replace_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    def edit(name: str, data: bytes) -> tuple[str, bytes]:
        if name.endswith("data.pkl"):
            assert data.count(old) == 1
            data = data.replace(old, new)
        return name, data

    rewrite_zip(path, edit)


def refusal(path: Path, variant: Variant = MINI) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, variant)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's own message advises to switch the protection off
    return str(caught.value)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return official_tensors(MINI)


@pytest.fixture(scope="module")
def weights(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return load_checkpoint(save_official(tmp_path_factory.mktemp("official") / "mini.pth", tensors), MINI)


# --- what an official file holds arrives ---


@pytest.mark.parametrize("name", VARIANTS)
def test_official_names_shapes_types_and_order_are_those_of_the_manifest(name: str) -> None:
    manifest = json.loads((GOLDEN / "manifests" / f"{name}.json").read_text())["state_dict"]
    shapes = official_state_dict_shapes(VARIANTS[name])
    assert list(shapes.items()) == [(key, tuple(shape)) for key, (shape, _) in manifest.items()]
    integers = {key for key, (_, dtype) in manifest.items() if dtype != "float32"}
    assert integers == {key for key in shapes if key.endswith("relative_position_index")}


def test_a_golden_checkpoint_gives_the_official_logits(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("deterministic_weights", GOLDEN / "deterministic_weights.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    manifest = json.loads((GOLDEN / "manifests" / "tiny.json").read_text())["state_dict"]
    tensors = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in manifest.items()}
    recipe.fill_(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("relative_position_index", "attn_mask")):
            tensor.copy_(computed_buffer(name, tuple(tensor.shape)))
    model = load_model("tiny", save_official(tmp_path / "dat_tiny_in1k_224.pth", tensors))
    with torch.inference_mode():
        logits = model(recipe.images((224, 224)))
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


@pytest.mark.parametrize(
    "form",
    ["legacy", "state_dict", "bare", "module_prefix", "parameters", "without_buffers", "not_contiguous", "safetensors"],
)
def test_every_form_of_file_gives_the_same_weights(
    form: str, weights: Weights, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "mini.pth"
    match form:
        case "legacy":
            save_official(path, tensors, legacy=True)
        case "state_dict":
            torch.save({"state_dict": tensors, "epoch": 3}, path)
        case "bare":
            torch.save(tensors, path)
        case "module_prefix":
            save_official(path, {f"module.{name}": tensor for name, tensor in tensors.items()})
        case "parameters":
            torch.save({k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in tensors.items()}, path)
        case "without_buffers":
            torch.save({k: v for k, v in tensors.items() if "_mask" not in k and "_index" not in k}, path)
        case "not_contiguous":
            torch.save({k: v.mT.contiguous().mT if v.ndim > 1 else v for k, v in tensors.items()}, path)
        case "safetensors":
            save_file(tensors, path)  # known by its content, not by its name
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
    path = save_official(tmp_path / "mini.pth", tensors)
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
    model = load_model(MINI, save_official(tmp_path / "mini.pth", tensors))
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


def test_a_seeded_network_samples_away_from_its_grid_and_tells_images_apart() -> None:
    model = load_model("tiny")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(images)
        _, locations = model.forward_features(images)
    assert logits.isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 0.1
    assert all(points.std(dim=0).max() > 0.01 for points in locations.values())  # offsets depend on the image


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
    source, output = save_official(tmp_path / "mini.pth", tensors), tmp_path / "mini.safetensors"
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
    source, output = save_official(tmp_path / "mini.pth", tensors), tmp_path / "out.safetensors"
    output.write_text("mine")
    with pytest.raises(OutputError, match="exists; pass --force to replace it"):
        convert_checkpoint(source, output)
    assert output.read_text() == "mine"
    convert_checkpoint(source, output, force=True)
    load_checkpoint(output, MINI)


def test_converting_what_fits_no_variant_is_refused_and_writes_nothing(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save_official(tmp_path / "mini.pth", tensors)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(path, tmp_path / "out.safetensors")
    assert str(caught.value) == f"{path} fits no variant: tiny, small, base, base-384."
    assert [p.name for p in tmp_path.iterdir()] == ["mini.pth"]


# --- a checkpoint of another network ---


@pytest.mark.parametrize(("actual", "wanted"), [(a, w) for a in VARIANTS for w in VARIANTS if a != w])
def test_a_checkpoint_of_another_variant_names_the_one_it_fits(actual: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": hollow_tensors(VARIANTS[actual])}, path)
    assert refusal(path, VARIANTS[wanted]).endswith(f". It fits variant '{actual}'; use --variant {actual}.")


def test_a_checkpoint_of_another_variant_names_tensors_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "small.pth"
    torch.save({"model": hollow_tensors(VARIANTS["small"])}, path)
    assert refusal(path, VARIANTS["tiny"]) == (
        f"{path} is not a checkpoint of variant 'tiny': unknown: stages.2.layer_norms.12.norm.weight (384), "
        "stages.2.layer_norms.12.norm.bias (384), stages.2.layer_norms.13.norm.weight (384) and 207 more. "
        "It fits variant 'small'; use --variant small."
    )


def test_missing_unknown_and_misshapen_tensors_are_all_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mini.pth"
    changed = {**tensors, "temperature\n\x1b[2J": torch.zeros(()), "cls_norm.norm.bias": torch.zeros(3)}
    del changed["cls_norm.norm.weight"]
    torch.save(changed, path)
    assert refusal(path) == (
        f"{path} is not a checkpoint of variant 'mini': missing: cls_norm.norm.weight (64); "
        "unknown: temperature\\n\\x1b[2J (); cls_norm.norm.bias is 3 instead of 64. "
        "It fits none of: tiny, small, base, base-384."
    )


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "finetuned.pth"
    torch.save({"model": hollow_tensors(replace(VARIANTS["tiny"], classes=10))}, path)
    assert refusal(path, VARIANTS["tiny"]) == (
        f"{path} classifies into 10 classes and variant 'tiny' into 1000. Heads of another size are not supported."
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


# --- hostile files: refused by name, and nothing runs ---


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.reduced

    def __call__(self) -> None:
        raise AssertionError("only there so that pickle takes it for a function")


def make_canary(canary: Path) -> str:
    return f"touch {shlex.quote(str(canary))}"


def nested_pickle(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Call(os.system, make_canary(canary)), buffer)
    return buffer.getvalue()


PAYLOADS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "os_system": (lambda canary: Call(os.system, make_canary(canary)), "posix.system"),
    "eval": (lambda canary: Call(eval, f"open({str(canary)!r}, 'w').close()"), "builtins.eval"),
    "exec": (lambda canary: Call(builtins.exec, f"open({str(canary)!r}, 'w').close()"), "builtins.exec"),
    "chain": (
        lambda canary: Call(Call(getattr, Call(importlib.import_module, "os"), "system"), make_canary(canary)),
        "builtins.getattr",
    ),
    "torch_storage": (
        lambda canary: Call(torch.storage._load_from_bytes, nested_pickle(canary)),
        "torch.storage._load_from_bytes",
    ),
}
CONTAINERS: dict[str, Callable[[Any, Path], Any]] = {
    "zip": lambda content, path: torch.save(content, path),
    "zip_protocol_4": lambda content, path: torch.save(content, path, pickle_protocol=4),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "plain_pickle_2": lambda content, path: path.write_bytes(pickle.dumps(content["config"], 2)),
    "plain_pickle_5": lambda content, path: path.write_bytes(pickle.dumps(content["config"], 5)),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_is_refused_by_name_and_does_not_run(
    payload: str, container: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    build, name = PAYLOADS[payload]
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    evil = build(canary)
    CONTAINERS[container]({"model": tensors, "config": evil}, path)
    assert refusal(path) == (
        f"refused to load {path}: it asks for the Python object '{name}', which a checkpoint does not need. {ADVICE}"
    )
    assert not canary.exists()


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_torch_refuses_code_too_should_the_inspection_miss_it(
    payload: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for inspection in ("_inspect_zip", "_inspect_legacy"):
        monkeypatch.setattr(checkpoint, inspection, lambda *_: None)
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    CONTAINERS[container]({"model": {}, "config": PAYLOADS[payload][0](canary)}, path)
    assert refusal(path).startswith(f"{path} is damaged or incomplete: ")
    assert not canary.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_payloads_do_run_when_python_unpickles_them(payload: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(PAYLOADS[payload][0](canary)))  # noqa: S301  # the control of the test above
    assert canary.exists()


@pytest.mark.parametrize(
    ("pickled", "name"),
    [
        (b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.", "os.system"),  # INST, which names without GLOBAL
        (b"\x80\x02X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "os.system"),  # STACK_GLOBAL
        (b"\x80\x02X\x06\x00\x00\x00system2X\x02\x00\x00\x00os\x93.", "None.os"),  # a name that is computed
        (b"\x80\x02\x82\x05.", "copyreg extension.5"),
        (b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.", "builtins.bytearray"),  # 64 GiB
        (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.", "torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_every_way_to_name_an_object_is_seen(pickled: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({}, path)
    rewrite_zip(path, lambda member, data: (member, pickled if member.endswith("data.pkl") else data))
    assert refusal(path) == (
        f"refused to load {path}: it asks for the Python object '{name}', which a checkpoint does not need. {ADVICE}"
    )


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x020.",  # pops an empty stack
        b"\x80\x02(q\x00.",  # a mark where an object belongs
        b"\x80\x02h\x07.",  # an object that was never stored
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a string of 2 GiB in a file of 15 bytes
        b"\x80\x02N",  # no end
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a reference to something that is no storage
    ],
)
def test_a_malformed_pickle_is_refused(pickled: bytes, tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({}, path)
    rewrite_zip(path, lambda member, data: (member, pickled if member.endswith("data.pkl") else data))
    assert refusal(path) == f"{path} is damaged or incomplete: its pickle is not one that torch.save writes."


def test_another_pickle_protocol_is_refused_with_the_reason(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mini.pth"
    torch.save(tensors, path, pickle_protocol=4)
    assert refusal(path) == (
        f"{path} has pickle protocol 4; only torch.save's own, 2, can be read without running code."
    )


@pytest.fixture
def three_numbers(tmp_path: Path) -> Path:
    path = tmp_path / "evil.pth"
    torch.save({"model": {"a": torch.ones(3)}}, path)
    return path


def test_a_storage_that_claims_more_than_the_file_holds_is_refused(three_numbers: Path) -> None:
    replace_in_pickle(three_numbers, b"K\x03t", b"J\xff\xff\xff\x7ft")
    assert refusal(three_numbers) == (
        f"refused to load {three_numbers}: it claims 8589934588 bytes for storage '0', which has 12."
    )


def test_a_storage_that_the_file_lacks_is_refused(three_numbers: Path) -> None:
    old, new = (b"X" + struct.pack("<I", len(key)) + key for key in (b"0", b"../../etc/passwd"))
    replace_in_pickle(three_numbers, old, new)
    assert refusal(three_numbers) == (
        f"refused to load {three_numbers}: it claims 12 bytes for storage '../../etc/passwd', which has 0."
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"QK\x00K\x03\x85", b"QK\x00K\x63\x85"),  # 99 items of three
        (b"QK\x00K\x03\x85", b"QK\x63K\x03\x85"),  # three items from the 99th on
        (b"K\x01\x85", b"K\x63\x85"),  # every 99th
        (b"K\x01\x85", b"J\xff\xff\xff\xff\x85"),  # backwards
        (b"QK\x00K\x03\x85", b"QJ\xff\xff\xff\xffK\x03\x85"),  # from the item before the first
    ],
)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(old: bytes, new: bytes, three_numbers: Path) -> None:
    with zipfile.ZipFile(three_numbers) as archive:
        pickled = archive.read("evil/data.pkl")
    for memo in (b"q\x08", b"q\x09"):  # BINPUT between the parts that are written together here
        pickled = pickled.replace(memo, b"")
    assert pickled.count(old) == 1
    rewrite_zip(
        three_numbers, lambda name, data: (name, pickled.replace(old, new) if name.endswith("data.pkl") else data)
    )
    assert refusal(three_numbers).startswith(f"{three_numbers} is damaged or incomplete: ")


def test_a_legacy_storage_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x03Nt") == 1
    path.write_bytes(data.replace(b"K\x03Nt", b"J\xff\xff\xff\x7fNt"))
    assert refusal(path) == (
        f"refused to load {path}: it claims 8589934588 bytes of storage, and the file has {path.stat().st_size}."
    )


def test_a_legacy_tensor_that_reaches_outside_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"QK\x00K\x03\x85") == 1
    path.write_bytes(data.replace(b"QK\x00K\x03\x85", b"QK\x00K\x63\x85"))
    assert refusal(path).startswith(f"{path} is damaged or incomplete: ")


@pytest.mark.parametrize("member", ["../../evil", "/evil", "evil\\..\\evil"])
def test_an_archive_member_that_leaves_its_folder_is_refused(member: str, three_numbers: Path) -> None:
    with zipfile.ZipFile(three_numbers, "a") as archive:
        archive.writestr(member, b"x")
    shown = member.replace("\\", "\\\\")
    assert (
        refusal(three_numbers) == f"refused to load {three_numbers}: its member '{shown}' leaves the archive's folder."
    )


def test_two_archive_members_of_one_name_are_refused(three_numbers: Path) -> None:
    with (
        zipfile.ZipFile(three_numbers, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("evil/data.pkl", pickle.dumps(Call(os.system, "true"), 2))
    assert refusal(three_numbers) == f"refused to load {three_numbers}: two of its members have one name."


def test_a_compressed_archive_is_refused(three_numbers: Path) -> None:
    rewrite_zip(
        three_numbers,
        lambda name, data: (name, b"\0" * 10**7 if name.endswith("data/0") else data),
        zipfile.ZIP_DEFLATED,
    )
    assert three_numbers.stat().st_size < 20_000
    assert refusal(three_numbers) == f"refused to load {three_numbers}: it is compressed, which torch.save never does."


def test_an_archive_that_declares_more_than_it_holds_is_refused(three_numbers: Path) -> None:
    data = bytearray(three_numbers.read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # the last record of the central directory
    struct.pack_into("<II", data, entry + 20, 2**32 - 2, 2**32 - 2)
    three_numbers.write_bytes(data)
    message = refusal(three_numbers)
    assert message.startswith(f"refused to load {three_numbers}: its members declare 42949")
    assert message.endswith(f" bytes, and the file has {len(data)}.")


def test_a_pickle_too_large_for_a_checkpoint_is_refused(three_numbers: Path) -> None:
    rewrite_zip(three_numbers, lambda name, data: (name, data + bytes(2**24) if name.endswith(".pkl") else data))
    message = refusal(three_numbers)
    assert message.startswith(f"refused to load {three_numbers}: its pickle has 1677")
    assert message.endswith(" bytes, and 16777216 are the limit.")


# --- files that are no checkpoints ---


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_short_anywhere_is_refused(legacy: bool, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = save_official(tmp_path / "mini.pth", tensors, legacy=legacy)
    data = path.read_bytes()
    for share in (0.001, 0.01, 0.1, 0.5, 0.9, 0.9999):
        path.write_bytes(data[: int(share * len(data))])
        message = refusal(path)
        assert message.startswith((f"{path} is damaged or incomplete: ", f"refused to load {path}: it claims ")), share


def test_a_flipped_bit_in_the_weights_is_noticed(three_numbers: Path) -> None:
    data = bytearray(three_numbers.read_bytes())
    data[data.index(struct.pack("<fff", 1, 1, 1))] ^= 1
    three_numbers.write_bytes(data)
    assert refusal(three_numbers) == (
        f"{three_numbers} is damaged: the checksum of 'evil/data/0' is wrong. Download it again."
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.pth", b"", "{path} is empty."),
        (
            "text.pth",
            b"hello, I am a text file",
            "{path} is not a checkpoint: neither torch.save nor safetensors wrote it.",
        ),
        (
            "text2.pth",
            b"settings{a: 1, b: 2}",
            "{path} is not a checkpoint: neither torch.save nor safetensors wrote it.",
        ),
        (
            "cat.jpg",
            b"\xff\xd8\xff\xe0\0\x10JFIF",
            "{path} is not a checkpoint: neither torch.save nor safetensors wrote it.",
        ),
        ("dict.pkl", pickle.dumps({"a": 1}, 2), "{path} is a plain pickle, not a checkpoint that torch.save wrote."),
        ("page.pth", b"PK\x03\x04 and no archive", "{path} is damaged or incomplete: File is not a zip file."),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert refusal(path) == message.format(path=path)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x08", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 8) + b'{"a": 1}', struct.pack("<Q", 2) + b"{"],
)
def test_a_corrupt_safetensors_header_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    expected = f"{path} is not a readable safetensors file: " if data else f"{path} is empty."
    assert refusal(path).startswith(expected)


def test_safetensors_whose_tensor_lies_outside_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert refusal(path).startswith(f"{path} is not a readable safetensors file: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "{path} holds an object of type 'list', not a state dict."),
        (torch.ones(1), "{path} holds an object of type 'Tensor', not a state dict."),
        ({"epoch": 3}, "{path} holds no tensors, neither in itself nor under 'model' or 'state_dict'."),
        ({"model": {}}, "{path} holds no tensors, neither in itself nor under 'model' or 'state_dict'."),
        (
            {"a": torch.ones(1), "epoch": 3},
            "{path} has the entry 'epoch' of type 'int' among its tensors; a state dict has names and tensors only.",
        ),
    ],
)
def test_a_file_without_a_state_dict_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert refusal(path) == message.format(path=path)


def test_a_zip_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "archive.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/readme.txt", "hello")
    assert refusal(path) == f"{path} is a zip archive that torch.save did not write."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/constants.pkl", "")
    assert refusal(path) == f"{path} is a TorchScript program; a state dict written by torch.save is needed."


def test_paths_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is a folder; name the checkpoint file in it."
    missing = tmp_path / "missing.pth"
    assert refusal(missing) == f"cannot read {missing}: No such file or directory."
    pipe = tmp_path / "pipe.pth"
    os.mkfifo(pipe)
    assert refusal(pipe) == f"{pipe} is not a regular file."
    closed = tmp_path / "closed.pth"
    closed.write_bytes(b"x")

    def denied(*_: Any) -> Iterator[None]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root, who runs CI, is denied nothing
    assert refusal(closed) == f"cannot read {closed}: Permission denied."
