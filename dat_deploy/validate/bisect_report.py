"""What `bisect` ran and found."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dat_deploy.errors import VerificationError
from dat_deploy.files import atomic_output
from dat_deploy.runners import EngineDescription

__all__ = ["PHOTOGRAPHS", "BisectReport", "Run"]

PHOTOGRAPHS = 2  # that are looked at where the user names none


@dataclass(frozen=True)
class Run:
    """One graph that was opened and compared.

    Attributes:
        place: what ends there: `stages.2.attns.1`, `stages.2.attns.1.proj_q`, `deformable_sample alone`, or an output.
        tensor: its name in the file.
        error: the largest absolute difference from PyTorch; NaN if the engine gives one.
    """

    place: str
    tensor: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN is not <= anything


@dataclass(frozen=True)
class BisectReport:
    """What `bisect` found.

    Attributes:
        steps: the runs, in order.
        block: the first whose output is wrong, as in the model: `stages.2.attns.1`; None if the sides agree.
        operator: in that block, `proj_q` or `deformable_attention`; None where the block is one.
        part: of the operator: `bias`, where that alone is wrong.
        hint: what the wrong operator behaves like, as the end of a sentence; empty if like nothing known.
        blocks: how many blocks the network has.
    """

    engine: EngineDescription
    reference: EngineDescription
    steps: tuple[Run, ...]
    block: str | None
    operator: str | None
    part: str | None
    hint: str
    blocks: int

    @property
    def runs(self) -> int:
        return len(self.steps)

    @property
    def agrees(self) -> bool:
        return self.block is None

    @property
    def place(self) -> str:
        """`stages.2.attns.1: deformable_attention, bias`; empty if the sides agree."""
        inside = ", ".join(filter(None, (self.operator, self.part)))
        return ": ".join(filter(None, (self.block, inside)))

    @property
    def finding(self) -> str:
        """The outcome in one sentence."""
        names, count = f"{self.engine.name} and {self.reference.name}", f"{self.runs} run{'s' * (self.runs > 1)}"
        if self.agrees:
            worst = max(run.error / run.tolerance for run in self.steps)
            return f"{names} agree, the worst error is {worst:.1%} of what is allowed; {count}."
        hint = f"; {self.hint}" if self.hint else ""
        return f"{names} part at {self.place}; what goes in is right, what comes out is not{hint}; {count}."

    def to_json(self) -> str:
        fields: dict[str, Any] = asdict(self)
        for run, row in zip(self.steps, fields["steps"], strict=True):
            row["passed"] = run.passed
            row["error"] = run.error if math.isfinite(run.error) else str(run.error)  # JSON has no NaN
        summary = {"agrees": self.agrees, "finding": self.finding, "place": self.place, "runs": self.runs}
        return json.dumps({**summary, **fields}, indent=2, default=str) + "\n"

    def write(self, path: Path, *, force: bool = False) -> None:
        with atomic_output(path, force=force) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def raise_if_found(self) -> None:
        """Raises VerificationError with the place unless the two sides agree."""
        if not self.agrees:
            raise VerificationError(f"{self.engine.name} differs from {self.reference.name} at {self.place}.")
