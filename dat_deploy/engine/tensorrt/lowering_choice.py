"""Which lowering an engine is built from: the fastest of those that are right on the GPU at hand.

TensorRT has compiled deformable attention wrongly for some batch slots and said nothing (NVIDIA/TensorRT#4813), so no
lowering is trusted before it was tried: a network of one block of each kind is built from each, compared with float64
in every slot of the batch, and timed. What was found is kept for that TensorRT, GPU architecture and driver.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from dat_deploy.engine.passport import Profile, sha256
from dat_deploy.engine.tensorrt.library import reasons_against_gpu
from dat_deploy.engine.tensorrt.serialize import serialized_engine
from dat_deploy.engine.tensorrt.session import Session
from dat_deploy.environment import gpu_architecture, installed_version, nvidia_smi, tool_version
from dat_deploy.errors import DatDeployError, OutputError, VerificationError
from dat_deploy.export import export, relower
from dat_deploy.files import atomic_output
from dat_deploy.metadata import FileMetadata, load_onnx
from dat_deploy.networks.family import Network, family_of
from dat_deploy.plugins.tensorrt import registry
from dat_deploy.plugins.tuning import configurations_path
from dat_deploy.precision import FULL, PRECISIONS
from dat_deploy.progress import Progress
from dat_deploy.typed_json import typed

__all__ = ["Choice", "LoweringVerdict", "choose_lowering", "stored_verdicts", "try_lowerings"]

CANDIDATES = ("plugin", "gather", "function", "hat", "gridsample")
Outputs = dict[str, NDArray[np.float32]]
Execute = Callable[[str, onnx.ModelProto, NDArray[np.float32]], tuple[Outputs, float]]


@dataclass(frozen=True)
class LoweringVerdict:
    """How one lowering did.

    Attributes:
        error: the largest difference to float64 as a share of what is allowed, over all slots; None if there is none,
            and `reason` says why.
        slot: of the batch, where it was largest.
        ms: of one call, in the median; None if it is wrong.
    """

    lowering: str
    error: float | None
    slot: int | None
    ms: float | None
    reason: str

    def __str__(self) -> str:
        return f"{self.lowering} {self.reason or f'{self.ms:.3f} ms'}"

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= 1


@dataclass(frozen=True)
class Choice:
    """`reason` is one sentence for the user."""

    lowering: str
    reason: str
    verdicts: tuple[LoweringVerdict, ...] = ()


def choose_lowering(
    trt: ModuleType,
    backend: str,
    metadata: FileMetadata,
    batch: int,
    image_size: tuple[int, int],
    *,
    register_plugins: Callable[[], str],
    progress: Progress = lambda _: None,
) -> Choice:
    """The lowering to build `metadata`'s network from, for batches up to `batch`.

    Args:
        register_plugins: makes them known to TensorRT in the form that the engine is to have, and returns that.

    Raises:
        VerificationError: if none is right on the GPU at hand.
    """
    architecture = gpu_architecture()
    if architecture is None:
        against = registry.reasons_against_plugins(trt)
        none_here = "no GPU is at hand to try the lowerings on"
        if not against:
            return Choice("plugin", f"{none_here}; took plugin, whose kernels are tested by themselves.")
        return Choice("gather", f"{none_here}, and the plugins cannot be used ({'; '.join(against)}); took gather.")
    reasons = reasons_against_gpu(trt, backend, architecture)
    if reasons:
        lowering = "gather" if registry.reasons_against_plugins(trt) else "plugin"
        return Choice(lowering, f"{'; '.join(reasons)}, so nothing was tried; took {lowering}.")
    network = metadata.network.with_image_size(*image_size)
    where = f"{backend} {trt.__version__}, sm_{architecture}, driver {' '.join(nvidia_smi('driver_version')[:1])}"
    what = f"{network.name} {image_size[0]}x{image_size[1]}, {metadata.precision}, batch {batch}, {_digest(network)}"
    verdicts = stored_verdicts().get(where, {}).get(what)
    if verdicts is None:

        def execute(lowering: str, model: onnx.ModelProto, images: NDArray[np.float32]) -> tuple[Outputs, float]:
            return _execute(trt, backend, lowering, model, images, register_plugins)

        quantized = not PRECISIONS[metadata.precision].is_exported
        precision = FULL.name if quantized else metadata.precision  # of the operators in such a file
        verdicts = try_lowerings(network, precision, batch, execute, progress=progress)
        if any(verdict.passed for verdict in verdicts):  # else something may be wrong that will be mended
            with contextlib.suppress(OSError, OutputError):  # without it, the next build tries again
                _store(where, what, verdicts)
    successes = [verdict for verdict in verdicts if verdict.passed]
    listing = "; ".join(map(str, verdicts))
    if not successes:
        raise VerificationError(
            f'no lowering is right with {where}: {listing}. Use `backend="aotinductor"`, and report this.'
        )
    best = min(successes, key=lambda verdict: verdict.ms or 0.0)
    return Choice(best.lowering, f"took {best.lowering}, the fastest that is right with {where}: {listing}.", verdicts)


def _digest(network: Network) -> str:
    """Of what else decides how the lowerings do: the blocks, and the versions that made the kernels and the files."""
    made_by = [tool_version(), *(installed_version(package) for package in ("torch", "triton", "onnxscript"))]
    return sha256(json.dumps([dataclasses.asdict(network.small()), made_by]).encode())[:8]


def try_lowerings(
    network: Network, precision: str, batch: int, execute: Execute, *, progress: Progress = lambda _: None
) -> tuple[LoweringVerdict, ...]:
    """Build and run each lowering of `network.small()` on a batch of different images, against float64.

    Args:
        execute: (lowering, model, images) -> outputs by name, and milliseconds of a call; what it raises is a verdict.
    """
    small = network.small()
    family = family_of(small)
    weights = family.weights(small)
    images = np.random.default_rng(0).standard_normal((batch, 3, *small.image_size)).astype(np.float32)
    exact = _eager(family.module(small, weights).double(), small, images)
    eager = family.module(small, weights)
    if PRECISIONS[precision].is_half:
        eager = family.rounded(eager, PRECISIONS[precision].dtype)
    tolerances = _tolerances(precision, _eager(eager, small, images), exact)
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder, "function.onnx")
        progress("exporting one block of each kind")
        export(small, exported, precision=precision)
        for lowering in CANDIDATES:
            progress(f"trying lowering {lowering}")
            source = exported.with_stem(lowering)
            if lowering != "function":
                relower(exported, source, lowering)
            verdicts.append(_verdict(lowering, load_onnx(source), images, exact, tolerances, execute))
    return tuple(verdicts)


def _verdict(
    lowering: str,
    model: onnx.ModelProto,
    images: NDArray[np.float32],
    exact: Outputs,
    tolerances: dict[str, float],
    execute: Execute,
) -> LoweringVerdict:
    try:
        outputs, ms = execute(lowering, model, images)
    except (DatDeployError, RuntimeError) as error:  # torch's, of CUDA, are RuntimeErrors
        text = " ".join(str(error).split())
        return LoweringVerdict(lowering, None, None, None, f"not built: {text}")
    slots = np.zeros(len(images))
    for name, values in outputs.items():
        difference = np.abs(values - exact[name]).reshape(len(images), -1).max(axis=1)
        slots = np.maximum(slots, difference / tolerances[name])  # keeps a NaN
    slot = int(np.argmax(np.where(np.isnan(slots), np.inf, slots)))
    worst = float(slots[slot])
    if np.isnan(worst):
        return LoweringVerdict(lowering, None, slot, None, f"wrong: not a number in slot {slot}")
    if not worst <= 1:
        return LoweringVerdict(lowering, worst, slot, None, f"wrong: {worst:.3g} times what is allowed, in slot {slot}")
    return LoweringVerdict(lowering, worst, slot, ms, "")


@torch.inference_mode()
def _eager(model: torch.nn.Module, network: Network, images: NDArray[np.float32]) -> Outputs:
    """One image at a time, so that no slot can disturb another."""
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    outputs: dict[str, list[Any]] = {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for image in torch.from_numpy(images):
            results = model(image[None].to(device, dtype))
            results = results if isinstance(results, tuple) else (results,)
            for name, result in zip(network.output_names(), results, strict=True):
                outputs.setdefault(name, []).append(result.double().cpu().numpy())
    return {name: np.concatenate(results) for name, results in outputs.items()}


def _tolerances(precision: str, rounded: Outputs, exact: Outputs) -> dict[str, float]:
    """Twice the error of eager PyTorch in that precision, on the same images."""
    # two orders of summation differ by more than one does from exact
    least = 0.0 if PRECISIONS[precision].is_half else 1e-4
    return {name: max(least, 2 * float(np.abs(rounded[name] - exact[name]).max())) for name in exact}


def _execute(
    trt: ModuleType,
    backend: str,
    lowering: str,
    model: onnx.ModelProto,
    images: NDArray[np.float32],
    register_plugins: Callable[[], str],
) -> tuple[Outputs, float]:
    """Build and run on the GPU at hand; the time is that of the replay of a CUDA graph, in the median of 50."""
    batch, _, height, width = images.shape
    profiles = [Profile(batch, batch, batch)]
    form = register_plugins() if lowering == "plugin" else None
    engine = serialized_engine(trt, backend, model, profiles, (height, width), plugin_form=form)
    names = [value.name for value in model.graph.output]
    session = Session(trt, engine.content, name=lowering, profiles=profiles, outputs=names, image_size=(height, width))
    with contextlib.closing(session):
        return session.run(images), session.replay_ms(batch, 50)


def _verdicts_path() -> Path:
    return configurations_path().with_name("lowerings.json")


def stored_verdicts() -> dict[str, dict[str, tuple[LoweringVerdict, ...]]]:
    """What earlier builds found: by TensorRT, architecture and driver, then by network, precision and batch."""
    with contextlib.suppress(OSError, ValueError):
        verdicts = json.loads(_verdicts_path().read_text(encoding="utf-8"))
        kind = dict[str, dict[str, tuple[LoweringVerdict, ...]]]
        return typed(kind, verdicts, "verdicts")  # type: ignore[no-any-return]  # checked
    return {}


def _store(where: str, what: str, verdicts: tuple[LoweringVerdict, ...]) -> None:
    records = stored_verdicts()
    records.setdefault(where, {})[what] = verdicts
    path = _verdicts_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {w: {k: [dataclasses.asdict(v) for v in each] for k, each in by.items()} for w, by in records.items()}
    with atomic_output(path, force=True) as temporary:
        temporary.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
