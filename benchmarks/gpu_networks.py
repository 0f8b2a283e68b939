"""Whole networks as they ship (`half_network`), engines, where the time of a forward goes, and the tests marked gpu."""

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_operators import slack, tuned_share
from gpu_record import Found
from gpu_timing import Call
from torch import Tensor

from dat_deploy.benchmark.tune import tune as tune_network
from dat_deploy.networks.dat.checkpoint import load_weights, model_from_weights
from dat_deploy.networks.dat.model import half_network
from dat_deploy.networks.dat.variants import VARIANTS, Variant
from dat_deploy.networks.family import Weights
from dat_deploy.plugins.dispatch import recorded_jobs
from dat_deploy.precision import PRECISIONS

__all__ = ["check", "engine", "measure", "ncu", "profile", "tests", "tune"]

COMPILE_MODE = "max-autotune-no-cudagraphs"  # the graph is captured by hand, alike for all modes
CHUNK = 16  # images of what answers are compared with, at a time
COLD = {"p50": "median", "p90": "p90", "p99": "p99"}
NCU_SECTIONS = ("SpeedOfLight", "WarpStateStats", "InstructionStats", "MemoryWorkloadAnalysis", "Occupancy")
OURS = r"(deformable|neighborhood|whole_window|window)_\w*kernel"
MIB = 2**20


@functools.lru_cache(maxsize=2)
def _weights(variant: Variant) -> Weights:
    return load_weights(variant)


def network(variant: Variant, mode: str, device: torch.device, precision: str = "fp16") -> torch.nn.Module:
    """The seeded network, as the mode calls it but not compiled.

    Args:
        precision: fp16 as it ships, fp32, or fp64 for what others are compared with.
    """
    model = model_from_weights(_weights(variant), variant, fused=mode.startswith("fused"))
    if precision == "fp16":
        return half_network(model, torch.float16).to(device)
    return model.to(device, {"fp32": torch.float32, "fp64": torch.float64}[precision])


def make_images(variant: Variant, batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(batch)
    return torch.randn(batch, 3, *variant.image_size, generator=generator, device=device)


@functools.lru_cache(maxsize=2)  # modes of one network and batch mostly follow each other
def answers(variant: Variant, batch: int, device: torch.device, precision: str) -> tuple[Tensor, Tensor]:
    """Logits in float64 of the eager network in the next higher precision, and in this one."""
    images, results = make_images(variant, batch, device), []
    for kind in ("fp64", "fp32") if precision == "fp32" else ("fp32", precision):
        model, given = network(variant, "eager", device, kind), images.double() if kind == "fp64" else images
        results.append(torch.cat([model(part).double() for part in given.split(CHUNK)]))
    return results[0], results[1]


def judged(variant: Variant, logits: Tensor, precision: str) -> tuple[dict[str, float], str | None]:
    """Every slot beside `answers`: twice the error of the eager network is allowed, and `slack` of the largest."""
    exact, eager = answers(variant, len(logits), logits.device, precision)
    largest, error = exact.abs().max().item(), (logits.double() - exact).abs().amax(dim=1)
    own = (eager - exact).abs().max().item()
    allowed = 2 * own + slack(PRECISIONS[precision].dtype) * largest
    wrong = int((~(error <= allowed)).sum())  # a NaN is wrong, too
    numbers = {"max_logit_error": error.max().item(), "allowed_error": allowed}
    sentence = f"wrong in {wrong} of {len(logits)} slots: a logit is off by {numbers['max_logit_error']:.3g}"
    sentence += f" where {allowed:.3g} is allowed"
    return numbers | {"eager_error": own, "largest_logit": largest}, sentence if wrong else None


def check(variant: str, precision: str, gpu: Any, *, batch: int = 3) -> Found:
    """The fused network against the eager one."""
    about = VARIANTS[variant]
    with recorded_jobs() as jobs:
        logits = network(about, "fused", gpu.device, precision)(make_images(about, batch, gpu.device))
    blocks = "".join(stage.blocks for stage in about.stages)
    numbers, error = judged(about, logits, precision)
    if len(jobs) != len(blocks) + blocks.count("D"):
        error = f"{len(jobs)} kernels were launched where {len(blocks) + blocks.count('D')} must be"
    return Found(numbers, error=error)


def _timed(call: Call, batch: int, gpu: Any) -> tuple[dict[str, float], str]:
    """Latencies of a call that has run before."""
    took, how = gpu.times(call, milliseconds=700)
    numbers = {"images_per_s": batch / took["median"] * 1e6, "p50_ms": took["median"] / 1000}
    numbers |= {f"cold_{name}_ms": took[f"cold_{of}"] / 1000 for name, of in COLD.items() if f"cold_{of}" in took}
    return numbers | {"samples": took["samples"], "sm_mhz": took["sm_mhz"]}, how


def measure(variant: str, mode: str, batch: int, gpu: Any, size: tuple[int, int] | None = None) -> Found:
    """Logits of every slot, then memory without a graph, then time; at the network's own image size or another."""
    torch.compiler.reset()
    about = VARIANTS[variant].with_image_size(*size or VARIANTS[variant].image_size)
    images, model = make_images(about, batch, gpu.device), network(about, mode, gpu.device)
    run = torch.compile(model, mode=COMPILE_MODE, dynamic=False) if mode.endswith("compile") else model
    begin = time.perf_counter()
    with recorded_jobs() if mode == "fused" else contextlib.nullcontext([]) as jobs:
        logits = run(images)
    gpu.release()
    right = {"first_call_s": time.perf_counter() - begin} | ({"tuned": tuned_share(jobs)} if jobs else {})
    jobs.clear()  # they hold the tensors of every launch, which would count as memory
    more, error = judged(about, logits, "fp16")
    peak = gpu.peak_bytes(lambda: run(images))
    numbers, how = _timed(lambda: run(images), batch, gpu)
    return Found(numbers | {"peak_mib": peak / MIB} | right | more, (how,), error)


def tune(variant: str, batches: list[int], gpu: Any) -> Found:
    """The fastest configuration of every kernel that the network launches, kept for the operators."""
    done = tune_network(variant, batches=batches, precision="fp16")
    gains = [row.default_microseconds / row.microseconds for row in done.launches if row.default_microseconds]
    numbers = {"launches": len(done.launches), "largest_gain": max(gains, default=1.0)}
    changed = sum(gain > 1.02 for gain in gains)
    return Found(numbers, (f"{changed} of {len(gains)} launches are 2 % faster or more than by rule",))


def engine(variant: str, batches: list[int], gpu: Any, device: str = "cuda") -> Found:
    """AOTInductor's package, built and opened as users do; per batch the answers of every slot, then the time on the
    device, then from NumPy to NumPy by `dat_deploy.benchmark`."""
    from dat_deploy import runners
    from dat_deploy.benchmark import benchmark
    from dat_deploy.engine.build import build

    about, errors, notes = VARIANTS[variant], [], []
    with tempfile.TemporaryDirectory() as folder:
        how: dict[str, Any] = {"output": Path(folder, "engine.pt2"), "backend": "aotinductor", "device": device}
        report = build(variant=about, precision="fp16", batches=batches, **how)
        numbers = {"build_s": report.seconds, "engine_mib": report.passport.engine_bytes / MIB}
        with runners.open_runner(str(report.path)) as runner:
            for batch in batches:
                call = functools.partial(runner.outputs_on_device, make_images(about, batch, gpu.device))
                right, error = judged(about, call()["logits"], "fp16")
                errors += [f"batch {batch}: {error}"] if error else []
                timed, said = _timed(call, batch, gpu)
                notes.append(f"batch {batch}: {said}")
                numbers |= {f"batch {batch} {name}": value for name, value in (timed | right).items()}
        host = benchmark([str(report.path)], batches=batches, rounds=2, seconds=0.5)
        numbers |= {f"batch {row.batch} host_p50_ms": row.p50_ms for row in host.rows}
    return Found(numbers, (*report.notes, *notes), "; ".join(errors) or None)


def profile(variant: str, batch: int, gpu: Any, path: Path) -> Found:
    """Kernels of one fused forward by their time: the largest as numbers, all as text beside the record."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    images = make_images(VARIANTS[variant], batch, gpu.device)
    model = network(VARIANTS[variant], "fused", gpu.device)
    for _ in range(3):
        model(images)
    gpu.release()
    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        model(images)
        gpu.release()
    averages = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    averages.sort(key=lambda event: -event.self_device_time_total)
    lines = [f"{event.self_device_time_total:10.0f} us {event.count:5d} x {event.key}" for event in averages]
    with path.with_name(f"{path.stem}-profile.txt").open("a", encoding="utf-8") as file:
        file.write("\n".join([f"{variant}, batch {batch}", *lines, "", ""]))
    total = sum(event.self_device_time_total for event in averages)
    ours = sum(e.self_device_time_total for e in averages if re.match(OURS, e.key))
    numbers = {"device_ms": total / 1000, "share_of_our_kernels": ours / total if total else 0.0}
    numbers |= {"kernels": float(sum(event.count for event in averages))}
    return Found(numbers | {f"us {event.key[:80]}": event.self_device_time_total for event in averages[:6]})


def ncu(kit: Path | None, path: Path) -> Found:
    """What Nsight Compute says of a launch at the shape of the targets, beside the record."""
    program, log = shutil.which("ncu"), path.with_name(f"{path.stem}-ncu.txt")
    if program is None:
        return Found({}, ("Nsight Compute's ncu is not on the PATH here",))
    command = [
        program,
        "--clock-control",
        "none",
        "--print-details",
        "all",
        "--kernel-name",
        "regex:^deformable_attention_",
    ]
    command += [part for section in NCU_SECTIONS for part in ("--section", section)]
    command += [sys.executable, str(Path(__file__).with_name("gpu.py")), "--ncu-target", "--kit", str(kit or "none")]
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=file).returncode  # noqa: S603  # fixed
    lines = log.read_text(encoding="utf-8").splitlines()
    said = "\n".join(line.rstrip() for line in lines if not re.match(r"==PROF== \w+onnected|\[\d+\]", line)) + "\n"
    log.write_text(said, encoding="utf-8")  # without the paths and numbers of the process
    if code or "deformable_attention_" not in said:
        return Found({}, error=f"ncu ended with {code}: {' '.join(said.strip().splitlines()[-3:])[:400]}")
    return Found({"launches": float(said.count("Section: GPU Speed Of Light"))}, (f"its report is {log.name}",))


def tests(path: Path, *, mark: str, seconds: float) -> Found:
    """The tests of that mark, in a process of their own, whose output is a file beside the record: what was finished
    when the time was up counts. Files without the mark are not even imported."""
    root = Path(__file__).resolve().parents[1]
    files = [found for found in sorted(root.glob("tests/**/test_*.py")) if f"mark.{mark}" in found.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", mark, *map(str, files), "-v", "-p", "no:cacheprovider"]
    command += ["-W", "default", "--continue-on-collection-errors", "--tb=line", "--no-header", "-rN"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels, on one core each
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    with tempfile.TemporaryDirectory() as folder:
        more = {"DAT_DEPLOY_CONFIGURATIONS": str(Path(folder, "configurations.json"))}  # what was tuned stays
        more["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        log = path.with_name(f"{path.stem}-tests.txt")
        with log.open("w", encoding="utf-8") as file:
            try:
                done = subprocess.run(  # noqa: S603  # fixed
                    command, stdout=file, stderr=file, timeout=seconds, cwd=root, env=os.environ | more
                )
                ended = f"pytest ended with {done.returncode}" if done.returncode else None
            except subprocess.TimeoutExpired:
                ended = f"the tests were stopped after {seconds:.0f} s"
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if "::" in line]
    found = [word for line in lines for word in re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)[:1]]
    numbers = {name.lower(): float(found.count(name)) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    if not numbers["passed"]:
        ended = ended or "no test passed"
    return Found(numbers, (f"what each test said is in {log.name}",), ended)
