"""What TensorRT does with the plugins in this process, which its caller never sees: launches and exceptions."""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from dat_deploy.plugins.operator import OPERATORS

__all__ = ["count_launch", "last_error", "launch_counts", "recorded"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_lock = threading.Lock()
_launches = dict.fromkeys(OPERATORS, 0)
_error: Exception | None = None


def count_launch(operator: str) -> None:
    with _lock:
        _launches[operator] += 1


def launch_counts() -> dict[str, int]:
    """How many kernels the IPluginV3 plugins have launched in this process, by operator.

    A run whose counts do not grow did not go through them; the replay of a CUDA graph does not count. What was compiled
    ahead of time runs without Python and is not counted.
    """
    with _lock:
        return dict(_launches)


def last_error() -> Exception | None:
    """The latest exception inside a plugin, which TensorRT's caller never sees; once told, it is forgotten.

    Call it where TensorRT reports a failure: after a parse, a build, or an execution.
    """
    global _error
    with _lock:
        error, _error = _error, None
    return error


def recorded(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """TensorRT turns what is raised into an error status; before that, keep it for `last_error`."""

    @functools.wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        global _error
        try:
            return method(*args, **kwargs)
        except Exception as error:
            with _lock:
                _error = error
            raise

    return call
