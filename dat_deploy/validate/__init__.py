"""Is the engine's answer still PyTorch's? Photographs, stress inputs, batch slots, coordinates, data; one verdict."""

import contextlib
import datetime
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dat_deploy.engine.passport import Verdict, read_passport, record_verdict
from dat_deploy.environment import tool_version
from dat_deploy.errors import DatDeployError, OutputError, PassportError, ShapeError
from dat_deploy.images.data_set import DataSet, open_data_set
from dat_deploy.images.photographs import photographs
from dat_deploy.images.preprocess import check_images
from dat_deploy.progress import Progress
from dat_deploy.runners import EngineDescription, EngineOutline, Runner, check_engine, open_runner
from dat_deploy.validate.check import Check
from dat_deploy.validate.checks import CHECKS
from dat_deploy.validate.defaults import BATCHES, FP32_TOLERANCE, PHOTOGRAPHS
from dat_deploy.validate.gates import OF_DATA, OF_LABELS, check_gates, default_gates
from dat_deploy.validate.report import ValidationReport

if TYPE_CHECKING:
    from dat_deploy.validate.reference import Reference

# What loads torch or a graph library is imported after the checks, so that a wrong argument is told at once.

__all__ = ["BATCHES", "CHECKS", "FP32_TOLERANCE", "Check", "ValidationReport", "validate"]
DataProgress = Callable[[int, int], None]


def validate(
    engine: str | Runner,
    *,
    checkpoint: Path | None = None,
    images: Sequence[Path] | None = None,
    data: Path | None = None,
    limit: int | None = None,
    strict_data: bool = False,
    batches: Sequence[int] = BATCHES,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    tolerance: float | None = None,
    gates: Mapping[str, float] | None = None,
    skip: Collection[str] = (),
    trace: bool = False,
    reference: "Reference | None" = None,
    progress: Progress = lambda _: None,
    data_progress: DataProgress = lambda count, total: None,
) -> ValidationReport:
    """Compare an engine with the eager PyTorch network that holds the same weights.

    Args:
        engine: `[RUNTIME:]TARGET`, see `open_runner`; or one that is open, whose passport is then left alone.
        checkpoint: what the engine was exported from; without one, see `Family.weights`.
        images: photographs of your own; without any, those in scikit-image's wheel.
        data: a folder of images, labelled or not, see `open_data_set`; `limit`: at most so many of them.
        strict_data: let an image of `data` that cannot be read be an error; otherwise it is counted and left out.
        batches: batch sizes to try; an engine of a fixed batch is tried at that one.
        image_sizes: (height, width) in pixels to try; by default the engine's own, and where its size is dynamic a
            rectangle as well, since a size that tracing has frozen shows at another one alone.
        tolerance: largest error of a logit or of an element of another output, as it stands; by default FP32_TOLERANCE
            of how far PyTorch's answers to different images spread in that class or channel, and in a lower precision
            twice the error of eager PyTorch in that precision (int8: four times), in the same terms; a third of the
            distance between two images' answers at most.
        gates: largest values that pass, by name, where they are not to be the defaults; see `Gates`.
        skip: kinds of checks to leave out, of CHECKS; the verdict says so.
        trace: also follow one photograph through the blocks of both sides, for a page; see `Trace`.
        reference: of `reference.open_reference`, which is left open, for engines of the same weights one after another:
            what PyTorch answers is then computed once. Without one, it is opened from `checkpoint`.
        progress: called with the name of each check before it runs; data_progress: see `compare_on_data`.

    Returns:
        The report, passed or failed; `raise_if_failed` turns a failure into an error.

    Raises:
        DatDeployError: if the two sides do not hold the same weights, either cannot be opened, or `data` is refused.
        VerificationError: if PyTorch itself gives NaN on `data`.
    """
    if checkpoint is not None and reference is not None:
        raise DatDeployError("a reference holds its weights already; give it or a checkpoint, not both.")
    if not batches or min(batches) < 1:
        raise ShapeError(f"batches {list(batches)} are not possible; give numbers from 1, such as 1,2,3,8.")
    unknown = sorted(set(skip) - set(CHECKS))
    if unknown:
        raise DatDeployError(f"there is no check '{unknown[0]}' to skip; checks are {', '.join(CHECKS)}.")
    if tolerance is not None and not tolerance > 0:
        raise DatDeployError(f"tolerance got {tolerance}; it takes a number above 0, such as 1e-4.")
    names = check_gates(gates)
    outline = engine.description if isinstance(engine, Runner) else check_engine(engine, checkpoint=checkpoint)
    for size in image_sizes or ():
        outline.network_at(*size)
    check_images(images or ())
    data_set = None if data is None else _data(outline, data, limit)
    for name in names:
        if name in OF_DATA and data_set is None:
            raise DatDeployError(f"gate '{name.replace('_', '-')}' is about data; name a folder of images with `data`.")
        if name in OF_LABELS and data_set is not None and data_set.labels is None:
            raise DatDeployError(
                f"gate '{name.replace('_', '-')}' needs labels, and data '{data}' has none; put its images into a "
                f"folder for each class."
            )
    if not images and "photographs" not in skip:
        photographs(PHOTOGRAPHS)
    from dat_deploy.validate.comparison import Comparison
    from dat_deploy.validate.reference import open_reference
    from dat_deploy.validate.trace import trace_blocks

    with contextlib.ExitStack() as stack:
        progress("opening the engine")
        runner = (
            engine if isinstance(engine, Runner) else stack.enter_context(open_runner(engine, checkpoint=checkpoint))
        )
        about = runner.description
        identity = None if isinstance(engine, Runner) else _identity(about)
        limits = default_gates(about.answer_precision, gates)
        if reference is None:
            progress("opening PyTorch")
            reference = stack.enter_context(open_reference(about, checkpoint))
        else:
            reference.check_fits(about)
        descriptions = [about.at_image_size(*size) for size in image_sizes or _default_sizes(about)]
        kinds = [kind for name, kind in CHECKS.items() if name not in skip]
        checks: list[Check] = []
        comparisons: list[Comparison] = []
        for at_size in descriptions:
            where = "" if descriptions == [about] else f", {at_size.image_size[0]}x{at_size.image_size[1]}"

            def announce(what: str, where: str = where) -> None:
                progress(what + where)

            comparison = Comparison(
                runner,
                reference,
                at_size,
                images,
                batches,
                tolerance,
                limits,
                data_set,
                strict_data,
                announce,
                data_progress,
            )
            rows = [check for kind in kinds if kind.at_each_size for check in kind.run(comparison)]
            checks += [replace(check, name=check.name + where) for check in rows]
            comparisons.append(comparison)
        first = comparisons[0]
        checks += [check for kind in kinds if not kind.at_each_size for check in kind.run(first)]
        block_trace = trace_blocks(first) if trace else None
    notes = () if data_set is None or not data_set.note else (f"data {data_set.folder}: {data_set.note}",)
    report = ValidationReport(
        engine=about,
        reference=reference.description,
        checks=tuple(checks),
        accuracy=first.accuracy,
        drift=first.drift,
        gates=limits,
        file_sha256=_sha256(about.path),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        version=tool_version(),
        skipped=tuple(name for name in CHECKS if name in skip),
        notes=notes,
        trace=block_trace,
    )
    return report if identity is None else _recorded(report, tolerance, gates, identity)


def _data(engine: EngineOutline | EngineDescription, folder: Path, limit: int | None) -> DataSet:
    if engine.network.answer.kind != "classes":
        raise DatDeployError(
            f"{engine.name} is a backbone and classifies nothing; leave `data` out, or validate an engine with logits."
        )
    return open_data_set(folder, engine.network.answer.class_names, limit)


def _sha256(path: Path | None) -> str | None:
    """None of what is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None and path.is_file() else None


def _identity(about: EngineDescription) -> str | None:
    """The SHA-256 in an engine's passport; None of what has none."""
    if about.path is None or about.file_kind != "engine":
        return None
    return read_passport(about.path).engine_sha256


def _recorded(
    report: ValidationReport, tolerance: float | None, gates: Mapping[str, float] | None, identity: str
) -> ValidationReport:
    """An engine's passport carries the last verdict, with what it was held to."""
    assert report.engine.path is not None  # of what has an identity
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    checks = sum(check.passed is not None for check in report.checks)
    batches = tuple(
        sorted({check.batch for check in report.checks if check.batch is not None and check.passed is not None})
    )
    asked = dict(gates) if gates else None
    judged_in = report.engine.judged_in
    verdict = Verdict(report.passed, report.verdict, date, checks, batches, tolerance, asked, judged_in)
    try:
        record_verdict(report.engine.path, verdict, identity)
    except (OutputError, PassportError) as error:
        return replace(report, notes=(*report.notes, f"the verdict is not in the engine's passport: {error}"))
    return report


def _default_sizes(about: EngineDescription) -> list[tuple[int, int]]:
    height, width = about.image_size
    step = about.network.side_multiple
    return [about.image_size] + [(height + step, width + 3 * step)] * about.dynamic_image_size
