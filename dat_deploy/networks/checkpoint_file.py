"""A checkpoint as a file: what can be said of it before torch is loaded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dat_deploy.errors import CheckpointError
from dat_deploy.files import open_input

__all__ = ["check_checkpoint", "open_checkpoint"]


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """The file, and its kind by its first bytes or ending: `safetensors`, `zip`, or `legacy` of torch before 1.6.

    Raises:
        CheckpointError: if the file cannot be read, is empty, or of no such kind.
    """
    with open_input(path, CheckpointError, "checkpoint file") as file:
        head = file.read(9)
        file.seek(0)
        if not head:
            raise CheckpointError(f"{path} is empty.")
        if path.suffix == ".safetensors" or (
            head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
        ):
            yield file, "safetensors"
        elif head.startswith(b"PK\x03\x04"):
            yield file, "zip"
        elif head.startswith(b"\x80"):
            yield file, "legacy"
        else:
            raise CheckpointError(f"{path} is not a checkpoint: neither torch.save nor safetensors wrote it.")


def check_checkpoint(path: Path | None) -> None:
    """Raises CheckpointError, as `open_checkpoint`, for one that was named."""
    if path is not None:
        with open_checkpoint(path):
            pass
