"""What other programs of this machine say."""

import shutil
import subprocess

__all__ = ["command_output", "nvidia_smi"]


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
