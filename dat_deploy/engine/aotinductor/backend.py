"""The backend `aotinductor`, and what it refuses; loads no torch."""

from collections.abc import Sequence
from pathlib import Path

from dat_deploy.engine.backend import Backend, BuildRequest, BuiltEngine, EngineLayer
from dat_deploy.engine.passport import Passport
from dat_deploy.errors import EngineBuildError, ShapeError, UnsupportedError
from dat_deploy.networks.checkpoint_file import check_checkpoint
from dat_deploy.networks.family import find_network
from dat_deploy.precision import EXPORTED, FULL

__all__ = ["BACKENDS", "DEVICES"]

DEVICES = ("cpu", "cuda")


def _build(request: BuildRequest) -> BuiltEngine:
    precision = request.precision or FULL.name
    ranges = [str(profile) for profile in request.profiles if profile.least != profile.most]
    if ranges:
        raise ShapeError(
            f"an AOTInductor package has static batches, and `batches` got {', '.join(ranges)}; give each, as 1,8,32."
        )
    if precision not in EXPORTED:
        raise EngineBuildError(f"no precision '{precision}'. Precisions: {', '.join(EXPORTED)}.")
    if request.device not in (None, *DEVICES):
        raise EngineBuildError(f"no device '{request.device}'. Devices: {', '.join(DEVICES)}.")
    assert request.variant is not None
    network = find_network(request.variant, image_size=request.image_size, features=request.features)
    check_checkpoint(request.checkpoint)
    from dat_deploy.engine.aotinductor.package import package_and_passport

    return package_and_passport(network, precision, request)


def _layers(path: Path, passport: Passport, content: bytes) -> Sequence[EngineLayer]:
    raise UnsupportedError("an AOTInductor package is compiled code, whose layers are not listed")


BACKENDS = (
    Backend(
        name="aotinductor",
        title="AOTInductor",
        suffix=".pt2",
        parameters=frozenset({"variant", "checkpoint", "features", "precision", "device"}),
        build=_build,
        layers=_layers,
    ),
)
