"""A server for the whole run, and one's own way to start another."""

import contextlib
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dat_deploy.export import export


@pytest.fixture(scope="session")
def points_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo with the weights that ship, a dynamic batch and its sampled points."""
    path = tmp_path_factory.mktemp("points_onnx") / "demo.onnx"
    export("demo", path, sampling_locations=True)
    return path


class Server:
    """`dat-deploy serve` in a process of its own."""

    def __init__(self, *arguments: object, log: Path) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(  # noqa: S603  # our own command
                [
                    sys.executable,
                    "-c",
                    "from dat_deploy.cli import main; main()",
                    "serve",
                    "--port",
                    "0",
                    *map(str, arguments),
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.port = self._port()
        self.url = f"localhost:{self.port}"

    def _port(self) -> int:
        """Once it takes requests."""
        assert self.process.stdout is not None
        end = time.monotonic() + 90
        while time.monotonic() < end:
            if select.select([self.process.stdout], [], [], 0.5)[0]:
                line = self.process.stdout.readline()
                found = re.search(r"at http://127\.0\.0\.1:(\d+);", line)
                if found:
                    return int(found.group(1))
            if self.process.poll() is not None:
                break
        self.stop()
        raise AssertionError(f"the server did not start: {self.log.read_text()}")

    def replicas(self) -> list[int]:
        """The processes of the engine's copies."""
        found = []
        for pid in _descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if b"ray::ServeReplica:dat-deploy" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def stop(self) -> int:
        """Its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode


def _descendants(parent: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = (entry / "stat").read_text()
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, waiting = [], [parent]
    while waiting:
        more = children.get(waiting.pop(), [])
        found += more
        waiting += more
    return found


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start servers; those that still run at the end are stopped."""
    servers: list[Server] = []
    folder = tmp_path_factory.mktemp("servers")

    def one(*arguments: object) -> Server:
        servers.append(Server(*arguments, log=folder / f"{len(servers)}.log"))
        return servers[-1]

    yield one
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start: Callable[..., Server], points_onnx: Path) -> Server:
    return start("--engine", points_onnx)
