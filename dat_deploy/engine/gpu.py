"""The GPU at hand, as far as engines depend on it."""

import contextlib

import torch

__all__ = ["driver_cuda_version", "gpu_architecture"]


def gpu_architecture() -> int | None:
    """The compute capability of the current CUDA device, times ten; None without one."""
    with contextlib.suppress(RuntimeError, AssertionError):
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            return 10 * major + minor
    return None


def driver_cuda_version() -> int:
    """The CUDA version of the driver at hand, 12080 for 12.8; 0 without one."""
    if gpu_architecture() is None:
        return 0
    return int(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]  # of torch for CUDA
