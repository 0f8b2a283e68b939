"""validate passes what is right and fails what is wrong, at the check that is meant for the fault."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import dat_deploy.validate as library
from dat_deploy.errors import DatDeployError, UnsupportedError, VerificationError
from dat_deploy.export import export
from dat_deploy.images.photographs import photographs
from dat_deploy.networks.dat.variants import Variant
from dat_deploy.runners import Runner, open_runner
from dat_deploy.validate import FP32_TOLERANCE, validate
from dat_deploy.validate.checks import CHECKS, CheckKind
from dat_deploy.validate.reference import Reference, open_reference

INSIDE = ("coordinates", "drift")  # checks that cut a file into parts, of which OpenVINO compiles each


def failed(report: library.ValidationReport) -> set[str]:
    return {check.name for check in report.checks if check.passed is False}


@pytest.fixture(scope="module")
def report(tiny_onnx: dict[str, Path]) -> library.ValidationReport:
    """Of a released network in its full size."""
    return validate(str(tiny_onnx["function"]), batches=(1, 3))


def test_right_file_passes_every_check(report):
    assert report.passed
    assert [(check.name, check.batch) for check in report.checks] == [
        ("preprocessing", None),
        *((("photographs", batch)) for batch in (1, 3)),
        ("images told apart", None),
        *((f"top-{first} kept", None) for first in (1, 5)),
        *((f"stress image: {name}", 1) for name in ("zero", "bright", "checkerboard", "noise")),
        *((name, 3) for name in ("slots: one image in all", "slots: images permuted")),
        ("slots: own image nearest", None),
        ("batch invariance", None),
        ("repeated runs", 3),
        ("precision of the file", None),
        ("weights of the file", None),
        *((f"coordinates: {kind}", None) for kind in ("pixels", "half pixels", "border", "outside")),
        ("drift of sampling locations", None),
    ]
    told_apart = next(check for check in report.checks if check.kind == "telling")
    assert told_apart.error < 0.1  # %
    assert all(check.error is not None and check.error < 3e-5 for check in report.checks if check != told_apart)


def test_report_is_json_that_says_the_verdict(report):
    content = json.loads(report.to_json())
    assert content["passed"] is True
    assert content["verdict"] == report.verdict
    assert content["engine"]["weights_sha256"] == content["reference"]["weights_sha256"]
    assert [row["passed"] for row in content["checks"]] == [True] * len(report.checks)


def tampered(source: Path, target: Path, change: str) -> str:
    """A copy of a file with one fault in the deformable path of stages.2.attns.1."""
    model = onnx.load(source)
    block = "stages.2.attns.1"
    if change == "x and y swapped":  # the two outputs of the Split that takes locations apart change places
        (node,) = (n for n in model.graph.node if n.name == f"{block}/deformable_sample/Split")
        first, second = node.output
        node.output[0], node.output[1] = second, first
    else:
        (node,) = (n for n in model.graph.node if n.name == f"{block}.proj_out/MatMul")
        (weight,) = (t for t in model.graph.initializer if t.name == node.input[1])
        values = numpy_helper.to_array(weight).copy()
        values[0, 0] = np.nan if change == "NaN" else values[0, 0] + 3
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, target)
    return str(target)


@pytest.mark.parametrize(
    ("lowering", "change"),
    [
        ("hat", "x and y swapped"),
        ("function", "one weight off"),
        *((lowering, "NaN") for lowering in ("function", "gather", "gridsample", "hat")),
    ],
)
def test_fault_in_the_file_is_caught(lowering, change, demo_lowerings, demo_reference, tmp_path):
    engine = tampered(demo_lowerings[lowering], tmp_path / "wrong.onnx", change)
    report = validate(engine, images=photographs(2), batches=[1], reference=demo_reference)
    assert not report.passed
    assert "photographs" in failed(report)
    assert ("coordinates: pixels" in failed(report)) == (change == "x and y swapped")
    with pytest.raises(VerificationError) as error:
        report.raise_if_failed()
    assert str(error.value) == report.verdict
    sentence = f"differs from pytorch:demo: {len(failed(report))} of 18 checks failed, first 'photographs' at batch 1"
    assert sentence in str(error.value)
    assert json.loads(report.to_json())["passed"] is False


class _MixesSlots(Runner):
    """Right for one image, but gives the images of a batch each other's answers."""

    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.description = inner.description

    def _run(self, images_nchw):
        return {name: np.roll(output, 1, axis=0) for name, output in self.inner.outputs(images_nchw).items()}

    def open_graph(self, onnx_model):
        return self.inner.open_graph(onnx_model)

    def close(self):
        self.inner.close()


def test_runtime_that_mixes_up_slots_is_caught_only_by_batches(demo_onnx, demo_reference, monkeypatch):
    monkeypatch.setattr(library, "open_runner", lambda *a, **k: _MixesSlots(open_runner(*a, **k)))
    assert validate(str(demo_onnx), images=photographs(2), batches=[1], reference=demo_reference).passed
    report = validate(str(demo_onnx), images=photographs(2), batches=[1, 2], reference=demo_reference)
    assert failed(report) >= {"photographs", "slots: images permuted", "slots: own image nearest"}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_engine_that_computes_with_several_threads_passes(runtime, demo_onnx, demo_reference):
    """A worker of these tests has one core, so that all others compute with one."""
    with open_runner(f"{runtime}:{demo_onnx}", threads=2) as runner:
        assert runner.description.threads == 2
        report = validate(runner, images=photographs(2), batches=[1, 3], skip=INSIDE, reference=demo_reference)
    assert report.passed, report.verdict


def test_a_reference_holds_its_weights_already(demo_onnx, demo_reference, golden_checkpoint):
    with pytest.raises(DatDeployError) as error:
        validate(str(demo_onnx), checkpoint=golden_checkpoint, reference=demo_reference)
    assert str(error.value) == "a reference holds its weights already; give it or a checkpoint, not both."


def test_what_a_reference_answered_is_given_again_and_cannot_be_changed(demo_onnx, demo_reference, monkeypatch):
    images = np.zeros((1, 3, 64, 64), np.float32)
    first = demo_reference.answers(images)
    monkeypatch.setattr(demo_reference, "_forward", None)  # nothing can be computed now
    assert demo_reference.answers(images.copy()) is first
    assert not first["logits"].flags.writeable


class _RightAtOneSize(_MixesSlots):
    """As a file is in which tracing froze a size."""

    def _run(self, images_nchw):
        outputs = self.inner.outputs(images_nchw)
        if images_nchw.shape[2:] == (64, 64):
            return outputs
        return {name: output + 1 for name, output in outputs.items()}


@pytest.fixture(scope="module")
def of_any_size(mini_pp: Variant, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dynamic") / "mini_pp.onnx"
    export(mini_pp, path, image_size=(64, 64), dynamic_image_size=True)
    return path


def test_dynamic_file_that_is_right_at_one_size_alone_is_caught(of_any_size, monkeypatch):
    monkeypatch.setattr(library, "open_runner", lambda *a, **k: _RightAtOneSize(open_runner(*a, **k)))
    engine = str(of_any_size)
    report = validate(engine, images=photographs(2), batches=[1], skip=["coordinates", "drift"])
    assert failed(report)
    assert all(name.endswith(", 96x160") for name in failed(report))
    only = validate(engine, images=photographs(2), batches=[1], image_sizes=[(64, 64)], skip=["coordinates", "drift"])
    assert only.passed


@pytest.mark.parametrize(
    ("runtime", "sizes"), [("onnxruntime", [(128, 128), (96, 160)]), ("openvino", [(96, 160), (64, 64)])]
)
def test_a_dynamic_file_passes_at_the_sizes_asked_for(runtime, sizes, of_any_size):
    engine = f"{runtime}:{of_any_size}"
    skip = INSIDE if runtime == "openvino" else ()
    report = validate(engine, images=photographs(2), batches=[1, 2], image_sizes=sizes, skip=skip)
    assert report.passed, report.verdict
    assert {check.name for check in report.checks if check.name.startswith("photographs")} == {
        f"photographs, {height}x{width}" for height, width in sizes
    }


class _LosesAttention(_MixesSlots):
    """Wrong in outputs whose numbers are small."""

    def _run(self, images_nchw):
        outputs = self.inner.outputs(images_nchw)
        return {name: output * (not name.startswith("attention")) for name, output in outputs.items()}


@pytest.fixture(scope="module")
def with_points(mini_pp: Variant, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Reference]]:
    path = tmp_path_factory.mktemp("points") / "points.onnx"
    export(mini_pp, path, image_size=(64, 64), sampling_locations=True)
    with open_runner(str(path)) as runner, open_reference(runner.description) as reference:
        yield path, reference


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino-bf16"])
def test_each_output_has_its_own_tolerance(runtime, with_points, monkeypatch):
    path, reference = with_points
    engine = f"{runtime}:{path}"
    try:
        assert validate(engine, images=photographs(2), batches=[1], skip=INSIDE, reference=reference).passed
    except UnsupportedError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(library, "open_runner", lambda *a, **k: _LosesAttention(open_runner(*a, **k)))
    report = validate(engine, images=photographs(2), batches=[1], skip=INSIDE, reference=reference)
    assert "photographs" in failed(report)
    assert next(check.detail for check in report.checks if check.name == "photographs").startswith("attention_")


def test_each_operator_is_tried_once_where_the_points_are_outputs(with_points):
    path, reference = with_points
    report = validate(str(path), images=photographs(2), batches=[1], reference=reference)
    rows = [check for check in report.checks if check.kind == "coordinates"]
    assert all(check.detail.startswith("6 operators, ") for check in rows)
    assert report.passed
    assert len(report.drift) == 3  # of the outputs, not of a file that was cut


def test_file_that_lost_its_list_of_operators_says_that_coordinates_were_not_checked(
    demo_lowerings, demo_reference, tmp_path
):
    model = onnx.load(demo_lowerings["hat"])
    kept = [entry for entry in model.metadata_props if entry.key != "dat_deploy.operators"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "bare.onnx")
    report = validate(str(tmp_path / "bare.onnx"), images=photographs(2), batches=[1], reference=demo_reference)
    checks = {check.kind: check for check in report.checks}
    assert (checks["coordinates"].passed, checks["drift"].passed) == (None, None)
    assert checks["coordinates"].detail == "the file's metadata no longer lists its operators"


def test_tolerance_can_be_set(demo_onnx, demo_reference):
    report = validate(str(demo_onnx), images=photographs(2), batches=[1], tolerance=1e-9, reference=demo_reference)
    assert not report.passed


def test_bfloat16_passes_its_own_tolerance_and_not_that_of_float32(demo_onnx, demo_reference):
    engine = f"openvino-bf16:{demo_onnx}"
    try:
        report = validate(engine, images=photographs(2), batches=[1, 2], skip=INSIDE, reference=demo_reference)
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert report.passed
    worst = max(check.error for check in report.checks if check.name == "photographs")
    assert worst > 10 * FP32_TOLERANCE


def test_pytorch_itself_has_no_operators_to_cut_out():
    report = validate("pytorch:demo", images=photographs(2), batches=[1])
    assert report.passed
    assert [(c.name, c.passed, c.detail) for c in report.checks][-2:] == [
        ("coordinates", None, "only an ONNX file can be cut into operators"),
        (
            "drift of sampling locations",
            None,
            "the engine does not give its locations; build it from `export(sampling_locations=True)`",
        ),
    ]


def test_other_weights_are_an_error_not_a_failed_check(tiny_onnx, golden_checkpoint):
    with pytest.raises(DatDeployError) as error:
        validate(str(tiny_onnx["function"]), checkpoint=golden_checkpoint)
    assert type(error.value) is DatDeployError
    assert "holds the weights of seeded random weights (seed 0)" in str(error.value)
    assert "the PyTorch side those of dat_tiny_in1k_224.pth" in str(error.value)
    assert str(error.value).endswith("Pass the same `checkpoint` that it was exported with.")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_tolerance_that_nothing_can_meet_is_refused(value, demo_onnx):
    with pytest.raises(DatDeployError) as error:
        validate(str(demo_onnx), tolerance=value)
    assert str(error.value) == f"tolerance got {value}; it takes a number above 0, such as 1e-4."


class _ToyCheck(CheckKind):
    """A check is one class: it is run, can be left out, and its failure is in the numbers."""

    name = "toy"
    in_numbers = True

    def run(self, comparison):
        yield self.row("toy", float(len(comparison.photos)), 1.0, "photographs")


def test_a_check_is_one_class(demo_onnx, demo_reference, monkeypatch):
    monkeypatch.setitem(CHECKS, "toy", _ToyCheck())
    others = [name for name in CHECKS if name != "toy"]
    report = validate(str(demo_onnx), images=photographs(2), skip=others, reference=demo_reference)
    assert [(row.kind, row.error, row.passed) for row in report.checks] == [("toy", 2.0, False)]
    assert report.differs
    skipped = validate(str(demo_onnx), images=photographs(2), skip=[*others[1:], "toy"], reference=demo_reference)
    assert skipped.skipped == (*others[1:], "toy")


def test_the_list_of_checks_is_light():
    code = "import sys, dat_deploy.validate.checks; print({'torch', 'onnx_ir', 'onnxscript'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603  # fixed
    assert done.stdout.strip() == "set()"


def test_an_unknown_check_cannot_be_skipped(demo_onnx):
    with pytest.raises(DatDeployError) as error:
        validate(str(demo_onnx), skip=["slot"])
    assert str(error.value) == (
        "there is no check 'slot' to skip; checks are preprocessing, photographs, telling, decisions, stress, "
        "slots, repeats, precision, weights, range, rounding, coordinates, drift, data."
    )


def test_a_backbone_takes_no_data(demo_onnx, tmp_path):
    with open_runner(str(demo_onnx)) as runner:
        backbone = _MixesSlots(runner)
        about = runner.description
        backbone.description = replace(about, network=replace(about.network, features=(3,)), outputs=("feature_map_3",))
        with pytest.raises(DatDeployError) as error:
            validate(backbone, data=tmp_path)
    assert str(error.value) == (
        f"{demo_onnx} is a backbone and classifies nothing; leave `data` out, or validate an engine with logits."
    )


@pytest.mark.parametrize(
    ("outputs", "given"), [(["scores"], "scores"), (["logits", "features"], "logits, features")], ids=["other", "more"]
)
def test_an_engine_with_other_outputs_is_refused(outputs, given, demo_onnx, tmp_path):
    model = onnx.load(demo_onnx)
    shape = ["batch", 10]
    for name in outputs:
        if name != "logits":
            model.graph.node.append(onnx.helper.make_node("Identity", ["logits"], [name]))
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, shape) for name in outputs)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(DatDeployError) as error:
        validate(str(tmp_path / "other.onnx"))
    assert str(error.value) == (
        f"{tmp_path}/other.onnx gives {given} where its network gives logits, so they cannot be compared. "
        f"Export it again, and leave its outputs as they are."
    )


def test_impossible_batches_are_refused(demo_onnx):
    with pytest.raises(DatDeployError, match="give numbers from 1"):
        validate(str(demo_onnx), batches=[0, 1])
