"""Tolerances are shares of what tells images apart; one that tells none apart is no pass, nor is a lost decision."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dat_deploy.errors import VerificationError
from dat_deploy.export import export
from dat_deploy.images.photographs import photographs
from dat_deploy.precision import PRECISIONS
from dat_deploy.runners import open_runner
from dat_deploy.validate import CHECKS, ValidationReport, validate
from dat_deploy.validate.faults import Misbehaving
from dat_deploy.validate.tolerance import TELLS_APART, Tolerance, spread_between, ulp

FP32 = PRECISIONS["fp32"]
ANSWERS = np.float32([[0, 0], [1, 100], [2, -100], [3, 0]])  # of four images; the second class spreads 63 times as far


def test_each_class_is_measured_by_its_own_spread() -> None:
    scale = spread_between(ANSWERS, 0, FP32, ulps=0)
    np.testing.assert_allclose(scale.scale, ANSWERS.std(axis=0), rtol=1e-6)
    assert scale.error(ANSWERS + np.float32([0.1, 0]), ANSWERS) == pytest.approx(0.1 / ANSWERS[:, 0].std(), rel=1e-5)
    assert scale.error(ANSWERS + np.float32([0, 0.1]), ANSWERS) == pytest.approx(0.1 / ANSWERS[:, 1].std(), rel=1e-4)


def test_a_scale_of_the_answers_changes_no_error() -> None:
    wrong = np.roll(ANSWERS, 1, axis=0)
    errors = [
        spread_between(factor * ANSWERS, 0, FP32, ulps=4).error(factor * wrong, factor * ANSWERS)
        for factor in np.float32([1, 300, 1e-5])
    ]
    np.testing.assert_allclose(errors, errors[0], rtol=1e-5)
    assert errors[0] > 1


@pytest.mark.parametrize(("steps", "passes"), [(4, True), (6, False)])
def test_a_class_that_is_switched_off_may_be_off_by_units_in_the_last_place(steps: int, passes: bool) -> None:
    answers = ANSWERS.copy()
    answers[:, 1] = -1e4
    other = answers.copy()
    other[:, 1] += steps * np.spacing(np.float32(1e4))
    scale = spread_between(answers, 0, FP32, ulps=4)
    assert (scale.error(other, answers) == 0) is passes


def test_a_map_has_a_scale_for_each_channel_and_points_one_for_each_axis() -> None:
    maps = (
        np.random.default_rng(0).standard_normal((5, 3, 4, 6)).astype(np.float32)
        * np.float32([1, 10, 100])[:, None, None]
    )
    assert spread_between(maps, 0, FP32, ulps=4).scale.shape == (3, 1, 1)
    points = np.moveaxis(maps[:, :2], 1, -1)
    scale = spread_between(points, 2, FP32, ulps=4).scale
    assert scale.shape == (1, 1, 2)
    assert 5 < scale[0, 0, 1] / scale[0, 0, 0] < 20


@pytest.mark.parametrize(("precision", "step"), [("fp32", 2.0**-23), ("fp16", 2.0**-10), ("bf16", 2.0**-7)])
def test_units_in_the_last_place_are_those_of_the_precision(precision: str, step: float) -> None:
    alike = np.full((3, 1), 1.5, np.float32)
    assert spread_between(alike, 0, PRECISIONS[precision], ulps=2).floor == 2 * step
    assert ulp(np.float16([1.5, 3, 0])).tolist() == [2.0**-10, 2.0**-9, 2.0**-24]


def test_no_tolerance_takes_more_than_a_third_of_the_distance_to_the_nearest_image() -> None:
    scale = spread_between(ANSWERS, 0, FP32, ulps=0)
    distances = [
        max(np.abs(a - b) / ANSWERS.std(axis=0)) for i, a in enumerate(ANSWERS) for j, b in enumerate(ANSWERS) if i != j
    ]
    cap = scale.cap(ANSWERS)
    assert cap == pytest.approx(TELLS_APART * np.median(np.min(np.reshape(distances, (4, 3)), axis=1)), rel=1e-5)
    assert scale.at(0.5 * cap, "x").capped(cap).allowed == 0.5 * cap
    lowered = scale.at(2 * cap, "x").capped(cap)
    assert (lowered.allowed, lowered.basis) == (cap, "a third of the distance between images, less than x")
    assert spread_between(np.ones((3, 2), np.float32), 0, FP32, ulps=4).cap(np.ones((3, 2), np.float32)) < 0


def test_nan_is_no_small_error() -> None:
    wrong = ANSWERS.copy()
    wrong[0, 0] = np.nan
    assert np.isnan(spread_between(ANSWERS, 0, FP32, ulps=4).error(wrong, ANSWERS))
    assert np.isnan(Tolerance.absolute(1e-4, "asked").error(wrong, ANSWERS))


# --- a network of three convolutions, with the weights changed ---


@pytest.fixture
def validated(toy: Any, tmp_path: Path) -> Callable[..., ValidationReport]:
    """`validated(change, misbehave)` is what is said of the toy with other weights, on a runtime of its own."""

    def run(
        change: Any = None, misbehave: Any = None, network: Any = None, precision: str = "fp32", **options: Any
    ) -> ValidationReport:
        network = network(toy.find("toy")) if network else toy.find("toy")
        weights = {name: weight.clone() for name, weight in toy.weights(network).state_dict.items()}
        if change is not None:
            change(weights)
        checkpoint, path = tmp_path / "toy.safetensors", tmp_path / "toy.onnx"
        save_file(weights, checkpoint)
        export(network, path, checkpoint=checkpoint, precision=precision, force=True)
        with open_runner(str(path)) as runner:
            tested = runner if misbehave is None else Misbehaving(runner, misbehave)
            return validate(tested, checkpoint=checkpoint, batches=[3], **options)

    return run


def moved(_: Any, right: dict[str, Any]) -> dict[str, Any]:
    return {name: np.roll(values, 1, axis=0) for name, values in right.items()}


def failed(report: ValidationReport) -> set[str]:
    return {check.name for check in report.checks if check.passed is False}


def test_a_network_of_few_layers_passes_and_one_whose_answers_are_moved_does_not(validated: Any) -> None:
    assert validated().passed
    assert {"photographs", "slots: own image nearest"} <= failed(validated(misbehave=moved))


def test_constant_answers_tell_no_images_apart_and_are_no_pass(validated: Any) -> None:
    def constant(weights: dict[str, torch.Tensor]) -> None:
        weights["8.weight"].zero_()

    report = validated(constant)
    assert failed(report) == {"images told apart"}
    row = next(check for check in report.checks if check.kind == "telling")
    assert row.detail == (
        "a tolerance that cannot tell images apart is none: toy answers these images alike, or they are alike"
    )
    assert validated(
        lambda weights: weights["8.weight"].zero_(), skip=["telling"]
    ).passed  # nothing else would have said it


def test_a_tolerance_asked_for_that_tells_no_images_apart_is_no_pass(validated: Any) -> None:
    report = validated(misbehave=moved, tolerance=100.0, skip=["slots"])
    assert failed(report) - {"top-1 kept"} == {"images told apart"}
    row = next(check for check in report.checks if check.kind == "telling")
    assert row.detail.endswith("ask for a smaller `tolerance`")
    assert validated(tolerance=1e-5).passed


def test_answers_are_recognized_whatever_tolerance_is_asked_for(validated: Any) -> None:
    report = validated(misbehave=moved, tolerance=100.0, skip=["telling", "decisions"])
    assert failed(report) == {"slots: own image nearest"}
    assert validated(misbehave=moved, tolerance=100.0, skip=["telling", "decisions", "slots"]).passed


def test_one_photograph_is_told_from_other_images_and_images_that_are_alike_are_no_fault(validated: Any) -> None:
    one, *others = map(Path, photographs(4))
    assert "slots: own image nearest" in failed(validated(misbehave=moved, images=[one]))
    assert validated(images=[one]).passed
    assert validated(images=[one, *others, one, *others]).passed


def test_a_family_without_half_precision_in_pytorch_is_held_to_what_tells_images_apart(validated: Any) -> None:
    report = validated(precision="fp16", tolerance=1e-3)
    assert report.passed, report.verdict
    row = next(check for check in report.checks if check.name == "eager PyTorch in fp16")
    assert (row.passed, row.detail) == (None, "networks of family 'toy' have no half precision in PyTorch")
    assert validated(precision="fp16").passed
    assert not validated(misbehave=moved, precision="fp16").passed


def test_a_decision_that_pytorch_is_sure_of_may_not_be_lost_at_any_tolerance(validated: Any) -> None:
    def apart(weights: dict[str, torch.Tensor]) -> None:
        weights["8.bias"] += torch.tensor([0.0, 0.0, 10.0])

    def second(_: Any, right: dict[str, Any]) -> dict[str, Any]:
        return {name: values[:, [0, 2, 1]] for name, values in right.items()}

    report = validated(apart, second, tolerance=100.0, skip=["telling", "slots"])
    assert failed(report) == {"top-1 kept"}
    row = next(check for check in report.checks if check.name == "top-1 kept")
    assert (row.error, row.detail) == (8.0, "PyTorch is sure of the first class of 8 of 8 photographs")
    assert validated(apart, second, tolerance=100.0, skip=["telling", "slots", "decisions"]).passed


def test_one_class_is_no_decision_and_a_verdict_all_the_same(validated: Any) -> None:
    report = validated(network=lambda toy: replace(toy, classes=("thing",)))
    assert report.passed
    assert not [check for check in report.checks if check.kind == "decisions"]
    assert "photographs" in failed(validated(network=lambda toy: replace(toy, classes=("thing",)), misbehave=moved))


def test_nan_in_the_reference_is_said_of_the_reference(validated: Any) -> None:
    with pytest.raises(VerificationError) as caught:
        validated(lambda weights: weights["0.bias"].fill_(torch.nan))
    assert str(caught.value) == (
        "pytorch:toy itself gives NaN or infinity as logits of photograph 1, so no engine can be judged by it. "
        "Check the checkpoint."
    )


def test_every_row_with_a_derived_tolerance_says_from_what(validated: Any) -> None:
    report = validated()
    assert {check.basis for check in report.checks if check.unit == "spread"} == {
        "0.0001 of the spread between images",
        "1e-05 of the spread between images",
    }
    assert set(CHECKS) >= {"telling", "decisions", "weights", "range", "rounding"}
