"""TensorRT and TensorRT-RTX: one API under two names, looked for, loaded, and listened to."""

import ctypes
import functools
import importlib
import importlib.util
import re
import tempfile
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

from dat_deploy.errors import UnsupportedError

__all__ = ["MODULES", "Log", "check_installed", "import_tensorrt", "missing", "reasons_against_gpu", "version"]

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
LEAST = {"tensorrt": (10, 16), "tensorrt-rtx": (1, 7)}
BELOW = {"tensorrt": (12,), "tensorrt-rtx": (2,)}


def missing(backend: str) -> list[str]:
    """Why `backend`'s library cannot be loaded here; empty if it can. Nothing is loaded to find out."""
    if importlib.util.find_spec(MODULES[backend]) is None:
        return [f"package {MODULES[backend]} is not installed: pip install 'dat-deploy[{backend}]'"]
    return []


def check_installed(backend: str) -> None:
    """Raises UnsupportedError if `backend`'s package is not installed; nothing is loaded."""
    reasons = missing(backend)
    if reasons:
        raise UnsupportedError(f"backend {backend} cannot be used here: {'; '.join(reasons)}")


@functools.cache
def import_tensorrt(backend: str) -> ModuleType:
    """The Python module of `tensorrt` or `tensorrt-rtx`.

    Raises:
        UnsupportedError: if it is not installed, cannot be loaded, or is of a version that is not supported.
    """
    check_installed(backend)
    if backend == "tensorrt-rtx":
        _load_under_the_name_that_the_parser_opens()
    try:
        trt = importlib.import_module(MODULES[backend])
    except (ImportError, OSError) as error:
        raise UnsupportedError(
            f"package {MODULES[backend]} is installed, but its libraries cannot be loaded ({error}). "
            f"Install it again: pip install --force-reinstall 'dat-deploy[{backend}]'"
        ) from error
    if not LEAST[backend] <= version(trt) < BELOW[backend]:
        least, below = (".".join(map(str, bound[backend])) for bound in (LEAST, BELOW))
        raise UnsupportedError(
            f"{backend} {trt.__version__} is installed; dat-deploy works with {least} and later, below {below}: "
            f"pip install 'dat-deploy[{backend}]'"
        )
    return trt


def version(trt: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:3])


def reasons_against_gpu(trt: ModuleType, backend: str, architecture: int) -> list[str]:
    """Why `backend` cannot run on a GPU of this compute capability times ten; empty if nothing is known against it."""
    if backend != "tensorrt-rtx":
        return []
    architectures = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name[2:].isdigit())
    if architecture in architectures or architecture > architectures[-1]:
        return []
    listing = ", ".join(f"sm_{each}" for each in architectures)
    return [f"TensorRT-RTX {trt.__version__} does not run on sm_{architecture}; it knows {listing} and later"]


_folders: list[tempfile.TemporaryDirectory[str]] = []  # until the process ends


def _load_under_the_name_that_the_parser_opens() -> None:
    """TensorRT-RTX's parser opens `libtensorrt_rtx.so` in its own folder, where the wheel has only `.so.1` (1.7.1).

    So both libraries are loaded through links in a temporary folder that has the name, and nothing is written to
    site-packages, which may be read-only. The loader knows a library by its inode: there is still one of each.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return  # installed by other means, which have the name
    libraries = Path(spec.origin).parent
    cores, parsers = (
        sorted(libraries.glob(f"{name}.so.*")) for name in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx")
    )
    if not cores or not parsers or (libraries / "libtensorrt_rtx.so").exists():
        return
    core, parser = cores[0], parsers[0]
    try:
        folder = tempfile.TemporaryDirectory(prefix="dat-deploy-")
        _folders.append(folder)
        for library, names in ((core, ("libtensorrt_rtx.so", core.name)), (parser, (parser.name,))):
            for name in names:
                Path(folder.name, name).symlink_to(library)
        ctypes.CDLL(str(Path(folder.name, core.name)))
        ctypes.CDLL(str(Path(folder.name, parser.name)))
    except OSError as error:
        raise UnsupportedError(
            f"TensorRT-RTX cannot be loaded ({error}). Its parser opens libtensorrt_rtx.so, which its wheel lacks; "
            f"make the link yourself: ln -s {core.name} {libraries / 'libtensorrt_rtx.so'}"
        ) from error


class Log:
    """What TensorRT says from here on; `logger` is the object that it takes, one a process, for it ignores others."""

    def __init__(self, trt: ModuleType) -> None:
        self.logger, self._messages = _logger(trt)
        self._messages.clear()

    def tail(self, lines: int = 6) -> str:
        """Its last errors on one line, else its last warnings; `nothing` if there are none."""
        errors = [text for is_error, text in self._messages if is_error]
        warnings = [text for is_error, text in self._messages if not is_error]
        return " | ".join(" ".join(text.split()) for text in (errors or warnings)[-lines:]) or "nothing"


@functools.cache
def _logger(trt: ModuleType) -> tuple[Any, "deque[tuple[bool, str]]"]:
    messages: deque[tuple[bool, str]] = deque(maxlen=100)

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]  # a class of a module known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                messages.append((severity <= trt.ILogger.Severity.ERROR, message.strip()))

    return Logger(), messages
