"""What `dat-deploy serve` and `dat-deploy client` refuse in one sentence, before Ray is started or anything answers."""

import socket
import sys
from pathlib import Path

import pytest

PICTURE = Path(__file__).parents[2] / "dat_deploy" / "data" / "ankle_boot.png"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing Ray fails the test."""
    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, None)


def test_our_client_says_that_nothing_answers(call_main):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = call_main("client", PICTURE, "--url", f"localhost:{port}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no server of the protocol answers at localhost:{port}: ")
    assert "Traceback" not in done.stderr


def test_an_address_of_another_protocol_is_refused(call_main):
    done = call_main("client", PICTURE, "--url", "ftp://a")
    sentence = "error: --url got 'ftp://a'; it takes HOST:PORT, http://HOST:PORT or https://HOST:PORT.\n"
    assert (done.returncode, done.stderr) == (1, sentence)


def test_a_port_that_is_taken_is_said_at_once(call_main, demo_onnx):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = call_main("serve", "--engine", demo_onnx, "--port", port)
    assert (done.returncode, done.stderr) == (
        1,
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use. Choose another --host or --port, or stop "
        f"what listens there.\n",
    )


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 1, "there is no engine to serve; name one: dat-deploy serve --engine tiny.onnx"),
        (
            ["--engine", "none.onnx"],
            1,
            "there is no file none.onnx. Export one with: dat-deploy export --variant tiny --output none.onnx",
        ),
        (
            ["--engine", "none.engine"],
            1,
            "there is no file none.engine. Build one with: dat-deploy build tiny.onnx",
        ),
        (
            ["--engine", "pytorch:tiny"],
            1,
            "'pytorch:tiny' is no file; a server takes FILE.onnx, FILE.engine or FILE.pt2. "
            "Export it with: dat-deploy export --variant tiny --output tiny.onnx",
        ),
        (["--engine", "a.onnx", "--port", "99999"], 1, "--port: Input should be less than or equal to 65535."),
        (
            ["--engine", "a.onnx", "--replicas", "3", "--max-replicas", "2"],
            1,
            "max_replicas is 2, below replicas, 3.",
        ),
        (["--config", "none.yaml"], 1, "cannot read none.yaml: [Errno 2] No such file or directory: 'none.yaml'"),
    ],
)
def test_bad_input_is_one_sentence(call_main, tmp_path, monkeypatch, words, code, sentence):
    monkeypatch.chdir(tmp_path)
    done = call_main("serve", *words)
    assert (done.returncode, done.stderr) == (code, f"error: {sentence}\n")


def test_an_engine_that_is_not_what_its_passport_says_is_refused(call_main, engine):
    path = engine()
    path.write_bytes(b"another engine")
    done = call_main("serve", "--engine", path, "--port", 0)
    assert (done.returncode, done.stderr) == (
        1,
        f"error: {path} is not the engine that demo.engine.json describes (its SHA-256 differs): it was replaced or is "
        f"damaged. Build it again with: dat-deploy build demo.onnx\n",
    )


def test_an_engine_that_failed_its_validation_is_refused(call_main, engine, bad_verdict):
    path = engine(verdict=bad_verdict)
    done = call_main("serve", "--engine", path, "--port", 0)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {path} failed its last validation, of 2026-11-21T00:00:00+00:00: it differs from PyTorch. Look into "
        f"it with: dat-deploy validate --engine {path}\n",
    )


def test_a_name_that_no_address_can_hold_is_refused(call_main, demo_onnx):
    done = call_main("serve", "--engine", demo_onnx, "--name", "a/b")
    assert (done.returncode, done.stderr) == (
        1,
        "error: 'a/b' cannot be a model's name; it takes up to 63 letters, digits, '_', '.' and '-', and begins with a "
        "letter or digit, for URLs have it. Give another with --name.\n",
    )


def test_a_config_file_may_say_it_all(call_main, tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("engine: none.onnx\nreplica: 2\n")
    done = call_main("serve", "--config", config)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {config}: replica: is no setting; those are engine, name, host, port, ")
    config.write_text("engine: none.onnx\nmax_batch: 0\n")
    done = call_main("serve", "--config", config)
    assert done.stderr == f"error: {config}: max_batch: Input should be greater than or equal to 1.\n"
    config.write_text("- a")
    assert call_main("serve", "--config", config).stderr == (
        f"error: {config} holds ['a']; it takes settings, such as 'engine: tiny.onnx'.\n"
    )
