"""As much of the CUDA driver as it takes to launch PTX by hand, through ctypes, in the context that torch made current.

What TensorRT does with an ahead-of-time plugin: a module, an entry point, a grid, and the address of each argument.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

__all__ = ["Argument", "CudaError", "Driver", "int32", "kernel_parameters", "pointer"]

Argument = ctypes.c_void_p | ctypes.c_int32
DEFAULT_SHARED_BYTES = 48 * 1024  # more must be asked for
LOG_BYTES = 8192
# cuda.h: CUjit_option, CUfunction_attribute.
JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 5, 6
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class CudaError(RuntimeError):
    """A call of the driver that failed."""


def pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


def int32(value: int) -> ctypes.c_int32:
    """Raises OverflowError for what does not fit, where ctypes would cut it off."""
    if not -(2**31) <= value < 2**31:
        raise OverflowError(f"{value} is no int32")
    return ctypes.c_int32(value)


def kernel_parameters(arguments: Sequence[Argument]) -> "ctypes.Array[ctypes.c_void_p]":
    """`kernelParams` of cuLaunchKernel: the address of each argument, which must outlive the launch."""
    return (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))


class Driver:
    """libcuda, with every call checked.

    Args:
        library: in its place, for tests.
    """

    def __init__(self, library: Any = None) -> None:
        self.library = ctypes.CDLL("libcuda.so.1") if library is None else library

    def call(self, name: str, *arguments: Any) -> None:
        """Raises CudaError if the driver does not say that it worked."""
        code = getattr(self.library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
            raise CudaError(f"{name}: error {code}, {(text.value or b'unknown').decode()}")

    def version(self) -> int:
        """13000 for CUDA 13.0: the newest that the driver takes."""
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        return version.value

    def load(self, ptx: str) -> ctypes.c_void_p:
        """A module from PTX, which the driver compiles. Raises CudaError with the compiler's own words."""
        module, log = ctypes.c_void_p(), ctypes.create_string_buffer(LOG_BYTES)
        options = (ctypes.c_int * 2)(JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), LOG_BYTES)
        image = ctypes.c_char_p(ptx.encode())
        try:
            self.call("cuModuleLoadDataEx", ctypes.byref(module), image, ctypes.c_uint(2), options, values)
        except CudaError as error:
            raise CudaError(f"{error}; {log.value.decode(errors='replace').strip() or 'no log'}") from None
        return module

    def function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(name.encode()))
        return function

    def launch(
        self,
        function: ctypes.c_void_p,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_memory_bytes: int,
        stream: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Queue one launch; the driver has copied the arguments when this returns."""
        if shared_memory_bytes > DEFAULT_SHARED_BYTES:
            attribute, size = ctypes.c_int(MAX_DYNAMIC_SHARED_SIZE_BYTES), ctypes.c_int(shared_memory_bytes)
            self.call("cuFuncSetAttribute", function, attribute, size)
        sizes = [ctypes.c_uint(size) for size in (*grid, *block, shared_memory_bytes)]
        parameters = kernel_parameters(arguments)
        self.call("cuLaunchKernel", function, *sizes, ctypes.c_void_p(stream), parameters, ctypes.c_void_p())

    def unload(self, module: ctypes.c_void_p) -> None:
        self.call("cuModuleUnload", module)
