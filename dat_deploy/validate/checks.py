"""The checks: each class looks at one thing that goes wrong, and gives rows with a verdict."""

import abc
import math
from collections.abc import Iterable, Iterator, Sequence
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
from dat_deploy.validate.defaults import FP32_TOLERANCE

if TYPE_CHECKING:
    from dat_deploy.validate.comparison import Comparison

# What loads torch or a graph library is imported where a check runs, so that the list of checks is light.

__all__ = ["CHECKS", "CheckKind"]

REPEATS = 5
LOST_LAYERS = 0.5  # of those asked for in a precision; fusion counts layers anew, but never turns most of them back
# float32 at different batch sizes takes other kernels, which sum in another order; 2e-6 was the most seen.
FP32_SPREAD = 1e-5
# Locations are float32 in every precision; between runtimes they differed by 1e-5 px at most.
LEAST_DRIFT_PX = 1e-3
# Of eager PyTorch's own drift in the engine's precision: a block has few points, and the largest of few varies.
ROUNDED_DRIFTS = 4
# Eight bits move the features that offsets are computed from; a pixel is what training itself jitters.
INT8_DRIFT_PX = 1.0


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
    ) -> Check:
        return Check(self.name, name, batch, error, tolerance, detail, unit, self.in_numbers)

    def worst_output(
        self, name: str, batch: int, outputs: Outputs, expected: Outputs, tolerances: dict[str, float], detail: str = ""
    ) -> Check:
        """The output that is furthest off, measured by what each is allowed."""
        rows = [
            self.row(
                name,
                _largest_error(outputs[output], expected[output]),
                tolerances[output],
                detail if len(outputs) == 1 else output,
                batch=batch,
            )
            for output in expected
        ]
        return max(rows, key=lambda row: math.inf if math.isnan(row.share) else row.share)


def _largest_error(values: NDArray[Any], expected: NDArray[Any]) -> float:
    """NaN if either has one."""
    return float(np.abs(values.astype(np.float64) - expected).max())


def _is_full(comparison: "Comparison") -> bool:
    """Whether nothing is rounded to less than float32."""
    precision = PRECISIONS[comparison.about.answer_precision]
    return precision.is_exported and not precision.is_half


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
        about, tolerances = comparison.about, comparison.tolerances
        if about.profiles:
            detail = f"it was built for {about.batches_taken}"
            for batch in sorted(set(comparison.batches)):
                if not about.takes_batch(batch):
                    yield self.row("photographs", None, max(tolerances.values()), detail, batch=batch)
        photos, expected = comparison.photos, comparison.expected
        for batch in comparison.tried:
            comparison.progress(f"photographs, batch {batch}")
            outputs = comparison.runner.in_batches(photos, batch)
            detail = ""
            if "logits" in outputs:
                agreeing = int((outputs["logits"].argmax(axis=1) == expected["logits"].argmax(axis=1)).sum())
                detail = f"top-1 agrees on {agreeing} of {len(photos)}"
            yield self.worst_output("photographs", batch, outputs, expected, tolerances, detail)


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
            yield self.worst_output(f"stress image: {label}", batch, outputs, expected, comparison.tolerances)


class SlotsCheck(CheckKind):
    """A runtime that mixes up the images of a batch passes every test on one image (NVIDIA/TensorRT#4813)."""

    name = "slots"
    at_each_size = True
    in_numbers = True

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        photos, expected, tolerances = comparison.photos, comparison.expected, comparison.tolerances
        alone: Outputs | None = None
        spread, bits = 0.0, True
        for batch in comparison.tried:
            comparison.progress(f"slots, batch {batch}")
            same = comparison.runner.outputs(np.repeat(photos[:1], batch, axis=0))
            alone = alone or {name: values[:1] for name, values in same.items()}
            spread = float(np.max([spread, *(np.abs(values - alone[name]).max() for name, values in same.items())]))
            bits = bits and all(np.array_equal(values, values[:1].repeat(batch, axis=0)) for values in same.values())
            bits = bits and all(np.array_equal(values[:1], alone[name]) for name, values in same.items())
            if batch == 1:
                continue
            apart = max(float(np.abs(values - values[:1]).max()) for values in same.values())
            first = {name: values[:1] for name, values in expected.items()}
            detail = f"slots differ by at most {apart:.1e}"
            yield self.worst_output("slots: one image in all", batch, same, first, tolerances, detail)
            order = np.roll(np.arange(batch), 1) % len(photos)
            permuted = {name: values[order] for name, values in expected.items()}
            outputs = comparison.runner.outputs(photos[order])
            yield self.worst_output("slots: images permuted", batch, outputs, permuted, tolerances)
        batches = ", ".join(map(str, comparison.tried))
        detail = f"one image in every slot of batch {batches}: {'the same bits' if bits else 'not the same bits'}"
        limit = comparison.gates.batch_spread
        if limit is None:
            limit = max(tolerances.values())
            if comparison.asked_tolerance is None and _is_full(comparison):
                limit = min(FP32_SPREAD, limit)
        yield self.row("batch invariance", spread, limit, detail)


class RepeatsCheck(CheckKind):
    """The same batch again and again."""

    name = "repeats"
    at_each_size = True

    def run(self, comparison: "Comparison") -> Iterator[Check]:
        batch = comparison.tried[-1]
        comparison.progress(f"repeated runs, batch {batch}")
        images = comparison.photos[np.arange(batch) % len(comparison.photos)]
        first = comparison.runner.outputs(images)
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
        precision = PRECISIONS[about.answer_precision]
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
                tolerance = FP32_TOLERANCE
                if precision.is_half:  # eight bits leave the operators alone
                    # in a lower precision the points would move, and any fault be in the tolerance
                    of_locations = precision.dtype if about.rounds_locations else torch.float32
                    rounded = eager_output(
                        record.operator, weights | inputs, record.attributes, precision.dtype, of_locations
                    )
                    tolerance = 2 * float(np.abs(rounded - exact).max())
                outputs = run({name: value.numpy() for name, value in inputs.items()})
                detail = f"{len(records)} operators, worst {record.name}"
                row = self.row(f"coordinates: {kind}", _largest_error(outputs, exact), tolerance, detail)
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
        gate, precision = comparison.gates.drift_px, PRECISIONS[comparison.about.answer_precision]
        limits = dict.fromkeys(expected, LEAST_DRIFT_PX if gate is None else gate)
        if gate is None and not precision.is_exported:
            limits = dict.fromkeys(expected, INT8_DRIFT_PX)
        elif gate is None and precision.is_half:
            for name, locations in comparison.rounded_locations.items():
                limits[name] += ROUNDED_DRIFTS * float(blocks[name].distances_px(locations, expected[name]).max())
        drift = [
            block_drift(blocks[name], engine_locations[name], where, limits[name]) for name, where in expected.items()
        ]
        comparison.drift = tuple(drift)
        worst = max(drift, key=lambda block: block.share)
        detail = f"{len(drift)} blocks, worst {worst.block}: median {worst.median:.1e}, p99 {worst.p99:.1e} px"
        yield self.row("drift of sampling locations", worst.largest, worst.allowed, detail, "px")


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
            strict=comparison.strict_data,
            progress=comparison.data_progress,
        )
        # of the logits: thousands of images find rarer inputs than the photographs that it was derived from
        factor = 1 if comparison.asked_tolerance is not None or _is_full(comparison) else 4
        return accuracy_rows(comparison.accuracy, comparison.gates, factor * comparison.tolerances["logits"])


CHECKS: dict[str, CheckKind] = {
    kind.name: kind
    for kind in (
        PreprocessingCheck(),
        PhotographsCheck(),
        StressCheck(),
        SlotsCheck(),
        RepeatsCheck(),
        PrecisionCheck(),
        CoordinatesCheck(),
        DriftCheck(),
        DataCheck(),
    )
}
