import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from subprocess import run

import pytest
from PIL import Image

from dat_deploy.errors import UnsupportedError
from dat_deploy.images.photographs import LICENCES, photographs


def test_every_photograph_is_there_with_a_free_licence_and_colour_comes_first() -> None:
    paths = photographs()
    assert [path.name for path in paths] == list(LICENCES)
    modes = []
    for path in paths:
        assert LICENCES[path.name].startswith(("CC0", "public domain", "no known copyright restrictions"))
        with Image.open(path) as image:
            modes.append(image.mode)
    assert modes == ["RGB"] * 7 + ["L"] * 6


@pytest.mark.parametrize("count", [0, 1, 8])
def test_a_count_gives_the_first_ones(count: int) -> None:
    assert photographs(count) == photographs()[:count]


@pytest.mark.parametrize("count", [-1, 14])
def test_a_count_that_cannot_be_had_is_refused(count: int) -> None:
    with pytest.raises(UnsupportedError) as caught:
        photographs(count)
    assert str(caught.value) == (
        f"{count} photographs were asked for; scikit-image carries 13. Name image files of your own."
    )


def test_without_scikit_image_the_pip_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError) as caught:
        photographs()
    assert str(caught.value) == (
        "the photographs come with scikit-image, which is not installed. Install it with: "
        "pip install 'dat-deploy[demo]'"
    )


def test_a_scikit_image_without_the_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ModuleSpec("skimage", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UnsupportedError) as caught:
        photographs()
    assert str(caught.value) == (
        f"scikit-image in '{tmp_path / 'data'}' lacks the photograph 'astronaut.png'; its wheels carry it. Install one "
        f"with: pip install --force-reinstall --only-binary :all: scikit-image"
    )


def test_finding_the_photographs_does_not_import_scikit_image() -> None:
    code = "import sys, dat_deploy.images.photographs as p; p.photographs(); sys.exit('skimage' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603 - our own interpreter and code
