"""The networks against the official implementation's numbers."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dat_deploy.checkpoint import load_model
from dat_deploy.errors import ShapeError, VariantError
from dat_deploy.model import DAT, reference_points
from dat_deploy.variants import VARIANTS, get_variant

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "tiny.npz"))


@pytest.fixture(scope="module")
def golden_outputs(
    golden_checkpoint: Path, deterministic_weights: ModuleType
) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
    model = load_model("tiny", golden_checkpoint)
    images = deterministic_weights.images((224, 224))
    with torch.inference_mode():
        return model(images), *model.forward_features(images)


def test_tiny_logits_agree_with_the_official_implementation(golden, golden_outputs):
    np.testing.assert_allclose(golden_outputs[0].numpy(), golden["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", range(4))
def test_tiny_stage_agrees_with_the_official_implementation(golden, golden_outputs, stage):
    channels_first = golden_outputs[1][stage].permute(0, 3, 1, 2)[:, :4].numpy()
    np.testing.assert_allclose(channels_first, golden[f"stage{stage}"], rtol=0, atol=2e-5)


def test_tiny_sampling_locations_agree_with_the_official_implementation(golden, golden_outputs):
    expected = {name: value for name, value in golden.items() if name.startswith("sampling_locations")}
    locations = golden_outputs[2]
    assert len(expected) == len(locations) == 4
    for name, value in expected.items():
        _, stage, block = name.split(".")
        np.testing.assert_allclose(locations[f"stages.{stage}.attns.{block}"].numpy(), value, rtol=0, atol=2e-6)


def test_fused_operators_give_the_same_logits_as_the_reference(golden_checkpoint, golden):
    fused = load_model("tiny", golden_checkpoint, fused=True)
    images = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode():
        np.testing.assert_allclose(fused(images).numpy(), golden["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_table_counts_the_parameters_of_the_network(name):
    with torch.device("meta"):
        model = DAT(VARIANTS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == VARIANTS[name].parameters


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_table_counts_the_multiply_adds_of_the_network(name):
    height, width = VARIANTS[name].image_size
    with torch.device("meta"):
        model = DAT(VARIANTS[name])
        image = torch.zeros(1, 3, height, width)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(VARIANTS[name].gmacs, abs=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_has_the_official_configuration(name):
    manifest = json.loads((GOLDEN / "manifests" / f"{name}.json").read_text())
    config, variant = manifest["config"], VARIANTS[name]
    assert variant.image_size == (config["img_size"], config["img_size"])
    assert [stage.channels for stage in variant.stages] == config["dims"]
    assert [list(stage.blocks) for stage in variant.stages] == config["stage_spec"]
    assert [stage.heads for stage in variant.stages] == config["heads"]
    assert [stage.window_size for stage in variant.stages] == config["window_sizes"]
    assert [stage.offset_groups or -1 for stage in variant.stages] == config["groups"]
    assert [stage.offset_range_factor or -1 for stage in variant.stages] == config["offset_range_factor"]
    assert {stage.head_dim for stage in variant.stages} == {32}


def test_reference_points_are_the_centres_of_the_pixels():
    assert reference_points(2, 4).tolist() == [
        [[-0.5, -0.75], [-0.5, -0.25], [-0.5, 0.25], [-0.5, 0.75]],
        [[0.5, -0.75], [0.5, -0.25], [0.5, 0.25], [0.5, 0.75]],
    ]


@pytest.mark.parametrize(
    ("size", "nearest"), [((230, 230), "224x224 or 448x448"), ((1, 700), "224x672 or 224x896"), ((448, 100), "448x224")]
)
def test_size_that_the_windows_do_not_tile_names_the_nearest_that_work(size, nearest):
    with pytest.raises(ShapeError) as error:
        get_variant("tiny").with_image_size(*size)
    assert str(error.value) == (
        f"image size {size[0]}x{size[1]} does not fit variant 'tiny': its windows tile only sides that are multiples "
        f"of 224 px. Nearest that work: {nearest}."
    )


def test_rectangular_size_gives_rectangular_feature_maps():
    variant = get_variant("tiny").with_image_size(224, 448)
    assert [variant.feature_map(stage) for stage in range(4)] == [(56, 112), (28, 56), (14, 28), (7, 14)]


def test_unknown_variant_lists_near_matches():
    with pytest.raises(VariantError) as error:
        get_variant("bse")
    assert str(error.value) == (
        "no variant 'bse'. Did you mean base or base-384? Variants: tiny, small, base, base-384."
    )
