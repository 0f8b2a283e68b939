"""The checks, by kind: each looks at one thing that goes wrong, and gives rows with a verdict."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dat_deploy.engine.passport import read_passport
from dat_deploy.export.census import precision_census
from dat_deploy.export.precision import nodes_in_another_precision
from dat_deploy.export.quantized_graph import quantized_differently
from dat_deploy.export.records import operator_records
from dat_deploy.export.subgraph import operator_model
from dat_deploy.images.preprocess import golden_sha256
from dat_deploy.metadata import FileMetadata, load_onnx
from dat_deploy.networks.family import family_of
from dat_deploy.networks.operators import operator_weights
from dat_deploy.plugins.eager import LOCATIONS, eager_output, stress_inputs
from dat_deploy.plugins.operator import specification
from dat_deploy.runners import parse_engine
from dat_deploy.validate.accuracy import Accuracy, compare_on_data
from dat_deploy.validate.comparison import (
    DTYPES,
    Comparison,
    Images,
    Outputs,
    precision_of,
    rounds_everything,
)
from dat_deploy.validate.drift import BlockDrift, block_drift
from dat_deploy.validate.gates import Gates
from dat_deploy.validate.kinds import FP32_TOLERANCE, OF_ENGINE, OF_SIZE
from dat_deploy.validate.report import Check

__all__ = ["ENGINE_CHECKS", "SIZE_CHECKS", "accuracy_rows", "check_accuracy", "check_drift"]

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


def check_preprocessing(comparison: Comparison) -> Iterator[Check]:
    """The file's own preprocessing against that of its network's training: both sides of every other check use it."""
    own, trained = comparison.about.preprocessing, comparison.about.network.preprocessing
    changed = [
        f"{name} is {getattr(own, name)}, trained with {getattr(trained, name)}"
        for name in ("image_size", "resize_size", "interpolation", "crop", "mean", "std", "color")
        if getattr(own, name) != getattr(trained, name)
    ]
    recorded = _golden_sha256(comparison)
    if recorded and recorded != golden_sha256(own):
        changed.append("the golden picture comes out otherwise than at export")
    detail = "; ".join(changed) or "as trained"
    yield Check("preprocessing", "preprocessing", None, float(len(changed)), 0.0, detail, "settings")


def _golden_sha256(comparison: Comparison) -> str:
    """As the file or the passport has it; empty if neither does."""
    _, target = parse_engine(comparison.about.name)
    if comparison.onnx_model is not None:
        metadata = FileMetadata.from_properties(dict(comparison.onnx_model.metadata_props), Path(target))
        # of the file's own size, not of another that this comparison is at
        return metadata.golden_sha256 if metadata.preprocessing == comparison.about.preprocessing else ""
    return read_passport(Path(target)).metadata.golden_sha256 if target.endswith((".engine", ".pt2")) else ""


def check_precision(comparison: Comparison) -> Iterator[Check]:
    """What the graph and the built engine compute in, against what was asked for."""
    model = comparison.onnx_model
    _, target = parse_engine(comparison.about.name)
    if model is not None:
        metadata = FileMetadata.from_properties(dict(model.metadata_props), Path(target))
        records = operator_records(model.metadata_props)
        locations = [name for record in records for name in record.locations]
        if metadata.precision == "int8":
            wrong = quantized_differently(model)
        else:
            wrong = nodes_in_another_precision(
                model, metadata.precision, locations, fp32=metadata.fp32_added, no_fp32=metadata.fp32_removed
            )
        detail = f"asked {metadata.precision}, but {wrong[0]}" if wrong else f"asked {metadata.precision}"
        if not wrong:
            detail += f"; {precision_census(load_onnx(Path(target)))}".replace("precision: ", "")
        yield Check("precision", "precision of the file", None, float(len(wrong)), 0.0, detail, "nodes")
    elif target.endswith(".engine"):
        passport = read_passport(Path(target))
        asked = passport.metadata.precision
        if passport.engine_layers is None:
            yield Check("precision", "precision of the engine", None, None, LOST_LAYERS, "it has not been inspected")
        else:
            parsed, built = (_share(counts, asked) for counts in (passport.layers, passport.engine_layers))
            detail = f"{built:.0%} of its layers in {asked}, {parsed:.0%} of the parsed network's"
            lost = max(0.0, 1 - built / parsed) if parsed else 1.0
            yield Check("precision", "precision of the engine", None, lost, LOST_LAYERS, detail)


def _share(layers: dict[str, int], precision: str) -> float:
    """Of the layers that compute in floating point or int8."""
    computing = {name: count for name, count in layers.items() if name not in ("cast", "integer")}
    return computing.get(precision, 0) / max(1, sum(computing.values()))


def check_photographs(comparison: Comparison) -> Iterator[Check]:
    """Real images at every batch."""
    about, tolerances = comparison.about, comparison.tolerances
    if about.profiles:
        refused = [batch for batch in sorted(set(comparison.batches)) if not about.takes_batch(batch)]
        detail = f"it was built for {about.batches_taken}"
        for batch in refused:
            yield Check("photographs", "photographs", batch, None, max(tolerances.values()), detail)
    photos, expected = comparison.photos, comparison.expected
    for batch in comparison.tried:
        comparison.progress(f"photographs, batch {batch}")
        got = {name: np.empty_like(values) for name, values in expected.items()}
        for images, slots in _filled(photos, batch):
            for name, values in comparison.runner.outputs(images).items():
                got[name][slots] = values
        detail = ""
        if "logits" in got:
            agreeing = int((got["logits"].argmax(axis=1) == expected["logits"].argmax(axis=1)).sum())
            detail = f"top-1 agrees on {agreeing} of {len(photos)}"
        yield _outputs("photographs", "photographs", batch, got, expected, tolerances, detail)


def check_stress(comparison: Comparison) -> Iterator[Check]:
    """Images that no photograph resembles."""
    batch = comparison.about.least_batch
    for label, image in comparison.stress.items():
        comparison.progress(f"stress image: {label}")
        got = comparison.runner.outputs(np.repeat(image, batch, axis=0))
        expected = comparison.stress_expected[label]
        yield _outputs("stress", f"stress image: {label}", batch, got, expected, comparison.tolerances, "")


def check_slots(comparison: Comparison) -> Iterator[Check]:
    """A runtime that mixes up the images of a batch passes every test on one image (NVIDIA/TensorRT#4813)."""
    photos, expected = comparison.photos, comparison.expected
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
        yield _outputs("slots", "slots: one image in all", batch, same, first, comparison.tolerances, detail)
        order = np.roll(np.arange(batch), 1) % len(photos)
        permuted = {name: values[order] for name, values in expected.items()}
        got = comparison.runner.outputs(photos[order])
        yield _outputs("slots", "slots: images permuted", batch, got, permuted, comparison.tolerances, "")
    tried = ", ".join(map(str, comparison.tried))
    detail = f"one image in every slot of batch {tried}: {'the same bits' if bits else 'not the same bits'}"
    allowed = comparison.gates.batch_spread
    if allowed is None:
        is_fp32 = precision_of(comparison.about) == "fp32"
        largest = max(comparison.tolerances.values())
        allowed = min(FP32_SPREAD, largest) if is_fp32 and comparison.asked_tolerance is None else largest
    yield Check("slots", "batch invariance", None, spread, allowed, detail)


def check_repeats(comparison: Comparison) -> Iterator[Check]:
    """The same batch again and again."""
    batch = comparison.tried[-1]
    comparison.progress(f"repeated runs, batch {batch}")
    images = comparison.photos[np.arange(batch) % len(comparison.photos)]
    first = comparison.runner.outputs(images)
    spread = 0.0
    for _ in range(REPEATS - 1):
        again = comparison.runner.outputs(images)
        spread = float(np.max([spread, *(np.abs(again[name] - values).max() for name, values in first.items())]))
    detail = f"{REPEATS} runs gave the same bits" if spread == 0 else f"{REPEATS} runs differ"
    yield Check("repeats", "repeated runs", batch, spread, comparison.gates.repeats, detail)


def check_coordinates(comparison: Comparison) -> Iterator[Check]:
    """Each deformable operator of the file alone, at locations that a trained network seldom visits."""
    model, about = comparison.onnx_model, comparison.about
    if not about.network.sampled_blocks:
        return
    if model is None:
        detail = "only an ONNX file can be cut into operators"
        yield Check("coordinates", "coordinates", None, None, FP32_TOLERANCE, detail)
        return
    # the first of its module: `--sampling-locations` calls the attention again, with values that are constant
    deformable = [record for record in operator_records(model.metadata_props) if record.locations]
    records = list({(r.name.partition("/")[0], r.operator): r for r in reversed(deformable)}.values())[::-1]
    if not records:
        detail = "the file's metadata no longer lists its operators"
        yield Check("coordinates", "coordinates", None, None, FP32_TOLERANCE, detail)
        return
    sampled = {block.name: block for block in about.network.sampled_blocks}
    blocks = family_of(about.network).blocks(about.network)
    steps = {(block.name, step.operator): (block, step) for block in blocks for step in block.steps if step.operator}
    dtype = DTYPES.get(precision_of(about))  # eight bits leave the operators alone
    worst: dict[str, Check] = {}
    for record in records:
        comparison.progress(f"coordinates: {record.name}")
        run = comparison.runner.open_graph(operator_model(model, record))
        module = record.name.partition("/")[0]
        sizes = sampled[module].sizes(about.batch or 2)
        weights = operator_weights(comparison.reference.model, *steps[module, record.operator])
        for kind in LOCATIONS:
            inputs = stress_inputs(specification(record.operator), record.inputs, sizes, kind)
            exact = eager_output(record.operator, weights | inputs, record.attributes)
            tolerance = FP32_TOLERANCE
            if dtype is not None:
                # in a lower precision the points would move, and any fault be in the tolerance
                of_locations = dtype if rounds_everything(about) else torch.float32
                rounded = eager_output(record.operator, weights | inputs, record.attributes, dtype, of_locations)
                tolerance = 2 * float(np.abs(rounded - exact).max())
            got = run({name: value.numpy() for name, value in inputs.items()})
            detail = f"{len(records)} operators, worst {record.name}"
            check = _check("coordinates", f"coordinates: {kind}", None, got, exact, tolerance, detail)
            if kind not in worst or not check.share <= worst[kind].share:  # NaN is the worst
                worst[kind] = check
    yield from worst.values()


def check_drift(comparison: Comparison) -> tuple[list[Check], tuple[BlockDrift, ...]]:
    """Where the blocks look, on the photographs."""
    blocks = {block.name: block for block in comparison.about.network.sampled_blocks}
    expected = comparison.locations
    if not expected:
        return [], ()
    got = comparison.engine_locations
    if got is None:
        detail = "the engine does not give its locations; build it from export --sampling-locations"
        return [Check("drift", "drift of sampling locations", None, None, LEAST_DRIFT_PX, detail, "px")], ()
    rows = []
    allowed = dict.fromkeys(
        expected, LEAST_DRIFT_PX if comparison.gates.drift_px is None else comparison.gates.drift_px
    )
    precision = precision_of(comparison.about)
    if comparison.gates.drift_px is None and precision == "int8":
        allowed = dict.fromkeys(expected, INT8_DRIFT_PX)
    elif comparison.gates.drift_px is None and precision != "fp32":
        for name, locations in comparison.rounded_locations.items():
            allowed[name] += ROUNDED_DRIFTS * float(blocks[name].distances_px(locations, expected[name]).max())
    for name, locations in expected.items():
        rows.append(block_drift(blocks[name], got[name], locations, allowed[name]))
    worst = max(rows, key=lambda row: row.share)
    detail = f"{len(rows)} blocks, worst {worst.block}: median {worst.median:.1e}, p99 {worst.p99:.1e} px"
    check = Check("drift", "drift of sampling locations", None, worst.largest, worst.allowed, detail, "px")
    return [check], tuple(rows)


def check_accuracy(comparison: Comparison, progress: Callable[[int, int], None]) -> tuple[list[Check], Accuracy | None]:
    """A folder of images."""
    if comparison.data is None:
        if precision_of(comparison.about) != "int8" or "logits" not in comparison.about.outputs:
            return [], None
        detail = "what eight bits cost shows on images alone: give --data"
        return [Check("data", "top-1", None, None, comparison.gates.top1_drop, detail, "points")], None
    found = compare_on_data(
        comparison.runner,
        comparison.reference,
        comparison.about,
        comparison.data,
        strict=comparison.strict_data,
        progress=progress,
    )
    return accuracy_rows(found, comparison.gates, _data_tolerance(comparison)), found


def accuracy_rows(found: Accuracy, gates: Gates, tolerance: float) -> list[Check]:
    """What was found, held to the gates; `tolerance` is of the logits."""
    rows = []

    def row(name: str, error: float, allowed: float, detail: str, unit: str) -> None:
        rows.append(Check("data", name, None, error, allowed, detail, unit))

    if found.engine is not None and found.reference is not None:
        for name, engine, reference, gate in (
            ("top-1", found.engine.top1, found.reference.top1, "top1_drop"),
            ("top-5", found.engine.top5, found.reference.top5, "top5_drop"),
        ):
            detail = (
                f"{engine.percent:.2f}% ({engine.low:.2f} to {engine.high:.2f}), PyTorch {reference.percent:.2f}% "
                f"({reference.low:.2f} to {reference.high:.2f})"
            )
            if name == "top-1":
                detail += f", McNemar's p {found.mcnemar_p:.2g}"
            lost = 100 * max(0, reference.count - engine.count) / found.images
            row(f"{name} lost", lost, _of_images(gates, gate, found.images), detail, "points")
    agreement = found.agreement
    disagreeing = 100 * (agreement.images - agreement.count) / agreement.images
    detail = f"{agreement.images - agreement.count} of {agreement.images} flip"
    if found.flips and math.isfinite(found.flips[0].reference_margin):
        detail += f", the surest by {found.flips[0].reference_margin:.2g} logits"
    row("images that flip", disagreeing, _of_images(gates, "disagreement", agreement.images), detail, "%")
    detail = f"mean {found.mean_error:.1e}, p99.9 {found.p999_error:.1e}"
    if found.not_finite:
        detail = f"NaN or infinity for {found.not_finite} images"
    row("logits on data", found.largest_error, tolerance, detail, "")
    row("cosine on data", 1 - found.least_cosine, gates.cosine_distance, f"least {found.least_cosine:.8f}", "")
    if found.unreadable:
        total = found.images + len(found.unreadable)
        named = ", ".join(path.name for path, _ in found.unreadable[:3])
        detail = f"{len(found.unreadable)} of {total} left out: {named}{' ...' * (len(found.unreadable) > 3)}"
        row("unreadable images", 100 * len(found.unreadable) / total, gates.unreadable, detail, "%")
    return rows


def _of_images(gates: Gates, name: str, images: int) -> float:
    """The gate in percent of so many images; by default one image, at least."""
    gate: float = getattr(gates, name)
    return gate if name in gates.exact else max(gate, 100 / images)


def _data_tolerance(comparison: Comparison) -> float:
    """Of the logits: thousands of images find rarer inputs than the photographs that it was derived from."""
    factor = 1 if comparison.asked_tolerance is not None or precision_of(comparison.about) == "fp32" else 4
    return factor * comparison.tolerances["logits"]


_Checks = dict[str, Callable[[Comparison], Iterable[Check]]]
_OF_SIZE = (check_preprocessing, check_photographs, check_stress, check_slots, check_repeats)
SIZE_CHECKS: _Checks = dict(zip(OF_SIZE, _OF_SIZE, strict=True))
ENGINE_CHECKS: _Checks = dict(zip(OF_ENGINE, (check_precision, check_coordinates), strict=True))


def _outputs(
    kind: str,
    name: str,
    batch: int | None,
    got: Outputs,
    expected: Outputs,
    tolerances: dict[str, float],
    detail: str,
) -> Check:
    """The output that is furthest off, measured by what each is allowed."""
    checks = [
        _check(
            kind, name, batch, got[output], expected[output], tolerances[output], detail if len(got) == 1 else output
        )
        for output in expected
    ]
    return max(checks, key=lambda check: math.inf if math.isnan(check.share) else check.share)


def _check(
    kind: str, name: str, batch: int | None, got: NDArray[Any], expected: NDArray[Any], tolerance: float, detail: str
) -> Check:
    error = float(np.abs(got.astype(np.float64) - expected).max())  # NaN if either has one
    return Check(kind, name, batch, error, tolerance, detail)


def _filled(images: Images, batch: int) -> Iterable[tuple[Images, list[int]]]:
    """Batches of exactly `batch` images that together hold each image, and the index of the image in each slot."""
    for first in range(0, len(images), batch):
        slots = [(first + slot) % len(images) for slot in range(batch)]
        yield images[slots], slots
