"""Files are written whole or not at all: whatever goes wrong, no partial and no temporary file stays."""

import contextlib
import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dat_deploy.errors import OutputError
from dat_deploy.files import atomic_output, check_output


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(path: Path, *, force: bool = False) -> str:
    """The sentence with which `path` is refused, the same early and late."""
    with pytest.raises(OutputError) as early:
        check_output(path, force=force)
    with pytest.raises(OutputError) as late, atomic_output(path, force=force):
        pytest.fail("the block of a refused output ran")
    assert str(early.value) == str(late.value)
    return str(early.value)


def write_half(path: Path, error: BaseException, *, force: bool = False) -> None:
    with atomic_output(path, force=force) as temporary:
        temporary.write_text("half")
        raise error


@contextlib.contextmanager
def files_of_at_most_1000_bytes() -> Iterator[None]:
    """The kernel refuses the rest, as on a full disk; Python ignores the signal that would come with it.

    Not a fixture: pytest's own output may go to a file too, which must not be cut off.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- what is written ---


def test_the_file_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    with atomic_output(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename is atomic only within one file system
        assert (temporary.name[0], temporary.suffix) == (".", ".part")
    assert path.read_bytes() == b"whole"
    assert names(tmp_path) == ["tiny.onnx"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic_output(tmp_path / "file") as temporary:
            temporary.write_text("x")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_the_umask_of_the_process_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("another thread's new file may have any permission"))
    with atomic_output(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == ["file"]


def test_force_replaces_what_exists(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_output(path, force=True) as temporary:
        assert path.read_text() == "old"  # readers see the old file until the new one is whole
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_output(path, force=True) as first, atomic_output(path, force=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last to end
    assert names(tmp_path) == ["file"]


# --- what is refused, before the work as after it ---


def test_a_file_that_exists_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    path.write_text("mine")
    assert refusal(path) == f"{path} exists; pass `force=True` to replace it, or choose another name."
    assert path.read_text() == "mine"


def test_a_link_to_nothing_is_refused_and_replaced_with_force(tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    path.symlink_to("nothing")
    assert refusal(path) == f"{path} exists; pass `force=True` to replace it, or choose another name."
    with atomic_output(path, force=True) as temporary:
        temporary.write_text("new")
    assert (path.read_text(), names(tmp_path)) == ("new", ["tiny.onnx"])


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_refused_even_with_force(force: bool, tmp_path: Path) -> None:
    assert refusal(tmp_path, force=force) == f"{tmp_path} is a folder; give a file name, such as {tmp_path}/output."


def test_a_missing_folder_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    folder = tmp_path / "not there"
    assert refusal(folder / "tiny.onnx") == f"folder {folder} does not exist; make it first: mkdir -p '{folder}'"


def test_a_folder_without_write_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # not chmod, which does not stop root
    assert refusal(tmp_path / "tiny.onnx") == f"no permission to write in folder {tmp_path}; choose another folder."


def test_a_folder_that_may_not_be_entered_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stat_is_refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = tmp_path / "tiny.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", stat_is_refused)  # as it raises there up to Python 3.13
        patch.setattr(Path, "exists", stat_is_refused)
        sentence = refusal(path)
    assert sentence == f"cannot write {path}: Permission denied; choose another name or folder."


def test_a_name_that_is_too_long_is_an_output_error(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 300)
    with pytest.raises(OutputError) as caught, atomic_output(path):
        pytest.fail("the block of a refused output ran")
    assert str(caught.value) == f"cannot write {path}: File name too long; choose another name or folder."


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_a_file_system_that_takes_no_files_is_an_output_error() -> None:
    with pytest.raises(OutputError) as caught, atomic_output(Path("/proc/tiny.onnx")):
        pytest.fail("the block of a refused output ran")
    assert str(caught.value) in (
        "cannot write /proc/tiny.onnx: No such file or directory; choose another name or folder.",  # as root
        "no permission to write in folder /proc; choose another folder.",
    )


# --- what goes wrong on the way ---


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("force", [False, True])
def test_a_block_that_fails_leaves_everything_as_it_was(
    exception: type[BaseException], force: bool, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    if force:
        path.write_text("old")
    with pytest.raises(exception):
        write_half(path, exception(), force=force)
    assert names(tmp_path) == (["file"] if force else [])
    assert not force or path.read_text() == "old"


def test_a_block_that_removes_its_file_is_an_output_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OutputError) as caught, atomic_output(path) as temporary:
        temporary.unlink()
    assert str(caught.value) == f"cannot write {path}: No such file or directory; choose another name or folder."
    assert names(tmp_path) == []


def test_a_file_that_another_process_made_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OutputError) as caught, atomic_output(path):
        path.write_text("theirs")
    assert str(caught.value) == f"{path} exists; pass `force=True` to replace it, or choose another name."
    assert path.read_text() == "theirs"
    assert names(tmp_path) == ["file"]


def test_a_file_that_another_process_makes_in_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "file", os.link

    def link_too_late(source: Path, target: Path) -> None:
        path.write_text("theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", link_too_late)
    with pytest.raises(OutputError) as caught, atomic_output(path) as temporary:
        temporary.write_text("ours")
    assert str(caught.value) == f"{path} exists; pass `force=True` to replace it, or choose another name."
    assert path.read_text() == "theirs"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV], ids=["EPERM", "EOPNOTSUPP", "EXDEV"])
def test_a_file_system_without_hard_links_will_do(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "file"
    with atomic_output(path) as temporary:
        temporary.write_text("whole")
    assert (path.read_text(), names(tmp_path)) == ("whole", ["file"])
    path.unlink()
    with pytest.raises(OutputError) as caught, atomic_output(path):
        path.write_text("theirs")
    assert str(caught.value) == f"{path} exists; pass `force=True` to replace it, or choose another name."
    assert (path.read_text(), names(tmp_path)) == ("theirs", ["file"])


def test_a_write_that_the_kernel_refuses_half_way_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with files_of_at_most_1000_bytes(), pytest.raises(OutputError) as caught, atomic_output(path) as temporary:
        temporary.write_bytes(bytes(2000))
    assert str(caught.value) == f"cannot write {path}: File too large; free some space or choose another folder."
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["disk-full", "quota"])
def test_a_full_disk_is_told_apart_from_a_wrong_path(number: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OutputError) as caught:
        write_half(path, OSError(number, os.strerror(number)))
    assert str(caught.value) == (
        f"cannot write {path}: {os.strerror(number)}; free some space or choose another folder."
    )
    assert names(tmp_path) == []


def test_it_loads_neither_numpy_nor_torch() -> None:
    code = "import sys, dat_deploy.files; sys.exit(bool({'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603  # our own code
