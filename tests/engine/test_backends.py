"""Backends are rows; another package adds one by an entry point."""

import ast
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import dat_deploy
from dat_deploy.engine import build as library
from dat_deploy.engine.backend import Backend, BuildRequest, BuiltEngine
from dat_deploy.engine.build import backend_names, build, find_backend
from dat_deploy.engine.inspector import inspect
from dat_deploy.engine.passport import Passport, Profile, read_passport, sha256
from dat_deploy.errors import EngineBuildError, UnsupportedError
from dat_deploy.metadata import FileMetadata
from dat_deploy.networks.dat.variants import VARIANTS

PACKAGE = Path(dat_deploy.__file__).parent


def build_stone(request: BuildRequest) -> BuiltEngine:
    network = VARIANTS[str(request.variant)]
    metadata = FileMetadata(
        network=network,
        batch=None,
        dynamic_image_size=False,
        lowering="reference",
        precision=request.precision or "fp32",
        opset_version=0,
        preprocessing=network.preprocessing,
        class_names=(),
        weights_sha256="",
        weights_source="",
        version="0.1.0",
    )
    content = b"stone"
    passport = Passport(
        engine_sha256=sha256(content),
        engine_bytes=len(content),
        backend=request.backend,
        backend_version="1.0",
        versions={},
        architectures=(),
        profiles=request.profiles,
        outputs=("logits",),
        layers={},
        kinds={},
        engine_layers=None,
        plugins={},
        plugin_form=None,
        metadata=metadata,
        source=None,
        source_sha256=None,
        rebuild=request.command,
    )
    return BuiltEngine(content, passport, ("it is heavy",))


def no_layers(path: Path, passport: Passport, content: bytes) -> tuple[()]:
    raise UnsupportedError(f"{path.name} has no layers")


STONE = Backend(
    name="stone",
    title="Stone",
    suffix=".stone",
    parameters=frozenset({"variant", "precision"}),
    build=build_stone,
    layers=no_layers,
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package with the backends `stone`, `broken`, `other`, and one that would take a name of ours."""
    values = {"stone": "STONE", "tensorrt": "STONE", "other": "STONE", "broken": "MISSING"}
    entries = [EntryPoint(name, f"{__name__}:{value}", "dat_deploy.backends") for name, value in values.items()]
    monkeypatch.setattr(library, "entry_points", lambda *, group: entries if group == "dat_deploy.backends" else [])


@pytest.mark.usefixtures("installed")
def test_a_backend_of_another_package_builds_and_is_inspected(tmp_path: Path) -> None:
    assert backend_names() == ("tensorrt", "tensorrt-rtx", "aotinductor", "stone", "other", "broken")
    target = tmp_path / "tiny.stone"
    report = build(variant="tiny", backend="stone", output=target, precision="fp16", batches=[1, "2-4"])
    assert (target.read_bytes(), report.notes) == (b"stone", ("it is heavy",))
    passport = read_passport(target)
    assert passport.profiles == (Profile(1, 1, 1), Profile(2, 4, 4))
    assert passport.rebuild_command == (
        f"dat-deploy build --backend stone --variant tiny --precision fp16 --output {target} --batch 1,2-4"
    )
    assert inspect(target).unseen == "tiny.stone has no layers"


@pytest.mark.usefixtures("installed")
def test_what_it_does_not_take_is_refused() -> None:
    with pytest.raises(EngineBuildError) as caught:
        build(variant="tiny", backend="stone", device="cpu", checkpoint=Path("x.pth"))
    assert str(caught.value) == "`checkpoint`, `device` is for backend aotinductor, not for stone; leave it out."
    with pytest.raises(EngineBuildError) as caught:
        build(variant="tiny", backend="stone", output=Path("tiny.pt2"))
    assert str(caught.value) == (
        "`output` got 'tiny.pt2'; what stone makes ends in .stone, by which the other commands know it."
    )


@pytest.mark.usefixtures("installed")
def test_a_name_of_ours_stays_ours() -> None:
    assert find_backend("tensorrt").title == "TensorRT"


@pytest.mark.usefixtures("installed")
def test_one_that_cannot_be_loaded_or_is_another_is_named() -> None:
    with pytest.raises(EngineBuildError) as caught:
        find_backend("broken")
    assert str(caught.value) == (
        f"backend 'broken' cannot be loaded from {__name__}:MISSING: AttributeError: module '{__name__}' has no "
        "attribute 'MISSING'"
    )
    with pytest.raises(EngineBuildError, match=f"^{re.escape(__name__)}:STONE is no backend 'other' of dat_deploy"):
        find_backend("other")


def sentences(path: Path) -> list[str]:
    """What a file may say: its texts without docstrings; what an f-string fills in is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    documentation = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner | documentation:
            texts.append(node.value)
    return texts


@pytest.mark.parametrize("part", ["engine", "export", "metadata.py", "validate/gates.py", "precision.py"])
def test_the_library_speaks_of_parameters_not_of_options(part: str) -> None:
    """An option stands in a whole command alone, as `dat-deploy inspect --layers`."""
    files = [PACKAGE / part] if part.endswith(".py") else sorted((PACKAGE / part).rglob("*.py"))
    found = {
        f"{path.name}: {text}"
        for path in files
        for text in sentences(path)
        if re.search(r"(?<!\S)--[a-z]", re.sub(r"(dat-deploy|pip install) \S.*", "", text))
    }
    assert {text for text in found if not re.fullmatch(r"build\.py: --[a-z-]+", text)} == set()  # of the passport
