"""What is installed on this machine, and what other programs of it say."""

import importlib.metadata
import shutil
import subprocess

__all__ = ["command_output", "installed_version", "nvidia_smi", "tool_version"]


def installed_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tool_version() -> str:
    """Of dat-deploy; a checkout that was never installed has none."""
    return installed_version("dat-deploy") or "not installed"


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
