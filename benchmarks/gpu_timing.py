"""The CUDA device: how long calls take on it, at which clock, and how much memory. Importing this touches no CUDA."""

import math
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_record import Machine

from dat_deploy.environment import nvidia_smi

__all__ = ["Call", "CudaGpu", "percentile"]

Call = Callable[[], Any]
CLOCK_US = 50_000.0  # of work under way while the clock is read


def percentile(values: list[float], share: float) -> float:
    """The least value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class CudaGpu:
    """The current CUDA device.

    Attributes:
        kit: machine code that was made elsewhere, see `gpu_kit` and `plugins.precompiled`, or None.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.failed_capture, self.kit = False, None
        properties = torch.cuda.get_device_properties(self.device)
        self.capability = properties.major * 10 + properties.minor
        self.machine = Machine(
            gpu=torch.cuda.get_device_name(self.device),
            memory_gib=round(properties.total_memory / 2**30),
            multiprocessors=properties.multi_processor_count,
            l2_mib=round(int(getattr(properties, "L2_cache_size", 0)) / 2**20),
            versions=_versions(),
        )

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
        before, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            call()
        torch.cuda.synchronize()
        self.failed_capture = True  # unless it ends well; the allocator else thinks that it is under way
        try:
            with torch.cuda.graph(graph):
                call()
        finally:
            torch.cuda.set_stream(before)  # as torch.cuda.graph does not after a failure
        self.failed_capture = False
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def times(self, call: Call, *, milliseconds: int = 200) -> tuple[dict[str, float], str]:
        """Microseconds of a call that has run before, by Triton's `do_bench_cudagraph` and `do_bench`.

        Returns:
            `median`, of calls one after the other in a CUDA graph, so that the L2 cache may hold what the last one
            left; `cold_median`, of ten or more `cold_p90` and of a hundred `cold_p99`, of single replays after the
            cache was filled with something else; `samples` of those; `sm_mhz`, the clock while it ran, 0 where nobody
            knows. And in words how it was timed.
        """
        from triton.testing import do_bench, do_bench_cudagraph

        how, warm, timed = "CUDA graphs; cold: L2 filled before each replay", [], call
        try:
            timed = self.capture(call)
            warm = do_bench_cudagraph(call, rep=max(1, milliseconds // 10), return_mode="all")
        except Exception as error:
            timed, self.failed_capture = (
                call,
                True,
            )  # the allocator may think that it is under way, so later rows need a new process
            torch.cuda.synchronize()  # raises if more is broken than the capture
            sentence = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            how = f"launches included and L2 cold, for it could not be captured: {sentence}"
        cold = [1000 * each for each in do_bench(timed, rep=milliseconds, return_mode="all")]
        found = {"cold_median": statistics.median(cold), "samples": float(len(cold))}
        found |= {f"cold_p{p}": percentile(cold, p / 100) for p, least in ((90, 10), (99, 100)) if len(cold) >= least}
        found["median"] = 1000 * statistics.median(warm) if warm else found["cold_median"]
        for _ in range(min(2000, math.ceil(CLOCK_US / found["median"]))):
            timed()
        found["sm_mhz"] = _clock_mhz()
        torch.cuda.synchronize()
        return found, how

    def peak_bytes(self, call: Call) -> int:
        """The most memory that tensors held at once while `call` ran, inputs and weights included."""
        self.release()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def _clock_mhz() -> float:
    """Of the multiprocessors now; 0 where torch cannot ask the driver."""
    try:
        return float(torch.cuda.clock_rate())
    except Exception:  # pynvml or the driver's library is missing
        return 0.0


def _versions() -> dict[str, str]:
    import triton

    drivers = nvidia_smi("driver_version") or ["unknown"]
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return found | {"cuda": torch.version.cuda or "none", "driver": drivers[0]}
