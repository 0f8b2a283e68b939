"""What this machine is, as far as this process may use it: cores, memory, GPU, versions. No host name, no path."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Hardware",
    "available_cores",
    "command_output",
    "commit",
    "cpu_flags",
    "driver_cuda_version",
    "gpu_architecture",
    "hardware",
    "installed_version",
    "nvidia_smi",
    "tool_version",
    "versions",
]

# torch is imported where the GPU is asked for, so that this module is light.


@dataclass(frozen=True)
class Hardware:
    """Attributes:
    cpu_flags: the instruction sets among those that matter here; cores: that the process may run on.
    """

    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    memory_gib: int
    gpus: tuple[str, ...]


def hardware() -> Hardware:
    """Of this machine."""
    model = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return Hardware(
        cpu=model.group(1).strip() if model else platform.machine(),
        cpu_flags=cpu_flags(),
        cores=available_cores(),
        memory_gib=round(int(memory.group(1)) / 2**20) if memory else 0,
        gpus=tuple(nvidia_smi("name")),
    )


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def installed_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tool_version() -> str:
    """Of dat-deploy; a checkout that was never installed has none."""
    return installed_version("dat-deploy") or "not installed"


_CPU_FLAGS = (  # that decide which kernels a runtime picks; x86 and Arm
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_int8"),
    *("asimd", "bf16", "i8mm", "sve", "sve2"),
)


def cpu_flags() -> tuple[str, ...]:
    """The instruction sets of this CPU, among those that matter here."""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return tuple(flag for flag in _CPU_FLAGS if flag in present)


def command_output(command: list[str]) -> str:
    """What a command prints; nothing if it is not installed, fails or hangs."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20)  # noqa: S603  # fixed
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def nvidia_smi(field: str) -> list[str]:
    """A property of each NVIDIA GPU, such as `name` or `driver_version`; none without one."""
    return command_output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]).splitlines()


def gpu_architecture() -> int | None:
    """The compute capability of torch's current CUDA device, times ten; None without one."""
    import torch

    with contextlib.suppress(RuntimeError, AssertionError):
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            return 10 * major + minor
    return None


def driver_cuda_version() -> int:
    """The CUDA version of the driver at hand, 12080 for 12.8; 0 without one."""
    import torch

    if gpu_architecture() is None:
        return 0
    return int(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]  # of torch for CUDA


def versions() -> dict[str, str]:
    """Of everything but the runtimes, which only their workers load."""
    found = {
        "dat-deploy": tool_version(),
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "os": platform.platform(),
    }
    drivers = nvidia_smi("driver_version")
    return found | ({"nvidia-driver": drivers[0]} if drivers else {})


def commit() -> str | None:
    """The commit of the checkout that dat_deploy runs from, with `-dirty` if it was edited; None if it is installed."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # a virtual environment may lie inside some other repository
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    return command_output([*command, "--exclude=*"]) or None


def _text(path: str) -> str:
    """Nothing if it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
