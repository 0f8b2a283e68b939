"""An engine is opened by its passport alone, and nothing about either can change unseen."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dat_deploy.engine import passport as library
from dat_deploy.engine.build import BuildReport
from dat_deploy.engine.passport import Passport, Profile, Verdict, open_engine, passport_path, read_passport
from dat_deploy.errors import EngineBuildError, PassportError, ShapeError
from dat_deploy.runners import open_runner


@pytest.fixture
def engine(built: BuildReport, tmp_path: Path) -> Path:
    """A copy of the engine, its passport and its ONNX file, to be damaged."""
    for path in (built.path, passport_path(built.path), built.path.with_suffix(".onnx")):
        shutil.copy(path, tmp_path)
    return tmp_path / built.path.name


@pytest.fixture
def nothing_deserialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads TensorRT has gone too far."""

    def refuse(backend: str) -> None:
        raise AssertionError(f"{backend} was loaded")

    monkeypatch.setattr("dat_deploy.runners.tensorrt_runner.import_tensorrt", refuse)


def test_an_engine_is_opened_with_what_build_wrote(built: BuildReport) -> None:
    passport, content = open_engine(built.path)
    assert passport == built.passport
    assert content == built.path.read_bytes()
    assert passport.engine_sha256 == library.sha256(content)
    assert passport.source_sha256 == library.sha256(built.path.with_suffix(".onnx").read_bytes())


def test_a_passport_of_before_there_was_a_golden_picture_is_read(built: BuildReport) -> None:
    assert len(built.passport.metadata.golden_sha256) == 64
    old = replace(built.passport, metadata=replace(built.passport.metadata, golden_sha256=""))
    for later in (b"golden_sha256", b"calibration", b"gates"):
        assert later not in old.to_bytes()
    assert Passport.from_bytes(old.to_bytes(), Path("old.engine.json")) == old


def _flip(path: Path, position: int, bit: int) -> Callable[[], None]:
    """Change one bit of a file; returns what changes it back."""

    def flip() -> None:
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1 << bit]))

    flip()
    return flip


@pytest.mark.parametrize("suffix", [".engine", ".engine.json", ".onnx"])
@pytest.mark.usefixtures("nothing_deserialised")
def test_one_changed_bit_anywhere_is_refused_before_anything_is_deserialised(engine: Path, suffix: str) -> None:
    damaged = engine.with_suffix(suffix)
    size = damaged.stat().st_size
    at_random = random.Random(0)  # noqa: S311  # no secret
    count = 400 if suffix.endswith("json") else 40
    positions = [0, 1, size // 2, size - 2, size - 1, *(at_random.randrange(size) for _ in range(count))]
    for position in positions:
        undo = _flip(damaged, position, at_random.randrange(8))
        with pytest.raises(PassportError):
            open_runner(str(engine))
        undo()
    with pytest.raises(AssertionError, match="tensorrt-rtx was loaded"):  # whole again, it goes on
        open_runner(str(engine))


@pytest.mark.usefixtures("nothing_deserialised")
def test_a_longer_or_shorter_engine_is_refused(engine: Path, built: BuildReport) -> None:
    content = engine.read_bytes()
    for changed in (content[:-1], content + b"\0", b""):
        engine.write_bytes(changed)
        with pytest.raises(PassportError) as caught:
            open_runner(str(engine))
        assert str(caught.value) == (
            f"{engine} is not the engine that mini.engine.json describes (its SHA-256 differs): it was replaced or is "
            f"damaged. Build it again with: {built.passport.rebuild_command}"
        )


def test_the_passport_of_another_engine_is_refused(engine: Path, built: BuildReport) -> None:
    other = replace(built.passport, engine_sha256="0" * 64)
    passport_path(engine).write_bytes(other.to_bytes())
    with pytest.raises(PassportError, match=r"is not the engine that mini\.engine\.json describes"):
        open_engine(engine)


def test_an_engine_without_passport_is_refused(engine: Path) -> None:
    passport_path(engine).unlink()
    with pytest.raises(PassportError) as caught:
        open_runner(str(engine))
    assert str(caught.value) == (
        f"{engine} has no passport mini.engine.json beside it, so nothing says what it holds; copy both files, or "
        f"build the engine again, see `build()`."
    )


def test_a_missing_engine_is_told_from_a_missing_passport(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"there is no file .*none\.engine\. Build one with: `build\("):
        open_runner(str(tmp_path / "none.engine"))


def test_an_onnx_file_that_changed_since_is_told(engine: Path, built: BuildReport) -> None:
    source = engine.with_suffix(".onnx")
    source.write_bytes(source.read_bytes() + b"\0")
    with pytest.raises(PassportError) as caught:
        open_engine(engine)
    assert str(caught.value) == (
        f"{source} has changed since mini.engine was built from it. Build the engine again with: "
        f"{built.passport.rebuild_command}"
    )
    source.unlink()
    assert open_engine(engine)  # on a server there is no ONNX file


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"null", b"[1]", b'"text"', b"{", b"\xff", b'{"schema_version": 1}', b'{"schema_version": 1e999}'],
    ids=repr,
)
def test_what_is_no_passport_is_refused_in_one_sentence(engine: Path, content: bytes) -> None:
    passport_path(engine).write_bytes(content)
    with pytest.raises(PassportError, match="is not a passport of this version, or it is damaged") as caught:
        read_passport(engine)
    assert "\n" not in str(caught.value)


def test_the_passport_of_a_later_version_is_told(engine: Path, built: BuildReport) -> None:
    passport_path(engine).write_bytes(replace(built.passport, schema_version=99).to_bytes())
    with pytest.raises(PassportError, match="schema_version is 99, not 1"):
        read_passport(engine)


def test_a_verdict_is_kept_and_the_engine_still_opens(engine: Path) -> None:
    verdict = Verdict(True, "it agrees.", "2026-11-21T00:00:00+00:00", 18, (1, 4), None)
    before = read_passport(engine)
    library.record_verdict(engine, verdict, before.engine_sha256)
    with pytest.raises(PassportError, match="was built anew while it was validated"):
        library.record_verdict(engine, verdict, "0" * 64)
    passport, _ = open_engine(engine)
    assert replace(passport, verdict=None) == before
    assert passport.verdict == verdict


@pytest.mark.parametrize(
    ("text", "profile"),
    [("8", Profile(8, 8, 8)), ("1-32", Profile(1, 32, 32)), ("1-8-32", Profile(1, 8, 32)), ("3-3", Profile(3, 3, 3))],
)
def test_profiles_are_read(text: str, profile: Profile) -> None:
    assert Profile.parse(text) == profile


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "8-1", "1-9-8", "1-2-3-4", "1.5", "1-"])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ShapeError, match="a profile is a batch such as 8, a range such as 1-32"):
        Profile.parse(text)


def test_the_passport_says_what_was_built(built: BuildReport) -> None:
    passport: Passport = built.passport
    assert passport.profiles == (Profile(1, 1, 1), Profile(4, 4, 4))
    assert passport.backend == "tensorrt-rtx"
    assert passport.plugins == {"window_attention": 4, "deformable_sample": 2, "deformable_attention": 2}
    assert passport.plugin_form == "IPluginV3"
    assert passport.metadata.lowering == "plugin"
    assert passport.metadata.precision == "fp16"
    assert passport.layers["fp16"] > passport.layers["fp32"] > 0
    assert passport.engine_layers is None  # no GPU, no inspector
    assert passport.outputs == ("logits",)
