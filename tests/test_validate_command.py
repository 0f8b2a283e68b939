"""`dat-deploy validate` as it is typed: tables, files, exit codes, and one sentence for what is wrong."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from dat_deploy import cli


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def run(*words: object) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr("sys.argv", ["dat-deploy", *map(str, words)])
        code = cli._run()  # main, less its signal handlers
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if not re.fullmatch(r"validate: .+, \d+\.\d s", line)]
        return int(code or 0), captured.out.splitlines(), errors

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for index in range(10):
        path = tmp_path / "data" / ("Bag" if index % 2 else "Coat") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (28, 28, 3), np.uint8)).save(path)
    return tmp_path / "data"


QUICK = ("--batch", "1", "--skip", "coordinates", "--skip", "drift", "--skip", "stress")


def test_data_gives_accuracy_and_files_and_the_next_command(run, demo_onnx: Path, data: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, out, _ = run("validate", "--engine", demo_onnx, "--data", data, "--limit", 6, *QUICK, "--json", report)
    assert code == 0
    text = "\n".join(out)
    for row in ("top-1 lost", "top-5 lost", "images that flip", "logits on data", "cosine on data"):
        assert f" {row} " in text
    assert f"note: data {data}: labelled by the names of classes, 6 of 10 images, evenly spaced" in out
    assert out[-2].startswith(f"{demo_onnx} agrees with pytorch:demo: ")
    assert out[-2].endswith("left out on request: stress, coordinates, drift.")
    assert out[-1] == f"next: dat-deploy bench --engine pytorch:demo --engine {demo_onnx}"
    content = json.loads(report.read_text())
    assert content["accuracy"]["images"] == 6
    assert content["passed"] is True
    assert content["file_sha256"] == hashlib.sha256(demo_onnx.read_bytes()).hexdigest()
    assert content["gates"]["top1_drop"] == 0.1
    assert content["date"]


def test_a_corrupt_image_is_named_and_fails_only_its_gate(run, demo_onnx: Path, data: Path) -> None:
    (data / "Bag" / "torn.png").write_bytes(b"no picture")
    words = ("validate", "--engine", demo_onnx, "--data", data, *QUICK)
    code, out, err = run(*words)
    assert code == 2
    assert any(line.startswith(f"left out: {data}/Bag/torn.png: ") for line in out)
    assert err[-1].startswith(f"error: {demo_onnx} does not pass its gates against pytorch:demo: 1 of ")
    assert not any(line.startswith("next: ") for line in out)
    assert "'unreadable images' with an error of 9.09% where 1% is allowed" in err[-1]
    assert run(*words, "--gate", "unreadable=10")[0] == 0
    code, _, err = run(*words, "--strict-data")
    assert code == 1
    assert len(err) == 1
    assert "torn.png" in err[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "validate takes --engine ENGINE, such as --engine tiny.onnx, or --self-test."),
        (("--engine", "x.onnx", "--limit", 3), "--limit and --strict-data are about --data; name a folder with it."),
        (("--engine", "x.onnx", "--strict-data"), "--limit and --strict-data are about --data; name a folder with it."),
        (
            ("--self-test", "--limit", 3),
            "--self-test takes no other option than --engine, --checkpoint, --json and --force.",
        ),
        (
            ("--self-test", "--batch", 1),
            "--self-test takes no other option than --engine, --checkpoint, --json and --force.",
        ),
        (
            ("--engine", "pytorch:demo", "--gate", "top1-drop"),
            "--gate got 'top1-drop'; it takes NAME=NUMBER, such as top1-drop=0.5.",
        ),
        (
            ("--engine", "pytorch:demo", "--gate", "disagreement=0.5"),
            "gate 'disagreement' is about data; name a folder of images with --data.",
        ),
        (
            ("--engine", "pytorch:demo", "--data", "nowhere"),
            "'nowhere' does not exist; name a folder of images, at any depth.",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_one_sentence(run, words: tuple[object, ...], sentence: str) -> None:
    code, out, err = run("validate", *words)
    assert (code, out, err[-1:]) == (1, [], [f"error: {sentence}"])


def test_a_page_that_exists_is_refused_before_any_work(run, demo_onnx: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("mine")
    code, out, err = run("validate", "--engine", demo_onnx, "--html", page)
    assert (code, out) == (1, [])
    assert str(page) in err[-1]
    assert page.read_text() == "mine"


def test_a_page_names_options_as_the_terminal_does(run, demo_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(demo_onnx)
    next(entry for entry in model.metadata_props if entry.key == "dat_deploy.precision").value = '"int8"'
    onnx.save(model, tmp_path / "int8.onnx")
    code, out, _ = run("validate", "--engine", tmp_path / "int8.onnx", *QUICK, "--html", tmp_path / "page.html")
    assert code == 2  # nothing of it is quantized
    sentence = "what eight bits cost shows on images alone: give --data"
    assert any(sentence in line for line in out)
    assert sentence in (tmp_path / "page.html").read_text()
