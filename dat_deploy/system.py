"""What is installed on this machine, and what other programs of it say."""

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

__all__ = ["command_output", "cpu_flags", "installed_version", "nvidia_smi", "tool_version"]


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
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
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
