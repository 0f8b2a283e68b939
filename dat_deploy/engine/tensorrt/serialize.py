"""An exported file -> a serialised engine of TensorRT or TensorRT-RTX."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from google.protobuf.message import EncodeError

from dat_deploy.engine.passport import Profile
from dat_deploy.engine.tensorrt.library import Log
from dat_deploy.engine.tensorrt.network import ParsedNetwork, parsed_network
from dat_deploy.environment import gpu_architecture
from dat_deploy.errors import EngineBuildError, ShapeError, UnsupportedError
from dat_deploy.files import atomic_output
from dat_deploy.plugins.tensorrt.calls import last_error
from dat_deploy.progress import Progress

__all__ = ["SerializedEngine", "serialized_engine"]


@dataclass(frozen=True)
class SerializedEngine:
    """A serialised engine, and of the network that it was built from what `ParsedNetwork` counts."""

    content: bytes
    layers: dict[str, int]
    kinds: dict[str, int]
    plugins: dict[str, int]


def serialized_engine(
    trt: ModuleType,
    backend: str,
    model: onnx.ModelProto,
    profiles: Sequence[Profile],
    image_size: tuple[int, int],
    *,
    plugin_form: str | None,
    architectures: Sequence[int] = (),
    timing_cache: Path | None = None,
    workspace_bytes: int | None = None,
    progress: Progress = lambda _: None,
) -> SerializedEngine:
    """Build an engine of `model`; the precision is the graph's own, TF32 is off.

    Args:
        model: of a fixed or dynamic batch; `profiles` fit it.
        plugin_form: `IPluginV3` or `ahead-of-time`, registered by the caller; None for an engine without plugins.
        architectures: compute capabilities times ten to build for; by default that of the GPU at hand, and with
            TensorRT-RTX all that it knows. For others TensorRT leaves out what not all GPUs from Ampere on have.
        timing_cache: read if it exists, and written; not for TensorRT-RTX.
        workspace_bytes: of GPU memory that a layer may use besides its tensors; None for all.

    Raises:
        EngineBuildError: if TensorRT fails; what it said is in the message.
        UnsupportedError: if the backend does not know an architecture.
    """
    log = Log(trt)
    progress("reading the file")
    try:
        definition = parsed_network(
            trt, model, log, plugins=plugin_form is not None, ahead_of_time=plugin_form == "ahead-of-time"
        )
        config = definition.builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is what keeps coordinates exact
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the inspector can tell types
        if workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        _set_architectures(trt, backend, config, architectures)
        _add_profiles(definition, config, profiles, image_size)
        cache = _set_timing_cache(config, timing_cache)
        monitor = _monitor(trt, progress)
        config.progress_monitor = monitor.object
        memory = definition.builder.build_serialized_network(definition.network, config)
    except (MemoryError, EncodeError) as error:  # protobuf's for a message that it has no memory for
        raise _failed(log, out_of_memory=True) from error
    if monitor.error is not None:
        raise monitor.error
    if memory is None:
        raise _failed(log)
    if cache is not None and timing_cache is not None:
        with atomic_output(timing_cache, force=True) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    return SerializedEngine(bytes(memory), definition.layers, definition.kinds, definition.plugins)


def _failed(log: Log, *, out_of_memory: bool = False) -> EngineBuildError:
    plugin = last_error()
    if plugin is not None:
        return EngineBuildError(f"a plugin refused its part of the network: {plugin}")
    tail = log.tail()
    hint = '`lowering="gather"`, and report this'
    if out_of_memory or any(word in tail.lower() for word in ("memory", "alloc")):
        hint = "smaller `batches`, `workspace_bytes`, or a machine with more memory"
    return EngineBuildError(f"TensorRT could not build the engine; it said: {tail}. Try {hint}.")


def _set_architectures(trt: ModuleType, backend: str, config: Any, architectures: Sequence[int]) -> None:
    if not architectures:
        return
    if backend == "tensorrt":
        here = gpu_architecture()
        if set(architectures) == {here}:
            return
        if here not in architectures:
            raise UnsupportedError(
                f"TensorRT times the kernels on the GPU at hand, sm_{here}, which `architectures` does not have; add "
                f"it, or build on one of {', '.join(f'sm_{a}' for a in architectures)}."
            )
        if min(architectures) < 80:
            raise UnsupportedError(
                f"an engine of TensorRT runs on the architecture of the GPU at hand, or with `architectures` on "
                f"several from sm_80 on; it has sm_{min(architectures)}. Build there, or use "
                f'`backend="tensorrt-rtx"`.'
            )
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        return
    levels = {int(name[2:]): value for name, value in trt.ComputeCapability.__members__.items() if name[2:].isdigit()}
    unknown = [architecture for architecture in architectures if architecture not in levels]
    if unknown:
        raise UnsupportedError(
            f"TensorRT-RTX {trt.__version__} does not build for {', '.join(f'sm_{a}' for a in unknown)}; it knows "
            f'{", ".join(f"sm_{a}" for a in sorted(levels))}. Use `backend="tensorrt"` or `"aotinductor"` there.'
        )
    config.num_compute_capabilities = len(architectures)
    for index, architecture in enumerate(architectures):
        config.set_compute_capability(levels[architecture], index)


def _add_profiles(
    definition: ParsedNetwork, config: Any, profiles: Sequence[Profile], image_size: tuple[int, int]
) -> None:
    image = definition.network.get_input(0)
    if -1 not in image.shape:
        return  # a fixed batch needs none
    for profile in profiles:
        optimization_profile = definition.builder.create_optimization_profile()
        optimization_profile.set_shape(
            "image", *((batch, 3, *image_size) for batch in (profile.least, profile.best, profile.most))
        )
        if config.add_optimization_profile(optimization_profile) < 0:
            raise ShapeError(f"TensorRT refuses the profile of batch {profile} for images of {image_size}.")


def _set_timing_cache(config: Any, path: Path | None) -> Any:
    """The cache, or None if there is to be none."""
    if path is None:
        return None
    try:
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    except OSError as error:
        raise EngineBuildError(f"cannot read {path}: {error.strerror}; give another `timing_cache`.") from error
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineBuildError(
            f"{path} is no timing cache of this TensorRT and this GPU; give another `timing_cache`, or remove it."
        )
    return cache


@dataclass
class _Monitor:
    """`object` is what TensorRT calls; `error` what was raised meanwhile, a signal for one."""

    object: Any
    error: BaseException | None = None


def _monitor(trt: ModuleType, progress: Progress) -> _Monitor:
    steps: dict[str, int] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]  # a class of a module known at run time
        def phase_start(self, name: str, parent: str | None, count: int) -> None:
            steps[name] = count
            self.tell(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self.tell(name, step + 1)
            return monitor.error is None

        def phase_finish(self, name: str) -> None:
            steps.pop(name, None)

        def tell(self, name: str, count: int) -> None:
            try:  # an exception must not pass through TensorRT
                progress(f"building the engine, {name} ({count}/{steps.get(name, count)})")
            except BaseException as error:
                monitor.error = error

    monitor = _Monitor(None)
    monitor.object = Monitor()
    return monitor
