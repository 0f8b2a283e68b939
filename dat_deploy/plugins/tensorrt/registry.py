"""The operators as TensorRT plugins, in two forms over the launches that the torch operators make.

- `register_plugins`: IPluginV3 in Python, see `iplugin_v3`.
- `register_ahead_of_time`: the kernels are compiled into the engine, see `ahead_of_time`.

`trt` is the imported module everywhere: `tensorrt` or `tensorrt_rtx`. A registry holds one form at a time, under the
same names; registering one takes the other out. What a plugin refuses is raised inside TensorRT, which prints it and
tells its caller only that the plugin failed: `calls.last_error()` has the exception.
"""

import importlib.util
import threading
from typing import Any

from dat_deploy.errors import UnsupportedError
from dat_deploy.plugins.operator import OPERATORS
from dat_deploy.plugins.tensorrt import ahead_of_time, iplugin_v3
from dat_deploy.plugins.tensorrt.calls import last_error
from dat_deploy.plugins.tensorrt.node import NAMESPACE, VERSION

__all__ = [
    "deregister_plugins",
    "reasons_against_ahead_of_time",
    "reasons_against_plugins",
    "register_ahead_of_time",
    "register_plugins",
]


def _version(trt: Any) -> tuple[int, int]:
    major, minor, *_ = str(trt.__version__).split(".")
    return int(major), int(minor)


def _is_rtx(trt: Any) -> bool:
    return str(trt.__name__).startswith("tensorrt_rtx")


def reasons_against_plugins(trt: Any) -> list[str]:
    """Why `register_plugins` cannot work here, a sentence each; none if it can."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton is not installed, which compiles the kernels; install it with: pip install triton")
    name, (least, end) = ("TensorRT-RTX", ((1, 7), (2, 0))) if _is_rtx(trt) else ("TensorRT", ((10, 10), (12, 0)))
    if not least <= _version(trt) < end:
        reasons.append(f"{name} {trt.__version__} is not supported; it takes {least[0]}.{least[1]} to below {end[0]}")
    return reasons


def reasons_against_ahead_of_time(trt: Any) -> list[str]:
    """Why `register_ahead_of_time` cannot work here, a sentence each; none if it can."""
    reasons = reasons_against_plugins(trt)
    if _is_rtx(trt):
        reasons.append("TensorRT-RTX takes no plugins that are compiled ahead of time")
    elif _version(trt) == (10, 14):
        reasons.append(
            f"TensorRT {trt.__version__} cannot build plugins that are compiled ahead of time, no 10.14 can; "
            f"use 10.16 or later"
        )
    return reasons


def _require_none(reasons: list[str], what: str) -> None:
    if reasons:
        raise UnsupportedError(f"{what} cannot be registered: {'; '.join(reasons)}.")


# One creator an operator, of either form.

_registering = threading.RLock()
_python_creators: dict[str, dict[str, Any]] = {}  # by trt.__name__; the registry keeps no reference of its own
_ahead_of_time_creators: dict[str, Any] = {}


def _own(trt: Any, name: str) -> list[Any]:
    """The creators of this package for an operator, of both forms."""
    ahead_of_time = None if _is_rtx(trt) else _ahead_of_time_creators.get(name)
    made = (_python_creators.get(trt.__name__, {}).get(name), ahead_of_time)
    return [creator for creator in made if creator is not None]


def _registered(trt: Any, name: str) -> Any:
    """The creator that has an operator's place in the registry, or None; `get_creator` would log that as an error."""
    wanted = (name, NAMESPACE, VERSION)
    for creator in trt.get_plugin_registry().all_creators:
        if tuple(getattr(creator, each, None) for each in ("name", "plugin_namespace", "plugin_version")) == wanted:
            return creator
    return None


def _remove(trt: Any, name: str, *, keep: Any = None) -> None:
    """Empty an operator's place in the registry, unless it holds `keep`.

    Raises:
        UnsupportedError: if it holds a plugin of someone else, or TensorRT does not let go of it.
    """
    registry = trt.get_plugin_registry()
    current = _registered(trt, name)
    if current is None or current is keep:
        return
    if not any(current is creator for creator in _own(trt, name)) or not registry.deregister_creator(current):
        raise UnsupportedError(
            f"another plugin is registered as {NAMESPACE}::{name}, and it cannot be taken out; "
            f"use a process of its own for each."
        )


def _register(trt: Any, name: str, creator: Any) -> None:
    _remove(trt, name, keep=creator)
    if _registered(trt, name) is None and not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
        raise UnsupportedError(f"TensorRT {trt.__version__} does not take the plugin {NAMESPACE}::{name}.")


def register_plugins(trt: Any) -> None:
    """Let TensorRT's parser and its engines run the operators through Triton; again is no error.

    Forgets `last_error`. Takes what `register_ahead_of_time` registered out of the registry.

    Raises:
        UnsupportedError: for each of `reasons_against_plugins`, or if someone else's plugins have the names.
    """
    _require_none(reasons_against_plugins(trt), "the plugins")
    last_error()
    with _registering:
        creators = _python_creators.setdefault(trt.__name__, {})
        for name in OPERATORS:
            if name not in creators:
                creators[name] = iplugin_v3.creator(trt, name)
            _register(trt, name, creators[name])


def deregister_plugins(trt: Any) -> None:
    """Take the plugins of either form out of the registry: nodes are then read as the ONNX functions they carry.

    Raises:
        UnsupportedError: if someone else's plugins have the names.
    """
    for name in OPERATORS:
        _remove(trt, name)


def register_ahead_of_time(trt: Any, architecture: int, ptx_version: int | None = None) -> None:
    """Let TensorRT's parser compile the operators into the engines it builds; again, for another GPU, is no error.

    The image size of an engine must be fixed, only its batch may be dynamic. Networks are created with
    the flag PREFER_AOT_PYTHON_PLUGINS. Forgets `last_error`. Takes what `register_plugins` registered out of the
    registry.

    Args:
        trt: `tensorrt`; TensorRT-RTX has no such plugins.
        architecture: of the GPU that will run the engine, 90 for sm_90.
        ptx_version: 88 for PTX 8.8, which drivers of CUDA 12.9 and later take; None for the newest that Triton knows.

    Raises:
        UnsupportedError: for each of `reasons_against_ahead_of_time`, for an unknown architecture, or if someone
            else's plugins have the names.
    """
    _require_none(reasons_against_ahead_of_time(trt), "plugins that are compiled ahead of time")
    ahead_of_time.set_target(architecture, ptx_version)
    last_error()
    for name in OPERATORS:
        if name in _ahead_of_time_creators:
            _register(trt, name, _ahead_of_time_creators[name])
            continue
        _remove(trt, name)
        ahead_of_time.define(name)
        _ahead_of_time_creators[name] = _registered(trt, name)
