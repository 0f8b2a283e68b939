"""Known faults put into a file, one at a time; what validate makes of each."""

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dat_deploy.errors import DatDeployError, VerificationError
from dat_deploy.export import export
from dat_deploy.networks.checkpoint_file import check_checkpoint
from dat_deploy.progress import Progress
from dat_deploy.runners import EngineDescription, check_engine, open_runner, parse_engine
from dat_deploy.validate import ValidationReport, validate
from dat_deploy.validate.defaults import SELF_TEST_BATCHES

if TYPE_CHECKING:
    from dat_deploy.validate.faults import Fault
    from dat_deploy.validate.reference import Reference

# What loads a graph library is imported after the checks, so that a wrong argument is told at once.

OF_SCALED = ("x and y swapped", "weights altered", "answers moved")  # faults put into each badly scaled network

__all__ = ["SelfTest", "Tried", "self_test"]


@dataclass(frozen=True)
class Tried:
    """`caught_by`: the kinds of checks that failed, in the order of the report; `row`: the first that did."""

    fault: str
    story: str
    caught_by: tuple[str, ...]
    row: str


@dataclass(frozen=True)
class SelfTest:
    """What validate made of each fault; `notes` say which were left out, and why.

    Attributes:
        refused: badly scaled networks, of `scaled.SCALED`, that validate failed without a fault.
    """

    engine: EngineDescription
    tried: tuple[Tried, ...]
    notes: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def missed(self) -> list[str]:
        return [trial.fault for trial in self.tried if not trial.caught_by]

    @property
    def verdict(self) -> str:
        caught = len(self.tried) - len(self.missed)
        sentence = f"validate caught {caught} of {len(self.tried)} faults put into {self.engine.name}"
        if self.refused:
            sentence += f"; it failed without a fault: {', '.join(self.refused)}"
        return f"{sentence}; it missed {', '.join(self.missed)}." if self.missed else f"{sentence}."

    def raise_if_failed(self) -> None:
        """Raises VerificationError if a fault was missed, or a sound network failed."""
        if self.missed or self.refused:
            raise VerificationError(self.verdict)


def self_test(
    engine: str | None = None,
    *,
    checkpoint: Path | None = None,
    progress: Progress = lambda _: None,
) -> SelfTest:
    """Put each of FAULTS into an exported file and validate it, but for those that need what the file does not have.

    Args:
        engine: `[RUNTIME:]FILE.onnx` in fp32; by default `demo`, exported for this, and then with badly scaled weights,
            in nine ways, sound and with some of the faults.
        checkpoint: what it was exported from; without one, see `Family.weights`.
        progress: called with the name of each fault.

    Raises:
        DatDeployError: if the engine is no ONNX file, or one in which some faults could not show.
        VerificationError: if it fails without a fault.
    """
    if engine is not None:
        _check(engine)
    check_checkpoint(checkpoint)
    from dat_deploy.validate.faults import FAULTS, lacks
    from dat_deploy.validate.scaled import SCALED_IN_FP32, write_scaled

    refused: list[str] = []
    is_demo = engine is None
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dat-deploy-"))
        if engine is None:
            progress("exporting demo")
            engine = str(Path(folder, "demo.onnx"))
            export("demo", Path(engine))
        progress("no fault")
        about, reference, sound = _sound_report(engine, checkpoint, stack)
        if not sound.passed:
            raise VerificationError(f"the self-test needs an engine that is right. {sound.verdict}")
        lacking = lacks(engine)
        trials = _tried([fault for fault in FAULTS if fault.needs not in lacking], engine, reference, progress)
        for network in SCALED_IN_FP32 if is_demo else ():
            progress(network)
            weights, path = Path(folder, "scaled.safetensors"), Path(folder, "scaled.onnx")
            write_scaled(network, weights)
            export("demo", path, checkpoint=weights, force=True)
            with contextlib.ExitStack() as opened:
                _, other, sound = _sound_report(str(path), weights, opened)
                refused += [] if sound.passed else [network]
                faults = [fault for fault in FAULTS if fault.name in OF_SCALED]
                trials += _tried(faults, str(path), other, progress, network)
    left_out = {name: [fault.name for fault in FAULTS if fault.needs == name] for name in lacking}
    notes = [f"left out, for {about.name} has no {name}: {', '.join(faults)}" for name, faults in left_out.items()]
    return SelfTest(about, tuple(trials), tuple(notes), tuple(refused))


def _sound_report(
    engine: str, checkpoint: Path | None, stack: contextlib.ExitStack
) -> "tuple[EngineDescription, Reference, ValidationReport]":
    from dat_deploy.validate.reference import open_reference

    with open_runner(engine) as runner:
        about = runner.description
        reference = stack.enter_context(open_reference(about, checkpoint))
        return about, reference, validate(runner, batches=SELF_TEST_BATCHES, reference=reference)


def _tried(
    faults: "Sequence[Fault]", engine: str, reference: "Reference", progress: Progress, network: str = ""
) -> list[Tried]:
    from dat_deploy.validate.faults import faulty_report

    trials = []
    with tempfile.TemporaryDirectory(prefix="dat-deploy-") as folder:
        for fault in faults:
            name = f"{fault.name}, {network}" if network else fault.name
            progress(name)
            report = faulty_report(fault, engine, Path(folder), reference)
            failures = [check for check in report.checks if check.passed is False]
            kinds = tuple(dict.fromkeys(check.kind for check in failures))
            trials.append(Tried(name, fault.story, kinds, failures[0].name if failures else ""))
    return trials


def _check(engine: str) -> None:
    if not parse_engine(engine)[0].takes_exported:
        raise DatDeployError(f"faults are put into ONNX files, and '{engine}' is none; name a FILE.onnx.")
    outline = check_engine(engine)
    if outline.batch == 1 or outline.network.answer.kind != "classes" or outline.file_precision != "fp32":
        raise DatDeployError(
            f"the self-test takes an fp32 file that classifies batches, and {engine} is none; export it with "
            '`batch=None` and `precision="fp32"`, without `features`.'
        )
