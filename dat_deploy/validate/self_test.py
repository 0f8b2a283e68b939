"""Known faults put into a file, one at a time; what validate makes of each."""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dat_deploy.errors import DatDeployError, VerificationError
from dat_deploy.export import export
from dat_deploy.networks.checkpoint_file import check_checkpoint
from dat_deploy.progress import Progress
from dat_deploy.runners import EngineDescription, check_engine, open_runner, parse_engine
from dat_deploy.validate import validate
from dat_deploy.validate.defaults import SELF_TEST_BATCHES

# What loads a graph library is imported after the checks, so that a wrong argument is told at once.

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
    """What validate made of each fault; `notes` say which were left out, and why."""

    engine: EngineDescription
    tried: tuple[Tried, ...]
    notes: tuple[str, ...] = ()

    @property
    def missed(self) -> list[str]:
        return [trial.fault for trial in self.tried if not trial.caught_by]

    @property
    def verdict(self) -> str:
        caught = len(self.tried) - len(self.missed)
        sentence = f"validate caught {caught} of {len(self.tried)} faults put into {self.engine.name}"
        return f"{sentence}; it missed {', '.join(self.missed)}." if self.missed else f"{sentence}."

    def raise_if_failed(self) -> None:
        """Raises VerificationError if a fault was missed."""
        if self.missed:
            raise VerificationError(self.verdict)


def self_test(
    engine: str | None = None,
    *,
    checkpoint: Path | None = None,
    progress: Progress = lambda _: None,
) -> SelfTest:
    """Put each of FAULTS into an exported file and validate it, but for those that need what the file does not have.

    Args:
        engine: `[RUNTIME:]FILE.onnx` in fp32; by default `demo`, exported for this.
        checkpoint: what it was exported from; without one, see `Family.weights`.
        progress: called with the name of each fault.

    Raises:
        DatDeployError: if the engine is no ONNX file, or one in which some faults could not show.
        VerificationError: if it fails without a fault.
    """
    if engine is not None:
        _check(engine)
    check_checkpoint(checkpoint)
    from dat_deploy.validate.faults import FAULTS, faulty_report, lacks
    from dat_deploy.validate.reference import open_reference

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dat-deploy-"))
        if engine is None:
            progress("exporting demo")
            engine = str(Path(folder, "demo.onnx"))
            export("demo", Path(engine))
        progress("no fault")
        with open_runner(engine) as runner:
            about = runner.description
            reference = stack.enter_context(open_reference(about, checkpoint))
            sound = validate(runner, batches=SELF_TEST_BATCHES, reference=reference)
        if not sound.passed:
            raise VerificationError(f"the self-test needs an engine that is right. {sound.verdict}")
        trials = []
        lacking = lacks(engine)
        for fault in FAULTS:
            if fault.needs in lacking:
                continue
            progress(fault.name)
            report = faulty_report(fault, engine, Path(folder), reference)
            failures = [check for check in report.checks if check.passed is False]
            kinds = tuple(dict.fromkeys(check.kind for check in failures))
            trials.append(Tried(fault.name, fault.story, kinds, failures[0].name if failures else ""))
    left_out = {name: [fault.name for fault in FAULTS if fault.needs == name] for name in lacking}
    notes = [f"left out, for {about.name} has no {name}: {', '.join(faults)}" for name, faults in left_out.items()]
    return SelfTest(about, tuple(trials), tuple(notes))


def _check(engine: str) -> None:
    if not parse_engine(engine)[0].takes_exported:
        raise DatDeployError(f"faults are put into ONNX files, and '{engine}' is none; name a FILE.onnx.")
    outline = check_engine(engine)
    if outline.batch == 1 or outline.network.answer.kind != "classes" or outline.file_precision != "fp32":
        raise DatDeployError(
            f"the self-test takes an fp32 file that classifies batches, and {engine} is none; export it with "
            '`batch=None` and `precision="fp32"`, without `features`.'
        )
