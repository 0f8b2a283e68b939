"""Gates have a default for each precision, can be set, and let a single image never fail."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dat_deploy.errors import DatDeployError
from dat_deploy.images.data_set import DataSet
from dat_deploy.validate import Check, ValidationReport
from dat_deploy.validate.accuracy import Accuracy, Flip, Share, Side, accuracy_rows
from dat_deploy.validate.gates import Gates, default_gates
from dat_deploy.validate.tolerance import Tolerance

TOLERANCE = Tolerance.absolute(1e-4, "a test")


def share(count: int, images: int) -> Share:
    return Share.of(np.arange(images) < count)


def accuracy(images: int, engine: int, reference: int, flips: int = 0, **changes: object) -> Accuracy:
    flip = Flip(Path("x.png"), "a", "a", "b", 0.5, 0.25)
    found = Accuracy(
        data=DataSet(Path("data"), (), None),
        images=images,
        engine=Side(share(engine, images), share(images, images)),
        reference=Side(share(reference, images), share(images, images)),
        only_engine=0,
        only_reference=reference - engine,
        mcnemar_p=1.0,
        agreement=share(images - flips, images),
        flips=(flip,) * flips,
        scaled_error=0.0,
        largest_error=0.0,
        mean_error=0.0,
        p999_error=0.0,
        least_cosine=1.0,
        not_finite=0,
        unreadable=(),
        seconds={},
    )
    return replace(found, **changes)


def verdicts(found: Accuracy, gates: Gates) -> dict[str, bool | None]:
    return {row.name: row.passed for row in accuracy_rows(found, gates, TOLERANCE)}


@pytest.mark.parametrize(
    ("images", "lost", "passes"),
    [(10_000, 10, True), (10_000, 11, False), (100, 1, True), (100, 2, False), (1, 1, True)],
)
def test_top1_may_fall_by_a_tenth_of_a_point_or_one_image(images: int, lost: int, passes: bool) -> None:
    reference = images - images // 10
    found = accuracy(images, reference - lost, reference)
    assert verdicts(found, default_gates("fp16"))["top-1 lost"] is passes


def test_a_gate_that_was_set_holds_for_a_single_image() -> None:
    found = accuracy(100, 89, 90, flips=1)
    assert verdicts(found, default_gates("fp16", {"top1-drop": 0.0}))["top-1 lost"] is False
    assert verdicts(found, default_gates("fp16", {"disagreement": 0.5}))["images that flip"] is False
    assert verdicts(found, default_gates("fp16"))["images that flip"] is True


def test_an_engine_that_is_better_loses_nothing() -> None:
    rows = accuracy_rows(accuracy(1000, 950, 900), default_gates("fp16"), TOLERANCE)
    assert next(row.error for row in rows if row.name == "top-1 lost") == 0


@pytest.mark.parametrize(
    ("precision", "flips", "passes"),
    [("fp32", 10, True), ("fp32", 11, False), ("fp16", 100, True), ("fp16", 101, False), ("int8", 500, True)],
)
def test_flips_are_held_to_the_precision(precision: str, flips: int, passes: bool) -> None:
    found = accuracy(10_000, 9_000, 9_000, flips)
    assert verdicts(found, default_gates(precision))["images that flip"] is passes


def test_nan_fails_every_row_that_it_reaches() -> None:
    nan = float("nan")
    found = accuracy(10_000, 9_999, 10_000, 1, scaled_error=nan, largest_error=nan, least_cosine=nan, not_finite=1)
    failed = {name for name, passed in verdicts(found, default_gates("fp32")).items() if passed is False}
    assert failed == {"logits on data", "cosine on data"}


def test_unreadable_images_are_held_to_their_gate() -> None:
    found = accuracy(98, 98, 98, unreadable=((Path("a.png"), "torn"), (Path("b.png"), "torn")))
    row = next(row for row in accuracy_rows(found, default_gates("fp32"), TOLERANCE) if row.name == "unreadable images")
    assert (row.error, row.passed) == (2.0, False)
    assert row.detail == "2 of 100 left out: a.png, b.png"
    assert verdicts(found, default_gates("fp32", {"unreadable": 2}))["unreadable images"] is True


def test_a_gate_can_be_set_by_name() -> None:
    gates = default_gates("fp16", {"top1-drop": 0.5, "drift_px": 2})
    assert (gates.top1_drop, gates.drift_px, gates.disagreement) == (0.5, 2, 1.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"accuracy": 1.0},
            "there is no gate 'accuracy'; gates are top1-drop, top5-drop, disagreement, cosine-distance, unreadable, "
            "batch-spread, repeats, drift-px.",
        ),
        ({"repeats": -1.0}, "gate 'repeats' got -1.0; it takes the largest value that passes, from 0 on."),
        ({"repeats": float("nan")}, "gate 'repeats' got nan; it takes the largest value that passes, from 0 on."),
    ],
    ids=["unknown", "negative", "nan"],
)
def test_a_gate_that_is_none_is_one_sentence(changes: dict[str, float], sentence: str) -> None:
    with pytest.raises(DatDeployError) as caught:
        default_gates("fp32", changes)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("error", "tolerance", "passed"),
    [(0.0, 0.0, True), (1e-9, 0.0, False), (1.0, 1.0, True), (float("nan"), 1.0, False), (None, 1.0, None)],
)
def test_a_check_passes_up_to_what_is_allowed(error: float | None, tolerance: float, passed: bool | None) -> None:
    assert Check("repeats", "repeats", None, error, tolerance, "").passed is passed


def test_a_report_in_which_nothing_ran_has_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ValidationReport.passed.fget(replace_checks(()))
    assert not ValidationReport.passed.fget(replace_checks((Check("data", "top-1", None, None, 1.0, ""),)))


def replace_checks(checks: tuple[Check, ...]) -> ValidationReport:
    report = object.__new__(ValidationReport)
    object.__setattr__(report, "checks", checks)
    return report
