"""The measurement of `tune`: each configuration of each kernel that a network launches, on the GPU at hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dat_deploy.errors import UnsupportedError
from dat_deploy.networks.family import Network, family_of
from dat_deploy.plugins.dispatch import Job, recorded_jobs
from dat_deploy.plugins.launch import Configuration, Problem
from dat_deploy.plugins.tuning import measured, store
from dat_deploy.precision import PRECISIONS

__all__ = ["TunedLaunch", "Tuning", "tune_network"]

DEVICE = "cuda"


@dataclass(frozen=True)
class TunedLaunch:
    """The fastest configuration for one launch of the network, beside the one taken unmeasured, if that runs here.

    Attributes:
        wrong: configurations whose answer is another one than that of the one taken unmeasured; they are left out.
    """

    operator: str
    problem: Problem
    configuration: Configuration
    microseconds: float
    default_microseconds: float | None
    wrong: tuple[Configuration, ...] = ()


@dataclass(frozen=True)
class Tuning:
    gpu: str
    launches: list[TunedLaunch]
    path: Path


def tune_network(
    network: Network, batches: Sequence[int], precision: str, progress: Callable[[int, int, str], None] | None
) -> Tuning:
    """As `tune`, whose arguments were checked.

    Raises:
        UnsupportedError: if there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"torch {torch.__version__} sees no CUDA device here, and kernels are measured on one; "
            f"run this where one is."
        )
    row, family = PRECISIONS[precision], family_of(network)
    model = family.module(network, family.weights(network), fused=True)
    if row.is_half:
        model = family.rounded(model, row.dtype)  # what ships: a table in float32 makes another problem of a launch
    model = model.to(DEVICE)
    jobs: dict[tuple[str, tuple[tuple[str, int], ...]], Job] = {}
    for batch in batches:
        with recorded_jobs() as launched, torch.inference_mode():
            model(torch.randn(batch, 3, *network.image_size, device=DEVICE))
        jobs |= {(job.operator, tuple(job.problem.items())): job for job in launched}
    tuned = []
    for count, job in enumerate(jobs.values()):
        if progress is not None:
            progress(count, len(jobs), job.operator)
        candidates = job.kernel.configurations(job.problem)
        wrong = _unlike_the_first(job, candidates)
        medians = measured([candidate for candidate in candidates if candidate not in wrong], job.run)
        best = min(medians, key=lambda candidate: medians[candidate])
        tuned.append(TunedLaunch(job.operator, job.problem, best, medians[best], medians.get(candidates[0]), wrong))
    gpu = torch.cuda.get_device_name()
    path = store(gpu, [(t.operator, t.problem, t.configuration, t.microseconds) for t in tuned])
    return Tuning(gpu, tuned, path)


@torch.inference_mode()
def _unlike_the_first(job: Job, candidates: Sequence[Configuration]) -> tuple[Configuration, ...]:
    """Of those that run here, the ones that compute something else: what is fast must be right first."""
    answers: dict[Configuration, torch.Tensor] = {}
    for candidate in candidates:
        job.output.fill_(torch.nan)  # what is not written shows
        try:
            job.run(candidate)
            answers[candidate] = job.output.float().clone()
        except Exception:  # noqa: S112  # too large for this GPU, for one: `measured` leaves it out or raises its error
            continue
    if not answers:
        return ()
    first, *others = answers
    share = max(1e-4, 4 * torch.finfo(job.output.dtype).eps)  # of the largest output
    tolerance = share * answers[first].abs().max()
    return tuple(other for other in others if not (answers[other] - answers[first]).abs().max() <= tolerance)
