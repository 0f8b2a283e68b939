"""One function for each command, with the command's name, and `load_model` and `open_runner` for work of your own.

They are not in `dat_deploy` itself, because `dat_deploy.export` and others are packages there.
"""

from dat_deploy.benchmark import benchmark as bench
from dat_deploy.benchmark import compare
from dat_deploy.checkpoint import convert_checkpoint as convert
from dat_deploy.checkpoint import load_model
from dat_deploy.classify import classify
from dat_deploy.doctor import doctor
from dat_deploy.engine.build import build
from dat_deploy.engine.inspector import inspect
from dat_deploy.export import export, relower
from dat_deploy.export.quantize import quantize
from dat_deploy.preprocess_check import check_preprocessing
from dat_deploy.preprocess_check import preprocess_for_engine as preprocess
from dat_deploy.runners import open_runner
from dat_deploy.serving import serve
from dat_deploy.serving.client import client
from dat_deploy.serving.repository import package
from dat_deploy.tune import tune
from dat_deploy.validate import validate
from dat_deploy.validate.bisect import bisect
from dat_deploy.variants import VARIANTS as variants  # noqa: N811  # the command's name, not a constant's
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
