"""networks/family.py: a family of networks is one file, here or in another package, and every command takes it."""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dat_deploy.classify import classify
from dat_deploy.errors import ExportError, ShapeError, UnsupportedError, VariantError
from dat_deploy.export import export, read_metadata
from dat_deploy.export.boundaries import block_boundaries
from dat_deploy.images.photographs import photographs
from dat_deploy.networks.dat.variants import VARIANTS, Variant
from dat_deploy.networks.family import family_of, find_network, network_names
from dat_deploy.runners import open_runner
from dat_deploy.serving.tensors import TensorSpec, output_specs
from dat_deploy.validate.faults import FAULTS
from dat_deploy.validate.self_test import self_test


def test_a_family_of_another_package_is_exported_and_opened_like_ours(toy: Any, tmp_path: Path) -> None:
    path = tmp_path / "toy.onnx"
    report = export("toy", path)
    assert (report.operators, report.outputs) == (0, ("logits",))
    metadata = read_metadata(path)
    assert (metadata.family, metadata.network) == ("toy", find_network("toy"))
    assert family_of(metadata.network) is toy
    assert output_specs(metadata, report.outputs) == (TensorSpec("logits", "FP32", (-1, 3)),)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    with open_runner(str(path)) as runner, open_runner("pytorch:toy") as reference:
        np.testing.assert_allclose(runner(images), reference(images), atol=1e-6)
        assert runner.description.weights_sha256 == reference.description.weights_sha256
    (predictions,) = classify(photographs(1), str(path)).predictions
    assert {prediction.name for prediction in predictions} == {"cat", "dog", "lizard"}
    model = onnx.load(path)
    assert model.graph.name == "toy_toy"
    assert block_boundaries({entry.key: entry.value for entry in model.metadata_props}) == {}


@pytest.mark.usefixtures("toy")
def test_what_a_family_does_not_give_is_one_sentence(tmp_path: Path) -> None:
    network = find_network("toy")
    refusals: dict[str, tuple[type[Exception], Any]] = {
        "network 'toy' is no backbone: it gives no feature maps.": (
            VariantError,
            lambda: find_network("toy", features=[1]),
        ),
        "network 'toy' takes images of 32x32 alone, not 64x32.": (
            ShapeError,
            lambda: find_network("toy", image_size=(64, 32)),
        ),
        "network 'toy' takes images of one size; export it once for each.": (
            ShapeError,
            lambda: export("toy", tmp_path / "toy.onnx", dynamic_image_size=True),
        ),
        "networks of family 'toy' have no half precision in PyTorch.": (
            UnsupportedError,
            lambda: family_of(network).rounded(torch.nn.Identity(), torch.float16),
        ),
        "'maps' is no output of toy; its outputs are logits. Export it again.": (
            ExportError,
            lambda: network.output("maps"),
        ),
    }
    for sentence, (kind, refused) in refusals.items():
        with pytest.raises(kind) as caught:
            refused()
        assert str(caught.value) == sentence


@pytest.mark.usefixtures("toy")
def test_the_self_test_leaves_out_the_faults_that_need_what_the_file_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "toy.onnx"
    export("toy", path)
    report = self_test(str(path))
    assert report.notes == (
        f"left out, for {path} has no deformable blocks: x and y swapped, align_corners flipped, offsets scaled, "
        "half-pixel shift, locations in float16, heads transposed",
        f"left out, for {path} has no bias tables: stale bias table",
        f"left out, for {path} has no LayerNormalization: LayerNorm epsilon",
        f"left out, for {path} has no half precision in PyTorch: precision not as asked",
    )
    left_out = {fault.name for fault in FAULTS if fault.needs is not None}
    assert [row.fault for row in report.tried] == [fault.name for fault in FAULTS if fault.name not in left_out]
    assert report.missed == []


@pytest.mark.usefixtures("toy")
def test_a_name_that_no_family_has_is_refused_with_those_of_all() -> None:
    with pytest.raises(VariantError) as caught:
        find_network("toi")
    assert str(caught.value) == (
        f"no variant 'toi'. Did you mean toy or tiny or pp-tiny? Variants: {', '.join(VARIANTS)}, toy."
    )


def test_blocks_of_the_first_family_name_the_outputs_that_show_them_and_what_operators_read() -> None:
    network = VARIANTS["demo"]
    family = family_of(network)
    steps = {step.outputs: step for block in family.blocks(network) for step in block.steps if step.outputs}
    assert [name for outputs in steps for name in outputs] == [
        *(name for block in network.sampled_blocks for name in (block.locations, block.attention)),
        "logits",
    ]
    for block in family.blocks(network):
        names = {step.name for step in block.steps}
        assert all(source in names for step in block.steps for _, source in step.inputs)
        assert all(bool(step.inputs) == bool(step.operator) for step in block.steps)
    backbone = network.as_backbone([1, 2])
    assert [block.name for block in family.blocks(backbone) if block.is_branch] == ["norms.1", "norms.2"]


def test_the_blocks_that_sample_say_where_they_look_as_the_module_does(mini_dat: Variant) -> None:
    for network in (VARIANTS["demo"].with_image_size(64, 96), mini_dat):
        family = family_of(network)
        model = family.module(network, family.weights(network), sampled_points=True)
        image = torch.zeros(1, 3, *network.image_size)
        outputs = network.outputs(sampled_points=True)
        with torch.inference_mode():
            results = dict(zip((output.name for output in outputs), model(image), strict=True))
            located = family.sampling_locations(model, image)
        assert [tuple(results[output.name].shape[1:]) for output in outputs] == [output.shape for output in outputs]
        assert list(located) == [block.name for block in network.sampled_blocks]
        for block in network.sampled_blocks:
            torch.testing.assert_close(located[block.name], results[block.locations], rtol=0, atol=0)


def test_a_family_that_cannot_be_loaded_is_left_out_with_a_warning(monkeypatch):
    class Entry:
        value = "broken:FAMILY"

        def load(self):
            raise ImportError("no module broken")

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry()])
    with pytest.warns(UserWarning, match="broken:FAMILY cannot be loaded: no module broken; it is left out"):
        names = network_names()
    assert names == network_names(own=True)
    assert "tiny" in names


def test_a_network_of_no_family_is_refused_in_one_sentence(toy, monkeypatch):
    network = toy.find("toy")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    with pytest.raises(VariantError, match="no family has networks of type Toy, as 'toy' is"):
        family_of(network)
