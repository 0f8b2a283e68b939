"""The networks against the official implementation's numbers."""

import functools
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dat_deploy.errors import ShapeError, VariantError
from dat_deploy.networks.dat.checkpoint import load_model, load_weights, model_from_weights
from dat_deploy.networks.dat.model import DAT, REFERENCE, SampledPoints, reference_points
from dat_deploy.networks.dat.variants import RELEASED, VARIANTS, get_variant
from dat_deploy.plugins.deformable_attention.reference import interpolated_bias

GOLDEN = Path(__file__).parent / "golden"


class Golden(NamedTuple):
    expected: dict[str, np.ndarray]
    logits: torch.Tensor
    stages: list[torch.Tensor]
    sampled: dict[str, SampledPoints]


@pytest.fixture(scope="module", params=["tiny", "pp-tiny"])
def golden(request, golden_checkpoints: dict[str, Path], deterministic_weights: ModuleType) -> Golden:
    """What the official implementation gives, and what ours does for the same weights and images."""
    model = load_model(request.param, golden_checkpoints[request.param])
    images = deterministic_weights.images((224, 224))
    with torch.inference_mode():
        return Golden(dict(np.load(GOLDEN / f"{request.param}.npz")), model(images), *model.forward_features(images))


def test_logits_agree_with_the_official_implementation(golden):
    np.testing.assert_allclose(golden.logits.numpy(), golden.expected["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", range(4))
def test_stage_agrees_with_the_official_implementation(golden, stage):
    channels_first = golden.stages[stage].permute(0, 3, 1, 2)[:, :4].numpy()
    expected = golden.expected[f"stage{stage}"]
    scale = max(1.0, np.abs(expected).max())  # stage 2 of pp-tiny reaches 540
    np.testing.assert_allclose(channels_first, expected, rtol=0, atol=2e-5 * scale)


def test_sampling_locations_agree_with_the_official_implementation(golden):
    expected = {name: value for name, value in golden.expected.items() if name.startswith("sampling_locations")}
    assert len(expected) == len(golden.sampled)
    for name, value in expected.items():
        _, stage, block = name.split(".")
        locations = golden.sampled[f"stages.{stage}.attns.{block}"].locations
        np.testing.assert_allclose(locations.numpy(), value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", ["tiny", "pp-tiny"])
def test_fused_operators_give_the_same_logits_as_the_reference(variant, golden_checkpoints, deterministic_weights):
    images = deterministic_weights.images((224, 224))
    with torch.inference_mode():
        reference = load_model(variant, golden_checkpoints[variant])(images)
        fused = load_model(variant, golden_checkpoints[variant], fused=True)(images)
    torch.testing.assert_close(fused, reference, rtol=0, atol=2e-5)


def test_attention_received_is_the_mean_of_the_probabilities(pp_tiny_model):
    """The operator returns no probabilities; the network gets them out of it by its values."""
    block = pp_tiny_model.stages[3].attns[0]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 4, 512, generator=generator)
    key = torch.randn(2, 45, 512, generator=generator)  # more keys than a head has channels
    locations = torch.rand(2, 8, 9, 5, 2, generator=generator) * 2 - 1
    received = block.attention_received(query, key, locations)
    bias = interpolated_bias(block.relative_position_bias_table, locations, 3, 4, half_pixel=False)
    q, k = (x.reshape(2, -1, 16, 32).transpose(1, 2) for x in (query, key))
    probabilities = (q @ k.mT / 32**0.5 + bias).softmax(dim=-1).mean(dim=2)  # B, M, Ns
    expected = probabilities.reshape(2, 8, 2, 9, 5).mean(dim=2)
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-6)


def test_sampled_points_change_no_logits_and_come_in_the_order_of_their_names():
    variant = get_variant("pp-tiny")
    weights = load_weights(variant)
    model = model_from_weights(weights, variant, sampled_points=True)
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        results = dict(zip(model.variant.output_names(sampled_points=True), model(image), strict=True))
        torch.testing.assert_close(results["logits"], model_from_weights(weights, variant)(image), rtol=0, atol=0)
        _, sampled = model.forward_features(image)
    assert len(results) == 1 + 2 * 14
    for name, points in sampled.items():
        _, stage, _, block = name.split(".")
        assert torch.equal(results[f"sampling_locations_{stage}_{block}"], points.locations)
        assert torch.equal(results[f"attention_{stage}_{block}"], points.attention)


def test_backbone_gives_the_normalised_maps_of_the_stages_asked_for(pp_tiny_model):
    image = torch.randn(1, 3, 64, 96)
    backbone = load_model("pp-tiny", features=(1, 3))
    with torch.inference_mode():
        maps = backbone(image)
        outputs, _ = pp_tiny_model.forward_features(image)
    assert [tuple(m.shape) for m in maps] == [(1, 128, 8, 12), (1, 512, 2, 3)]
    for feature_map, stage in zip(maps, (1, 3), strict=True):
        norm = backbone.norms[str(stage)]
        torch.testing.assert_close(feature_map, norm(outputs[stage]).permute(0, 3, 1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("features", [(), (1, 0), (0, 0), (4,), (-1,)])
def test_features_that_are_no_stages_are_refused(features):
    with pytest.raises(VariantError) as error:
        get_variant("pp-tiny").as_backbone(features)
    assert str(error.value) == (
        f"features {','.join(map(str, features))} are not stages of 'pp-tiny'; "
        f"they are some of 0,1,2,3, in this order, each once."
    )


@functools.cache
def hollow(name: str) -> DAT:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return DAT(VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_table_counts_the_parameters_of_the_network(name):
    assert sum(parameter.numel() for parameter in hollow(name).parameters()) == VARIANTS[name].parameters


def two_products_a_neighborhood(
    qkv: torch.Tensor, _padding: torch.Tensor, _table: torch.Tensor, num_heads: int, kernel_size: int, _dilation: int
) -> torch.Tensor:
    """The multiply-adds of neighborhood attention; the reference makes more products than it uses."""
    batch, height, width, channels3 = qkv.shape
    head_dim = channels3 // 3 // num_heads
    q = qkv.new_empty(batch * height * width * num_heads, 1, head_dim)
    k = qkv.new_empty(batch * height * width * num_heads, head_dim, kernel_size**2)
    return (q @ k @ k.mT).reshape(batch, height, width, channels3 // 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_table_counts_the_multiply_adds_of_the_network(name, monkeypatch):
    height, width = VARIANTS[name].image_size
    operators = SimpleNamespace(**vars(REFERENCE) | {"neighborhood_attention": two_products_a_neighborhood})
    monkeypatch.setattr("dat_deploy.networks.dat.model.REFERENCE", operators)
    with torch.device("meta"):
        model = DAT(VARIANTS[name])
        image = torch.zeros(1, 3, height, width)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(VARIANTS[name].gmacs, abs=1e-3)


def test_every_head_of_a_released_network_has_32_channels():
    assert {stage.head_dim for name in RELEASED for stage in VARIANTS[name].stages} == {32}


def test_reference_points_of_dat_are_the_centres_of_the_sampled_grid():
    assert reference_points(2, 4, half_pixel=True).tolist() == [
        [[-0.5, -0.75], [-0.5, -0.25], [-0.5, 0.25], [-0.5, 0.75]],
        [[0.5, -0.75], [0.5, -0.25], [0.5, 0.25], [0.5, 0.75]],
    ]


def test_reference_points_of_dat_pp_run_past_the_border():
    assert reference_points(2, 3, half_pixel=False).tolist() == [
        [[0.0, -0.5], [0.0, 0.5], [0.0, 1.5]],
        [[2.0, -0.5], [2.0, 0.5], [2.0, 1.5]],
    ]


@pytest.mark.parametrize("name", ["plus", "pp-tiny"])
@pytest.mark.parametrize("size", [(64, 64), (224, 224), (96, 352), (800, 1344)])
def test_points_sampled_are_as_many_as_the_configuration_says(name, size):
    with torch.device("meta"):
        _, sampled = hollow(name).forward_features(torch.zeros(1, 3, *size))
    variant = get_variant(name).with_image_size(*size)
    for block, points in sampled.items():
        stage = int(block.split(".")[1])
        assert tuple(points.locations.shape[2:4]) == variant.stages[stage].sampled_map(*variant.feature_map(stage))


@pytest.mark.parametrize("size", [(32, 64), (100, 224), (0, 224)])
def test_size_that_dat_pp_does_not_take_names_the_nearest_that_work(size):
    nearest = {(32, 64): "64x64", (100, 224): "96x224 or 128x224", (0, 224): "64x224"}[size]
    with pytest.raises(ShapeError) as error:
        get_variant("pp-tiny").with_image_size(*size)
    assert str(error.value) == (
        f"image size {size[0]}x{size[1]} does not fit variant 'pp-tiny': its sides are multiples of 32 px, from 64 px "
        f"on. Nearest that work: {nearest}."
    )


def test_image_size_may_be_changed_again_without_a_trace():
    variant = get_variant("tiny")
    for size in ((224, 448), (448, 448), (672, 224), (224, 224)):
        assert variant.with_image_size(448, 224).with_image_size(*size) == variant.with_image_size(*size)


def test_backbone_of_one_stage_gives_a_tuple_too():
    with torch.device("meta"):
        maps = DAT(get_variant("pp-tiny").as_backbone((3,)))(torch.zeros(2, 3, 64, 64))
    assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 512, 2, 2)]


IMPOSSIBLE = {
    "no blocks": {"blocks": ""},
    "letters": {"blocks": "NX"},
    "endless": {"blocks": "N" * 2000},
    "heads": {"heads": 3},
    "no groups": {"blocks": "D", "offset_groups": 0},
    "groups": {"blocks": "D", "offset_groups": 3},
    "no offset kernel": {"blocks": "D", "offset_kernel_size": 0},
    "no stride": {"offset_stride": 0},
    "no window": {"blocks": "LS"},
    "no neighborhood": {"neighborhood_size": 0},
    "even neighborhood": {"neighborhood_size": 6},
    "size": {"channels": 2**20},
}


@pytest.mark.parametrize("change", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_stage_is_refused(change):
    with pytest.raises(VariantError, match="a stage cannot be StageConfig"):
        replace(get_variant("pp-tiny").stages[0], **change)


@pytest.mark.parametrize(
    "change",
    [{"family": "ViT"}, {"stages": ()}, {"features": (7,)}, {"features": (1, 0)}, {"image_size": (0, 224)}],
    ids=str,
)
def test_impossible_network_is_refused(change):
    with pytest.raises(VariantError, match="a network cannot be Variant"):
        replace(get_variant("pp-tiny"), **change)


def test_dat_pp_reads_tables_of_one_size_at_any_image_size_and_dat_does_not():
    pp, dat = get_variant("pp-base-384"), get_variant("tiny")
    assert [pp.bias_table(stage) for stage in range(4)] == [(111, 111), (55, 55), (27, 27), (13, 13)]
    assert pp.with_image_size(64, 96).bias_table(0) == (111, 111)
    assert dat.with_image_size(224, 448).bias_table(3) == (13, 27)


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
        f"no variant 'bse'. Did you mean base or pp-base or base-384? Variants: {', '.join(VARIANTS)}."
    )
