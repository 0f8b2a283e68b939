"""A network -> AOTInductor package with its passport."""

import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dat_deploy.engine.aotinductor import compile_package
from dat_deploy.engine.passport import Passport, Profile, sha256, versions
from dat_deploy.environment import cpu_flags, gpu_architecture, tool_version
from dat_deploy.errors import UnsupportedError
from dat_deploy.images.preprocess import golden_sha256
from dat_deploy.metadata import FileMetadata
from dat_deploy.networks.family import Network, family_of

__all__ = ["package_and_passport"]


def package_and_passport(
    network: Network,
    *,
    profiles: Sequence[Profile],
    checkpoint: Path | None,
    precision: str,
    device: str | None,
    command: Sequence[str],
    progress: Callable[[str], None],
) -> tuple[bytes, Passport, tuple[str, ...]]:
    """Compile a network for one batch after the other; the package, its passport, and notes on the weights.

    What can be wrong with the arguments, `build` has checked.

    Raises:
        EngineBuildError: if the compiler fails.
        UnsupportedError: if there is no CUDA device, or no compiler.
    """
    architecture = gpu_architecture()
    device = device or ("cpu" if architecture is None else "cuda")
    if device == "cuda" and architecture is None:
        raise UnsupportedError(
            f"torch {torch.__version__} sees no CUDA device here; build this package on one, or with --device cpu."
        )
    progress("loading weights")
    family = family_of(network)
    weights = family.weights(network, checkpoint)
    model = family.module(network, weights, fused=device == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "package.pt2")
        compile_package(
            model,
            network,
            package,
            batches=[profile.best for profile in profiles],
            precision=precision,
            device=device,
            progress=progress,
        )
        content = package.read_bytes()
    preprocessing = network.preprocessing
    metadata = FileMetadata(
        network=network,
        batch=None,
        dynamic_image_size=False,
        lowering="kernels" if device == "cuda" else "reference",
        precision=precision,
        opset_version=0,
        preprocessing=preprocessing,
        class_names=network.answer.class_names,
        weights_sha256=weights.sha256,
        weights_source=weights.source,
        version=tool_version(),
        golden_sha256=golden_sha256(preprocessing),
        family=family.name,
    )
    passport = Passport(
        engine_sha256=sha256(content),
        engine_bytes=len(content),
        backend="aotinductor",
        backend_version=str(torch.__version__),
        versions=versions(),
        architectures=(f"sm_{architecture}",) if device == "cuda" else ("cpu", platform.machine(), *cpu_flags()),
        profiles=tuple(profiles),
        outputs=network.output_names(),
        layers={},
        kinds={},
        engine_layers=None,
        plugins={},
        plugin_form=None,
        metadata=metadata,
        source=None,
        source_sha256=None,
        rebuild=tuple(command),
    )
    return content, passport, weights.notes
