"""What the tests of the GPU benchmark share: its modules, and a GPU that is none."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

for folder in ("tests/benchmarks", "benchmarks"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / folder))

import fake_gpu  # noqa: E402  # the path comes first
from gpu_cases import Case  # noqa: E402
from gpu_record import Record  # noqa: E402

from dat_deploy.networks.dat.model import REFERENCE  # noqa: E402
from dat_deploy.plugins import dispatch  # noqa: E402

ATTRIBUTES = {
    "deformable_attention": ("heads", "half_pixel"),
    "window_attention": ("heads", "window_size", "shift_size"),
    "neighborhood_attention": ("heads", "kernel_size", "dilation"),
    "deformable_sample": (),
}


class CpuGpu(fake_gpu.FakeGpu):
    """Runs on the CPU what a GPU would run; every call takes 10 µs, and 12 where the L2 cache is cold."""

    device = torch.device("cpu")
    capability = 90

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """As a CUDA graph, a replay writes where the call has written."""
        captured = call()
        return lambda: captured.copy_(call())

    def times(self, call: Callable[[], Any], *, milliseconds: int = 200) -> tuple[dict[str, float], str]:
        call()
        cold = {"cold_median": 12.0, "cold_p90": 13.0, "cold_p99": 14.0}
        return {"median": 10.0, **cold, "samples": 20.0, "sm_mhz": 1755.0}, "a fake clock"

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        call()
        return 3 * 2**20


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On shared cores, threads would take most of the time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gpu() -> CpuGpu:
    return CpuGpu()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[dispatch.Job]:
    """The operators launch kernels as on a GPU; each launch is computed by the reference, and listed."""
    launched: list[dispatch.Job] = []

    def run(job: dispatch.Job, configuration: Any, wrap: Any = None) -> None:
        assert configuration in job.kernel.configurations(job.problem)
        job.kernel.launch(job.problem, configuration)
        attributes = [job.problem[name] for name in ATTRIBUTES[job.operator]]
        job.output.copy_(getattr(REFERENCE, job.operator)(*job.inputs.values(), *attributes))
        launched.append(job)

    monkeypatch.setattr(dispatch.Job, "run", run)
    monkeypatch.setattr(dispatch, "kernel_computes", lambda _: True)
    return launched


@pytest.fixture
def record() -> Record:
    return Record("2026-11-21T12:00:00+00:00", "abc", "0123456789abcdef", fake_gpu.MACHINE)


SMALL = {
    "deformable_attention, DAT": Case("deformable_attention", 3, 6, 5, 32, 4, (6, 5), 2, (11, 9), True),
    "deformable_attention, DAT++": Case("deformable_attention", 2, 8, 8, 48, 3, (4, 4), 1, (13, 13), False),
    "deformable_sample": Case("deformable_sample", 2, 7, 5, 24, 0, (3, 4), 2),
    "window_attention": Case("window_attention", 2, 8, 12, 32, 2, window_size=4),
    "window_attention, shifted": Case("window_attention", 2, 8, 12, 32, 2, window_size=4, shift_size=2),
    "neighborhood_attention": Case("neighborhood_attention", 2, 9, 7, 32, 2, kernel_size=5),
}


@pytest.fixture(params=SMALL.values(), ids=SMALL.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return replace(request.param)
