"""Whole networks in float16: images a second, latency and memory; where the time of one forward goes; the GPU tests."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_record import Found, Job
from gpu_timing import times
from torch import Tensor

from dat_deploy.checkpoint import Weights, load_weights, model_from_weights
from dat_deploy.configuration import find_variant
from dat_deploy.files import atomic_output
from dat_deploy.variants import VARIANTS, Variant

__all__ = ["VARIANTS_BY_DEFAULT", "jobs", "memory_jobs", "profile_jobs", "tests_jobs"]

VARIANTS_BY_DEFAULT = ("tiny", "small", "base", "pp-tiny")
BATCHES = (1, 8, 64, 128)
# A row of another runtime is one more mode: what builds it takes a variant, its weights and the batch of images.
MODES = ("fused", "eager", "fused+compile", "compile")
COMPILE_MODE = "max-autotune-no-cudagraphs"  # the graph is captured by hand, alike for all modes
SECONDS = {"fused": 8.0, "eager": 6.0, "fused+compile": 60.0, "compile": 80.0}  # guesses, until one was measured
PROFILED = [("tiny", "fused"), ("base", "fused"), ("pp-tiny", "fused"), ("tiny", "fused+compile")]
DETECTOR = ("pp-tiny", (800, 1344))
TESTS_SECONDS = 300.0  # with TensorRT, each process builds its engines
NCU_SECONDS = 90.0
NOTE_LENGTH = 4000
WRONG = 0.1  # of the largest logit; float16 is within a tenth of that
MIB = 2**20


@functools.lru_cache(maxsize=4)
def _weights(variant: Variant) -> Weights:
    return load_weights(variant)


def network(variant: Variant, mode: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The seeded network, as the mode calls it but not compiled."""
    return model_from_weights(_weights(variant), variant, fused=mode.startswith("fused")).to(device, dtype)


def make_images(variant: Variant, batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(batch)
    return torch.randn(batch, 3, *variant.image_size, generator=generator, device=device)


def _compile(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, mode=COMPILE_MODE, dynamic=False)


def measure(
    variant: Variant, mode: str, batch: int, gpu: Any, *, compile_: Callable[..., Any] = _compile, dtype=torch.float16
) -> Found:
    """Logits against eager float32, then memory without a graph, then the time of a graph's replays."""
    torch.compiler.reset()
    images = make_images(variant, batch, gpu.device)
    slots = [0] if batch == 1 else [0, batch - 1]
    exact = network(variant, "eager", gpu.device, torch.float32)(images[slots])
    images = images.to(dtype)
    model = network(variant, mode, gpu.device, dtype)
    run = compile_(model) if mode.endswith("compile") else model
    begin = time.perf_counter()
    logits = run(images)
    gpu.synchronize()
    first_s = time.perf_counter() - begin
    error, largest = (logits[slots].float() - exact).abs().max().item(), exact.abs().max().item()
    del logits, exact
    peak = gpu.peak_bytes(lambda: run(images))
    notes = []
    try:
        call, how = gpu.capture(lambda: run(images)), "replays of a CUDA graph"
    except Exception as error_of_capture:
        gpu.synchronize()  # raises if more is broken than the capture
        call, how = functools.partial(run, images), "calls, launches included"
        notes.append(f"not captured in a CUDA graph: {str(error_of_capture).strip()[:300]}")
    took = times(gpu.samples([call], seconds=1.0, least=100, most=1000), 1, how)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    numbers = {
        "images_per_s": batch / took.median * 1e6,
        "p50_ms": took.median / 1000,
        "p90_ms": took.p90 / 1000,
        "p99_ms": took.p99 / 1000,
        "samples": took.samples,
        "peak_mib": peak / MIB,
        "weights_mib": weights / MIB,
        "first_call_s": first_s,
        "max_logit_error": error,
        "largest_logit": largest,
        "in_graph": float(not notes),
    }
    wrong = not error <= WRONG * largest  # a NaN is wrong, too
    sentence = f"wrong: a logit is off by {error:.3g}, the largest is {largest:.3g}" if wrong else None
    return Found(numbers, (f"{took.samples} {took.how}", *notes), sentence)


def jobs(variants: Sequence[str] = VARIANTS_BY_DEFAULT) -> list[Job]:
    """What the targets need comes first: the largest batch, ours and then all modes of a network after another."""
    largest = max(BATCHES)
    wanted = [(name, "fused", largest) for name in variants] + [(variants[0], "fused", 1)]
    # What was tuned for one compiled mode serves the other, so they stand together.
    wanted += [(name, mode, largest) for name in variants for mode in ("compile", "fused+compile", "eager")]
    wanted += [(variants[0], mode, 1) for mode in ("fused+compile", "compile", "eager")]
    wanted += [(name, mode, batch) for mode in MODES for batch in BATCHES for name in variants]

    def job(name: str, mode: str, batch: int) -> Job:
        size = "x".join(map(str, VARIANTS[name].image_size))
        return Job(
            f"networks/{name}/batch {batch}/{mode}",
            "networks",
            f"networks {mode}",
            {"variant": name, "image": size, "batch": str(batch), "mode": mode, "precision": "fp16"},
            SECONDS[mode],
            lambda gpu, record, path: measure(VARIANTS[name], mode, batch, gpu),
        )

    return [job(*each) for each in dict.fromkeys(wanted)]


def memory(mode: str, gpu: Any, *, variant: Variant | None = None, dtype=torch.float16) -> Found:
    """The most memory of one forward of a detector's backbone with its head, batch 1."""
    variant = variant or find_variant(DETECTOR[0], image_size=DETECTOR[1])
    images = make_images(variant, 1, gpu.device).to(dtype)
    model = network(variant, mode, gpu.device, dtype)
    logits = model(images).float()
    peak = gpu.peak_bytes(lambda: model(images))
    took = times(gpu.samples([lambda: model(images)], seconds=0.5, least=10, most=100), 1, "calls, launches included")
    numbers = {"peak_mib": peak / MIB, "p50_ms": took.median / 1000}
    exact = network(variant, "eager", gpu.device, torch.float32)(images.float())
    error, largest = (logits - exact).abs().max().item(), exact.abs().max().item()
    numbers |= {"max_logit_error": error, "largest_logit": largest}
    wrong = not error <= WRONG * largest
    return Found(numbers, (took.how,), f"wrong: a logit is off by {error:.3g}" if wrong else None)


def memory_jobs() -> list[Job]:
    name, size = DETECTOR
    labels = {"variant": name, "image": f"{size[0]}x{size[1]}", "batch": "1", "precision": "fp16"}

    def job(mode: str) -> Job:
        key = f"memory/{name}/{size[0]}x{size[1]}/{mode}"
        return Job(key, "memory", "memory", labels | {"mode": mode}, 10.0, lambda gpu, *_: memory(mode, gpu))

    return [job(mode) for mode in ("fused", "eager")]


def profile(name: str, batch: int, mode: str, gpu: Any, path: Path) -> Found:
    """Kernels of one forward by their time, as text beside the record."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    variant = VARIANTS[name]
    images, model = make_images(variant, batch, gpu.device).half(), network(variant, mode, gpu.device, torch.float16)
    model = _compile(model) if mode.endswith("compile") else model
    for _ in range(3):
        model(images)
    gpu.synchronize()
    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        model(images)
        gpu.synchronize()
    averages = profiler.key_averages()
    table = averages.table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=80)
    _append(
        path.with_name(f"{path.stem}-profile.txt"), f"{name}, batch {batch}, {mode}, one float16 forward\n{table}\n"
    )
    kernels = {event.key: event.self_device_time_total for event in averages if event.device_type == DeviceType.CUDA}
    total = sum(kernels.values())
    ours = sum(spent for kernel, spent in kernels.items() if re.search(r"_(attention|sample)_kernel", kernel))
    return Found({"device_ms": total / 1000, "share_of_our_kernels": ours / total if total else 0.0})


def ncu(program: str, path: Path) -> Found:
    """All that Nsight Compute says of one launch of the kernel at the shape of the targets."""
    command = [program, "--set", "full", "--kernel-name", "regex:deformable_attention_kernel", "--launch-skip", "2"]
    command += ["--launch-count", "1", sys.executable, str(Path(__file__).with_name("gpu.py")), "--ncu-target"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NCU_SECONDS)  # noqa: S603  # fixed
    except subprocess.TimeoutExpired:
        return Found({}, error=f"ncu took more than {NCU_SECONDS:.0f} s")
    _append(path.with_name(f"{path.stem}-ncu.txt"), done.stdout + done.stderr)
    if done.returncode or "deformable_attention_kernel" not in done.stdout:
        last = (done.stdout + done.stderr).strip().splitlines()[-3:]
        return Found({}, error=f"ncu ended with {done.returncode}: {' '.join(last)[:400]}")
    return Found({"exit_code": done.returncode})


def _append(path: Path, text: str) -> None:
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    with atomic_output(path, force=True) as temporary:
        temporary.write_text(before + text, encoding="utf-8")


def profile_jobs() -> list[Job]:
    batch = max(BATCHES)

    def job(name: str, mode: str) -> Job:
        return Job(
            f"profile/{name}/batch {batch}/{mode}",
            "profile",
            f"profile {mode}",
            {"variant": name, "batch": str(batch), "mode": mode},
            SECONDS[mode],
            lambda gpu, record, path: profile(name, batch, mode, gpu, path),
        )

    found, program = [job(*each) for each in PROFILED], shutil.which("ncu")
    if program:
        labels = {"kernel": "deformable_attention"}
        found.append(Job("profile/ncu", "profile", "ncu", labels, 40.0, lambda gpu, record, path: ncu(program, path)))
    return found


def run_tests(root: Path, *, mark: str = "gpu", seconds: float = TESTS_SECONDS) -> Found:
    """The tests of that mark, in a process of their own. Files without one are not even imported."""
    files = [path for path in sorted(root.glob("tests/**/test_*.py")) if f"mark.{mark}" in path.read_text("utf-8")]
    if not files:
        return Found({}, error=f"no test is marked {mark}")
    command = [sys.executable, "-m", "pytest", "-m", mark, *map(str, files), "-q", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--tb=line", "--no-header", "--maxfail=20"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels, on one core each
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    begin = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            more = {"DAT_DEPLOY_CONFIGURATIONS": str(Path(folder, "configurations.json"))}  # what was tuned stays
            more |= {"PYTHONPATH": str(root), "COLUMNS": "250"}  # room for the reasons behind the names
            done = subprocess.run(  # noqa: S603  # fixed
                command, capture_output=True, text=True, timeout=seconds, cwd=root, env=os.environ | more
            )
    except subprocess.TimeoutExpired as error:
        tail = (error.stdout or b"").decode(errors="replace")[-NOTE_LENGTH:]
        return Found({}, (tail,), f"the tests took more than {seconds:.0f} s")
    return tests_found(done.stdout + done.stderr, done.returncode, time.perf_counter() - begin)


def tests_found(output: str, code: int, seconds: float) -> Found:
    """What pytest's last line counts."""
    counted = {name: float(n) for n, name in re.findall(r"(\d+) (passed|failed|error|skipped|deselected)", output)}
    numbers = {name: counted.get(name, 0.0) for name in ("passed", "failed", "error", "skipped")} | {"seconds": seconds}
    wrong = code != 0 or not numbers["passed"]
    error = f"pytest ended with {code}: {int(numbers['passed'])} passed, {int(numbers['failed'])} failed"
    return Found(numbers, (output.strip()[-NOTE_LENGTH:],), error if wrong else None)


def tests_jobs() -> list[Job]:
    root = Path(__file__).resolve().parents[1]
    return [Job("tests", "tests", "tests", {"marker": "gpu"}, 45.0, lambda *_: run_tests(root))]
