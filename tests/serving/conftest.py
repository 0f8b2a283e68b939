"""A server for the whole run, and a way to start others."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dat_deploy.export import export

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

    def one(*arguments: object) -> Any:
        servers.append(module.ServerProcess(*arguments, log=folder / f"{len(servers)}.log"))
        return servers[-1]

    yield one
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start: Callable[..., Any], points_onnx: Path) -> Any:
    return start("--engine", points_onnx)
