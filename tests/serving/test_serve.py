"""`dat-deploy serve` as its users run it, with the client that they have: the real tritonclient."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from dat_deploy.classify import classify
from dat_deploy.images.photographs import photographs
from dat_deploy.images.preprocess import preprocess_files
from dat_deploy.runners import open_runner

DATA = Path(__file__).parents[2] / "dat_deploy" / "data"
PICTURE = DATA / "ankle_boot.png"


pytestmark = pytest.mark.server


def command_with_ray(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since Ray does to its process what it wants."""
    entry = "from dat_deploy.cli import main; main()"
    words = [sys.executable, "-c", entry, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603


def get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return bytes(answer.read())


def metric(port: int, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", get(port, "/metrics").decode(), re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def post(port: int, path: str, body: bytes, seconds: float = 30) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:  # noqa: S310
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture(scope="session")
def pictures() -> list[Path]:
    return [PICTURE, *photographs(3)]


def test_stock_client_reads_metadata_and_readiness(server):
    with triton.InferenceServerClient(f"localhost:{server.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("demo")
        assert client.is_model_ready("demo", "1")
        metadata = client.get_model_metadata("demo")
        assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 64, 64]}]
        assert metadata["outputs"][0] == {"name": "logits", "datatype": "FP32", "shape": [-1, 10]}
        assert client.get_server_metadata()["name"] == "dat-deploy"
        assert client.get_model_config("demo")["max_batch_size"] == 16
        assert client.get_model_repository_index() == [{"name": "demo", "version": "1", "state": "READY"}]
        with pytest.raises(InferenceServerException, match="there is no model 'other'; this server has 'demo'"):
            client.get_model_metadata("other")


@pytest.mark.parametrize("sent", [False, True], ids=["json", "binary"])
@pytest.mark.parametrize("asked", [False, True], ids=["json", "binary"])
def test_stock_client_gets_the_engines_answers(server, points_onnx, pictures, sent, asked):
    with open_runner(str(points_onnx)) as runner:
        images = preprocess_files(pictures, runner.description.preprocessing)
        expected = runner.outputs(images)
    with triton.InferenceServerClient(f"localhost:{server.port}") as client:
        tensor = triton.InferInput("image", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images, binary_data=sent)
        outputs = [triton.InferRequestedOutput(name, binary_data=asked) for name in expected]
        found = client.infer("demo", [tensor], outputs=outputs, request_id="r-1")
        assert found.get_response()["id"] == "r-1"
        for name, values in expected.items():
            np.testing.assert_allclose(found.as_numpy(name), values, atol=2e-5)


@pytest.mark.parametrize("workers", [1, 16])
def test_answers_are_those_of_classify_at_any_concurrency(server, points_onnx, pictures, workers):
    expected = classify(pictures, str(points_onnx), top=5).predictions
    batches, images = (
        metric(server.port, "dat_deploy_batch_images_count"),
        metric(server.port, "dat_deploy_images_total"),
    )

    def ask(i: int) -> None:
        status, body = post(server.port, "/v1/classify?top=5", pictures[i % len(pictures)].read_bytes())
        assert status == 200, body
        rows, right = body["predictions"], expected[i % len(pictures)]
        assert [row["index"] for row in rows] == [row.index for row in right]
        np.testing.assert_allclose([r["probability"] for r in rows], [r.probability for r in right], atol=1e-5)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(ask, range(64)))
    assert metric(server.port, "dat_deploy_images_total") - images == 64
    calls = metric(server.port, "dat_deploy_batch_images_count") - batches
    assert calls == 64 if workers == 1 else calls < 56, "with 16 at once, some went into one call together"


def test_our_client_prints_what_classify_prints(server, points_onnx, pictures, call_main):
    there = call_main("client", *pictures, "--url", f"localhost:{server.port}", "--top", 3)
    here = call_main("classify", *pictures, "--engine", points_onnx, "--top", 3)
    assert there.returncode == 0, there.stderr
    assert there.stdout.rpartition("next:")[0] == here.stdout.rpartition("next:")[0]


def test_our_client_says_what_a_server_refuses(server, call_main):
    url = f"localhost:{server.port}"
    done = call_main("client", PICTURE, "--url", url, "--name", "other")
    sentence = f"error: the server at {url} refuses: there is no model 'other'; this server has 'demo'.\n"
    assert (done.returncode, done.stderr) == (1, sentence)


def test_logs_are_json_lines(server):
    get(server.port, "/v2")
    entries = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert entries[-1].keys() == {"time", "level", "event", "endpoint", "request", "code", "ms", "client"}
    assert [entry["event"] for entry in entries[:2]] == ["starting", "replica started"]
    assert len(entries) == len(server.log.read_text().splitlines()), "no line is anything else"


def test_a_large_picture_is_refused_before_it_is_decoded(server, tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (6000, 6000)).save(path)
    status, body = post(server.port, "/v1/classify", path.read_bytes())
    assert status == 400
    assert "has 36000000 pixels; accepted are at most 25000000" in str(body["error"])


def test_a_replica_that_is_killed_costs_no_answer(start, demo_onnx):
    """Each request is answered, or told to try again, and the service comes back."""
    server = start("--engine", demo_onnx)
    (pid,) = server.replicas()
    results: list[tuple[float, int]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            begun = time.monotonic()
            status, body = post(server.port, "/v1/classify", PICTURE.read_bytes())
            assert status == 200 or (status == 503 and "again" in str(body["error"])), body
            results.append((begun, status))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        time.sleep(1.5)
        killed = time.monotonic()
        subprocess.run(["kill", "-KILL", str(pid)], check=True)  # noqa: S603, S607  # a replica of our own server
        back = None
        while back is None and time.monotonic() < killed + 30:
            time.sleep(0.2)
            fine = [begun for begun, status in results if begun > killed and status == 200]
            back = min(fine) - killed if fine else None
        stop.set()
        for each in asking:
            each.result(60)
    assert back is not None
    assert back < 30
    assert server.replicas() != [pid]
    assert server.stop() == 0


def test_a_server_on_a_cluster_leaves_others_alone(server, start, demo_onnx, monkeypatch):
    """The cluster is the Ray that another server started."""
    cluster = cluster_of(server, monkeypatch)
    same = command_with_ray("serve", "--engine", demo_onnx, "--port", 0, *cluster)
    assert same.stderr == (
        "error: the Ray cluster has a server of a model 'demo' already; choose another --name, or pass --force to take "
        "its place, such as after it was killed.\n"
    )
    other = start("--engine", demo_onnx, "--name", "other", *cluster)
    assert json.loads(get(other.port, "/v2/models/other"))["name"] == "other"
    assert post(other.port, "/v1/classify", PICTURE.read_bytes())[0] == 200
    assert other.stop() == 0
    assert post(server.port, "/v1/classify", PICTURE.read_bytes())[0] == 200


def cluster_of(server, monkeypatch) -> tuple[object, ...]:
    """Options for a second server on the Ray that the first one started."""
    pid, words = next((pid, words) for pid, words in server.processes().items() if b"/raylet/raylet" in words)
    address = re.search(rb"\x00--gcs-address=(\S+?)\x00", words)
    assert address is not None
    for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"):
        if entry.startswith("RAY_AUTH_"):
            monkeypatch.setenv(*entry.split("="))
    return "--address", address.group(1).decode(), "--threads", 1


@pytest.mark.slow
def test_a_server_takes_the_place_of_one_that_was_killed(server, start, demo_onnx, monkeypatch):
    cluster = cluster_of(server, monkeypatch)
    killed = start("--engine", demo_onnx, "--name", "killed", *cluster)
    killed.process.kill()  # its application stays behind
    killed.process.communicate(timeout=30)
    again = start("--engine", demo_onnx, "--name", "killed", "--force", *cluster)
    assert post(again.port, "/v1/classify", PICTURE.read_bytes())[0] == 200
    assert again.stop() == 0


def test_a_cluster_that_is_not_there_is_said_at_once(demo_onnx):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    done = command_with_ray("serve", "--engine", demo_onnx, "--port", 0, "--address", address)
    assert (done.returncode, done.stderr) == (
        1,
        f"error: no Ray cluster at --address {address}: [Errno 111] Connection refused. Start one with: ray start "
        f"--head\n",
    )


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 4, 6])
def test_a_signal_while_it_starts_ends_it(demo_onnx, seconds):
    words = [sys.executable, "-c", "from dat_deploy.cli import main; main()", "serve", "--engine", str(demo_onnx)]
    with subprocess.Popen([*words, "--port", "0"], stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        time.sleep(seconds)
        process.terminate()
        _, said = process.communicate(timeout=40)
    assert process.returncode in (143, -15, 15), said  # the latter from within Ray's own start


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stopping_loses_no_request_that_was_taken(start, demo_onnx, number):
    server = start("--engine", demo_onnx)
    lost: list[str] = []
    answered = [0]

    def ask() -> None:
        """One connection a request; what is not connected was not taken."""
        body = PICTURE.read_bytes()
        request = b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            except ConnectionError:
                return
            with connection:
                try:
                    connection.sendall(request + body)
                    received = connection.recv(65536)
                except ConnectionError as error:
                    received = repr(error).encode()
            if not received.startswith(b"HTTP/1.1 200"):
                lost.append(received[:200].decode())
                return
            answered[0] += 1

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        time.sleep(1.5)
        server.process.send_signal(number)
        for each in asking:
            each.result(60)
    assert answered[0] > 20
    # the kernel may have taken a connection that the closed listener never got; the request was not
    assert all("ConnectionResetError" in each for each in lost), lost
    assert len(lost) <= 2
    assert server.process.wait(30) == 0
    events = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    codes = [entry["code"] for entry in events if entry.get("endpoint") == "classify"]
    assert codes == [200] * answered[0], "each request that the server read was answered, and the answer arrived"
    assert next(entry for entry in events if entry["event"] == "stopped")["in_progress"] == 0


@pytest.mark.slow
def test_a_signal_to_the_whole_group_ends_it_in_good_time(start, demo_onnx):
    """As `timeout`, systemd or a terminal send it: Ray's processes get it, too."""
    server = start("--engine", demo_onnx, own_group=True)
    assert post(server.port, "/v1/classify", PICTURE.read_bytes())[0] == 200
    begun = time.monotonic()
    os.killpg(server.process.pid, signal.SIGTERM)
    server.process.communicate(timeout=50)
    assert time.monotonic() - begun < 40
    assert '"event": "stopped"' in server.log.read_text()


@pytest.mark.slow
def test_ray_that_does_not_answer_is_not_ready_and_ends_the_server(start, demo_onnx):
    server = start("--engine", demo_onnx)
    controller = next(pid for pid, words in server.processes().items() if words.startswith(b"ray::ServeController"))
    os.kill(controller, signal.SIGSTOP)
    try:
        end = time.monotonic() + 20
        status = 200
        while status == 200 and time.monotonic() < end:
            time.sleep(0.5)
            try:
                get(server.port, "/v2/health/ready")
            except urllib.error.HTTPError as error:
                status = error.code
        assert status == 503
        server.process.communicate(timeout=80)
        assert server.process.returncode == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(controller, signal.SIGCONT)


def test_an_engine_needs_a_gpu(engine):
    path = engine()
    done = command_with_ray("serve", "--engine", path, "--port", 0)
    assert (done.returncode, done.stderr) == (
        3,
        f"error: {path} needs 1 GPU for each replica, 1 in all, and Ray sees 0. Serve an ONNX file on the CPU, or give "
        f"each replica a share with --gpus.\n",
    )
