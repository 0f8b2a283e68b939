"""Runtimes behind one interface: `open_runner("openvino:tiny.onnx")(images) -> logits`."""

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dat_deploy.engine.passport import Profile, check_backend, open_engine, read_passport
from dat_deploy.engine.tensorrt.library import MODULES, check_installed
from dat_deploy.errors import DatDeployError, PassportError, UnsupportedError
from dat_deploy.metadata import FileMetadata, load_onnx
from dat_deploy.networks.checkpoint_file import check_checkpoint
from dat_deploy.networks.family import find_network
from dat_deploy.runners.base import EngineDescription, EngineOutline, Runner, no_plugin_here

__all__ = [
    "ENGINES",
    "RUNTIMES",
    "EngineDescription",
    "EngineOutline",
    "Runner",
    "Runtime",
    "check_engine",
    "open_runner",
    "parse_engine",
    "reasons_against",
]


@dataclass(frozen=True)
class Runtime:
    """A row of the table of runtimes.

    Attributes:
        target: what stands behind the colon of `RUNTIME:TARGET`.
        package: that it needs; extra: of dat-deploy that installs it.
    """

    name: str
    target: str
    package: str
    extra: str
    meaning: str


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("pytorch", "VARIANT", "torch", "", "PyTorch, eager, fp32"),
        Runtime("pytorch-compile", "VARIANT", "torch", "", "PyTorch, torch.compile, fp32"),
        Runtime("onnxruntime", "FILE.onnx", "onnxruntime", "onnxruntime", "ONNX Runtime on the CPU, fp32"),
        Runtime("onnxruntime-cuda", "FILE.onnx", "onnxruntime", "onnxruntime-gpu", "ONNX Runtime on CUDA, fp32"),
        Runtime("openvino", "FILE.onnx", "openvino", "openvino", "OpenVINO on the CPU, fp32"),
        Runtime("openvino-bf16", "FILE.onnx", "openvino", "openvino", "OpenVINO on the CPU, bf16"),
        Runtime("tensorrt", "FILE.engine", "tensorrt", "tensorrt", "TensorRT, an engine of dat-deploy build"),
        Runtime("tensorrt-rtx", "FILE.engine", "tensorrt_rtx", "tensorrt-rtx", "TensorRT-RTX, the same"),
        Runtime("aotinductor", "FILE.pt2", "torch", "", "AOTInductor, a package of dat-deploy build"),
    )
}


def parse_engine(engine: str) -> tuple[Runtime, str]:
    """`[RUNTIME:]TARGET` -> the runtime and its target.

    A bare `FILE.onnx` runs on ONNX Runtime, a `FILE.pt2` on AOTInductor, a `FILE.engine` on what its passport says.

    Raises:
        DatDeployError: if there is no such runtime, or no way to tell one.
    """
    name, colon, target = engine.partition(":")
    if not colon:
        if engine.endswith(".onnx"):
            return RUNTIMES["onnxruntime"], engine
        if engine.endswith(".pt2"):
            return RUNTIMES["aotinductor"], engine
        if engine.endswith(".engine"):
            return RUNTIMES[_backend(Path(engine))], engine
        raise DatDeployError(
            f"cannot tell what runs '{engine}'; an engine is FILE.onnx, FILE.engine, FILE.pt2 or "
            f"RUNTIME:TARGET, such as pytorch:tiny or openvino:tiny.onnx. Runtimes: {', '.join(RUNTIMES)}."
        )
    if name not in RUNTIMES:
        near = difflib.get_close_matches(name, RUNTIMES, n=2)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise DatDeployError(f"no runtime '{name}' in '{engine}'. {hint}Runtimes: {', '.join(RUNTIMES)}.")
    if not target:
        raise DatDeployError(f"'{engine}' names no target; write {name}:{RUNTIMES[name].target}")
    return RUNTIMES[name], target


def _backend(engine: Path) -> str:
    """That built it; TensorRT where nothing says so, of which the runner then complains."""
    try:
        backend = read_passport(engine).backend
    except PassportError:
        return "tensorrt"
    return backend if backend in RUNTIMES else "tensorrt"


def check_engine(
    engine: str,
    *,
    checkpoint: Path | None = None,
    image_size: tuple[int, int] | None = None,
    features: Sequence[int] | None = None,
) -> EngineOutline:
    """Refuse early what `open_runner` would refuse of the arguments and the file; no runtime is loaded.

    Raises:
        DatDeployError: as `open_runner`, but for what the runtime itself says.
    """
    runtime, target = parse_engine(engine)
    path = Path(target)
    check_checkpoint(checkpoint)
    if runtime.target == "VARIANT":
        network = find_network(target, image_size=image_size, features=features)
        is_dynamic = network.takes_any_size and runtime.name == "pytorch"
        outline = EngineOutline(engine, network, None, None, is_dynamic, network.preprocessing)
    elif runtime.target == "FILE.onnx":
        model = load_onnx(path)
        metadata = FileMetadata.from_properties({entry.key: entry.value for entry in model.metadata_props}, path)
        if metadata.lowering == "plugin":
            raise no_plugin_here(engine)
        outline = _outline(engine, metadata, [value.name for value in model.graph.output])
    else:
        passport, _ = open_engine(path)
        check_backend(path, passport, runtime.name)
        if runtime.name in MODULES:
            check_installed(runtime.name)
        outline = _outline(engine, passport.metadata, passport.outputs, passport.profiles)
    if image_size is not None:
        outline.network_at(*image_size)
    missing = _missing_package(runtime)
    if missing:
        raise _cannot_run(runtime, missing)
    return outline


def _outline(
    engine: str, metadata: FileMetadata, outputs: Iterable[str], profiles: tuple[Profile, ...] = ()
) -> EngineOutline:
    return EngineOutline(
        engine,
        metadata.network,
        tuple(outputs),
        metadata.batch,
        metadata.dynamic_image_size,
        metadata.preprocessing,
        profiles,
    )


def _missing_package(runtime: Runtime) -> list[str]:
    if importlib.util.find_spec(runtime.package) is None:
        return [f"package {runtime.package} is not installed: pip install 'dat-deploy[{runtime.extra}]'"]
    return []


def _cannot_run(runtime: Runtime, reasons: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(f"{runtime.name} cannot run here: {'; '.join(reasons)}")


def reasons_against(runtime: Runtime) -> list[str]:
    """Why `runtime` cannot run here; empty if it can."""
    missing = _missing_package(runtime)
    if missing:
        return missing
    if runtime.name in ("tensorrt", "tensorrt-rtx"):
        from dat_deploy.environment import gpu_architecture

        return [] if gpu_architecture() else ["torch sees no CUDA device here"]
    if runtime.name == "onnxruntime-cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return ["the installed onnxruntime has no CUDA: pip install 'dat-deploy[onnxruntime-gpu]'"]
    if runtime.name == "openvino-bf16":
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return ["this CPU has no bfloat16 instructions"]
    return []


def open_runner(
    engine: str,
    *,
    checkpoint: Path | None = None,
    image_size: tuple[int, int] | None = None,
    features: Sequence[int] | None = None,
    threads: int | None = None,
) -> Runner:
    """Open `[RUNTIME:]TARGET`.

    Args:
        checkpoint, features: for `pytorch:VARIANT`, where VARIANT is a name or a configuration file; an exported file
            has its own.
        image_size: (height, width) in pixels that `description` is for, where the engine has a choice.
        threads: that one call may use; None for all that this process may run on, or as many as torch takes in this
            process where torch computes.

    Raises:
        DatDeployError: if the engine cannot be opened; UnsupportedError if this environment lacks its runtime.
    """
    runtime, target = parse_engine(engine)
    if runtime.target == "VARIANT":  # what is wrong with the words is told before a runtime is loaded
        check_checkpoint(checkpoint)
        find_network(target, image_size=image_size, features=features)
    elif not Path(target).is_file():
        open_engine(Path(target)) if runtime.target != "FILE.onnx" else load_onnx(Path(target))
    if runtime.name in ("tensorrt", "tensorrt-rtx"):  # the engine first: what is wrong with it is wrong everywhere
        from dat_deploy.runners.tensorrt_runner import TensorrtRunner

        return TensorrtRunner(Path(target), engine, backend=runtime.name, image_size=image_size)
    if runtime.name == "aotinductor":
        from dat_deploy.runners.aotinductor_runner import AotinductorRunner

        return AotinductorRunner(Path(target), engine, image_size=image_size, threads=threads)
    reasons = reasons_against(runtime)
    if reasons:
        raise _cannot_run(runtime, reasons)
    match runtime.package:
        case "torch":
            from dat_deploy.runners.pytorch_runner import PytorchRunner

            compiled = runtime.name == "pytorch-compile"
            return PytorchRunner(
                target,
                engine,
                checkpoint=checkpoint,
                image_size=image_size,
                features=features,
                threads=threads,
                compiled=compiled,
            )
        case "onnxruntime":
            from dat_deploy.runners.onnxruntime_runner import OnnxruntimeRunner

            cuda = runtime.name == "onnxruntime-cuda"
            return OnnxruntimeRunner(Path(target), engine, image_size=image_size, threads=threads, cuda=cuda)
        case "openvino":
            from dat_deploy.runners.openvino_runner import OpenvinoRunner

            precision = "bf16" if runtime.name == "openvino-bf16" else "fp32"
            return OpenvinoRunner(Path(target), engine, image_size=image_size, threads=threads, precision=precision)
    raise AssertionError(f"{runtime.name} has no runner")
