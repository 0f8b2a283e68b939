"""Files are written whole or not at all."""

import contextlib
import errno
import os
import secrets
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dat_deploy.errors import DatDeployError, OutputError

__all__ = ["atomic_output", "check_output", "open_input"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def open_input(path: Path, error: type[DatDeployError], what: str) -> Iterator[BinaryIO]:
    """A file that the user named, open for reading.

    Args:
        error: what is raised unless `path` is a regular file that can be opened and, inside the block, read.
        what: it is, such as `checkpoint file`.
    """
    try:
        if path.is_dir():
            raise error(f"{path} is a folder; name the {what} in it.")
        if path.exists() and not path.is_file():  # a pipe or a device would block
            raise error(f"{path} is not a regular file.")
        with path.open("rb") as file:
            yield file
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror or reason}.") from reason


def check_output(path: Path, *, force: bool) -> None:
    """Refuse early, before long work, what `atomic_output` would refuse in the end.

    Raises:
        OutputError: if `path` exists and `force` is not set, or its folder is missing or not writable.
    """
    folder = path.parent
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder; give a file name, such as {path / 'output'}.")
        if (path.exists() or path.is_symlink()) and not force:  # a link to nothing too takes the name
            raise _exists(path)
        if not folder.is_dir():
            raise OutputError(f"folder {folder} does not exist; make it first: mkdir -p {shlex.quote(str(folder))}")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise _translated(error, path) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in folder {folder}; choose another folder.")


@contextlib.contextmanager
def atomic_output(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends, and is removed when it fails.

    Raises:
        OutputError: as `check_output`, and when the disk is full or the write is refused.
    """
    check_output(path, force=force)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less the umask
    except OSError as error:
        raise _translated(error, path) from error
    try:
        yield temporary
        if force:
            temporary.replace(path)
        else:
            _move_to_new(temporary, path)
    except OSError as error:
        raise _translated(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _move_to_new(temporary: Path, path: Path) -> None:
    """As `replace`, but a file that another process made meanwhile stays."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise _exists(path) from None
        temporary.replace(path)


def _exists(path: Path) -> OutputError:
    return OutputError(f"{path} exists; pass `force=True` to replace it, or choose another name.")


def _translated(error: OSError, path: Path) -> OutputError:
    reason = error.strerror or str(error)
    advice = "free some space or choose another folder" if error.errno in _FULL else "choose another name or folder"
    return OutputError(f"cannot write {path}: {reason}; {advice}.")
