"""Where the torch operators meet: what they refuse, and whether the kernel or the reference computes."""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec

import torch
from torch import Tensor

from dat_deploy.errors import ShapeError, UnsupportedError
from dat_deploy.plugins.launch import Configuration, Launch, Problem
from dat_deploy.plugins.tuning import configurations_path, tuned_configuration

__all__ = [
    "Job",
    "cache_key",
    "kernel_computes",
    "launch_kernel",
    "launched_by",
    "operator",
    "recorded_jobs",
    "require",
    "require_alike",
    "require_locations",
]

Arguments = ParamSpec("Arguments")

LARGEST_HEAD_DIM = 64
LARGEST_IMAGE = 2**31 - 1  # elements of a tensor's image: the kernels count them in int32
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def cache_key() -> str:
    """What torch.compile's caches on disk must be told apart by, if these operators are in what is compiled.

    Torch 2.13 knows an operator by its name alone: after another version of this package was installed, or other
    configurations were measured, it would give the code that it compiled before. Say so before the first call:

        torch.compiler.config.cache_key_tag = dat_deploy.plugins.cache_key()

    Nothing here sets it: it is the process's, and what this package itself compiles does not need it. The networks of
    `pytorch-compile` are made of the references, which torch hashes as it does all code that it traces; AOTInductor
    looks into no cache for what it compiles.
    """
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.rglob("*.py")), configurations_path()]:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return f"dat-deploy {digest.hexdigest()[:16]}"


def operator(
    result_shape: Callable[Arguments, Sequence[int]],
) -> Callable[[Callable[Arguments, Tensor]], Callable[Arguments, Tensor]]:
    """Register a function as `torch.ops.dat_deploy.NAME`, whose kernels torch.compile and AOTInductor compile in.

    Its first argument is a tensor, of whose type the result is; autocast is off inside, so that it keeps to that.

    Args:
        result_shape: checks the arguments, and says what shape the result has; while torch traces a network, this is
            all that runs.
    """
    return functools.partial(_registered, result_shape)


def _registered(
    result_shape: Callable[Arguments, Sequence[int]], function: Callable[Arguments, Tensor]
) -> Callable[Arguments, Tensor]:
    name = function.__name__
    signature = inspect.signature(function)
    kinds = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}

    @functools.wraps(function)
    def computed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        (first, *_) = args
        assert isinstance(first, Tensor)
        with torch.autocast(first.device.type if first.is_cuda else "cpu", enabled=False):
            return function(*args, **kwargs)

    def traced(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        (first, *_) = args
        assert isinstance(first, Tensor)
        return first.new_empty(result_shape(*args, **kwargs))

    def backward(*_: object) -> None:
        raise UnsupportedError(
            f"{name} has no gradient, it is for inference; call it under torch.inference_mode() or torch.no_grad()."
        )

    definition = torch.library.triton_op(f"dat_deploy::{name}", computed, mutates_args={})
    definition.register_fake(traced)  # type: ignore[attr-defined]  # torch says it returns a function
    definition.register_autograd(backward)  # type: ignore[attr-defined]  # torch says it returns a function

    @functools.wraps(function)  # of which help() shows the docstring
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        if not torch.compiler.is_compiling():
            for argument, value in signature.bind(*args, **kwargs).arguments.items():
                takes = (Tensor,) if kinds[argument] is Tensor else (int, torch.SymInt)
                if not isinstance(value, takes):
                    raise TypeError(
                        f"{name} got {argument} of type {type(value).__name__}; it takes a {takes[0].__name__}."
                    )
        return definition(*args, **kwargs)  # type: ignore[no-any-return]  # torch gives it no types

    return call


def require(holds: bool, operator: str, got: str, takes: str) -> None:
    """Raises ShapeError unless `holds`."""
    if not holds:
        raise ShapeError(f"{operator} got {got}; it takes {takes}.")


def require_alike(operator: str, tensors: dict[str, Tensor], *, tables: dict[str, Tensor] | None = None) -> None:
    """All on one device and of one floating-point type; tables may be float32, too.

    Raises:
        ShapeError: if they are not.
    """
    (first_name, first), *_ = tensors.items()
    for name, tensor in {**tensors, **(tables or {})}.items():
        dtypes = (first.dtype, torch.float32) if tables and name in tables else (first.dtype,)
        require(
            tensor.is_floating_point() and tensor.dtype in dtypes,
            operator,
            f"{name} of {tensor.dtype}" + (f" beside {first_name} of {first.dtype}" if name != first_name else ""),
            "tensors of one floating-point type; tables may be float32, too",
        )
        require(
            tensor.device == first.device,
            operator,
            f"{name} on {tensor.device} and {first_name} on {first.device}",
            "tensors on one device",
        )


def require_locations(operator: str, locations: Tensor, beside: Tensor) -> None:
    """[B, G, Hk, Wk, 2] on the device of `beside`, in float32 or more: half precision would move the points.

    Raises:
        ShapeError: if they are not.
    """
    require(
        locations.ndim == 5 and locations.shape[0] == beside.shape[0] and locations.shape[-1] == 2,
        operator,
        f"sampling_locations of shape {list(locations.shape)} for a batch of {beside.shape[0]}",
        "[B, G, Hk, Wk, 2], last axis (y, x)",
    )
    require(
        locations.dtype in (torch.float32, torch.float64),
        operator,
        f"sampling_locations of {locations.dtype}",
        "float32 or float64 locations: half precision would move the points",
    )
    require(
        locations.device == beside.device,
        operator,
        f"sampling_locations on {locations.device} beside a tensor on {beside.device}",
        "tensors on one device",
    )


def kernel_computes(tensor: Tensor, head_dim: int = 1) -> bool:
    """Whether the Triton kernel computes on this tensor; else the reference does: on a CPU, in float64, for heads that
    the kernels do not hold, and where there is no Triton."""
    return (
        tensor.is_cuda
        and tensor.dtype in KERNEL_DTYPES
        and head_dim <= LARGEST_HEAD_DIM
        and importlib.util.find_spec("triton") is not None
    )


def launch_kernel(
    operator: str, kernel: ModuleType, problem: Problem, inputs: dict[str, Tensor], output: Tensor
) -> None:
    """Compute `output` by the operator's kernel, in the configuration that was measured to be the fastest.

    Raises:
        ShapeError: if one image of a tensor, or a table, has 2^31 elements or more.
    """
    if output.numel() == 0:
        return
    for name, tensor in {**inputs, "output": output}.items():
        elements = tensor.numel() if "table" in name else tensor.shape[1:].numel()
        require(
            elements <= LARGEST_IMAGE, operator, f"{elements} elements of {name} an image", f"up to {LARGEST_IMAGE}"
        )
    inputs = {name: tensor.contiguous() for name, tensor in inputs.items()}
    job = Job(operator, kernel, problem, inputs, output)
    if _jobs is not None:
        _jobs.append(job)
    configurations: list[Configuration] = kernel.configurations(problem)
    tuned = tuned_configuration(operator, problem, output)
    if tuned is None or tuned not in configurations:  # measured by another version
        tuned = configurations[0]
    job.run(tuned, torch.library.wrap_triton)


@dataclass(frozen=True)
class Job:
    """A launch that is still open to a configuration."""

    operator: str
    kernel: ModuleType
    problem: Problem
    inputs: dict[str, Tensor]
    output: Tensor

    def run(self, configuration: Configuration, wrap: Callable[[Any], Any] = lambda kernel: kernel) -> None:
        """Launch; an operator wraps the kernel for torch's tracing, which costs a millisecond outside of one."""
        launch = self.kernel.launch(self.problem, configuration)
        is_traced = type(self.output) is not Tensor or torch.compiler.is_compiling()
        if _launcher is not None and not is_traced and _launcher(launch, self.inputs, self.output):
            return
        options = launch.options
        if is_traced:
            options.pop("maxnreg", None)  # which torch does not take
        on_gpu = self.output.is_cuda and torch.cuda.is_available()  # else torch only traces
        with torch.cuda.device(self.output.device) if on_gpu else contextlib.nullcontext():
            wrap(launch.kernel)[launch.grid](
                *(self.inputs[name] for name in launch.inputs),
                *launch.scalars.values(),
                self.output,
                **launch.constants,
                **options,
            )


_jobs: list[Job] | None = None
Launcher = Callable[[Launch, dict[str, Tensor], Tensor], bool]
_launcher: Launcher | None = None


@contextlib.contextmanager
def launched_by(launcher: Launcher) -> Iterator[None]:
    """While the block runs, kernels are launched by this, not by Triton, which would compile them first.

    Args:
        launcher: takes the launch, its inputs by name and its output, and says whether it has launched; where it has
            not, and where torch only traces, Triton does.
    """
    global _launcher
    _launcher = launcher
    try:
        yield
    finally:
        _launcher = None


@contextlib.contextmanager
def recorded_jobs() -> Iterator[list[Job]]:
    """What the operators launch while the block runs, in this process."""
    global _jobs
    _jobs = []
    try:
        yield _jobs
    finally:
        _jobs = None
