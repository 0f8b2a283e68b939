"""An exported file -> TensorRT engine with its passport."""

import dataclasses
from collections.abc import Sequence
from types import ModuleType

import onnx_ir as ir
import torch

from dat_deploy.engine.backend import BuildRequest, BuiltEngine
from dat_deploy.engine.passport import Passport, sha256, versions
from dat_deploy.engine.source import EngineSource, check_plugin_form
from dat_deploy.engine.tensorrt.layers import count_types, deserialized, layers_of
from dat_deploy.engine.tensorrt.library import import_tensorrt
from dat_deploy.engine.tensorrt.lowering_choice import choose_lowering
from dat_deploy.engine.tensorrt.serialize import serialized_engine
from dat_deploy.engine.tensorrt.session import check_fits
from dat_deploy.environment import driver_cuda_version, gpu_architecture
from dat_deploy.errors import EngineRunError, UnsupportedError
from dat_deploy.export.lowering import lower
from dat_deploy.images.preprocess import golden_sha256
from dat_deploy.metadata import FileMetadata
from dat_deploy.plugins.tensorrt import registry

__all__ = ["engine_and_passport"]


def engine_and_passport(source: EngineSource, request: BuildRequest) -> BuiltEngine:
    """An engine of TensorRT or TensorRT-RTX, for a request that was checked.

    Raises:
        DatDeployError: as `build`.
    """
    backend, plugin_form, architectures = request.backend, request.plugin_form, request.architectures
    trt = import_tensorrt(backend)
    here = gpu_architecture()
    if backend == "tensorrt" and here is None:
        raise UnsupportedError(
            f"TensorRT builds on a GPU, and torch {torch.__version__} sees none here. Build where one is, or with "
            f'`backend="tensorrt-rtx"`, which needs none for that.'
        )
    metadata, model, size = source.metadata, source.model, source.image_size
    lowering = source.lowering

    def register_plugins() -> str:
        return _register_form(trt, backend, plugin_form, architectures)

    notes: tuple[str, ...] = ()
    if lowering == "auto":
        most = max(profile.most for profile in request.profiles)
        choice = choose_lowering(
            trt, backend, metadata, most, size, register_plugins=register_plugins, progress=request.progress
        )
        lowering, notes = choice.lowering, (choice.reason,)
        check_plugin_form(plugin_form, lowering)
    if lowering != metadata.lowering:
        model = ir.to_proto(lower(ir.from_proto(model), lowering))
    form = register_plugins() if lowering == "plugin" else None
    engine = serialized_engine(
        trt,
        backend,
        model,
        request.profiles,
        size,
        plugin_form=form,
        architectures=architectures,
        timing_cache=request.timing_cache,
        workspace_bytes=request.workspace_bytes,
        progress=request.progress,
    )
    passport = Passport(
        engine_sha256=sha256(engine.content),
        engine_bytes=len(engine.content),
        backend=backend,
        backend_version=trt.__version__,
        versions=versions(),
        architectures=tuple(f"sm_{a}" for a in architectures or ([here] if here and backend == "tensorrt" else [])),
        profiles=request.profiles,
        outputs=tuple(value.name for value in model.graph.output),
        layers=engine.layers,
        kinds=engine.kinds,
        engine_layers=None,
        plugins=engine.plugins,
        plugin_form=form,
        metadata=_of_engine(metadata, lowering, size),
        source=source.path.name,
        source_sha256=source.sha256,
        rebuild=request.command,
    )
    try:
        check_fits(passport, trt, source.path.name)
    except UnsupportedError:
        return BuiltEngine(engine.content, passport, notes)  # it was built for other GPUs, which will tell
    passport, doubts = _confirmed(trt, engine.content, passport)
    return BuiltEngine(engine.content, passport, (*notes, *doubts))


def _confirmed(trt: ModuleType, content: bytes, passport: Passport) -> tuple[Passport, tuple[str, ...]]:
    """The passport with what the inspector says of the engine; a note if that is not what was parsed."""
    try:
        layers = layers_of(trt, deserialized(trt, content))
    except (EngineRunError, ValueError, KeyError, AttributeError, TypeError) as error:  # of any JSON
        return passport, (f"the layers of the engine could not be listed ({error}), so its types are not confirmed.",)
    plugins, expected = sum(layer.is_plugin for layer in layers), sum(passport.plugins.values())
    note = f"the network has {expected} plugin layers and the engine {plugins}; look at `inspect(...).engine_layers`."
    return dataclasses.replace(passport, engine_layers=count_types(layers)), (note,) if plugins != expected else ()


def _register_form(trt: ModuleType, backend: str, plugin_form: str, architectures: Sequence[int]) -> str:
    """Make the plugins known to TensorRT in that form, or for `auto` in the best one; returns it.

    Raises:
        UnsupportedError: if that form cannot be used here.
    """
    against = {
        "IPluginV3": registry.reasons_against_plugins(trt),
        "ahead-of-time": registry.reasons_against_ahead_of_time(trt),
    }
    form = plugin_form
    if form == "auto":
        form = "IPluginV3" if against["ahead-of-time"] else "ahead-of-time"
    if against[form]:
        instead = '`lowering="gather"`' if against["IPluginV3"] else '`plugin_form="IPluginV3"`'
        raise UnsupportedError(
            f"the {form} plugins cannot be used with {backend} {trt.__version__} here: {'; '.join(against[form])}. "
            f"Build with {instead} instead."
        )
    if form == "IPluginV3":
        registry.register_plugins(trt)
        return form
    from dat_deploy.plugins.ptx import newest_ptx_version

    targets = sorted(set(architectures)) or [gpu_architecture() or 0]
    if len(targets) > 1 and targets[0] >= 90:
        raise UnsupportedError(
            f"the kernels for sm_{targets[0]} run on no other architecture, and `architectures` also has "
            f"{', '.join(f'sm_{a}' for a in targets[1:])}. Build an engine for each, or begin with one below 90."
        )
    driver = driver_cuda_version()
    registry.register_ahead_of_time(trt, targets[0], newest_ptx_version(targets[0], driver) if driver else None)
    return form


def _of_engine(metadata: FileMetadata, lowering: str, size: tuple[int, int]) -> FileMetadata:
    """An engine has one lowering and one image size, whatever the file's are."""
    metadata = dataclasses.replace(metadata, lowering=lowering)
    if not metadata.dynamic_image_size:
        return metadata
    network = metadata.network.with_image_size(*size)
    preprocessing = network.preprocessing
    golden = golden_sha256(preprocessing) if metadata.golden_sha256 else ""
    return dataclasses.replace(
        metadata, network=network, preprocessing=preprocessing, golden_sha256=golden, dynamic_image_size=False
    )
