"""One function for each command, with the command's name, and `load_model` and `open_runner` for work of your own.

They are not in `dat_deploy` itself, because `dat_deploy.export` and others are packages there. Each is imported when it
is first asked for (PEP 562), so that importing this module is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dat_deploy.benchmark import benchmark as bench
    from dat_deploy.benchmark import compare
    from dat_deploy.benchmark.tune import tune
    from dat_deploy.classify import classify
    from dat_deploy.doctor import doctor
    from dat_deploy.engine.build import build
    from dat_deploy.engine.inspector import inspect
    from dat_deploy.export import export, relower
    from dat_deploy.export.quantize import quantize
    from dat_deploy.networks.dat.checkpoint import load_model
    from dat_deploy.networks.dat.convert import convert
    from dat_deploy.networks.dat.variants import VARIANTS as variants  # noqa: N811  # the command's name, not a constant's
    from dat_deploy.runners import open_runner
    from dat_deploy.serving import serve
    from dat_deploy.serving.client import client
    from dat_deploy.serving.triton.repository import package
    from dat_deploy.validate import validate
    from dat_deploy.validate.bisect import bisect
    from dat_deploy.validate.preprocessing import check_preprocessing
    from dat_deploy.validate.preprocessing import preprocess_for_engine as preprocess
    from dat_deploy.visualize import visualize

__all__ = [
    "bench",
    "bisect",
    "build",
    "check_preprocessing",
    "classify",
    "client",
    "compare",
    "convert",
    "doctor",
    "export",
    "inspect",
    "load_model",
    "open_runner",
    "package",
    "preprocess",
    "quantize",
    "relower",
    "serve",
    "tune",
    "validate",
    "variants",
    "visualize",
]

# Name -> (module, the name there); the imports above, for readers without types.
_HOMES = {
    "bench": ("dat_deploy.benchmark", "benchmark"),
    "bisect": ("dat_deploy.validate.bisect", "bisect"),
    "build": ("dat_deploy.engine.build", "build"),
    "check_preprocessing": ("dat_deploy.validate.preprocessing", "check_preprocessing"),
    "classify": ("dat_deploy.classify", "classify"),
    "client": ("dat_deploy.serving.client", "client"),
    "compare": ("dat_deploy.benchmark", "compare"),
    "convert": ("dat_deploy.networks.dat.convert", "convert"),
    "doctor": ("dat_deploy.doctor", "doctor"),
    "export": ("dat_deploy.export", "export"),
    "inspect": ("dat_deploy.engine.inspector", "inspect"),
    "load_model": ("dat_deploy.networks.dat.checkpoint", "load_model"),
    "open_runner": ("dat_deploy.runners", "open_runner"),
    "package": ("dat_deploy.serving.triton.repository", "package"),
    "preprocess": ("dat_deploy.validate.preprocessing", "preprocess_for_engine"),
    "quantize": ("dat_deploy.export.quantize", "quantize"),
    "relower": ("dat_deploy.export", "relower"),
    "serve": ("dat_deploy.serving", "serve"),
    "tune": ("dat_deploy.benchmark.tune", "tune"),
    "validate": ("dat_deploy.validate", "validate"),
    "variants": ("dat_deploy.networks.dat.variants", "VARIANTS"),
    "visualize": ("dat_deploy.visualize", "visualize"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
