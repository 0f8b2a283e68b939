"""Exported file -> TensorRT engine, network -> AOTInductor package, each with its passport."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dat_deploy.engine.passport import Passport, Profile, passport_path, write_engine
from dat_deploy.engine.source import check_plugin_form, read_source
from dat_deploy.engine.tensorrt.library import check_installed
from dat_deploy.errors import EngineBuildError, ShapeError, UnsupportedError
from dat_deploy.export.options import LOWERINGS, PRECISIONS
from dat_deploy.files import check_output
from dat_deploy.networks.checkpoint_file import check_checkpoint
from dat_deploy.networks.family import Network, find_network

__all__ = ["BACKENDS", "DEVICES", "PLUGIN_FORMS", "BuildReport", "build"]

# What loads torch or a runtime is imported after the checks, so that a wrong argument is told at once.

BACKENDS = ("tensorrt", "tensorrt-rtx", "aotinductor")
PLUGIN_FORMS = ("auto", "IPluginV3", "ahead-of-time")
DEVICES = ("cpu", "cuda")  # of AOTInductor
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What `build` wrote.

    Attributes:
        notes: what the user must know, such as why a lowering was taken.
    """

    path: Path
    passport: Passport
    seconds: float
    notes: tuple[str, ...]


def build(
    source: Path | None = None,
    output: Path | None = None,
    *,
    backend: str = "tensorrt",
    batches: Sequence[str | int] = (1,),
    lowering: str = "auto",
    plugin_form: str = "auto",
    architectures: Sequence[int] = (),
    timing_cache: Path | None = None,
    workspace_bytes: int | None = None,
    variant: str | Network | None = None,
    checkpoint: Path | None = None,
    image_size: tuple[int, int] | None = None,
    features: Sequence[int] | None = None,
    precision: str | None = None,
    device: str | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> BuildReport:
    """Build an engine and write it with its passport.

    Args:
        source: for TensorRT, an exported file; the precision is the file's own.
        output: by default `source` with the suffix `.engine`, or `VARIANT.pt2`.
        backend: one of BACKENDS.
        batches: a profile each, see `Profile.parse`; single batches alone for AOTInductor.
        lowering: as in `export`, or `auto`: the fastest that is right on the GPU at hand; without a GPU `plugin`
            where the plugins can be used, else `gather`. A file whose operators are inlined keeps its own.
        plugin_form: `IPluginV3`, `ahead-of-time`, or `auto`, which takes the latter where TensorRT knows it.
        architectures: compute capabilities times ten that it is to run on; by default that of the GPU at hand, and with
            TensorRT-RTX all that it knows.
        timing_cache, workspace_bytes: see `serialized_engine`.
        variant, checkpoint, features, precision: for AOTInductor alone, which builds from PyTorch; see `export`. What
            does not concern the backend is refused, not ignored.
        image_size: (height, width) in pixels, for AOTInductor and for a file of dynamic size.
        device: `cpu` or `cuda`, for AOTInductor; by default cuda where there is one.
        progress: called with what is being done.

    Raises:
        DatDeployError: one of its subclasses for each thing that can be wrong with the arguments or the build.
    """
    started = time.monotonic()
    if backend not in BACKENDS:
        raise EngineBuildError(f"no backend '{backend}'. Backends: {', '.join(BACKENDS)}.")
    profiles = tuple(dict.fromkeys(Profile.parse(str(batch)) for batch in batches))
    if not profiles:
        raise ShapeError("no batch to build for; give at least one, such as --batch 1.")
    if backend == "aotinductor":
        if source is not None or variant is None:
            raise EngineBuildError(
                "AOTInductor builds from PyTorch, not from a file. Build with: "
                "dat-deploy build --variant tiny --backend aotinductor"
            )
        target = output or Path(f"{variant if isinstance(variant, str) else variant.name}.pt2")
    elif source is None:
        raise EngineBuildError(
            f"backend {backend} builds from an exported file. Make one with: "
            f"dat-deploy export --variant {variant or 'tiny'} --precision fp16 --output {variant or 'tiny'}.onnx"
        )
    else:
        target = output or source.with_suffix(".engine")
    suffix = ".pt2" if backend == "aotinductor" else ".engine"
    if target.suffix != suffix:
        raise EngineBuildError(
            f"--output got '{target}'; what {backend} makes ends in {suffix}, by which the other commands know it."
        )
    _check_options(
        backend,
        {
            "--variant or --config": variant,
            "--checkpoint": checkpoint,
            "--features": features,
            "--precision": precision,
            "--device": device,
        },
        {
            "--lowering": lowering != "auto",
            "--plugins": plugin_form != "auto",
            "--arch": architectures,
            "--timing-cache": timing_cache,
            "--workspace-mib": workspace_bytes,
        },
    )
    command = _command(
        source,
        {
            "--backend": backend,
            "--config" if str(variant).endswith((".yaml", ".yml")) else "--variant": variant,
            "--checkpoint": checkpoint,
            "--features": ",".join(map(str, features or ())),
            "--precision": precision,
            "--device": device,
            "--output": target,
            "--batch": ",".join(map(str, batches)),
            "--lowering": lowering,
            "--plugins": plugin_form,
            "--arch": ",".join(map(str, architectures)),
            "--image-size": "" if image_size is None else f"{image_size[0]}x{image_size[1]}",
            "--timing-cache": timing_cache,
            "--workspace-mib": (workspace_bytes or 0) >> 20,
        },
    )
    check_output(target, force=force)
    check_output(passport_path(target), force=force)
    if variant is not None and source is None:
        _check_package(profiles, precision or "fp32", device)
        network = find_network(variant, image_size=image_size, features=features)
        check_checkpoint(checkpoint)
        from dat_deploy.engine.package import package_and_passport

        content, passport, notes = package_and_passport(
            network,
            profiles=profiles,
            checkpoint=checkpoint,
            precision=precision or "fp32",
            device=device,
            command=command,
            progress=progress,
        )
    else:
        assert source is not None
        if lowering not in ("auto", *LOWERINGS):
            raise EngineBuildError(f"no lowering '{lowering}'. Lowerings: auto, {', '.join(LOWERINGS)}.")
        if plugin_form not in PLUGIN_FORMS:
            raise EngineBuildError(f"no plugin form '{plugin_form}'. Forms: {', '.join(PLUGIN_FORMS)}.")
        if timing_cache is not None:
            if backend == "tensorrt-rtx":
                raise UnsupportedError(
                    "TensorRT-RTX times nothing while it builds, so --timing-cache is for --backend tensorrt; leave it "
                    "out."
                )
            check_output(timing_cache, force=True)
        check_installed(backend)
        file = read_source(source, profiles=profiles, image_size=image_size, lowering=lowering)
        if file.lowering != "auto":
            check_plugin_form(plugin_form, file.lowering)
        from dat_deploy.engine.tensorrt.engine import engine_and_passport

        content, passport, notes = engine_and_passport(
            file,
            backend=backend,
            profiles=profiles,
            plugin_form=plugin_form,
            architectures=architectures,
            timing_cache=timing_cache,
            workspace_bytes=workspace_bytes,
            command=command,
            progress=progress,
        )
    progress("writing")
    write_engine(target, content, passport, force=force)
    return BuildReport(target, passport, time.monotonic() - started, notes)


def _check_package(profiles: Sequence[Profile], precision: str, device: str | None) -> None:
    """What AOTInductor does not make, whatever the network."""
    ranges = [str(profile) for profile in profiles if profile.least != profile.most]
    if ranges:
        raise ShapeError(
            f"an AOTInductor package has static batches, and --batch got {', '.join(ranges)}; give each, as 1,8,32."
        )
    if precision not in PRECISIONS:
        raise EngineBuildError(f"no precision '{precision}'. Precisions: {', '.join(PRECISIONS)}.")
    if device not in (None, *DEVICES):
        raise EngineBuildError(f"no device '{device}'. Devices: {', '.join(DEVICES)}.")


def _check_options(backend: str, of_aotinductor: dict[str, object], of_tensorrt: dict[str, object]) -> None:
    """Raises EngineBuildError for what the backend would ignore."""
    theirs = of_tensorrt if backend == "aotinductor" else of_aotinductor
    given = [name for name, value in theirs.items() if value]
    if given and backend == "aotinductor":
        raise EngineBuildError(f"{', '.join(given)} is for TensorRT, not for --backend aotinductor; leave it out.")
    if given:
        raise EngineBuildError(
            f"{', '.join(given)} is for --backend aotinductor; {backend} builds what a file holds. Give it to: "
            f"dat-deploy export"
        )


def _command(source: Path | None, options: dict[str, object]) -> tuple[str, ...]:
    """The words that make the same engine again."""
    words = ["dat-deploy", "build"] + ([] if source is None else [str(source)])
    for name, value in options.items():
        if value and value != "auto":
            words += [name, value.name if isinstance(value, Network) else str(value)]
    return tuple(words)
