"""Kernels that were compiled elsewhere, launched through the CUDA driver: where they run, nothing compiles.

`precompile` writes a folder for one GPU architecture on any machine; `Precompiled` launches from it what the operators
ask for. A launch that the folder lacks is left to Triton.
"""

import ctypes
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat_deploy.errors import EngineRunError, UnsupportedError
from dat_deploy.plugins.dispatch import launched_by
from dat_deploy.plugins.launch import Launch
from dat_deploy.plugins.tuning import kernels_hash
from dat_deploy.typed_json import typed

__all__ = ["Driver", "Entry", "Needed", "Precompiled", "arguments", "key", "precompile", "write_index"]

INDEX = "index.json"
DEFAULT_SHARED_BYTES = 48 * 1024  # more must be asked for
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute of cuda.h
ALIGNMENT = 16  # bytes; see ahead_of_time.compile_launch

Argument = ctypes.c_void_p | ctypes.c_int32
Needed = tuple[Launch, Mapping[str, torch.dtype], Collection[str]]  # types and unaligned as in `compile_launch`


@dataclass(frozen=True)
class Entry:
    """What it takes to launch one kernel, and what the assembler says of it; see `CompiledLaunch`."""

    name: str
    shared_memory_bytes: int
    registers: int
    spilled_bytes: int
    code_bytes: int
    launch: str
    static_shared_memory_bytes: int = 0


def key(launch: Launch, dtypes: Mapping[str, torch.dtype], unaligned: Collection[str]) -> str:
    """What the machine code of a launch depends on, but for the kernel's own text."""
    constants = {name: str(value) for name, value in sorted(launch.constants.items())}
    types = [str(dtypes[name]) for name in (*launch.inputs, "output")]
    text = json.dumps([launch.kernel.__name__, constants, types, launch.options, sorted(unaligned)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def precompile(needed: Iterable[Needed], folder: Path, architecture: int) -> dict[str, Entry]:
    """Write the machine code of each launch into the folder. Returns the entries by `key`.

    Raises:
        UnsupportedError: see `compile_launch`.
    """
    from dat_deploy.plugins.ptx import compile_launch

    entries = {}
    for launch, dtypes, unaligned in needed:
        name = key(launch, dtypes, unaligned)
        made = compile_launch(launch, dtypes, architecture, unaligned=unaligned)
        (folder / f"{name}.cubin").write_bytes(made.cubin)
        constants = " ".join(f"{constant}={value}" for constant, value in launch.constants.items())
        types = f"{dtypes['output']}{', unaligned' if unaligned else ''}".removeprefix("torch.")
        entries[name] = Entry(
            name=made.name,
            shared_memory_bytes=made.shared_memory_bytes,
            registers=made.registers,
            spilled_bytes=made.spilled_bytes,
            code_bytes=len(made.cubin),
            launch=f"{constants} {' '.join(f'{option}={value}' for option, value in launch.options.items())} {types}",
            static_shared_memory_bytes=made.static_shared_memory_bytes,
        )
    return entries


def write_index(folder: Path, architecture: int, entries: Mapping[str, Entry], *, triton: str) -> None:
    """Make the folder one that `Precompiled` takes; `triton` is the version that compiled it."""
    about = {"architecture": architecture, "kernels": kernels_hash(), "triton": triton}
    rows = {name: asdict(entry) for name, entry in entries.items()}
    (folder / INDEX).write_text(json.dumps(about | {"entries": rows}, indent=1) + "\n", encoding="utf-8")


def arguments(launch: Launch, inputs: Mapping[str, Tensor], output: Tensor) -> list[Argument]:
    """Pointers to the inputs, int32 scalars, the pointer to the output: the order of ahead-of-time plugins."""
    pointers = [ctypes.c_void_p(inputs[name].data_ptr()) for name in launch.inputs]
    for name, value in launch.scalars.items():
        assert -(2**31) <= value < 2**31, name  # ctypes would cut it off
    scalars = [ctypes.c_int32(value) for value in launch.scalars.values()]
    return [*pointers, *scalars, ctypes.c_void_p(output.data_ptr())]


class Driver:
    """As much of libcuda as it takes, with every call checked, in the context that torch made current.

    Args:
        library: in its place, for tests.
    """

    def __init__(self, library: Any = None) -> None:
        self.library = ctypes.CDLL("libcuda.so.1") if library is None else library

    def _call(self, name: str, *values: Any) -> None:
        code = getattr(self.library, name)(*values)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
            raise EngineRunError(f"the CUDA driver's {name} failed: {code}, {(text.value or b'unknown').decode()}.")

    def function(self, code: bytes, name: str, shared_memory_bytes: int, static_bytes: int = 0) -> ctypes.c_void_p:
        """The entry point of a cubin, which declares the static bytes itself; it stays loaded.

        Raises:
            EngineRunError: if the driver refuses it.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(code))
        self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(name.encode()))
        if shared_memory_bytes + static_bytes > DEFAULT_SHARED_BYTES:
            attribute, size = ctypes.c_int(MAX_DYNAMIC_SHARED_SIZE_BYTES), ctypes.c_int(shared_memory_bytes)
            self._call("cuFuncSetAttribute", function, attribute, size)
        return function

    def launch(
        self, function: ctypes.c_void_p, launch: Launch, shared_memory_bytes: int, stream: int, held: Sequence[Argument]
    ) -> None:
        """Queue one launch; the driver has copied the arguments when this returns."""
        sizes = [ctypes.c_uint(size) for size in (*launch.grid, *launch.block, shared_memory_bytes)]
        parameters = (ctypes.c_void_p * len(held))(*(ctypes.addressof(argument) for argument in held))
        self._call("cuLaunchKernel", function, *sizes, ctypes.c_void_p(stream), parameters, ctypes.c_void_p())


class Precompiled:
    """A folder that `precompile` filled, loaded as it is needed.

    Attributes:
        architecture, triton: that it is for; the version that compiled it.
        launched: how many launches were made from it; missed: the names of kernels that it lacked.

    Raises:
        UnsupportedError: if it is damaged, for another GPU, or was made from other kernels.
    """

    def __init__(self, folder: Path, architecture: int, driver: Driver | None = None) -> None:
        try:
            about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.architecture, self.triton, kernels = about["architecture"], about["triton"], about["kernels"]
            self.entries = {name: typed(Entry, entry, name) for name, entry in about["entries"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsupportedError(f"{folder} is damaged ({error!r}); compile it again.") from error
        if self.architecture != architecture:
            raise UnsupportedError(
                f"{folder} holds code for sm_{self.architecture}, and this GPU is of sm_{architecture}; "
                f"compile for that one, or launch without it."
            )
        if kernels != kernels_hash():
            raise UnsupportedError(f"{folder} was compiled from other kernels than these; compile them again.")
        self.folder, self.driver = folder, driver or Driver()
        self.launched, self.missed = 0, set[str]()
        self._functions: dict[str, ctypes.c_void_p] = {}

    def launching(self) -> AbstractContextManager[None]:
        """While the block runs, the operators launch what is here."""
        return launched_by(self.launch)

    def launch(self, launch: Launch, inputs: Mapping[str, Tensor], output: Tensor) -> bool:
        """On torch's current stream; False if it is not here."""
        tensors = {**{name: inputs[name] for name in launch.inputs}, "output": output}
        unaligned = [name for name, tensor in tensors.items() if tensor.data_ptr() % ALIGNMENT]
        name = key(launch, {each: tensor.dtype for each, tensor in tensors.items()}, unaligned)
        entry = self.entries.get(name)
        if entry is None:
            self.missed.add(launch.kernel.__name__)
            return False
        shared = entry.shared_memory_bytes
        if name not in self._functions:
            code = (self.folder / f"{name}.cubin").read_bytes()
            self._functions[name] = self.driver.function(code, entry.name, shared, entry.static_shared_memory_bytes)
        stream = torch.cuda.current_stream().cuda_stream
        self.driver.launch(self._functions[name], launch, shared, stream, arguments(launch, inputs, output))
        self.launched += 1
        return True
