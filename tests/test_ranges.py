"""Half precision is judged by what the type holds: ranges, ONNX's own rules, eager PyTorch's overflow as a finding."""

import ast
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

from dat_deploy.errors import VerificationError
from dat_deploy.export import export
from dat_deploy.export.precision import MOVES
from dat_deploy.precision import PRECISIONS
from dat_deploy.runners import open_runner
from dat_deploy.validate import CHECKS, ValidationReport, validate
from dat_deploy.validate.bisect import bisect
from dat_deploy.validate.ranges import half_ranges
from dat_deploy.validate.scaled import SCALED

MLP = "stages.3.mlps.0"
HALF = ("range", "rounding")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """`changed(name, change, fp32=...)`: demo with other weights in float16, and its checkpoint; made once."""
    folder = tmp_path_factory.mktemp("ranges")

    def make(name: str, change: Callable[[Any], None], **options: Any) -> tuple[Path, Path]:
        path, checkpoint = folder / f"{name}.onnx", folder / f"{name.partition('.')[0]}.safetensors"
        if not path.exists():
            weights = load_file(str(resources.files("dat_deploy") / "data/demo.safetensors"))
            change(weights)
            save_file(weights, checkpoint)
            export("demo", path, checkpoint=checkpoint, precision="fp16", **options)
        return path, checkpoint

    return make


def report_of(file: tuple[Path, Path], *kinds: str) -> ValidationReport:
    skip = [kind for kind in CHECKS if kind not in kinds]
    return validate(str(file[0]), checkpoint=file[1], batches=[3], skip=skip)


def rows(report: ValidationReport) -> dict[str, Any]:
    return {check.name: check for check in report.checks}


def overflow(weights: Any) -> None:
    """One hidden channel at 7.5e4, which float16 does not reach."""
    weights[f"{MLP}.linear1.0.bias"][5] = 4e4
    weights[f"{MLP}.dwc.weight"][5] = 0
    weights[f"{MLP}.dwc.bias"][5] = 3.5e4
    weights[f"{MLP}.linear2.0.weight"][:, 5] *= 1e-3


def flush(weights: Any) -> None:
    for name in ("weight", "bias"):
        weights[f"stages.3.layer_norms.1.norm.{name}"] *= 1e-9


@pytest.fixture(scope="module")
def overflowing(changed: Any) -> tuple[tuple[Path, Path], ValidationReport]:
    file = changed("overflow", overflow)
    return file, report_of(file, *HALF)


def test_a_tensor_that_the_type_does_not_reach_is_named_with_what_helps(overflowing: Any, changed: Any) -> None:
    row = rows(overflowing[1])["range in fp16"]
    assert row.passed is False
    assert row.error == pytest.approx(100 * 7.5e4 / 65504, rel=0.01)
    assert row.detail.startswith(f"{MLP}")
    kept = ast.literal_eval(re.search(r"fp32=(\[.*?\])", row.detail)[1])
    mended = report_of(changed("overflow.mended", overflow, fp32=kept), *CHECKS)
    assert mended.passed, mended.verdict


def test_an_overflow_of_eager_pytorch_is_a_finding_that_says_where_it_begins(overflowing: Any) -> None:
    file, report = overflowing
    row = rows(report)["eager PyTorch in fp16"]
    assert (row.passed, row.error) == (False, 12.0)
    assert re.match(rf"overflows first in {MLP}[^;]*; keep it in float32, `export\(fp32=\['{MLP}", row.detail)
    with pytest.raises(VerificationError) as caught:
        bisect(str(file[0]), checkpoint=file[1])
    assert str(caught.value).startswith(f"eager PyTorch in fp16 overflows first in {MLP}")


def test_the_file_overflows_by_the_rules_of_onnx_though_onnx_runtime_gives_numbers(overflowing: Any) -> None:
    file, report = overflowing
    assert rows(report)["rounded in fp16"].passed is False
    assert np.isnan(rows(report)["rounded in fp16"].error)
    for kinds in (("range",), ("rounding",)):  # either alone is enough, and without both nothing says it
        assert not report_of(file, *kinds).passed
    outside = [kind for kind in CHECKS if kind not in HALF]
    assert report_of(file, *outside).passed


def test_what_is_rounded_to_zero_is_named(changed: Any) -> None:
    row = rows(report_of(changed("flush", flush), "range"))["flushed in fp16"]
    assert (row.passed, round(row.error)) == (False, 100)
    assert "stages.3.layer_norms.1" in row.detail or MLP in row.detail


@pytest.mark.parametrize(("name", "largest"), [("an activation of 4.2e4", 4e4), ("queries and keys × 100", 1e4)])
def test_no_chain_of_an_exported_file_overflows_where_its_result_is_representable(
    name: str, largest: float, changed: Any
) -> None:
    """Twice 4.2e4, and query times key (8 times the 1e4), are past 65504; what follows from them is not."""
    file = changed(re.sub(r"\W", "-", name), SCALED[name])
    row = rows(report_of(file, "range"))["range in fp16"]
    assert row.passed, row.detail
    path = file[0]
    with open_runner(str(path)) as runner:
        images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
        ranges = half_ranges(runner, ir.load(path), PRECISIONS["fp16"], images)
    assert max(each.largest for each in ranges) > largest


def _maker(value: ir.Value | None) -> str:
    """The node that made the numbers, behind those that only move them."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in MOVES:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return "" if node is None else str(node.name)


def test_no_step_of_an_activation_is_larger_than_what_goes_in_and_comes_out(changed: Any) -> None:
    """A walk over the graph: what the whole of a chain does not overflow, none of its steps may."""
    path, _ = changed("as-trained", SCALED["as trained"])
    model = ir.load(path)
    with open_runner(str(path)) as runner:
        images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
        largest = {each.node: each.largest for each in half_ranges(runner, model, PRECISIONS["fp16"], images)}
    chains: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.name in largest and str(node.name).partition("/")[0].endswith(".act"):
            chains.setdefault(str(node.name).partition("/")[0], []).append(node)
    assert len(chains) >= 9  # the stem's, and one a block
    for chain in chains.values():
        names = [str(node.name) for node in chain]
        comes_in = max(
            largest[maker]
            for node in chain
            for value in node.inputs
            if (maker := _maker(value)) in largest and maker not in names
        )
        for name in names:  # 1 + erf is at most 2
            assert largest[name] <= max(1.001 * comes_in, largest[names[-1]], 2.0), name


def test_who_computes_in_float32_does_not_vouch_for_half_precision(changed: Any) -> None:
    report = report_of(changed("as-trained", SCALED["as trained"]), "photographs")
    assert report.engine.judged_in == "fp32"
    assert "; judged in fp32, as onnxruntime computes what the file has in fp16" in report.verdict
    assert '"judged_in": "fp32"' in report.to_json()
