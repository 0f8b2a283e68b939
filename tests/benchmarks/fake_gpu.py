"""A GPU that is none: `python fake_gpu.py OUTPUT [SCALE]` is the whole benchmark on it, with rows of made-up times.

SCALE shortens them. Before they begin, rows write their keys and processes to OUTPUT/begun.txt. Imports no torch.
"""

import functools
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu  # the path comes first
import gpu_plan
from gpu_record import Found, Machine

MACHINE = Machine("NVIDIA H200", 141, 132, 60, {"torch": "2.11.0", "triton": "3.6.0"})
CEILINGS = {"tflop_per_s": 790.0, "tb_per_s": 4.3, "product_mhz": 1500.0, "copy_mhz": 1980.0}
OPERATOR = {"median_us": 10.0, "cold_us": 12.0, "sm_mhz": 2000.0, "tuned": 1.0}
OPERATOR |= {"flops": 790e6, "bytes": 4.3e6, "exponentials": 4.0 * 16 * 132 * 2000}  # 1, 1 and 4 us
NETWORK = {"images_per_s": 9000.0, "p50_ms": 14.0, "cold_p50_ms": 14.5, "cold_p90_ms": 15.0, "cold_p99_ms": 16.0}
SPEEDS = {"eager": 10.0, "compile": 3.5, "flex": 2.0, "flex+bias": 1.5, "sdpa": 2.5}


class FakeGpu:
    machine, kit = MACHINE, None

    def release(self) -> None: ...

    def healthy(self) -> bool:
        return True


def open_gpu(kit: Path | None) -> FakeGpu:
    return FakeGpu()


def row(key: str, peer: str, seconds: float, log: str, does: str = "") -> Found:
    """What a row says; `does` is what happens in its place."""
    with Path(log).open("a") as file:
        file.write(f"{key}\t{os.getpid()}\n")
    if does == "raises":
        raise RuntimeError("CUDA error: an illegal memory access\n\nmore words")
    if does == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60 if does == "hangs" else seconds)
    slower = SPEEDS.get(peer, 1.0)
    network = {name: value * (1 / slower if name == "images_per_s" else slower) for name, value in NETWORK.items()}
    operator = OPERATOR | {name: OPERATOR[name] * slower for name in ("median_us", "cold_us")}
    return Found({**CEILINGS, **operator, **network, "peak_mib": 900.0 * slower, "passed": 120.0, "failed": 0.0})


def made_up(job: gpu_plan.Job, log: Path, scale: float, does: dict[str, str]) -> gpu_plan.Job:
    peer = job.labels.get("implementation", job.labels.get("mode", ""))
    arguments: dict[str, Any] = {"key": job.key, "peer": peer, "seconds": scale * job.seconds, "log": str(log)}
    arguments["does"] = does.get(job.key, "")
    return replace(job, call="fake_gpu:row", arguments=arguments, seconds=scale * job.seconds, least_limit_seconds=1.5)


def main(output: Path, scale: float = 0.01, **does: str) -> int:
    """`does`: what rows do in place of their work, by their keys."""
    gpu.OPENER = "fake_gpu:open_gpu"
    output.mkdir(exist_ok=True)
    jobs = [made_up(job, output / "begun.txt", scale, does) for job in gpu_plan.first()]
    gpu.first = functools.partial(list, jobs)
    return gpu.main(["--output", str(output), "--kit", "none", "--minutes", "2", "--commit", "abc"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(float, sys.argv[2:3])))
