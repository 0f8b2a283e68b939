"""`dat-deploy serve` in a process of its own: for the benchmark of the server, and for its tests."""

import contextlib
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path


class ServerProcess:
    """A server that takes requests on `port` of the loopback; its log goes to the file `log`."""

    def __init__(self, *arguments: object, log: Path, own_group: bool = False) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(  # noqa: S603  # our own command
                [
                    *(sys.executable, "-c", "from dat_deploy.cli import main; main()"),
                    *("serve", "--port", "0", *map(str, arguments)),
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                process_group=0 if own_group else None,
            )
        self.port = self._port()

    def _port(self) -> int:
        assert self.process.stdout is not None
        end = time.monotonic() + 90
        while time.monotonic() < end and self.process.poll() is None:
            if select.select([self.process.stdout], [], [], 0.5)[0]:
                found = re.search(r"at http://127\.0\.0\.1:(\d+);", self.process.stdout.readline())
                if found:
                    return int(found.group(1))
        self.stop()
        raise RuntimeError(f"the server did not start: {self.log.read_text()}")

    def replicas(self) -> list[int]:
        """The processes of the engine's copies."""
        return [pid for pid, words in self.processes().items() if b"ray::ServeReplica:dat-deploy" in words]

    def processes(self) -> dict[int, bytes]:
        """All that belong to the server, with their command lines."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
        found: dict[int, bytes] = {}
        waiting = [self.process.pid]
        while waiting:
            pid = waiting.pop()
            waiting += children.get(pid, [])
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
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
