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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dat_deploy.engine.passport import read_passport
from dat_deploy.errors import DatDeployError, PassportError, UnsupportedError
from dat_deploy.images.photographs import photographs
from dat_deploy.images.preprocess import check_images
from dat_deploy.progress import Progress
from dat_deploy.runners import Runtime, check_engine, parse_engine
from dat_deploy.validate.bisect_report import PHOTOGRAPHS, BisectReport, Run

if TYPE_CHECKING:
    from dat_deploy.validate.reference import Reference

# What loads torch or a graph library is imported after the checks, so that a wrong argument is told at once.

__all__ = ["BisectReport", "Run", "bisect"]


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
    if not runtime.takes_exported:
        raise _no_onnx(engine, runtime, Path(target))
    if checkpoint is not None and reference is not None:
        raise DatDeployError("a reference holds its weights already; give it or a checkpoint, not both.")
    check_engine(engine, checkpoint=checkpoint)
    check_images(images or photographs(PHOTOGRAPHS))
    from dat_deploy.validate.bisect_search import find_difference

    return find_difference(
        engine, checkpoint=checkpoint, images=images, tolerance=tolerance, reference=reference, progress=progress
    )


def _no_onnx(engine: str, runtime: Runtime, path: Path) -> UnsupportedError:
    source = "FILE.onnx"
    if runtime.has_passport:
        with contextlib.suppress(PassportError):  # the sentence is right without it
            source = str(read_passport(path).source or source)
    return UnsupportedError(
        f"{engine} cannot be bisected: that runs pieces of an ONNX file, and {runtime.name} takes none. "
        f"Bisect the file that it was made from: `bisect(engine={source!r})`"
    )
