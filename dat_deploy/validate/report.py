"""What validate found: rows with a verdict each, and the verdict of all in one sentence."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dat_deploy.errors import VerificationError
from dat_deploy.files import atomic_output
from dat_deploy.runners import EngineDescription
from dat_deploy.validate.check import Check
from dat_deploy.validate.gates import Gates

if TYPE_CHECKING:
    from dat_deploy.validate.accuracy import Accuracy
    from dat_deploy.validate.drift import BlockDrift
    from dat_deploy.validate.trace import Trace

__all__ = ["ValidationReport"]


@dataclass(frozen=True)
class ValidationReport:
    """What validate found.

    Attributes:
        gates: what the engine was held to.
        file_sha256: of the engine's file, None of a network in PyTorch; `date` of the report, `version` of dat-deploy.
        skipped: the kinds of checks that were left out.
        notes: what the user must know beside the checks.
        trace: what a page shows beside it; only if it was asked for, and not in the JSON.
    """

    engine: EngineDescription
    reference: EngineDescription
    checks: tuple[Check, ...]
    accuracy: "Accuracy | None" = None
    drift: "tuple[BlockDrift, ...]" = ()
    gates: Gates | None = None
    file_sha256: str | None = None
    date: str = ""
    version: str = ""
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    trace: "Trace | None" = field(default=None, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether something was checked, and nothing failed."""
        verdicts = [check.passed for check in self.checks]
        return False not in verdicts and True in verdicts

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        failures = [check for check in self.checks if check.passed is False]
        ran = [check for check in self.checks if check.passed is not None]
        less = f"; left out on request: {', '.join(self.skipped)}" if self.skipped else ""
        if self.engine.judged_in is not None:
            of_file = self.engine.file_precision
            less += (
                f"; judged in {self.engine.judged_in}, as {self.engine.runtime} computes what the file has in {of_file}"
            )
        if not ran:
            return f"{self.engine.name} was not compared with {self.reference.name}: no check ran{less}."
        if not failures:
            # of a tolerance that was lowered to what tells images apart, that is all of what is allowed
            worst = max([c for c in ran if c.kind != "telling"] or ran, key=lambda check: check.share)
            return (
                f"{self.engine.name} agrees with {self.reference.name}: {len(ran)} checks passed, the worst is "
                f"'{worst.name}' at {worst.share:.1%} of what is allowed{self._top1()}{less}."
            )
        first = failures[0]
        where = f" at batch {first.batch}" if first.batch else ""
        how = "differs from" if self.differs else "does not pass its gates against"
        return (
            f"{self.engine.name} {how} {self.reference.name}: {len(failures)} of {len(ran)} checks failed, first "
            f"'{first.name}'{where} with an error of {_shown(first.error, first.unit)} where "
            f"{_shown(first.tolerance, first.unit)} is allowed{self._top1()}{less}."
        )

    @property
    def differs(self) -> bool:
        """Whether what failed is in the numbers of the engine, where `bisect` may find it."""
        return any(check.passed is False and check.in_numbers for check in self.checks)

    def _top1(self) -> str:
        if self.accuracy is None or self.accuracy.engine is None or self.accuracy.reference is None:
            return ""
        engine, reference = self.accuracy.engine.top1, self.accuracy.reference.top1
        return f"; top-1 {engine.percent:.2f}% against {reference.percent:.2f}% on {engine.images} images"

    def to_json(self) -> str:
        fields: dict[str, Any] = asdict(replace(self, trace=None))
        del fields["trace"]
        for check, row in zip(self.checks, fields["checks"], strict=True):
            row["passed"] = check.passed
        fields |= {"judged_in": self.engine.judged_in}
        return json.dumps(_plain({"passed": self.passed, "verdict": self.verdict, **fields}), indent=2) + "\n"

    def write(self, path: Path, *, force: bool = False) -> None:
        with atomic_output(path, force=force) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def raise_if_failed(self) -> None:
        """Raises VerificationError with the verdict unless a check ran and every one that ran has passed."""
        if not self.passed:
            raise VerificationError(self.verdict)


def _shown(value: float | None, unit: str) -> str:
    return f"{value:.3g}{'' if unit in ('', '%') else ' '}{unit}"


def _plain(value: Any) -> Any:
    """What JSON can hold: it has no NaN, and paths are text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
