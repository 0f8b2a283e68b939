"""The CUDA device: how long calls take on it, and how much memory. Importing this touches no CUDA."""

import math
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_record import Machine

__all__ = ["CEILINGS", "CudaGpu", "Times"]

# Datasheet: dense fp16 TFLOP/s and TB/s, by what the GPU's name holds; the first that fits.
CEILINGS = {
    "H200": (989.0, 4.8),
    "H100 PCIe": (756.0, 2.0),
    "H100 NVL": (835.0, 3.9),
    "H100": (989.0, 3.35),
    "A100-SXM4-80GB": (312.0, 2.039),
    "A100": (312.0, 1.555),
}
SHORT_US = 5000.0  # shorter calls are timed in a CUDA graph, where Python and launches do not count
GRAPH_US = 400.0  # which lasts at least so long, against the resolution of events
MOST_CALLS = 500  # in a graph
WARM_SECONDS = 0.1
Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Microseconds of one call.

    Attributes:
        samples: how many were taken; calls: of each sample, which is their mean.
        how: in words, for the row's notes.
    """

    median: float
    p90: float
    p99: float
    mean: float
    samples: int
    calls: int
    how: str


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def times(samples_us: Sequence[float], calls: int, how: str) -> Times:
    each = [sample / calls for sample in samples_us]
    middle = statistics.median(each)
    return Times(middle, percentile(each, 0.9), percentile(each, 0.99), statistics.fmean(each), len(each), calls, how)


class CudaGpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.failed_capture = False
        properties = torch.cuda.get_device_properties(self.device)
        self.name = torch.cuda.get_device_name(self.device)
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 50 * 2**20
        self.capability = properties.major * 10 + properties.minor
        self.machine = Machine(
            gpu=self.name,
            memory_gib=round(properties.total_memory / 2**30),
            multiprocessors=properties.multi_processor_count,
            l2_mib=round(self.l2_bytes / 2**20),
            versions=_versions(),
        )

    @property
    def ceilings(self) -> tuple[float, float] | None:
        """Datasheet TFLOP/s and TB/s, where they are known."""
        return next((both for name, both in CEILINGS.items() if name in self.name), None)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        """Give cached memory back, so that one row does not take it from the next."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def healthy(self) -> bool:
        """False where later rows could suffer: after an illegal address and its like, and after a failed capture."""
        try:
            torch.cuda.synchronize()
        except Exception:
            return False
        return not self.failed_capture

    def capture(self, call: Call) -> Call:
        """A CUDA graph of `call`, which must have run before; what it returns replays it."""
        before = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            call()
        before.wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except BaseException:
            self.failed_capture = True  # the allocator still thinks that it is under way
            torch.cuda.set_stream(before)  # as torch.cuda.graph does not after a failure
            raise
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def samples(self, calls: Sequence[Call], *, seconds: float, least: int, most: int) -> list[float]:
        """Microseconds of single calls, in turns, for about so many seconds; between CUDA events, after a warm-up."""
        estimate = max(self._elapsed(calls[0]), self._elapsed(calls[-1]))
        for i in range(min(1000, math.ceil(WARM_SECONDS * 1e6 / estimate))):
            calls[i % len(calls)]()
        count = min(most, max(least, int(seconds * 1e6 / estimate)))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize()
        for i, (start, end) in enumerate(events):
            start.record()
            calls[i % len(calls)]()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1000 for start, end in events]

    def _elapsed(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) * 1000, 0.5)

    def time_calls(self, calls: Sequence[Call], *, seconds: float = 0.2) -> Times:
        """Time calls that do the same on different inputs, in turns, each of which must have run before.

        Short ones are captured in a CUDA graph, as often as it takes; if that fails, they are timed as they are.
        """
        if min(self._elapsed(call) for call in calls[:3]) > SHORT_US:
            return times(self.samples(calls, seconds=seconds, least=10, most=200), 1, "CUDA events around each call")
        try:
            in_graph = list(calls)
            replay = self.capture(lambda: [call() for call in in_graph])
            taken = min(self._elapsed(replay) for _ in range(3))
            if taken < GRAPH_US:
                in_graph *= min(math.ceil(1.2 * GRAPH_US / taken), math.ceil(MOST_CALLS / len(calls)))
                replay = self.capture(lambda: [call() for call in in_graph])
            samples = self.samples([replay], seconds=seconds, least=5, most=500)
            return times(samples, len(in_graph), f"replays of a CUDA graph of {len(in_graph)} calls")
        except Exception as error:
            sentence = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            self.synchronize()
            samples = self.samples(calls, seconds=seconds, least=10, most=200)
            how = f"CUDA events around each call, launches included, for it could not be captured: {sentence}"
            return times(samples, 1, how)

    def peak_bytes(self, call: Call) -> int:
        """The most memory that tensors held at once while `call` ran, inputs and weights included."""
        self.release()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def _versions() -> dict[str, str]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton_version}
    found["cuda"] = torch.version.cuda or "none"
    try:
        from cuda_driver import Driver

        version = Driver().version()
        found["driver takes CUDA"] = f"{version // 1000}.{version % 1000 // 10}"
    except Exception:  # its absence is no reason not to measure
        found["driver takes CUDA"] = "unknown"
    return found
