"""What the tests of the benchmark share: its modules, and a GPU that is none."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_record import Machine, Record  # noqa: E402  # the path comes first
from gpu_timing import Times  # noqa: E402


class FakeGpu:
    """Runs on the CPU what a GPU would run; every call takes 10 µs."""

    name = "NVIDIA H200"
    device = torch.device("cpu")
    capability = 90
    ceilings = (989.0, 4.8)
    l2_bytes = 1000

    def __init__(self) -> None:
        self.is_healthy = True
        self.captures = True

    def synchronize(self) -> None: ...

    def release(self) -> None: ...

    def healthy(self) -> bool:
        return self.is_healthy

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        call()
        return call

    def samples(self, calls: Sequence[Callable[[], Any]], **_: Any) -> list[float]:
        for call in calls:
            call()
        return [10.0] * 100

    def time_calls(self, calls: Sequence[Callable[[], Any]]) -> Times:
        for call in calls:
            call()
        return Times(10.0, 11.0, 12.0, 10.0, 20, len(calls), "a fake clock")

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        call()
        return 3 * 2**20


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def record() -> Record:
    machine = Machine("NVIDIA H200", 141, 132, 60, {"torch": "2.11.0", "triton": "3.6.0"})
    return Record("2026-11-21T12:00:00+00:00", "abc", "0123456789abcdef", machine)
