"""Is the engine's answer still PyTorch's? Photographs, stress inputs, batch slots and coordinates; one verdict."""

import contextlib
import copy
import datetime
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from dat_deploy.engine.build import BACKENDS
from dat_deploy.engine.passport import Verdict, read_passport, record_verdict
from dat_deploy.errors import DatDeployError, OutputError, PassportError, ShapeError, VerificationError
from dat_deploy.export.lowering import OperatorRecord, operator_records
from dat_deploy.export.subgraph import operator_model
from dat_deploy.files import atomic_output
from dat_deploy.metadata import read_metadata
from dat_deploy.model import REFERENCE, half_network
from dat_deploy.photographs import photographs
from dat_deploy.preprocess import preprocess_files
from dat_deploy.runners import EngineDescription, Runner, open_runner, parse_engine
from dat_deploy.runners.pytorch_runner import PytorchRunner
from dat_deploy.validate.stress import LOCATIONS, stress_images, stress_locations
from dat_deploy.variants import Variant

__all__ = ["BATCHES", "FP32_TOLERANCE", "Check", "ValidationReport", "validate"]

BATCHES = (1, 2, 3, 8)

# In float32 two runtimes differ by the order of summation alone, about 2e-6 here; 1e-4 leaves room for other CPUs and
# is far below what moves a prediction. In a lower precision an engine may err twice as much as eager PyTorch does in
# that precision on the same inputs, both measured against float32.
FP32_TOLERANCE = 1e-4
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

Images = NDArray[np.float32]
Outputs = dict[str, NDArray[np.float32]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Attributes:
        batch: images in the call; None where there is no batch to speak of.
        error: the largest absolute difference seen; None if the check could not run, `detail` then says why.
        tolerance: what it may be.
    """

    name: str
    batch: int | None
    error: float | None
    tolerance: float
    detail: str

    @property
    def share(self) -> float:
        """The error as a share of what is allowed."""
        return 0.0 if self.error is None else self.error / self.tolerance

    @property
    def passed(self) -> bool | None:
        """None if the check did not run."""
        return None if self.error is None else self.error <= self.tolerance  # NaN is not <= anything


@dataclass(frozen=True)
class ValidationReport:
    """`notes` is what the user must know beside the checks."""

    engine: EngineDescription
    reference: EngineDescription
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        failed = [check for check in self.checks if check.passed is False]
        ran = [check for check in self.checks if check.passed is not None]
        if not failed:
            worst = max(check.share for check in ran)
            return (
                f"{self.engine.name} agrees with {self.reference.name}: {len(ran)} checks passed, the worst error is "
                f"{worst:.1%} of what is allowed."
            )
        first = failed[0]
        where = f" at batch {first.batch}" if first.batch else ""
        return (
            f"{self.engine.name} differs from {self.reference.name}: {len(failed)} of {len(ran)} checks failed, first "
            f"'{first.name}'{where} with an error of {first.error:.3g} where {first.tolerance:.3g} is allowed."
        )

    def to_json(self) -> str:
        fields: dict[str, Any] = asdict(self)
        for check, row in zip(self.checks, fields["checks"], strict=True):
            row["passed"] = check.passed
            if check.error is not None and not math.isfinite(check.error):
                row["error"] = str(check.error)  # JSON has no NaN
        return json.dumps({"passed": self.passed, "verdict": self.verdict, **fields}, indent=2) + "\n"

    def write(self, path: Path, *, force: bool = False) -> None:
        with atomic_output(path, force=force) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def raise_if_failed(self) -> None:
        """Raises VerificationError with the verdict unless every check that ran has passed."""
        if not self.passed:
            raise VerificationError(self.verdict)


def validate(
    engine: str,
    *,
    checkpoint: Path | None = None,
    images: Sequence[Path] | None = None,
    batches: Sequence[int] = BATCHES,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    tolerance: float | None = None,
    progress: Progress = lambda _: None,
) -> ValidationReport:
    """Compare an engine with the eager PyTorch network that holds the same weights.

    Args:
        engine: `[RUNTIME:]TARGET`, see `open_runner`.
        checkpoint: what the engine was exported from; without one, the seeded random weights.
        images: photographs of your own; without any, those in scikit-image's wheel.
        batches: batch sizes to try; an engine of a fixed batch is tried at that one.
        image_sizes: (height, width) in pixels to try; by default the engine's own, and where its size is dynamic a
            rectangle as well, since a size that tracing has frozen shows at another one alone.
        tolerance: largest error of a logit or of an element of another output; by default FP32_TOLERANCE, and in a
            lower precision twice the largest error of eager PyTorch in that precision.
        progress: called with the name of each check before it runs.

    Returns:
        The report, passed or failed; `raise_if_failed` turns a failure into an error.

    Raises:
        DatDeployError: if the two sides do not hold the same weights, or either cannot be opened.
    """
    if not batches or min(batches) < 1:
        raise ShapeError(f"batches {list(batches)} are not possible; give numbers from 1, such as 1,2,3,8.")
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(open_runner(engine, checkpoint=checkpoint))
        about = runner.description
        identity = _identity(engine)
        reference = stack.enter_context(_reference(about, about.network, checkpoint))
        if reference.description.weights_sha256 != about.weights_sha256:
            raise DatDeployError(
                f"{about.name} holds the weights of {about.weights_source} (sha256 {about.weights_sha256[:12]}), the "
                f"PyTorch side those of {reference.description.weights_source} "
                f"({reference.description.weights_sha256[:12]}). Pass the same --checkpoint that it was exported with."
            )
        described = [about.at_image_size(*size) for size in image_sizes or _default_sizes(about)]
        checks: list[Check] = []
        for at_size in described:
            where = "" if described == [about] else f", {at_size.image_size[0]}x{at_size.image_size[1]}"

            def announce(what: str, where: str = where) -> None:
                progress(what + where)

            found = _check_at_size(runner, reference, at_size, images, batches, tolerance, announce)
            checks += [replace(check, name=check.name + where) for check in found]
        checks += _check_coordinates(runner, reference, progress)
        report = ValidationReport(about, reference.description, tuple(checks))
    return report if identity is None else _recorded(engine, report, tolerance, identity)


def _identity(engine: str) -> str | None:
    """The SHA-256 in an engine's passport; None of what is no engine."""
    runtime, target = parse_engine(engine)
    return read_passport(Path(target)).engine_sha256 if runtime.name in BACKENDS else None


def _recorded(engine: str, report: ValidationReport, tolerance: float | None, identity: str) -> ValidationReport:
    """An engine's passport carries the last verdict, with what it was held to."""
    _, target = parse_engine(engine)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    checks = sum(check.passed is not None for check in report.checks)
    batches = tuple(sorted({check.batch for check in report.checks if check.batch is not None}))
    verdict = Verdict(report.passed, report.verdict, date, checks, batches, tolerance)
    try:
        record_verdict(Path(target), verdict, identity)
    except (OutputError, PassportError) as error:
        return replace(report, notes=(f"the verdict is not in the engine's passport: {error}",))
    return report


def _reference(about: EngineDescription, network: Variant, checkpoint: Path | None) -> PytorchRunner:
    with_points = any(name.startswith("sampling_locations") for name in about.outputs)
    return PytorchRunner(network, f"pytorch:{about.variant}", checkpoint=checkpoint, sampled_points=with_points)


def _default_sizes(about: EngineDescription) -> list[tuple[int, int]]:
    height, width = about.image_size
    step = about.network.side_multiple
    return [about.image_size] + [(height + step, width + 3 * step)] * about.dynamic_image_size


def _batches(about: EngineDescription, batches: Sequence[int]) -> list[int]:
    """To try: of an engine with profiles, both ends and the best of each, too."""
    if about.batch:
        return [about.batch]
    own = {batch for profile in about.profiles for batch in (profile.least, profile.best, profile.most)}
    return sorted(own.union(batch for batch in batches if about.takes_batch(batch)))


def _check_at_size(
    runner: Runner,
    reference: PytorchRunner,
    about: EngineDescription,
    images: Sequence[Path] | None,
    batches: Sequence[int],
    tolerance: float | None,
    progress: Progress,
) -> list[Check]:
    """Everything that whole images can show."""
    progress("PyTorch")
    photos = preprocess_files(list(images) if images else photographs(8), about.preprocessing)
    expected = _one_by_one(reference, photos)
    stress = stress_images(about.image_size)
    stress_expected = {label: reference.outputs(image) for label, image in stress.items()}
    if tolerance is None:
        inputs = np.concatenate([photos, *stress.values()])
        outputs = _joined([expected, *stress_expected.values()])
        tolerances = _default_tolerances(reference, about, inputs, outputs)
    else:
        tolerances = dict.fromkeys(about.outputs, tolerance)
    tried = _batches(about, batches)
    checks: list[Check] = []
    if about.profiles:
        refused = [batch for batch in sorted(set(batches)) if not about.takes_batch(batch)]
        detail = f"it was built for {about.batches_taken}"
        checks += [Check("photographs", batch, None, max(tolerances.values()), detail) for batch in refused]
    for batch in tried:
        progress(f"photographs, batch {batch}")
        checks.append(_compare_photographs(runner, photos, expected, batch, tolerances))
    for label, image in stress.items():
        progress(f"stress image: {label}")
        batch = about.least_batch
        got = runner.outputs(np.repeat(image, batch, axis=0))
        checks.append(_check_outputs(f"stress image: {label}", batch, got, stress_expected[label], tolerances, ""))
    for batch in tried:
        if batch > 1:
            progress(f"slots, batch {batch}")
            checks += _check_slots(runner, photos, expected, batch, tolerances)
    return checks


def _joined(parts: Sequence[Outputs]) -> Outputs:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _one_by_one(runner: Runner, images: Images) -> Outputs:
    return _joined([runner.outputs(images[i : i + 1]) for i in range(len(images))])


def _precision(about: EngineDescription) -> str:
    """In which the answer was rounded: a runtime may compute in float32 with the weights of a file in float16."""
    _, target = parse_engine(about.name)
    if about.precision == "fp32" and target.endswith(".onnx"):
        return read_metadata(Path(target)).precision
    return about.precision


def _rounds_everything(about: EngineDescription) -> bool:
    """Whether the runtime lowers the precision by itself, of coordinates too, whatever the file says."""
    return about.runtime == "openvino" and about.precision != "fp32"


def _default_tolerances(
    reference: PytorchRunner, about: EngineDescription, images: Images, expected: Outputs
) -> dict[str, float]:
    """One an output: what is much for attention is little for a logit."""
    precision = _precision(about)
    if precision == "fp32":
        return dict.fromkeys(expected, FP32_TOLERANCE)
    dtype = DTYPES[precision]
    rounds_all = _rounds_everything(about)
    model = copy.deepcopy(reference.model).to(dtype) if rounds_all else half_network(reference.model, dtype)
    worst = dict.fromkeys(expected, 0.0)
    with torch.inference_mode():
        for i, image in enumerate(torch.from_numpy(images)):
            outputs = model(image[None].to(dtype if rounds_all else torch.float32))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for (name, exact), rounded in zip(expected.items(), outputs, strict=True):
                worst[name] = max(worst[name], float(np.abs(rounded[0].float().numpy() - exact[i]).max()))
    return {name: 2 * error for name, error in worst.items()}


def _check_outputs(
    name: str, batch: int | None, got: Outputs, expected: Outputs, tolerances: dict[str, float], detail: str
) -> Check:
    """The output that is furthest off, measured by what each is allowed."""
    checks = [
        _check(name, batch, got[output], expected[output], tolerances[output], detail if len(got) == 1 else output)
        for output in expected
    ]
    return max(checks, key=lambda check: math.inf if math.isnan(check.share) else check.share)


def _check(
    name: str, batch: int | None, got: NDArray[Any], expected: NDArray[Any], tolerance: float, detail: str
) -> Check:
    error = float(np.abs(got.astype(np.float64) - expected).max())  # NaN if either has one
    return Check(name, batch, error, tolerance, detail)


def _filled(images: Images, batch: int) -> Iterable[tuple[Images, list[int]]]:
    """Batches of exactly `batch` images that together hold each image, and the index of the image in each slot."""
    for first in range(0, len(images), batch):
        slots = [(first + slot) % len(images) for slot in range(batch)]
        yield images[slots], slots


def _compare_photographs(
    runner: Runner, photos: Images, expected: Outputs, batch: int, tolerances: dict[str, float]
) -> Check:
    got = {name: np.empty_like(values) for name, values in expected.items()}
    for images, slots in _filled(photos, batch):
        for name, values in runner.outputs(images).items():
            got[name][slots] = values
    detail = ""
    if "logits" in got:
        agreeing = int((got["logits"].argmax(axis=1) == expected["logits"].argmax(axis=1)).sum())
        detail = f"top-1 agrees on {agreeing} of {len(photos)}"
    return _check_outputs("photographs", batch, got, expected, tolerances, detail)


def _check_slots(
    runner: Runner, photos: Images, expected: Outputs, batch: int, tolerances: dict[str, float]
) -> list[Check]:
    """A runtime that mixes up the images of a batch passes every test on one image (NVIDIA/TensorRT#4813)."""
    same = runner.outputs(np.repeat(photos[:1], batch, axis=0))
    spread = max(float(np.abs(values - values[:1]).max()) for values in same.values())
    first = {name: values[:1] for name, values in expected.items()}
    repeated = _check_outputs(
        "slots: one image in all", batch, same, first, tolerances, f"slots differ by at most {spread:.1e}"
    )
    order = np.roll(np.arange(batch)[::-1], 1) % len(photos)  # reversed, and moved by one
    permuted = {name: values[order] for name, values in expected.items()}
    moved = _check_outputs("slots: images permuted", batch, runner.outputs(photos[order]), permuted, tolerances, "")
    return [repeated, moved]


def _check_coordinates(runner: Runner, reference: PytorchRunner, progress: Progress) -> list[Check]:
    """Each deformable operator of the file alone, at locations that a trained network seldom visits."""
    _, target = parse_engine(runner.description.name)
    if not target.endswith(".onnx"):
        return [Check("coordinates", None, None, FP32_TOLERANCE, "only an ONNX file can be cut into operators")]
    model = ir.load(target)
    # the first of its module: `--sampling-locations` calls the attention again, with values that are constant
    deformable = [r for r in operator_records(model.metadata_props) if "sampling_locations" in r.inputs]
    records = list({(r.name.partition("/")[0], r.operator): r for r in reversed(deformable)}.values())[::-1]
    if not records:
        detail = "the file's metadata no longer lists its operators"
        return [Check("coordinates", None, None, FP32_TOLERANCE, detail)]
    precision, rounds_all = _precision(runner.description), _rounds_everything(runner.description)
    worst: dict[str, Check] = {}
    for record in records:
        progress(f"coordinates: {record.name}")
        run = runner.open_graph(operator_model(model, record))
        for kind in LOCATIONS:
            inputs = _operator_inputs(record, reference, kind, runner.description.batch or 2)
            exact = _operator_reference(record, reference, inputs, torch.float64, torch.float64)
            tolerance = FP32_TOLERANCE
            if precision != "fp32":
                # in a lower precision the points would move, and any fault be in the tolerance
                of_locations = DTYPES[precision] if rounds_all else torch.float32
                rounded = _operator_reference(record, reference, inputs, DTYPES[precision], of_locations)
                tolerance = 2 * float(np.abs(rounded - exact).max())
            got = run({name: value.numpy() for name, value in inputs.items()})
            detail = f"{len(records)} operators, worst {record.name}"
            check = _check(f"coordinates: {kind}", None, got, exact, tolerance, detail)
            if kind not in worst or not check.share <= worst[kind].share:  # NaN is the worst
                worst[kind] = check
    return list(worst.values())


def _operator_inputs(
    record: OperatorRecord, reference: PytorchRunner, kind: str, batch: int
) -> dict[str, torch.Tensor]:
    stage = int(record.name.split(".")[1])
    config = reference.model.variant.stages[stage]
    height, width = reference.model.variant.feature_map(stage)
    sampled_map = config.sampled_map(height, width)
    feature_map = (batch, height, width, config.channels)
    sampled = (batch, math.prod(sampled_map), config.channels)
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name in record.inputs:
        if name != "sampling_locations":
            is_map = name == "query" or record.operator == "deformable_sample"
            inputs[name] = torch.randn(feature_map if is_map else sampled, generator=generator)
    locations = (batch, config.offset_groups, *sampled_map, 2)
    inputs["sampling_locations"] = stress_locations(kind, locations, (height, width), seed=0)
    return inputs


def _operator_reference(
    record: OperatorRecord,
    reference: PytorchRunner,
    inputs: dict[str, torch.Tensor],
    dtype: torch.dtype,
    of_locations: torch.dtype,
) -> NDArray[np.float64]:
    """The operator in eager PyTorch, in `dtype` but for the locations, with the bias table of its module."""
    values = {name: value.to(of_locations if name == "sampling_locations" else dtype) for name, value in inputs.items()}
    if record.operator == "deformable_attention":
        module = reference.model.get_submodule(record.name.partition("/")[0])
        values["relative_position_bias_table"] = module.get_parameter("relative_position_bias_table").to(dtype)
    with torch.inference_mode():
        output = getattr(REFERENCE, record.operator)(**values, **record.attributes)
    return output.double().numpy()  # type: ignore[no-any-return]  # found by name
