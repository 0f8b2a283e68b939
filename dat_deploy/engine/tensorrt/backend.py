"""The backends `tensorrt` and `tensorrt-rtx`, and what they refuse; loads neither torch nor TensorRT."""

from collections.abc import Sequence
from pathlib import Path

from dat_deploy.engine.backend import Backend, BuildRequest, BuiltEngine, EngineLayer
from dat_deploy.engine.passport import Passport
from dat_deploy.engine.source import check_plugin_form, read_source
from dat_deploy.engine.tensorrt.library import check_installed, import_tensorrt
from dat_deploy.errors import EngineBuildError, UnsupportedError
from dat_deploy.export.options import LOWERINGS
from dat_deploy.files import check_output

__all__ = ["BACKENDS", "PLUGIN_FORMS"]

PLUGIN_FORMS = ("auto", "IPluginV3", "ahead-of-time")


def _build(request: BuildRequest) -> BuiltEngine:
    lowering, plugin_form = request.lowering, request.plugin_form
    if lowering not in ("auto", *LOWERINGS):
        raise EngineBuildError(f"no lowering '{lowering}'. Lowerings: auto, {', '.join(LOWERINGS)}.")
    if plugin_form not in PLUGIN_FORMS:
        raise EngineBuildError(f"no plugin form '{plugin_form}'. Forms: {', '.join(PLUGIN_FORMS)}.")
    if request.timing_cache is not None:
        if request.backend == "tensorrt-rtx":
            raise UnsupportedError(
                'TensorRT-RTX times nothing while it builds, so `timing_cache` is for `backend="tensorrt"`; leave it '
                "out."
            )
        check_output(request.timing_cache, force=True)
    check_installed(request.backend)
    assert request.source is not None
    source = read_source(request.source, profiles=request.profiles, image_size=request.image_size, lowering=lowering)
    if source.lowering != "auto":
        check_plugin_form(plugin_form, source.lowering)
    from dat_deploy.engine.tensorrt.engine import engine_and_passport

    return engine_and_passport(source, request)


def _layers(path: Path, passport: Passport, content: bytes) -> Sequence[EngineLayer]:
    trt = import_tensorrt(passport.backend)
    from dat_deploy.engine.tensorrt.layers import deserialized, layers_of
    from dat_deploy.engine.tensorrt.session import check_fits

    check_fits(passport, trt, str(path))
    if passport.plugin_form == "IPluginV3":
        from dat_deploy.plugins.tensorrt.registry import register_plugins

        register_plugins(trt)
    return layers_of(trt, deserialized(trt, content))


BACKENDS = tuple(
    Backend(
        name=name,
        title=title,
        suffix=".engine",
        parameters=frozenset({"source", "lowering", "plugin_form", "architectures", "timing_cache", "workspace_bytes"}),
        build=_build,
        layers=_layers,
    )
    for name, title in (("tensorrt", "TensorRT"), ("tensorrt-rtx", "TensorRT-RTX"))
)
