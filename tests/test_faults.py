"""Every known fault is caught, by the checks that say so: without them it slips through."""

from pathlib import Path

import onnx_ir as ir
import pytest

from dat_deploy.errors import DatDeployError, VerificationError
from dat_deploy.runners import open_runner
from dat_deploy.validate import CHECKS
from dat_deploy.validate.faults import FAULTS, faulty_report
from dat_deploy.validate.reference import Reference
from dat_deploy.validate.self_test import SelfTest, Tried, self_test

# The kinds of checks that are meant for a fault; others may catch it, too.
MEANT_FOR = {
    "x and y swapped": {"drift"},
    "align_corners flipped": {"coordinates"},
    "offsets scaled": {"drift"},
    "half-pixel shift": {"drift"},
    "locations in float16": {"precision", "drift"},
    "heads transposed": {"photographs"},
    "BGR": {"photographs"},
    "wrong mean and std": {"preprocessing"},
    "wrong resize": {"preprocessing"},
    "LayerNorm epsilon": {"photographs"},
    "stale bias table": {"photographs"},
    "truncated weights": {"photographs", "weights"},
    "weights altered": {"photographs", "weights"},
    "a weight altered": {"weights"},
    "classes reversed": {"photographs"},
    "precision not as asked": {"precision"},
    "one slot wrong": {"slots"},
    "answers moved": {"slots", "decisions"},
    "images leak": {"slots"},
    "NaN": {"stress"},
    "runs differ": {"repeats"},
}


@pytest.fixture(scope="module")
def tried(demo_onnx: Path) -> dict[str, Tried]:
    report = self_test(str(demo_onnx))
    assert report.notes == ()
    return {row.fault: row for row in report.tried}


def test_every_fault_has_its_check() -> None:
    assert list(MEANT_FOR) == [fault.name for fault in FAULTS]
    assert len(FAULTS) >= 12
    of_tolerance_and_half_precision = {"telling", "range", "rounding"}  # tests/test_tolerance.py, tests/test_ranges.py
    assert set().union(*MEANT_FOR.values()) == set(CHECKS) - {"data"} - of_tolerance_and_half_precision


@pytest.mark.parametrize("fault", [fault.name for fault in FAULTS])
def test_a_fault_is_caught_by_the_checks_that_are_meant_for_it(fault: str, tried: dict[str, Tried]) -> None:
    assert MEANT_FOR[fault] <= set(tried[fault].caught_by)


@pytest.mark.parametrize("name", ["align_corners flipped", "one slot wrong", "a weight altered"])
def test_a_fault_slips_through_without_the_checks_that_catch_it_and_not_without_all_others(
    name: str, tried: dict[str, Tried], demo_onnx: Path, demo_reference: Reference, tmp_path: Path
) -> None:
    """A check says the same whether others ran before it or not; so the kinds that caught each fault say it for all."""
    fault = next(fault for fault in FAULTS if fault.name == name)
    caught_by = tried[name].caught_by
    blind = faulty_report(fault, str(demo_onnx), tmp_path, demo_reference, skip=caught_by)
    assert blind.passed, blind.verdict
    assert blind.verdict.endswith(f"left out on request: {', '.join(k for k in CHECKS if k in caught_by)}.")
    others = [kind for kind in CHECKS if kind not in MEANT_FOR[name]]
    assert not faulty_report(fault, str(demo_onnx), tmp_path, demo_reference, skip=others).passed


def test_a_missed_fault_fails_the_self_test(tried: dict[str, Tried], demo_onnx: Path) -> None:
    rows = (tried["BGR"], Tried("painted over", "a fault that nobody thought of", (), ""))
    with open_runner(str(demo_onnx)) as runner:
        found = SelfTest(runner.description, rows)
    with pytest.raises(VerificationError) as caught:
        found.raise_if_failed()
    assert str(caught.value) == (f"validate caught 1 of 2 faults put into {demo_onnx}; it missed painted over.")


def test_an_engine_that_is_wrong_already_cannot_test_the_tester(demo_onnx: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.onnx"
    model = ir.load(demo_onnx)
    next(fault for fault in FAULTS if fault.name == "BGR").change(model)
    ir.save(model, wrong)
    with pytest.raises(VerificationError) as caught:
        self_test(str(wrong))
    assert str(caught.value).startswith(f"the self-test needs an engine that is right. {wrong} differs from pytorch:")


def test_only_an_onnx_file_can_be_given_faults() -> None:
    with pytest.raises(DatDeployError) as caught:
        self_test("pytorch:demo")
    assert str(caught.value) == "faults are put into ONNX files, and 'pytorch:demo' is none; name a FILE.onnx."
