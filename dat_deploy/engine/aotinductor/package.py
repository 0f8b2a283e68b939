"""Network -> AOTInductor package: compiled code and weights in one `.pt2`, which torch runs without dat-deploy."""

import contextlib
import errno
import logging
import platform
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.package.package import package_aoti
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from dat_deploy.engine.backend import BuildRequest, BuiltEngine
from dat_deploy.engine.passport import Passport, sha256, versions
from dat_deploy.environment import cpu_flags, gpu_architecture
from dat_deploy.errors import DatDeployError, EngineBuildError, UnsupportedError
from dat_deploy.metadata import FileMetadata
from dat_deploy.networks.family import Network, family_of
from dat_deploy.networks.operators import FUSED, REFERENCE, with_operators
from dat_deploy.plugins.neighborhood_attention.reference import neighborhood_index
from dat_deploy.precision import PRECISIONS
from dat_deploy.progress import Progress

__all__ = ["check_fits", "compile_package", "model_name", "package_and_passport"]

# Folded and packed weights take 40 % of the time away on a CPU. Without dynamic threads the package would start as many
# as the machine that compiled it has cores.
CPU_OPTIONS: dict[str, Any] = {"freezing": True, "cpp.dynamic_threads": True}

LONGEST_TEXT = 1000


def model_name(batch: int) -> str:
    """Of the compiled model of that batch inside a package."""
    return f"batch_{batch}"


def compile_package(
    model: torch.nn.Module,
    network: Network,
    output: Path,
    *,
    batches: Sequence[int],
    precision: str = "fp32",
    device: str = "cpu",
    progress: Progress = lambda _: None,
) -> None:
    """Compile a network for each of the batches, and write them as one package.

    Each model takes `image` [B, 3, H, W] float32 at the network's image size, and gives `network.outputs` in order,
    float32. On CUDA the Triton kernels are compiled in. A package runs on the operating system and the kind of CPU or
    GPU that it was compiled on, and holds the weights once for each batch.

    Args:
        model: what the family of `network` makes of it, in float32, fused or not.
        output: is overwritten.
        precision: one of `precision.EXPORTED`; half precision as in `Family.rounded`.
        device: `cpu` or `cuda`.
        progress: called with what is being done.

    Raises:
        EngineBuildError: if the compiler fails, or memory or disk space runs out.
        UnsupportedError: if there is no C++ compiler, or no CUDA device.
    """
    _check_device(device)
    with _translated(network.name, *batches):
        get_cpp_compiler()  # looked for now, and not when most of the work is done
    compiled = _on_device(model, network, precision, device)
    with tempfile.TemporaryDirectory(prefix="dat-deploy-") as folder:
        files = {}
        for batch in batches:
            progress(f"compiling batch {batch}")
            with _translated(network.name, batch), _quiet(), torch.no_grad():
                files[model_name(batch)] = _compiled(compiled, network, batch, device, Path(folder, model_name(batch)))
        progress("writing the package")
        with _translated(network.name, *batches), _quiet(), output.open("wb") as file:
            package_aoti(file, files)


def package_and_passport(network: Network, precision: str, request: BuildRequest) -> BuiltEngine:
    """Compile a network for one batch after the other, for a request that was checked.

    Raises:
        EngineBuildError: if the compiler fails.
        UnsupportedError: if there is no CUDA device, or no compiler.
    """
    architecture = gpu_architecture()
    device = request.device or ("cpu" if architecture is None else "cuda")
    _check_device(device)
    request.progress("loading weights")
    family = family_of(network)
    weights = family.weights(network, request.checkpoint)
    model = family.module(network, weights, fused=device == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "package.pt2")
        compile_package(
            model,
            network,
            package,
            batches=[profile.best for profile in request.profiles],
            precision=precision,
            device=device,
            progress=request.progress,
        )
        content = package.read_bytes()
    metadata = FileMetadata.of(
        network,
        weights,
        batch=None,
        dynamic_image_size=False,
        lowering="kernels" if device == "cuda" else "reference",
        precision=precision,
        opset_version=0,
    )
    passport = Passport(
        engine_sha256=sha256(content),
        engine_bytes=len(content),
        backend="aotinductor",
        backend_version=str(torch.__version__),
        versions=versions(),
        architectures=(f"sm_{architecture}",) if device == "cuda" else ("cpu", platform.machine(), *cpu_flags()),
        profiles=request.profiles,
        outputs=network.output_names(),
        layers={},
        kinds={},
        engine_layers=None,
        plugins={},
        plugin_form=None,
        metadata=metadata,
        source=None,
        source_sha256=None,
        rebuild=request.command,
    )
    return BuiltEngine(content, passport, weights.notes)


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            f'torch {torch.__version__} sees no CUDA device here; build this package on one, or with `device="cpu"`.'
        )


def check_fits(passport: Passport, name: str) -> None:
    """Refuse a package that was built for something else, before it is opened.

    Raises:
        UnsupportedError: if it is for another torch or another GPU than are here.
    """
    again = f"Build it again here: {passport.rebuild_command}"
    if _release(passport.backend_version) != _release(torch.__version__):
        raise UnsupportedError(
            f"{name} was built with torch {passport.backend_version}, and {torch.__version__} is installed; packages "
            f"run on the version that built them. {again}"
        )
    architecture = gpu_architecture()
    here = {"cpu", platform.machine(), *cpu_flags()} | ({f"sm_{architecture}"} if architecture else set())
    lacking = [each for each in passport.architectures if each not in here]
    if lacking:
        raise UnsupportedError(
            f"{name} was built for {', '.join(passport.architectures)}, and this machine has no {', '.join(lacking)}. "
            f"{again}"
        )


def _release(version: str) -> str:
    """`2.13.0+cpu` -> `2.13.0`."""
    return version.partition("+")[0]


def _on_device(model: torch.nn.Module, network: Network, precision: str, device: str) -> torch.nn.Module:
    """The same network on the device, of the operators that compile to the fastest code there."""
    if PRECISIONS[precision].is_half:
        model = family_of(network).rounded(model, PRECISIONS[precision].dtype)
    on_cpu = SimpleNamespace(**{**vars(REFERENCE), "neighborhood_attention": _gathered_neighborhood_attention})
    return with_operators(model, on_cpu if device == "cpu" else FUSED).to(device).eval().requires_grad_(False)


def _compiled(model: torch.nn.Module, network: Network, batch: int, device: str, folder: Path) -> list[Any]:
    """The files of one model."""
    image = torch.zeros(batch, 3, *network.image_size, device=device)
    program = torch.export.export(model, (image,))
    options = {"aot_inductor.package": True, "aot_inductor.output_path": str(folder)}
    if device == "cpu":
        options |= CPU_OPTIONS
        module = program.run_decompositions({}).module(check_guards=False)
        _fold_constants(module)
    else:
        module = program.module(check_guards=False)
    files = torch._inductor.aot_compile(module, (image,), options=options)
    assert isinstance(files, list), "of a package it gives a list"
    return files


def _fold_constants(module: GraphModule) -> None:
    """Replace by its value what depends on nothing: grids, indices, masks.

    Torch folds what depends on weights alone, but would compile such arithmetic into every kernel that reads it, which
    takes a quarter of the time of a compilation of DAT++.
    """
    values: dict[Node, Tensor] = {}
    for node in module.graph.nodes:
        is_constant = node.op == "call_function" and all(source in values for source in node.all_input_nodes)
        if is_constant and node.target is not torch.ops.aten.expand.default:  # which would only become larger
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            value = node.target(*args, **kwargs)
            if isinstance(value, Tensor):
                values[node] = value
    for i, (node, value) in enumerate(values.items()):
        if all(user in values for user in node.users):
            continue
        module.register_buffer(f"folded_{i}", value.contiguous())
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(f"folded_{i}"))
    module.graph.eliminate_dead_code()
    module.recompile()


def _gathered_neighborhood_attention(
    qkv: Tensor, padding_qkv: Tensor, table: Tensor, num_heads: int, kernel_size: int, dilation: int
) -> Tensor:
    """As the operator's reference, for a compiler that fuses: each pixel's neighbors are gathered where they are used.

    Run as it stands it takes K² times the memory. The reference compiles to a kernel for each row of the window, which
    takes longer and gives slower code.
    """
    batch, height, width, channels3 = qkv.shape
    head_dim = channels3 // (3 * num_heads)
    sides = [max(side, kernel_size * dilation) for side in (height, width)]
    if sides != [height, width]:
        canvas = padding_qkv.to(qkv.dtype).repeat(batch, *sides, 1)
        canvas[:, :height, :width] = qkv
        qkv = canvas
    (rows, bias_rows), (columns, bias_columns) = (
        [index[:length] for index in neighborhood_index(side, kernel_size, dilation, qkv.device)]
        for side, length in zip(sides, (height, width), strict=True)
    )
    q, k, v = qkv.reshape(batch, *sides, 3, num_heads, head_dim).unbind(3)  # B, H, W, M, D
    q = q[:, :height, :width, None] * head_dim**-0.5
    neighbors = (slice(None), rows[:, None, :, None], columns[None, :, None, :])
    scores = (q * k[neighbors].flatten(3, 4)).sum(-1)  # B, H, W, K², M
    bias = table.to(qkv.dtype)[:, bias_rows[:, None, :, None], bias_columns[None, :, None, :]]  # M, H, W, K, K
    probabilities = (scores + bias.flatten(3).permute(1, 2, 3, 0)).softmax(dim=3)
    out: Tensor = (probabilities[..., None] * v[neighbors].flatten(3, 4)).sum(3)
    return out.flatten(-2)


@contextlib.contextmanager
def _translated(variant: str, *batches: int) -> Iterator[None]:
    """torch's exceptions have no common base class, and wrap each other."""
    try:
        yield
    except DatDeployError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if len(text) > LONGEST_TEXT:  # a compiler's command line and all of its complaints
            text = f"{text[: LONGEST_TEXT // 2]} ... {text[-LONGEST_TEXT // 2 :]}"
        what = f"{variant} for batch {', '.join(map(str, batches))}"
        causes = list(_causes(error))
        if any(isinstance(cause, InvalidCxxCompiler) for cause in causes):
            raise UnsupportedError(
                f"AOTInductor needs a C++ compiler to compile {what}: {text} Install g++, or name one in CXX."
            ) from error
        if any(isinstance(cause, (MemoryError, torch.OutOfMemoryError)) for cause in causes):
            raise EngineBuildError(
                f"memory ran out while AOTInductor compiled {what}: {text} Give fewer or smaller batches."
            ) from error
        if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
            raise EngineBuildError(
                f"disk space ran out while AOTInductor compiled {what}: {text} Free some, or set TMPDIR and "
                f"TORCHINDUCTOR_CACHE_DIR to folders with more."
            ) from error
        raise EngineBuildError(f"AOTInductor cannot compile {what}: {text}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what it was raised from or wraps."""
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What torch's compilers say of themselves does not concern who calls this; errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
