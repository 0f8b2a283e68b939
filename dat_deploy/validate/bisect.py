"""Where does an engine leave PyTorch? The first block whose output is wrong, and the operator in it, in few runs.

A binary search over the tensors between the blocks. Each run opens one graph that ends at one of them, cut out of the
engine's own file; asking one graph for all of them at once would undo the runtime's fusions, and with them often the
fault, and fill its memory (NVIDIA/TensorRT#2189, #3161). The search keeps one tensor that is right and a later one that
is wrong, so what it names begins right and ends wrong, even where errors shrink again on the way.

Inside the block the search goes on over the tensors between its operators. One of our own operators is cut out and fed
with what PyTorch has there, so that no earlier error reaches it; what it gives is then compared with what it would give
if it were wrong in one of the usual ways.
"""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dat_deploy.engine.passport import read_passport
from dat_deploy.errors import PassportError, UnsupportedError, VerificationError
from dat_deploy.files import atomic_output
from dat_deploy.photographs import photographs
from dat_deploy.preprocess import check_images
from dat_deploy.runners import EngineDescription, Runtime, check_engine, parse_engine

if TYPE_CHECKING:
    from dat_deploy.validate.reference import Reference

# What loads torch or a graph library is imported after the checks, so that a wrong argument is told at once.

__all__ = ["BisectReport", "Run", "bisect"]

PHOTOGRAPHS = 2  # that are looked at where the user names none

Progress = Callable[[str], None]


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
        return json.dumps({**summary, **fields}, indent=2) + "\n"

    def write(self, path: Path, *, force: bool = False) -> None:
        with atomic_output(path, force=force) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def raise_if_found(self) -> None:
        """Raises VerificationError with the place unless the two sides agree."""
        if not self.agrees:
            raise VerificationError(f"{self.engine.name} differs from {self.reference.name} at {self.place}.")


def bisect(
    engine: str,
    *,
    checkpoint: Path | None = None,
    images: Sequence[Path] | None = None,
    tolerance: float | None = None,
    reference: "Reference | None" = None,
    progress: Progress = lambda _: None,
) -> BisectReport:
    """Find the first block, and the operator in it, where an exported file differs from eager PyTorch.

    At most 2·log2(blocks) + 4 graphs are run, where a block is one attention with its MLP.

    Args:
        engine: `[RUNTIME:]FILE.onnx`; a file of a fixed batch or image size is run at that one.
        checkpoint: what the file was exported from; without one, the seeded random weights.
        images: photographs of your own; without any, two of those in scikit-image's wheel and four stress images.
        tolerance: largest error of an output, and of another tensor in proportion to its largest element, if that
            exceeds 1; by default FP32_TOLERANCE, and in a lower precision twice the largest error of eager PyTorch in
            that precision at the same tensor.
        reference: see `validate`.
        progress: called with the name of each place before it is run.

    Returns:
        The report; `raise_if_found` turns a difference into an error.

    Raises:
        UnsupportedError: if the engine's runtime takes no ONNX graphs.
        DatDeployError: if the two sides do not hold the same weights, or PyTorch's own answer has NaNs.
    """
    runtime, target = parse_engine(engine)
    if not target.endswith(".onnx"):
        raise _no_onnx(engine, runtime, target)
    check_engine(engine, checkpoint=checkpoint)
    check_images(images or photographs(PHOTOGRAPHS))
    from dat_deploy.validate.bisect_search import find_difference

    return find_difference(
        engine, checkpoint=checkpoint, images=images, tolerance=tolerance, reference=reference, progress=progress
    )


def _no_onnx(engine: str, runtime: Runtime, target: str) -> UnsupportedError:
    source = "FILE.onnx"
    if target.endswith((".engine", ".pt2")):
        with contextlib.suppress(PassportError):  # the sentence is right without it
            source = str(read_passport(Path(target)).source or source)
    return UnsupportedError(
        f"{engine} cannot be bisected: that runs pieces of an ONNX file, and {runtime.name} takes none. "
        f"Bisect the file that it was made from: dat-deploy bisect --engine {source}"
    )
