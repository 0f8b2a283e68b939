"""A launch compiled for a GPU that need not be here: PTX for TensorRT and the CUDA driver, and what it takes to run."""

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version, sm_arch_from_capability
from triton.compiler import ASTSource

from dat_deploy.errors import UnsupportedError
from dat_deploy.plugins.launch import Launch

__all__ = ["ARCHITECTURES", "CompiledLaunch", "compile_launch", "newest_ptx_version"]

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities, times ten
_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


@dataclass(frozen=True)
class CompiledLaunch:
    """What a driver needs to launch a kernel, and what the assembler says of it.

    Attributes:
        ptx: its parameters are the pointers to the inputs, the int32 scalars and the pointer to the output, no more.
        name: of the entry point.
        shared_memory_bytes: dynamic, of one program; static_shared_memory_bytes: what the kernel itself declares.
        registers: of one thread; spilled_bytes: of its registers, that go to memory.
        cubin: the machine code that Triton's assembler makes of the PTX; it takes the same arguments.
    """

    ptx: str
    name: str
    shared_memory_bytes: int
    registers: int
    spilled_bytes: int
    cubin: bytes = field(default=b"", repr=False)
    static_shared_memory_bytes: int = 0


def newest_ptx_version(architecture: int, cuda_version: int) -> int:
    """The newest PTX that a driver takes and Triton's assembler makes: 88 for PTX 8.8.

    Args:
        cuda_version: of the driver, as CUDA writes it: 12080 for 12.8.
    """
    driver = f"{cuda_version // 1000}.{cuda_version % 1000 // 10}"
    return int(min(ptx_get_version(driver), ptx_get_version(get_ptxas(architecture).version)))


def compile_launch(
    launch: Launch,
    dtypes: Mapping[str, torch.dtype],
    architecture: int,
    *,
    ptx_version: int | None = None,
    unaligned: Collection[str] = (),
) -> CompiledLaunch:
    """Compile for a GPU of this compute capability. No GPU is needed.

    Args:
        launch: `dtypes` has the type of each of its inputs, and of "output".
        architecture: 90 for sm_90, and so on.
        ptx_version: 88 for PTX 8.8, which a driver of that CUDA version or a later one takes; None for the newest that
            Triton's assembler knows.
        unaligned: those of the inputs and "output" that may begin anywhere; the others at multiples of 16 bytes.

    Raises:
        UnsupportedError: if the kernel needs scratch memory that a launch by hand does not give it.
    """
    signature, attributes = {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in launch.constants:
            signature[name] = "constexpr"
        elif name in launch.scalars:
            signature[name] = "i32"
        else:
            signature[name] = _TYPES[dtypes[name]]
            if name not in unaligned:
                attributes[(index,)] = [["tt.divisibility", 16]]  # of addresses; without it loads are not vectors
    source = ASTSource(launch.kernel, signature, dict(launch.constants), attributes)
    options: dict[str, int] = launch.options | {"enable_fp_fusion": True}
    if ptx_version is not None:
        options["ptx_version"] = ptx_version
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    metadata = compiled.metadata
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, scratch, 0):
            raise UnsupportedError(
                f"{metadata.name} for sm_{architecture} needs {getattr(metadata, scratch)} bytes of {scratch[:-5]}; "
                f"only kernels that need none can be launched by hand. Use another configuration."
            )
    arguments = len(launch.inputs) + len(launch.scalars) + 1
    ptx = _without_hidden_parameters(compiled.asm["ptx"], arguments)
    cubin, registers, spilled, static = _assembled(ptx, architecture)
    return CompiledLaunch(ptx, metadata.name, metadata.shared, registers, spilled, cubin, static)


def _without_hidden_parameters(ptx: str, arguments: int) -> str:
    """Triton adds pointers to scratch memory after the arguments; a driver that is told of none passes none."""
    entry = re.search(r"\.visible \.entry \w+\(\s*(.*?)\s*\)", ptx, re.DOTALL)
    assert entry is not None
    parameters = [line.strip() for line in entry[1].split(",\n")]
    for hidden in parameters[arguments:]:
        name = hidden.split()[-1]
        used = len(re.findall(rf"\b{name}\b", ptx)) > 1
        if used:
            raise UnsupportedError(
                f"{name} is no argument of the launch, but the kernel reads it; report this as a bug."
            )
    kept = ",\n".join(f"\t{line}" for line in parameters[:arguments])
    return f"{ptx[: entry.start(1)]}{kept.lstrip()}{ptx[entry.end(1) :]}"


def _assembled(ptx: str, architecture: int) -> tuple[bytes, int, int, int]:
    """The machine code, and as ptxas reports: registers of a thread, bytes of them that are spilled, shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(architecture).path, "-v", "-lineinfo"]
        command += [f"--gpu-name={sm_arch_from_capability(architecture)}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  # Triton's own tool
        code = cubin.read_bytes()
    report = done.stderr + done.stdout
    registers, spilled = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
    assert registers is not None
    assert spilled is not None
    static = re.search(r"(\d+) bytes smem", report)
    return code, int(registers[1]), int(spilled[1]), int(static[1]) if static else 0
