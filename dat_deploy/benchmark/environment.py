"""What a measurement was taken on: hardware, versions, commit. No host name, no path."""

import importlib.metadata
import platform
import re
from pathlib import Path

import dat_deploy
from dat_deploy.benchmark.record import Hardware
from dat_deploy.runners.base import available_cores
from dat_deploy.system import command_output, cpu_flags, nvidia_smi, tool_version

__all__ = ["commit", "hardware", "versions"]


def hardware() -> Hardware:
    """Of this machine, as far as this process may use it."""
    cpuinfo = _text("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return Hardware(
        cpu=model.group(1).strip() if model else platform.machine(),
        cpu_flags=cpu_flags(),
        cores=available_cores(),
        memory_gib=round(int(memory.group(1)) / 2**20) if memory else 0,
        gpus=tuple(nvidia_smi("name")),
    )


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
    root = Path(dat_deploy.__file__).parents[1]
    if not (root / ".git").exists():  # a virtual environment may lie inside some other repository
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    return command_output([*command, "--exclude=*"]) or None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
