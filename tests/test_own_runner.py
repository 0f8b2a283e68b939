"""A runner and a runtime of somebody else's do what those of this package do: the example in examples/own_runner."""

import importlib.util
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from dat_deploy.benchmark import benchmark
from dat_deploy.classify import classify
from dat_deploy.doctor import doctor
from dat_deploy.errors import DatDeployError, UnsupportedError
from dat_deploy.export import export
from dat_deploy.images.photographs import photographs
from dat_deploy.networks.dat.variants import Variant
from dat_deploy.runners import (
    RUNTIMES,
    EngineDescription,
    Outputs,
    Runner,
    check_engine,
    open_runner,
    runtimes,
)
from dat_deploy.validate import validate

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_runner"
OUTSIDE = ("coordinates", "drift")  # the checks that look inside the network


@pytest.fixture(scope="module")
def file(mini_dat: Variant, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "mini.onnx"
    export(mini_dat, path, lowering="gather")
    return path


@pytest.fixture(scope="module")
def own_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_runner_example", EXAMPLE / "own_runner.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example as pip installs it; the folder of its metadata."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    (tmp_path / "own_runner.py").write_bytes((EXAMPLE / "own_runner.py").read_bytes())
    info = tmp_path / "own_runner-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return info


class Wrapped(Runner):
    """Another runner, of which nothing but its answers is known."""

    def __init__(self, inner: Runner, description: EngineDescription) -> None:
        self.inner, self.description = inner, description

    def _run(self, images_nchw: np.ndarray) -> Outputs:
        return self.inner.outputs(images_nchw)

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def mine(file: Path) -> Iterator[Runner]:
    """`mine`, which no table knows and which has no file."""
    inner = open_runner(str(file))
    about = replace(inner.description, name="mine", runtime="mine", path=None, file_kind=None, file_precision=None)
    with Wrapped(inner, about) as runner:
        yield runner


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "photograph.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(path)
    return path


def test_a_runner_named_mine_without_a_file_is_validated(mine: Runner) -> None:
    report = validate(mine, images=photographs(1), batches=[1, 2])
    assert report.passed, report.verdict
    assert report.verdict.startswith("mine agrees with pytorch:mini-dat: ")
    assert report.file_sha256 is None
    rows = {row.kind: row.detail for row in report.checks if row.passed is None}
    assert rows == {
        "coordinates": "only an ONNX file can be cut into operators",
        "drift": "the engine does not give its locations; build it from `export(sampling_locations=True)`",
    }


def test_a_runner_that_takes_no_graphs_is_validated_all_but_inside(file: Path) -> None:
    about = EngineDescription.of_file(file, name="mine", runtime="mine", runtime_version="1")
    assert (about.path, about.precision, about.file_precision) == (file, "fp32", "fp32")
    with Wrapped(open_runner(str(file)), about) as runner:
        report = validate(runner, images=photographs(1), batches=[1])
    assert report.passed, report.verdict
    assert [row.kind for row in report.checks if row.passed is None] == list(OUTSIDE)
    assert any(row.name == "precision of the file" and row.passed for row in report.checks)


def test_a_wrong_runner_of_somebody_else_fails(mine: Runner) -> None:
    mine._run = lambda images: {"logits": mine.inner.outputs(images)["logits"] + 1}
    assert not validate(mine, images=photographs(1), batches=[1], skip=OUTSIDE).passed


def test_an_open_runner_classifies_and_stays_open(mine: Runner, file: Path, photograph: Path) -> None:
    found = classify([photograph], mine, top=2)
    assert found.engine.name == "mine"
    assert found.predictions == classify([photograph], str(file), top=2).predictions
    assert mine.logits(np.zeros((1, 3, 64, 64), np.float32)).shape == (1, 1000)


def test_the_example_is_validated_inside_the_network_too(own_runner: ModuleType, file: Path) -> None:
    with own_runner.NumpyRunner(file, "mine") as runner:
        report = validate(runner, images=photographs(1), batches=[1], skip=["stress", "slots", "repeats"])
    assert report.passed, report.verdict
    assert all(row.passed for row in report.checks)
    assert {row.kind for row in report.checks} >= set(OUTSIDE)


@pytest.mark.usefixtures("installed")
def test_a_runtime_of_an_entry_point_is_one_of_the_table(file: Path, photograph: Path) -> None:
    assert list(runtimes()) == [*RUNTIMES, "numpy"]
    assert doctor().runtimes["numpy"] == []
    engine = f"numpy:{file}"
    assert check_engine(engine).path == file
    report = validate(engine, images=photographs(1), batches=[1], skip=["stress", "slots", "repeats", *OUTSIDE])
    assert report.passed, report.verdict
    assert (report.engine.name, report.engine.runtime, report.engine.path) == (engine, "numpy", file)
    names = [[each.name for each in classify([photograph], e).predictions[0]] for e in (engine, str(file))]
    assert names[0] == names[1]
    with pytest.raises(DatDeployError) as error:
        open_runner(f"numpi:{file}")
    assert str(error.value) == (
        f"no runtime 'numpi' in 'numpi:{file}'. Did you mean numpy? Runtimes: {', '.join(RUNTIMES)}, numpy."
    )


@pytest.mark.usefixtures("installed")
def test_a_runtime_of_an_entry_point_is_benched_in_a_process_of_its_own(file: Path) -> None:
    record = benchmark([f"numpy:{file}"], rounds=1, seconds=0.0, calls=1, warmup_calls=1)
    assert record.settings.engines["numpy:mini.onnx"].runtime == "numpy"
    assert record.versions["numpy"] == np.__version__


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module:RUNTIME", "cannot be loaded: No module named 'no_such_module'"),
        ("own_runner:NumpyRunner", "is no Runtime but ABCMeta"),
    ],
)
def test_an_entry_point_that_is_broken_says_so_and_breaks_nothing_else(
    value: str, reason: str, installed: Path, file: Path
) -> None:
    (installed / "entry_points.txt").write_text(f"[dat_deploy.runtimes]\nbroken = {value}\n")
    assert doctor().runtimes["broken"] == [f"its entry point {value} {reason}"]
    open_runner(str(file)).close()
    with pytest.raises(UnsupportedError) as error:
        check_engine(f"broken:{file}")
    assert str(error.value) == f"broken cannot run here: its entry point {value} {reason}"
    with pytest.raises(UnsupportedError, match=r"^broken cannot run here: its entry point"):
        open_runner(f"broken:{file}")
