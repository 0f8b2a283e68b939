"""Engines in float16, built and opened as users do: speed, latency, memory, and the error in every slot."""

import functools
import importlib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_networks import BATCHES, MIB, VARIANTS_BY_DEFAULT, WRONG, make_images, network
from gpu_record import Found, Job
from gpu_timing import Times, times
from torch import Tensor

from dat_deploy.engine.gpu import gpu_architecture
from dat_deploy.engine.tensorrt_library import MODULES, import_tensorrt, reasons_against_gpu
from dat_deploy.errors import UnsupportedError
from dat_deploy.plugins import trt_plugin
from dat_deploy.variants import VARIANTS, Variant

__all__ = ["ENGINES", "Engine", "jobs", "measure", "reason_against"]

REPLAYS = 20  # in which no Python may launch anything
EAGER_BATCH = 8  # of the float32 that answers are compared with
HOST_SECONDS = 0.5
SECONDS = {"aotinductor": 90.0, "tensorrt": 90.0, "tensorrt-rtx": 40.0}  # guesses, until one was measured
REFUSED_SECONDS = 1.0


@dataclass(frozen=True)
class Engine:
    """What `dat-deploy build` is asked for.

    Attributes:
        lowering: None for AOTInductor, which has the fused kernels compiled in.
        plugin_form: see `build`; None for an engine without plugins.
    """

    backend: str
    lowering: str | None = None
    plugin_form: str | None = None

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.backend, self.lowering, self.plugin_form)))


ENGINES = (  # in the order of their value at one batch of one network
    Engine("aotinductor"),
    Engine("tensorrt", "plugin", "ahead-of-time"),
    Engine("tensorrt", "gather"),
    Engine("tensorrt", "plugin", "IPluginV3"),
    Engine("tensorrt", "function"),
    Engine("tensorrt-rtx", "plugin", "IPluginV3"),
    Engine("tensorrt-rtx", "gather"),
)


def reason_against(engine: Engine) -> str | None:
    """Why none such can be built or run here, in a sentence; None if nothing is known against it. Builds nothing."""
    try:
        importlib.import_module("dat_deploy.engine.build")
        trt = None if engine.backend == "aotinductor" else import_tensorrt(engine.backend)
    except ImportError as error:
        return f"this Python cannot build engines: {error}"
    except UnsupportedError as error:
        return str(error)
    architecture = gpu_architecture()
    if trt is not None and architecture is not None:
        reasons = reasons_against_gpu(trt, engine.backend, architecture)
        if reasons:
            return "; ".join(reasons)
    against = {
        "ahead-of-time": trt_plugin.reasons_against_ahead_of_time,
        "IPluginV3": trt_plugin.reasons_against_plugins,
    }
    reasons = against[engine.plugin_form](trt) if engine.plugin_form else []
    return "; ".join(reasons) or None


def exported(variant: Variant, folder: Path) -> Path:
    """The variant in fp16, of any batch and with its operators as functions; made once in a folder."""
    from dat_deploy.export import export

    path = folder / f"{variant.name}.onnx"
    if not path.exists():
        export(variant, path, precision="fp16")
    return path


def free_bytes(device: torch.device) -> int:
    """Of the GPU's memory: what TensorRT takes, torch does not count."""
    return torch.cuda.mem_get_info(device)[0]


def measure(variant: Variant, engine: Engine, batch: int, gpu: Any, folder: Path | None = None) -> Found:
    """Build, open, compare every slot with eager float32, count launches from Python, then time the calls.

    Args:
        folder: where exported files stay for later rows; without one they go with this row.
    """
    from dat_deploy import runners
    from dat_deploy.engine import build as building

    images = make_images(variant, batch, gpu.device)
    exact = eager(variant, images)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        how: dict[str, Any] = {"variant": variant, "precision": "fp16"}
        if engine.backend != "aotinductor":
            how = {"source": exported(variant, folder or Path(own)), "lowering": engine.lowering}
            how |= {"plugin_form": engine.plugin_form or "auto"}
        output = Path(own, "engine.pt2" if engine.backend == "aotinductor" else "engine.engine")
        report = building.build(output=output, backend=engine.backend, batches=[batch], **how)
        gpu.release()
        free, begin = free_bytes(gpu.device), time.perf_counter()
        with runners.open_runner(str(report.path)) as runner:
            found = _run(runner, engine, images, exact, gpu, free=free, begin=begin)
    passport = report.passport
    layers = passport.layers if passport.engine_layers is None else passport.engine_layers
    numbers = {"build_s": report.seconds, "engine_mib": passport.engine_bytes / MIB}
    numbers |= {f"{kind} layers": float(count) for kind, count in sorted(layers.items())}
    numbers |= {"plugin_layers": float(sum(passport.plugins.values()))}
    notes = list(report.notes)
    if layers and passport.engine_layers is None:
        notes.append("layers are those of the parsed network, for the engine's own could not be seen")
    return Found(found.numbers | numbers, (*found.notes, *notes), found.error)


def eager(variant: Variant, images: Tensor) -> Tensor:
    """Logits in float32; of few images at a time, for their memory."""
    model = network(variant, "eager", images.device, torch.float32)
    return torch.cat([model(part) for part in images.split(EAGER_BATCH)])


def _run(runner: Any, engine: Engine, images: Tensor, exact: Tensor, gpu: Any, *, free: int, begin: float) -> Found:
    """What an opened engine does.

    Args:
        free: bytes that the GPU had before it was opened; begin: the time then.
    """
    call: Callable[[], Any] = functools.partial(runner.outputs_on_device, images)
    launched = launches()
    logits = call()["logits"]
    gpu.synchronize()
    open_s, capturing = time.perf_counter() - begin, launches() - launched
    slots = (logits.float() - exact).abs().amax(dim=1).nan_to_num(nan=math.inf).tolist()
    worst, largest = max(range(len(slots)), key=slots.__getitem__), exact.abs().max().item()
    del logits
    taken = free - free_bytes(gpu.device)
    notes, how = [], "calls on the device, each a copy, a replay of the engine's own CUDA graph and a copy"
    if engine.backend not in MODULES:  # TensorRT's runner has captured its graph
        try:
            call, how = gpu.capture(call), "replays of a CUDA graph"
        except Exception as error:
            gpu.synchronize()  # raises if more is broken than the capture
            how = "calls on the device, launches included"
            notes.append(f"not captured in a CUDA graph: {str(error).strip()[:300]}")
    launched = launches()
    for _ in range(REPLAYS):
        call()
    gpu.synchronize()
    replaying = launches() - launched
    took = times(gpu.samples([call], seconds=1.0, least=100, most=1000), 1, how)
    host = host_times(runner, images.cpu().numpy())
    numbers = {
        "images_per_s": len(images) / took.median * 1e6,
        "p50_ms": took.median / 1000,
        "p90_ms": took.p90 / 1000,
        "p99_ms": took.p99 / 1000,
        "samples": took.samples,
        "host_p50_ms": host.median / 1000,
        "host_p99_ms": host.p99 / 1000,
        "host_samples": host.samples,
        "device_mib": taken / MIB,
        "open_s": open_s,
        "max_logit_error": slots[worst],
        "largest_logit": largest,
        "worst_slot": worst,
        "python_launches_at_capture": capturing,
        "python_launches_in_replay": replaying,
        "in_graph": float(not notes),
    }
    wrong = []
    if not slots[worst] <= WRONG * largest:
        wrong.append(f"wrong: a logit of slot {worst} is off by {slots[worst]:.3g}, the largest is {largest:.3g}")
    if replaying:
        wrong.append(f"Python launched {replaying} kernels in {REPLAYS} replays, where it must launch none")
    if engine.plugin_form == "IPluginV3" and not capturing:
        wrong.append("the plugins launched nothing, so the engine does not run through them")
    said = (f"{took.samples} {took.how}", f"{host.samples} {host.how}", *notes)
    return Found(numbers, said, "; ".join(wrong) or None)


def launches() -> int:
    """Of the plugins from Python, in this process so far."""
    return sum(trt_plugin.launch_counts().values())


def host_times(runner: Any, images: Any) -> Times:
    """From NumPy to NumPy, by the clock of the host."""
    runner.outputs(images)  # whatever the first one allocates
    samples: list[float] = []
    until = time.perf_counter() + HOST_SECONDS
    while len(samples) < 10 or (len(samples) < 1000 and time.perf_counter() < until):
        begin = time.perf_counter()
        runner.outputs(images)
        samples.append((time.perf_counter() - begin) * 1e6)
    return times(samples, 1, "calls from NumPy to NumPy, by the host's clock")


def jobs(variants: Sequence[str] = VARIANTS_BY_DEFAULT, folder: Path | None = None) -> list[Job]:
    """What cannot run here comes first, in one row an engine; then the largest batch, batch 1 and the others.

    Args:
        folder: see `measure`.
    """
    reasons = {engine: reason_against(engine) for engine in ENGINES}
    largest = max(BATCHES)
    batches = dict.fromkeys((largest, 1, *BATCHES))

    def refused(engine: Engine, reason: str) -> Job:
        labels = {"variant": "any", "image": "any", "batch": "any", **_labels(engine)}
        key = f"engines/{engine.name}"
        return Job(key, "engines", "engines refused", labels, REFUSED_SECONDS, lambda *_: Found({}, error=reason))

    def job(name: str, batch: int, engine: Engine) -> Job:
        size = "x".join(map(str, VARIANTS[name].image_size))
        return Job(
            f"engines/{name}/batch {batch}/{engine.name}",
            "engines",
            f"engines {engine.name}",
            {"variant": name, "image": size, "batch": str(batch), **_labels(engine)},
            SECONDS[engine.backend],
            lambda gpu, record, path: measure(VARIANTS[name], engine, batch, gpu, folder),
        )

    found = [refused(engine, reason) for engine, reason in reasons.items() if reason]
    able = [engine for engine, reason in reasons.items() if not reason]
    return found + [job(name, batch, engine) for batch in batches for name in variants for engine in able]


def _labels(engine: Engine) -> dict[str, str]:
    return {"engine": engine.name, "backend": engine.backend, "precision": "fp16"}
