"""Where the torch operators meet: what they refuse, and whether the kernel or the reference computes."""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec

import torch
from torch import Tensor

from dat_deploy.errors import ShapeError, UnsupportedError
from dat_deploy.plugins.launch import Configuration, Launch, Problem
from dat_deploy.plugins.specification import Role, Specification
from dat_deploy.plugins.tuning import configurations_path, tuned_configuration

__all__ = [
    "Job",
    "cache_key",
    "compute",
    "kernel_computes",
    "launched_by",
    "recorded_jobs",
    "require",
    "require_countable",
    "require_heads",
    "require_inputs",
    "require_shape",
    "torch_operator",
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


def torch_operator(
    specification: Specification, check: Callable[Arguments, None]
) -> Callable[[Callable[Arguments, Tensor]], Callable[Arguments, Tensor]]:
    """Register a function as `torch.ops.dat_deploy.NAME`, whose kernels torch.compile and AOTInductor compile in.

    Its arguments are those of the specification; autocast is off inside, so that it keeps to the type of the first.

    Args:
        check: raises ShapeError for arguments that it does not take; while torch traces a network, this and the
            specification's output shape are all that runs.
    """
    return functools.partial(_registered, specification, check)


_TAKEN: dict[type, tuple[type, ...]] = {int: (int, torch.SymInt), float: (float, int)}


def _registered(
    specification: Specification, check: Callable[Arguments, None], function: Callable[Arguments, Tensor]
) -> Callable[Arguments, Tensor]:
    name = specification.name
    signature = inspect.signature(function)

    @functools.wraps(function)
    def computed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        (first, *_) = args
        assert isinstance(first, Tensor)
        check(*args, **kwargs)
        with torch.autocast(first.device.type if first.is_cuda else "cpu", enabled=False):
            return function(*args, **kwargs)

    def traced(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        check(*args, **kwargs)
        values = tuple(signature.bind(*args, **kwargs).arguments.values())
        tensors, attributes = values[: len(specification.inputs)], values[len(specification.inputs) :]
        result: Tensor = tensors[0].new_empty(specification.shape_of_output([x.shape for x in tensors], attributes))
        return result

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
                kind = specification.attributes.get(argument)
                takes: tuple[type, ...] = (Tensor,)
                if kind is not None:
                    element = int if kind.element is bool else kind.element
                    takes = (list, tuple) if kind.is_list else _TAKEN.get(element, (element,))
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


def require_inputs(specification: Specification, *tensors: Tensor) -> None:
    """The tensors, in order, are on one device and of the types of their roles; the first and locations fit `dims`.

    Raises:
        ShapeError: if they are not, or the first is empty but for its batch.
    """
    operator, (first, *_) = specification.name, tensors
    (first_name, dims), *_ = ((name, each.dims.split()) for name, each in specification.inputs.items())
    first_shape = f"{first_name} of shape {list(first.shape)}"
    require(first.ndim == len(dims), operator, first_shape, f"[{', '.join(dims)}]")
    require(first.shape[1:].numel() > 0, operator, first_shape, "maps that are not empty")
    for (name, role), tensor in zip(specification.roles.items(), tensors, strict=True):
        if role is Role.LOCATIONS:
            _require_locations(specification, name, tensor, first)
            continue
        dtypes = (first.dtype,) if role is Role.DATA else (first.dtype, torch.float32)
        is_taken = tensor.is_floating_point() and tensor.dtype in dtypes
        takes = "tensors of one floating-point type; tables may be float32, too"
        if role is Role.INDICES:
            is_taken, takes = tensor.dtype == torch.int64, "int64 indices"
        beside = f" beside {first_name} of {first.dtype}" if name != first_name else ""
        require(is_taken, operator, f"{name} of {tensor.dtype}{beside}", takes)
        devices = f"{name} on {tensor.device} and {first_name} on {first.device}"
        require(tensor.device == first.device, operator, devices, "tensors on one device")


def require_heads(operator: str, qkv: Tensor, num_heads: int) -> None:
    """Raises ShapeError unless query, key and value side by side, each has `num_heads` heads."""
    require(
        num_heads > 0 and qkv.shape[-1] % (3 * num_heads) == 0,
        operator,
        f"{qkv.shape[-1]} channels of query, key and value and {num_heads} heads",
        "heads that divide each of the three",
    )


def require_shape(operator: str, name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raises ShapeError unless an input has this shape, which means, such as `a row a distance`."""
    is_so = tuple(tensor.shape) == shape
    require(is_so, operator, f"{name} of shape {list(tensor.shape)}", f"{meaning}, {list(shape)}")


def _require_locations(specification: Specification, name: str, locations: Tensor, beside: Tensor) -> None:
    """In float32 or more: half precision would move the points."""
    dims, frame = specification.inputs[name].dims.split(), specification.frame
    fixed = [(axis, int(dim)) for axis, dim in enumerate(dims) if dim.isdigit()]
    require(
        locations.ndim == len(dims)
        and locations.shape[0] == beside.shape[0]
        and all(locations.shape[axis] == size for axis, size in fixed),
        specification.name,
        f"{name} of shape {list(locations.shape)} for a batch of {beside.shape[0]}",
        f"[{', '.join(dims)}]" + (f", last axis ({', '.join(frame.axes)})" if frame else ""),
    )
    require(
        locations.dtype in (torch.float32, torch.float64),
        specification.name,
        f"{name} of {locations.dtype}",
        "float32 or float64 locations: half precision would move the points",
    )
    require(
        locations.device == beside.device,
        specification.name,
        f"{name} on {locations.device} beside a tensor on {beside.device}",
        "tensors on one device",
    )


def require_countable(specification: Specification, shapes: Sequence[Sequence[int]]) -> None:
    """The kernels count the elements of an image, and of what is one for all images, in int32.

    Args:
        shapes: of the inputs, and of the output.

    Raises:
        ShapeError: if there are too many.
    """
    for (name, role), shape in zip([*specification.roles.items(), ("output", Role.DATA)], shapes, strict=True):
        elements = math.prod(shape[1:] if role.leads_with_batch else shape)
        require(
            elements <= LARGEST_IMAGE,
            specification.name,
            f"{elements} elements of {name} an image",
            f"up to {LARGEST_IMAGE}",
        )


def kernel_computes(tensor: Tensor) -> bool:
    """Whether the Triton kernel may compute on this tensor; else the reference does: on a CPU, in float64, and where
    there is no Triton."""
    return tensor.is_cuda and tensor.dtype in KERNEL_DTYPES and importlib.util.find_spec("triton") is not None


def compute(specification: Specification, tensors: Sequence[Tensor], attributes: Sequence[Any]) -> Tensor:
    """The operator's output, by its kernel in the configuration that was measured to be the fastest.

    By its reference where `kernel_computes` says so, and for heads that the kernels do not hold.

    Args:
        tensors, attributes: in the order of the specification; the operator takes them.

    Raises:
        ShapeError: see `require_countable`.
    """
    name, shapes = specification.name, [tensor.shape for tensor in tensors]
    if kernel_computes(tensors[0]):
        kernel = importlib.import_module(f"dat_deploy.plugins.{name}.kernel")
        element_bytes = [tensor.element_size() for tensor in tensors]
        problem = kernel.problem(*specification.problem_arguments(shapes, attributes, element_bytes))
        if problem.get("head_dim", 1) <= LARGEST_HEAD_DIM:
            output = tensors[0].new_empty(specification.shape_of_output(shapes, attributes))
            if output.numel() != 0:
                require_countable(specification, [*shapes, output.shape])
                inputs = {
                    each: (tensor.float() if role is Role.LOCATIONS else tensor).contiguous()
                    for (each, role), tensor in zip(specification.roles.items(), tensors, strict=True)
                }
                _launch(Job(name, kernel, problem, inputs, output))
            return output
    reference = getattr(importlib.import_module(f"dat_deploy.plugins.{name}.reference"), name)
    computed: Tensor = reference(*tensors, *attributes)
    return computed


def _launch(job: "Job") -> None:
    if _jobs is not None:
        _jobs.append(job)
    configurations: list[Configuration] = job.kernel.configurations(job.problem)
    tuned = tuned_configuration(job.operator, job.problem, job.output)
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
