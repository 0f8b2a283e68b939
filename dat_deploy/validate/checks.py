"""The checks: each class looks at one thing that goes wrong, and gives rows with a verdict."""

import abc
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dat_deploy.engine.passport import read_passport
from dat_deploy.images.preprocess import golden_sha256
from dat_deploy.metadata import FileMetadata, load_onnx
from dat_deploy.networks.family import family_of
from dat_deploy.precision import PRECISIONS
from dat_deploy.runners import Outputs
from dat_deploy.validate.accuracy import accuracy_rows, compare_on_data
from dat_deploy.validate.check import Check
from dat_deploy.validate.defaults import FP32_TOLERANCE, OF_FLOAT32, OF_LOWER
from dat_deploy.validate.tolerance import TELLS_APART, Tolerance

if TYPE_CHECKING:
    from dat_deploy.networks.sampling import SampledBlock
    from dat_deploy.validate.comparison import Comparison
    from dat_deploy.validate.drift import Locations

# What loads torch or a graph library is imported where a check runs, so that the list of checks is light.

__all__ = ["CHECKS", "CheckKind"]

REPEATS = 5
# Margin of a decision in the sum of how far its two classes spread between images; eight bits move each by up to 0.45.
SURE = 0.5
MOST_GIGAMACS = 0.1  # in one call of onnx's reference evaluator, which takes some 10 s for each GMAC
MOST_FLUSHED = 0.5  # of the magnitudes that a tensor holds
LOST_LAYERS = 0.5  # of those asked for in a precision; fusion counts layers anew, but never turns most of them back
# float32 at different batch sizes takes other kernels, which sum in another order; 2e-6 was the most seen.
FP32_SPREAD = 1e-5
# Locations are float32 in every precision; between runtimes they differed by 1e-5 px at most.
LEAST_DRIFT_PX = 1e-3
# Of eager PyTorch's own drift in the engine's precision: a block has few points, and the largest of few varies.
ROUNDED_DRIFTS = 4
# Eight bits move the features that offsets are computed from; a pixel is what training itself jitters.
INT8_DRIFT_PX = 1.0
THROWN_BY_INT8 = 0.02
# Of the points; of more than this a fault could hide among those that rounding throws across the map.
MOST_THROWN = 0.1


class CheckKind(abc.ABC):
    """One thing to look at.

    Attributes:
        name: by which it can be left out, and the `kind` of its rows.
        at_each_size: it runs at each image size; else once for an engine, at the first.
        in_numbers: its rows are about the numbers that the engine gives, see `Check`.
    """

    name: ClassVar[str]
    at_each_size: ClassVar[bool] = False
    in_numbers: ClassVar[bool] = False

    @abc.abstractmethod
    def run(self, comparison: "Comparison") -> Iterable[Check]:
        """Its rows, in order."""

    def row(
        self,
        name: str,
        error: float | None,
        tolerance: float,
        detail: str = "",
        unit: str = "",
        *,
        batch: int | None = None,
        basis: str = "",
    ) -> Check:
        return Check(self.name, name, batch, error, tolerance, detail, unit, self.in_numbers, basis)

    def worst_output(
        self,
        comparison: "Comparison",
        name: str,
        batch: int,
        outputs: Outputs,
        expected: Outputs,
        *,
        stress: bool = False,
        detail: str = "",
    ) -> Check:
        """The output that is furthest off, measured by what each is allowed."""
        tolerances = comparison.stress_tolerances if stress else comparison.tolerances
        rows = []
        for output, right in expected.items():
            tolerance = tolerances[output]
            error = tolerance.error(outputs[output], right)
            if not error <= tolerance.allowed:
                tolerance = comparison.widened(tolerance, output, stress=stress)
                error = tolerance.error(outputs[output], right)
            what = detail if len(outputs) == 1 else output
            rows.append(
                self.row(name, error, tolerance.allowed, what, tolerance.unit, batch=batch, basis=tolerance.basis)
            )
        return max(rows, key=lambda row: math.inf if math.isnan(row.share) else row.share)


def _largest_error(values: NDArray[Any], expected: NDArray[Any]) -> float:
    """NaN if either has one."""
    return float(np.abs(values.astype(np.float64) - expected).max())


class PreprocessingCheck(CheckKind):
    """The file's own preprocessing against that of its network's training: both sides of every other check use it."""

    name = "preprocessing"
    at_each_size = True

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        own, trained = comparison.about.preprocessing, comparison.about.network.preprocessing
        differences = [
            f"{name} is {getattr(own, name)}, trained with {getattr(trained, name)}"
            for name in ("image_size", "resize_size", "interpolation", "crop", "mean", "std", "color")
            if getattr(own, name) != getattr(trained, name)
        ]
        digest = _golden_sha256(comparison)
        if digest and digest != golden_sha256(own):
            differences.append("the golden picture comes out otherwise than at export")
        yield self.row(
            "preprocessing", float(len(differences)), 0.0, "; ".join(differences) or "as trained", "settings"
        )


def _golden_sha256(comparison: "Comparison") -> str:
    """As the file or the passport has it; empty if neither does."""
    path = comparison.about.path
    if path is None or comparison.about.file_kind is None:
        return ""
    if comparison.onnx_model is None:
        return read_passport(path).metadata.golden_sha256
    metadata = FileMetadata.from_properties(dict(comparison.onnx_model.metadata_props), path)
    # of the file's own size, not of another that this comparison is at
    return metadata.golden_sha256 if metadata.preprocessing == comparison.about.preprocessing else ""


class PhotographsCheck(CheckKind):
    """Real images at every batch."""

    name = "photographs"
    at_each_size = True
    in_numbers = True

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        about = comparison.about
        if about.profiles:
            detail = f"it was built for {about.batches_taken}"
            for batch in sorted(set(comparison.batches)):
                if not about.takes_batch(batch):
                    yield self.row("photographs", None, 0.0, detail, batch=batch)
        photos, expected = comparison.photos, comparison.expected
        for batch in comparison.tried:
            comparison.progress(f"photographs, batch {batch}")
            outputs = comparison.runner.in_batches(photos, batch)
            detail = ""
            if "logits" in outputs:
                agreeing = int((outputs["logits"].argmax(axis=1) == expected["logits"].argmax(axis=1)).sum())
                detail = f"top-1 agrees on {agreeing} of {len(photos)}"
            comparison.engine_answers[batch] = outputs
            yield self.worst_output(comparison, "photographs", batch, outputs, expected, detail=detail)


class TellingCheck(CheckKind):
    """A tolerance that two different images' answers would pass says nothing of an engine."""

    name = "telling"
    at_each_size = True

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        answers, shares = comparison.distinct, {}
        asked = comparison.asked_tolerance is not None
        for name, tolerance in comparison.tolerances.items():
            # one that is asked for holds as it stands, in every class
            cap = Tolerance.absolute(0.0, "").cap(answers[name]) if asked else comparison.caps[name]
            shares[name] = TELLS_APART * (tolerance.allowed / cap if cap > 0 else math.inf)
        varying = {name: share for name, share in shares.items() if math.isfinite(share)} or shares
        # what is derived is lowered for each output by itself, but for those that do not vary
        name = (max if asked else min)(varying, key=lambda name: varying[name])
        detail = "" if len(shares) == 1 else f"by {name}; "
        detail += f"of the distance from an image to its nearest other, of {len(answers[name])} images"
        if shares[name] > TELLS_APART:
            detail = "a tolerance that cannot tell images apart is none: " + (
                f"{comparison.about.variant} answers these images alike, or they are alike"
                if not asked
                else "ask for a smaller `tolerance`"
            )
        basis = comparison.tolerances[name].basis
        yield self.row("images told apart", 100 * shares[name], 100 * TELLS_APART, detail, "%", basis=basis)


class DecisionsCheck(CheckKind):
    """First classes, and first five, where PyTorch is far from any tie: no tolerance excuses another."""

    name = "decisions"
    at_each_size = True
    in_numbers = True

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        if "logits" not in comparison.expected:
            return
        expected, scale = comparison.expected["logits"], comparison.scales["logits"].scale
        for batch in comparison.tried:
            if batch not in comparison.engine_answers:
                comparison.progress(f"decisions, batch {batch}")
                comparison.engine_answers[batch] = comparison.runner.in_batches(comparison.photos, batch)
        for first in (1, 5):
            if expected.shape[1] <= first:
                continue
            best = np.argsort(-expected, axis=1, kind="stable")
            last, next_one = best[:, first - 1], best[:, first]
            rows = np.arange(len(expected))
            margins = (expected[rows, last] - expected[rows, next_one]) / (scale[last] + scale[next_one])
            sure = margins > SURE
            worst, batch_of_worst = 0, None
            for batch, answers in comparison.engine_answers.items():
                own = np.argsort(-answers["logits"], axis=1, kind="stable")[:, :first]
                same = np.array([set(a) == set(b) for a, b in zip(own, best[:, :first], strict=True)])
                same &= np.isfinite(answers["logits"]).all(axis=1)
                if int((sure & ~same).sum()) > worst:
                    worst, batch_of_worst = int((sure & ~same).sum()), batch
            classes = "first class" if first == 1 else f"first {first} classes"
            detail = f"PyTorch is sure of the {classes} of {int(sure.sum())} of {len(sure)} photographs"
            basis = "images whose margin is more than half the spreads of both classes"
            yield self.row(f"top-{first} kept", float(worst), 0.0, detail, "images", batch=batch_of_worst, basis=basis)


class StressCheck(CheckKind):
    """Images that no photograph resembles."""

    name = "stress"
    at_each_size = True
    in_numbers = True

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        batch = comparison.about.least_batch
        for label, image in comparison.stress.items():
            comparison.progress(f"stress image: {label}")
            outputs = comparison.runner.outputs(np.repeat(image, batch, axis=0))
            expected = comparison.stress_expected[label]
            row = self.worst_output(comparison, f"stress image: {label}", batch, outputs, expected, stress=True)
            if row.error is not None and row.tolerance < row.error <= comparison.clipped_error(label):
                detail = "outside of the range that int8 was calibrated for: eager PyTorch in int8 errs as much"
                row = replace(row, error=None, detail=detail)
            yield row


class SlotsCheck(CheckKind):
    """A runtime that mixes up the images of a batch passes every test on one image (NVIDIA/TensorRT#4813)."""

    name = "slots"
    at_each_size = True
    in_numbers = True

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        photos, expected, scales = comparison.photos, comparison.expected, comparison.scales
        others, answers = comparison.different
        alone: Outputs | None = None
        spread, bits = 0.0, True
        strangers, tried = 0, 0
        for batch in comparison.tried:
            comparison.progress(f"slots, batch {batch}")
            same = comparison.runner.outputs(np.repeat(photos[:1], batch, axis=0))
            alone = alone or {name: values[:1] for name, values in same.items()}
            if comparison.gates.batch_spread is None:
                spreads = [scales[name].error(values, alone[name]) for name, values in same.items()]
            else:
                spreads = [float(np.abs(values - alone[name]).max()) for name, values in same.items()]
            spread = float(np.max([spread, *spreads]))
            bits = bits and all(np.array_equal(values, values[:1].repeat(batch, axis=0)) for values in same.values())
            bits = bits and all(np.array_equal(values[:1], alone[name]) for name, values in same.items())
            if batch == 1:
                continue
            apart = max(float(np.abs(values - values[:1]).max()) for values in same.values())
            first = {name: values[:1] for name, values in expected.items()}
            detail = f"slots differ by at most {apart:.1e}"
            yield self.worst_output(comparison, "slots: one image in all", batch, same, first, detail=detail)
            order = np.roll(np.arange(batch), 1) % len(others)
            permuted = {name: values[order] for name, values in answers.items()}
            outputs = comparison.runner.outputs(others[order])
            stress = len(others) > len(photos)
            if not stress or comparison.precision.is_exported:  # eight bits clip stress images
                yield self.worst_output(comparison, "slots: images permuted", batch, outputs, permuted, stress=stress)
            told, wrong = comparison.told_apart(outputs, order)
            strangers, tried = strangers + wrong, tried + told
        if max(comparison.tried) > 1:
            detail = f"{tried - strangers} of {tried} answers are nearest to that of their own image"
            error: float | None = float(strangers)
            if not tried:
                error, detail = None, "no two of the images have answers that can be told apart"
            yield self.row("slots: own image nearest", error, 0.0, detail, "slots")
        batches = ", ".join(map(str, comparison.tried))
        detail = f"one image in every slot of batch {batches}: {'the same bits' if bits else 'not the same bits'}"
        yield self._invariance(comparison, spread, detail)

    def _invariance(self, comparison: "Comparison", spread: float, detail: str) -> Check:
        if comparison.gates.batch_spread is not None:
            return self.row("batch invariance", spread, comparison.gates.batch_spread, detail, basis="the gate")
        limits = []
        for name, tolerance in comparison.default_tolerances.items():
            limit = tolerance
            if comparison.is_full:
                limit = tolerance.at(
                    min(FP32_SPREAD, tolerance.allowed), f"{FP32_SPREAD:g} of the spread between images"
                )
            limits.append(limit if spread <= limit.allowed else comparison.widened(limit, name))
        loosest = max(limits, key=lambda limit: limit.allowed)
        return self.row("batch invariance", spread, loosest.allowed, detail, "spread", basis=loosest.basis)


class RepeatsCheck(CheckKind):
    """The same batch again and again."""

    name = "repeats"
    at_each_size = True

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        batch = comparison.tried[-1]
        comparison.progress(f"repeated runs, batch {batch}")
        images = comparison.photos[np.arange(batch) % len(comparison.photos)]
        seen = comparison.engine_answers.get(batch, {}) if batch == len(comparison.photos) else {}
        first = seen or comparison.runner.outputs(images)  # the same call, made for the photographs
        spread = 0.0
        for _ in range(REPEATS - 1):
            again = comparison.runner.outputs(images)
            spread = float(np.max([spread, *(np.abs(again[name] - values).max() for name, values in first.items())]))
        detail = f"{REPEATS} runs gave the same bits" if spread == 0 else f"{REPEATS} runs differ"
        yield self.row("repeated runs", spread, comparison.gates.repeats, detail, batch=batch)


class PrecisionCheck(CheckKind):
    """What the graph and the built engine compute in, against what was asked for."""

    name = "precision"

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        about = comparison.about
        if comparison.onnx_model is not None:
            yield self._of_file(comparison)
        elif about.path is not None and about.file_kind == "engine":
            passport = read_passport(about.path)
            if not passport.layers:  # compiled code has none to count
                return
            precision = passport.metadata.precision
            if passport.engine_layers is None:
                yield self.row("precision of the engine", None, LOST_LAYERS, "it has not been inspected")
                return
            network_share, engine_share = (
                _share(counts, precision) for counts in (passport.layers, passport.engine_layers)
            )
            detail = f"{engine_share:.0%} of its layers in {precision}, {network_share:.0%} of the parsed network's"
            loss = max(0.0, 1 - engine_share / network_share) if network_share else 1.0
            yield self.row("precision of the engine", loss, LOST_LAYERS, detail)

    def _of_file(self, comparison: "Comparison") -> Check:
        from dat_deploy.export.census import precision_census
        from dat_deploy.export.precision import nodes_in_another_precision
        from dat_deploy.export.quantized_graph import quantized_differently
        from dat_deploy.export.records import operator_records

        model, path = comparison.onnx_model, comparison.about.path
        assert model is not None
        assert path is not None
        metadata = FileMetadata.from_properties(dict(model.metadata_props), path)
        records = operator_records(model.metadata_props)
        locations = [name for record in records for name in record.locations]
        if PRECISIONS[metadata.precision].is_exported:
            wrong = nodes_in_another_precision(
                model, metadata.precision, locations, fp32=metadata.fp32_added, no_fp32=metadata.fp32_removed
            )
        else:
            wrong = quantized_differently(model)
        detail = f"asked {metadata.precision}, but {wrong[0]}" if wrong else f"asked {metadata.precision}"
        if not wrong:
            detail += f"; {precision_census(load_onnx(path))}".replace("precision: ", "")
        return self.row("precision of the file", float(len(wrong)), 0.0, detail, "nodes")


def _share(layers: dict[str, int], precision: str) -> float:
    """Of the layers that compute in floating point or int8."""
    computing = {name: count for name, count in layers.items() if name not in ("cast", "integer")}
    return computing.get(precision, 0) / max(1, sum(computing.values()))


class WeightsCheck(CheckKind):
    """The tensors of the file against the checkpoint's: one that is off by little hides in what a precision may err."""

    name = "weights"

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        from dat_deploy.validate.weights import weight_errors

        model = comparison.onnx_model
        if model is None:
            return
        parameters = comparison.reference.model.state_dict()
        errors = weight_errors(model, parameters)
        if not errors.compared:
            yield self.row(
                "weights of the file", None, 0.0, "none of its tensors has the name of a parameter", "tensors"
            )
            return
        detail = f"{errors.compared} of {len(parameters)} have the names of the network's parameters"
        if errors.off:
            detail += f"; {errors.worst} is off by {errors.steps:.3g} steps of its type"
        basis = "rounding to the nearest"
        yield self.row("weights of the file", float(len(errors.off)), 0.0, detail, "tensors", basis=basis)


class RangeCheck(CheckKind):
    """Whether half precision holds what the network computes, measured in float32: what runs the file may widen it."""

    name = "range"
    in_numbers = True

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        about = comparison.about
        if comparison.precision.is_half:
            yield self._of_pytorch(comparison)
        precision = PRECISIONS[about.file_precision or about.answer_precision]
        if not precision.is_half:
            return
        name = f"range in {precision.name}"
        if comparison.graph is None:
            yield self.row(name, None, 100.0, "only an ONNX file, on a runtime that runs parts, shows its tensors", "%")
            return
        import torch

        from dat_deploy.validate.overflow import kept_in_fp32
        from dat_deploy.validate.ranges import half_ranges, modules_to_keep

        comparison.progress("range of each tensor")
        images = np.concatenate([comparison.photos, *comparison.stress.values()])
        ranges = half_ranges(comparison.runner, comparison.graph, precision, images)
        if not ranges:
            return
        limit = torch.finfo(precision.dtype).max
        outside = [each for each in ranges if not each.largest <= limit]
        worst = outside[0] if outside else max(ranges, key=lambda each: each.largest)
        detail = f"{worst.node} holds {worst.largest:.3g}, {precision.name} {limit:.4g}"
        if outside:
            detail += f"; {kept_in_fp32(modules_to_keep(outside), precision.name)}"
        yield self.row(name, 100 * worst.largest / limit, 100.0, detail, "%", basis="the largest number of the type")
        lost = [each for each in ranges if each.flushed > MOST_FLUSHED]
        worst = max(lost or ranges, key=lambda each: each.flushed)
        detail = f"{worst.node} is worst" if lost or worst.flushed else "nothing is rounded to zero"
        if lost:
            detail += f"; {kept_in_fp32(modules_to_keep(lost), precision.name)}"
        yield self.row(f"flushed in {precision.name}", 100 * worst.flushed, 100 * MOST_FLUSHED, detail, "%")

    def _of_pytorch(self, comparison: "Comparison") -> Check:
        from dat_deploy.validate.overflow import first_overflow, kept_in_fp32

        name = f"eager PyTorch in {comparison.precision.name}"
        if comparison.lowered is None:
            detail = f"networks of family '{comparison.about.family}' have no half precision in PyTorch"
            return self.row(name, None, 0.0, detail, "images")
        finite = all(math.isfinite(error) for errors in comparison.lowered_errors for error in errors.values())
        if finite:
            return self.row(name, 0.0, 0.0, "finite on all images", "images")
        images = np.concatenate([comparison.different[0], *comparison.stress.values()])
        module, count = first_overflow(comparison.lowered[0], images, comparison.lowered[1]) or ("", len(images))
        advice = kept_in_fp32([module] if module else [], comparison.precision.name)
        detail = f"overflows first in {module or 'the network itself'}; {advice}"
        return self.row(name, float(count), 0.0, detail, "images")


class RoundingCheck(CheckKind):
    """A file in half precision by ONNX's own rules, which round after each step, where what runs it does not."""

    name = "rounding"

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        about, graph = comparison.about, comparison.onnx_model
        precision = PRECISIONS[about.file_precision or about.answer_precision]
        if about.judged_in is None or graph is None or not precision.is_half:
            return
        name = f"rounded in {precision.name}"
        batch = about.batch or 1
        from dat_deploy.validate.evaluator import answers_by_the_rules, gigamacs

        work = gigamacs(comparison.reference.model, comparison.photos[0])
        if work * batch > MOST_GIGAMACS:
            detail = (
                f"{work:.2g} GMACs are more than the {MOST_GIGAMACS:g} that are rounded step by step here; build it, "
                f"and validate the engine where {precision.name} is computed"
            )
            yield self.row(name, None, 0.0, detail)
            return
        comparison.progress("ONNX's reference evaluator")
        images = comparison.photos[: 2 if batch == 1 else batch]
        expected = {key: values[: len(images)] for key, values in comparison.expected.items()}
        outputs = answers_by_the_rules(graph, about, images)
        row = self.worst_output(comparison, name, batch, outputs, expected, detail="onnx's reference evaluator")
        yield row


class CoordinatesCheck(CheckKind):
    """Each deformable operator of the file alone, at locations that a trained network seldom visits."""

    name = "coordinates"
    in_numbers = True

    def run(self, comparison: "Comparison") -> Iterable[Check]:
        import torch

        from dat_deploy.export.records import operator_records
        from dat_deploy.export.subgraph import operator_model
        from dat_deploy.networks.operators import operator_weights
        from dat_deploy.plugins.eager import LOCATIONS, eager_output, stress_inputs
        from dat_deploy.plugins.operator import specification

        graph, about = comparison.graph, comparison.about
        if not about.network.sampled_blocks:
            return []
        if graph is None:
            return [self.row("coordinates", None, FP32_TOLERANCE, "only an ONNX file can be cut into operators")]
        # the first of its module: `sampling_locations` calls the attention again, with values that are constant
        deformable = [record for record in operator_records(graph.metadata_props) if record.locations]
        records = list({(r.name.partition("/")[0], r.operator): r for r in reversed(deformable)}.values())[::-1]
        if not records:
            return [self.row("coordinates", None, FP32_TOLERANCE, "the file's metadata no longer lists its operators")]
        sampled = {block.name: block for block in about.network.sampled_blocks}
        blocks = family_of(about.network).blocks(about.network)
        steps = {(block.name, step.operator): (block, step) for block in blocks for step in block.steps}
        if not all((r.name.partition("/")[0], r.operator) in steps for r in records):
            detail = f"its family, {about.family}, does not say what its operators are fed with"
            return [self.row("coordinates", None, FP32_TOLERANCE, detail)]
        precision = comparison.precision
        # eight bits leave the operators alone
        dtype, factor = (precision.dtype, OF_LOWER) if precision.is_half else (torch.float32, OF_FLOAT32)
        worst: dict[str, Check] = {}
        for record in records:
            comparison.progress(f"coordinates: {record.name}")
            run = comparison.runner.open_graph(operator_model(graph, record))
            module = record.name.partition("/")[0]
            sizes = sampled[module].sizes(about.batch or 2)
            weights = operator_weights(comparison.reference.model, *steps[module, record.operator])
            for kind in LOCATIONS:
                inputs = stress_inputs(specification(record.operator), record.inputs, sizes, kind)
                exact = eager_output(record.operator, weights | inputs, record.attributes)
                outputs = run({name: value.numpy() for name, value in inputs.items()})
                error, tolerance, basis = _largest_error(outputs, exact), FP32_TOLERANCE, f"{FP32_TOLERANCE:g}"
                if precision.is_half or not error <= FP32_TOLERANCE:
                    # in a lower precision the points would move, and any fault be in the tolerance
                    of_locations = dtype if about.rounds_locations else torch.float32
                    rounded = eager_output(record.operator, weights | inputs, record.attributes, dtype, of_locations)
                    own = factor * _largest_error(rounded, exact)
                    most = TELLS_APART * float(exact.std())
                    tolerance = min(max(own, 0.0 if precision.is_half else FP32_TOLERANCE), most)
                    tolerance = tolerance if math.isfinite(own) else most
                    basis = f"{factor:g} times eager PyTorch's own error in {str(dtype).removeprefix('torch.')}"
                detail = f"{len(records)} operators, worst {record.name}"
                row = self.row(f"coordinates: {kind}", error, tolerance, detail, basis=basis)
                if kind not in worst or not row.share <= worst[kind].share:  # NaN is the worst
                    worst[kind] = row
        return worst.values()


class DriftCheck(CheckKind):
    """Where the blocks look, on the photographs."""

    name = "drift"
    in_numbers = True

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        from dat_deploy.validate.drift import block_drift

        blocks = {block.name: block for block in comparison.about.network.sampled_blocks}
        expected = comparison.locations
        if not expected:
            return
        engine_locations = comparison.engine_locations
        if engine_locations is None:
            detail = "the engine does not give its locations; build it from `export(sampling_locations=True)`"
            yield self.row("drift of sampling locations", None, LEAST_DRIFT_PX, detail, "px")
            return
        drift = [
            block_drift(blocks[name], engine_locations[name], where, *self._allowed(comparison, blocks[name], where))
            for name, where in expected.items()
        ]
        comparison.drift = tuple(drift)
        worst = max(drift, key=lambda block: block.share)
        detail = f"{len(drift)} blocks, worst {worst.block}: median {worst.median:.1e}, p99 {worst.p99:.1e} px"
        if worst.left_out:
            detail += f", but for {worst.left_out:.1%} of the points, which rounding throws far"
        yield self.row("drift of sampling locations", worst.judged, worst.allowed, detail, "px", basis=worst.basis)

    def _allowed(
        self, comparison: "Comparison", block: "SampledBlock", expected: "Locations"
    ) -> tuple[float, str, float]:
        """Pixels, what they were derived from, and the share of the points that may be further off."""
        if comparison.gates.drift_px is not None:
            return comparison.gates.drift_px, "the gate", 0.0
        cap = TELLS_APART * block.extent_px
        if comparison.is_full:
            least = f"{LEAST_DRIFT_PX:g} px"
            drift = block.distances_px(comparison.engine_locations[block.name], expected)  # type: ignore[index]  # there are some
            if not drift.max() > LEAST_DRIFT_PX:
                return min(LEAST_DRIFT_PX, cap), least, 0.0
            lowered, factor, basis = comparison.exact_locations, OF_FLOAT32, "the drift of float32 against float64"
        elif comparison.lowered_locations is None:
            return min(INT8_DRIFT_PX, cap), f"{INT8_DRIFT_PX:g} px, and a third of the map at most", 0.0
        else:
            lowered, factor = comparison.lowered_locations, ROUNDED_DRIFTS
            basis = f"the drift of eager PyTorch in {comparison.precision.name}"
        own = np.nan_to_num(block.distances_px(lowered[block.name], expected), nan=np.inf)
        allowed = factor * float(own.max()) + LEAST_DRIFT_PX
        thrown = factor * float((factor * own > cap).mean())
        if not comparison.precision.is_exported:
            allowed, thrown = max(allowed, INT8_DRIFT_PX), max(thrown, THROWN_BY_INT8)
            basis += f", {INT8_DRIFT_PX:g} px at least"
        if allowed <= cap:
            return allowed, f"{factor:g} times {basis}", thrown
        return cap, f"a third of the map's extent, less than {factor:g} times {basis}", min(thrown, MOST_THROWN)


class DataCheck(CheckKind):
    """A folder of images."""

    name = "data"

    def run(self, comparison: "Comparison") -> Sequence[Check]:
        if comparison.data is None:
            if PRECISIONS[comparison.about.answer_precision].is_exported or "logits" not in comparison.about.outputs:
                return []
            detail = "what eight bits cost shows on images alone: give `data`"
            return [self.row("top-1", None, comparison.gates.top1_drop, detail, "points")]
        comparison.accuracy = compare_on_data(
            comparison.runner,
            comparison.reference,
            comparison.about,
            comparison.data,
            comparison.data_scale,
            strict=comparison.strict_data,
            progress=comparison.data_progress,
        )
        tolerance = comparison.data_tolerance
        if not comparison.accuracy.scaled_error <= tolerance.allowed:
            tolerance = comparison.widened(tolerance, "logits")
        return accuracy_rows(comparison.accuracy, comparison.gates, tolerance)


CHECKS: dict[str, CheckKind] = {
    kind.name: kind
    for kind in (
        PreprocessingCheck(),
        PhotographsCheck(),
        TellingCheck(),
        DecisionsCheck(),
        StressCheck(),
        SlotsCheck(),
        RepeatsCheck(),
        PrecisionCheck(),
        WeightsCheck(),
        RangeCheck(),
        RoundingCheck(),
        CoordinatesCheck(),
        DriftCheck(),
        DataCheck(),
    )
}
