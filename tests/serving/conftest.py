"""A server for the whole run, and a way to start others."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dat_deploy.engine.passport import Passport, Profile, Verdict, sha256, write_engine
from dat_deploy.export import export
from dat_deploy.metadata import FileMetadata, read_metadata

SERVER_PROCESS = Path(__file__).parents[2] / "benchmarks" / "server_process.py"


@pytest.fixture(scope="session")
def points_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo with the weights that ship, a dynamic batch and its sampled points."""
    path = tmp_path_factory.mktemp("points_onnx") / "demo.onnx"
    export("demo", path, sampling_locations=True)
    return path


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Start servers; those that still run at the end are stopped."""
    spec = importlib.util.spec_from_file_location(SERVER_PROCESS.stem, SERVER_PROCESS)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    servers: list[Any] = []
    folder = tmp_path_factory.mktemp("servers")

    def one(*arguments: object, own_group: bool = False) -> Any:
        log = folder / f"{len(servers)}.log"
        servers.append(module.ServerProcess(*arguments, log=log, own_group=own_group))
        return servers[-1]

    yield one
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start: Callable[..., Any], points_onnx: Path) -> Any:
    return start("--engine", points_onnx)


def verdict(*, passed: bool) -> Verdict:
    sentence = "it agrees with PyTorch." if passed else "it differs from PyTorch."
    return Verdict(passed, sentence, "2026-11-21T00:00:00+00:00", 18, (1, 8, 32), None)


@pytest.fixture(scope="session")
def bad_verdict() -> Verdict:
    return verdict(passed=False)


@pytest.fixture(scope="session")
def metadata(demo_onnx: Path) -> FileMetadata:
    return read_metadata(demo_onnx)


@pytest.fixture
def engine(metadata: FileMetadata, tmp_path: Path) -> Callable[..., Path]:
    """`engine("a.engine", "1-8-32", architectures=("sm_90",))` -> its path; the rest are fields of its passport."""

    def make(name: str = "demo.engine", *profiles: str, **changes: Any) -> Path:
        path = tmp_path / name
        content = f"the engine {name}".encode()
        passport = Passport(
            engine_sha256=sha256(content),
            engine_bytes=len(content),
            backend="tensorrt",
            backend_version="11.4.0.1",
            versions={},
            architectures=("sm_90",),
            profiles=tuple(map(Profile.parse, profiles or ("1-8-32",))),
            outputs=("logits",),
            layers={},
            kinds={},
            engine_layers=None,
            plugins={},
            plugin_form=None,
            metadata=replace(metadata, lowering="gather"),
            source="demo.onnx",
            source_sha256="0" * 64,
            rebuild=("dat-deploy", "build", "demo.onnx"),
            verdict=verdict(passed=True),
        )
        write_engine(path, content, replace(passport, **changes))
        return path

    return make
