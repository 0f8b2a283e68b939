"""The front holds its limits, whatever its replicas do: each refusal has its status and one sentence in JSON."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from dat_deploy.serving.own.front import Front
from dat_deploy.serving.own.http import HEADER_LIMIT_BYTES, protocol_class
from dat_deploy.serving.own.metrics import Metrics
from dat_deploy.serving.own.protocol import RequestError
from dat_deploy.serving.own.replica import Call, Reply, ServedModel
from dat_deploy.serving.own.settings import ServeSettings
from dat_deploy.serving.tensors import TensorSpec

IMAGE, LOGITS = TensorSpec("image", "FP32", (-1, 3, 2, 2)), TensorSpec("logits", "FP32", (-1, 4))
MODEL = ServedModel("mini", "mini.onnx", "", IMAGE, (LOGITS,), most_images=4, most_pixels=100, most_call_pixels=100)


class Stub:
    """Replicas that answer when they are let."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.bodies: list[bytes] = []
        self.failure: Exception | None = None

    async def infer(self, body: bytes, header_length: str | None, seconds: float) -> Reply:
        self.bodies.append(body)
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        if self.failure is not None:
            raise self.failure
        return Reply(200, b'{"length": "' + str(header_length).encode() + b'"}', images=2, calls=(Call(2, 1, 0.01),))

    async def classify(self, body: bytes, top: int, *, points: bool, seconds: float) -> Reply:
        reply = await self.infer(body, None, seconds)
        return Reply(200, json.dumps({"top": top, "points": points}).encode(), images=reply.images)


class Running:
    def __init__(self, front: Front, stub: Stub, port: int) -> None:
        self.front, self.stub, self.port = front, stub, port

    def ask(
        self, path: str, body: bytes | None = None, *, method: str | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method or ("GET" if body is None else "POST"), path, body, named)
            response = connection.getresponse()
            content = response.read()
            kind = response.headers.get("content-type", "")
            return response.status, json.loads(content) if "json" in kind else content.decode(), dict(response.headers)


@contextlib.contextmanager
def running(**limits: object) -> Iterator[Running]:
    """A front on a port of the loopback."""
    settings = ServeSettings.model_validate({"engine": "mini.onnx"} | limits)
    stub = Stub()
    front = Front(settings, MODEL, {"name": "mini"}, stub, Metrics())
    front.ready = True
    config = uvicorn.Config(
        front.app,
        http=protocol_class(settings.read_timeout_s),
        ws="none",
        lifespan="off",
        log_config=None,
        h11_max_incomplete_event_size=HEADER_LIMIT_BYTES,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield Running(front, stub, listener.getsockname()[1])
        finally:
            stub.go.set()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def mini() -> Iterator[Running]:
    with running() as found:
        yield found


def test_metadata_is_that_of_the_protocol(mini):
    assert mini.ask("/v2")[1]["name"] == "dat-deploy"
    assert "binary_tensor_data" in mini.ask("/v2")[1]["extensions"]
    assert mini.ask("/v2/models/mini")[1] == {
        "name": "mini",
        "versions": ["1"],
        "platform": "dat-deploy",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 2, 2]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 4]}],
    }
    assert mini.ask("/v2/models/mini/versions/1/config")[1] == {"name": "mini"}
    assert mini.ask("/v2/repository/index", b"")[1] == [{"name": "mini", "version": "1", "state": "READY"}]


def test_a_request_goes_to_a_replica_as_it_came(mini):
    status, body, headers = mini.ask("/v2/models/mini/infer", b"abc\x00", inference_header_content_length="3")
    assert (status, body) == (200, {"length": "3"})
    assert mini.stub.bodies[-1] == b"abc\x00"
    assert len(headers["x-request-id"]) == 16
    assert mini.ask("/v1/classify?top=3&points=1", b"x")[1] == {"top": 3, "points": True}


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/v2/models/other", 404, "there is no model 'other'; this server has 'mini'."),
        ("/v2/models/mini/versions/3", 404, "there is no version '3' of mini; there is 1."),
        ("/nothing", 404, "there is nothing at this address; see /v2."),
        ("/v2/", 404, "there is nothing at this address; see /v2."),
        ("/v1/classify", 405, "this address takes another method; see /v2."),
    ],
)
def test_addresses_that_there_are_not(mini, path, status, sentence):
    assert mini.ask(path)[:2] == (status, {"error": sentence})


@pytest.mark.parametrize("query", ["top=0", "top=x", "top=-1", "top=1001", "points=2", "top=%D9%A3", "top="])
def test_parameters_out_of_range_are_refused(mini, query):
    status, body, _ = mini.ask(f"/v1/classify?{query}", b"x")
    assert status == 400
    assert body["error"].startswith(f"parameter '{query.partition('=')[0]}' is ")


def test_forms_and_compressed_bodies_are_refused(mini):
    status, body, _ = mini.ask("/v1/classify", b"x", content_type="multipart/form-data; boundary=a")
    sentence = "the body is a form; send the image itself: curl --data-binary @photograph.jpg"
    assert (status, body) == (415, {"error": sentence})
    status, body, _ = mini.ask("/v1/classify", b"x", content_encoding="gzip")
    assert (status, body) == (415, {"error": "the body has content encoding 'gzip'; send it as it is."})


def test_a_body_that_is_too_large_is_413_and_reaches_no_replica():
    with running(max_body_mb=0.001) as mini:
        assert mini.ask("/v1/classify", bytes(1000))[0] == 200
        for size in (1001, 3000, 30_000_000):
            status, body, _ = mini.ask("/v1/classify", bytes(size))
            sentence = "the body is larger than the 1000 bytes that this server takes; send less at once."
            assert (status, body) == (413, {"error": sentence})
        assert len(mini.stub.bodies) == 1


def test_a_large_body_that_is_announced_need_not_be_sent():
    with running(max_body_mb=0.001) as mini:
        head = b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 9000000\r\n\r\n"
        received, _ = raw(mini.port, head)
        assert received.startswith(b"HTTP/1.1 413 ")


def test_one_request_too_many_is_429_and_tells_to_try_again():
    with running(max_requests=2) as mini:
        mini.stub.go.clear()
        waiting = [threading.Thread(target=mini.ask, args=("/v1/classify", b"x")) for _ in range(2)]
        for thread in waiting:
            thread.start()
        end = time.monotonic() + 5
        while len(mini.stub.bodies) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        status, body, headers = mini.ask("/v1/classify", b"y")
        sentence = "2 requests are waiting, which is all this server takes; try again."
        assert (status, body, headers["retry-after"]) == (429, {"error": sentence}, "1")
        assert mini.ask("/v2/health/live")[0] == 200
        mini.stub.go.set()
        for thread in waiting:
            thread.join()
        assert mini.ask("/v1/classify", b"z")[0] == 200


def test_an_answer_that_takes_too_long_is_503():
    with running(timeout_s=0.2) as mini:
        mini.stub.go.clear()
        status, body, headers = mini.ask("/v1/classify", b"x")
        sentence = "no answer within 0.2 s, which is this server's limit; try again later."
        assert (status, body, headers["retry-after"]) == (503, {"error": sentence}, "1")


def test_replicas_that_cannot_answer_are_503(mini):
    mini.stub.failure = RequestError(503, "the engine's process died and is started anew; try again.")
    status, body, headers = mini.ask("/v1/classify", b"x")
    mini.stub.failure = None
    assert (status, headers["retry-after"]) == (503, "1")
    assert body == {"error": "the engine's process died and is started anew; try again."}


def test_a_bug_is_500_without_its_trace(mini):
    mini.stub.failure = KeyError("secret")
    status, body, _ = mini.ask("/v1/classify", b"x")
    mini.stub.failure = None
    assert (status, body) == (500, {"error": "an error inside the server; its log says which."})


def raw(port: int, content: bytes, seconds: float = 8) -> tuple[bytes, float]:
    """What comes back for bytes after which nothing is sent."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(content)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received, time.monotonic() - started


def test_bodies_and_headers_that_stop_coming_are_given_up():
    with running(read_timeout_s=0.3) as mini:
        body, seconds = raw(mini.port, b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc")
        assert body.startswith(b"HTTP/1.1 408 ")
        sentence = b"the body stopped, or came too slowly, after 3 bytes; send it again, faster."
        assert body.endswith(b'{"error": "' + sentence + b'"}')
        assert 0.2 < seconds < 3
        header, seconds = raw(mini.port, b"GET /v2 HTTP/1.1\r\nHos")
        assert header.startswith(b"HTTP/1.1 400 ")
        assert header.endswith(b'its header is not whole after 0.3 s."}')
        assert seconds < 3
        nothing, seconds = raw(mini.port, b"")
        assert nothing == b""
        assert seconds < 3


def test_a_body_that_drips_is_given_up():
    with running(read_timeout_s=0.3, min_body_kb_per_s=1) as mini:
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", mini.port), timeout=8) as connection:
            connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < started + 8:
                    connection.sendall(b"x")
                    time.sleep(0.1)
        assert time.monotonic() - started < 4
        assert mini.front.in_progress == 0


def test_a_body_that_nobody_reads_does_not_keep_its_connection():
    with running(read_timeout_s=0.3) as mini:
        head = b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", mini.port), timeout=8) as connection:
            connection.sendall(head)
            received = b""
            while not received.endswith(b'see /v2."}'):
                received += connection.recv(65536)
            assert received.startswith(b"HTTP/1.1 404")
            connection.sendall(b"x")
            started = time.monotonic()
            assert connection.recv(65536) == b""
        assert time.monotonic() - started < 3


def test_more_connections_than_the_limit_are_closed(monkeypatch):
    monkeypatch.setattr("dat_deploy.serving.own.http.CONNECTION_LIMIT", 2)
    with running() as mini, contextlib.ExitStack() as stack:
        waiting = [socket.create_connection(("127.0.0.1", mini.port), timeout=8) for _ in range(3)]
        for connection in waiting:
            stack.enter_context(connection)
        with pytest.raises(ConnectionError):
            mini.ask("/v2/health/live")


def test_bodies_that_wait_have_a_limit_together():
    with running(max_body_mb=0.001) as mini:
        mini.stub.go.clear()
        asking = [threading.Thread(target=mini.ask, args=("/v1/classify", bytes(1000))) for _ in range(16)]
        for thread in asking:
            thread.start()
        end = time.monotonic() + 5
        while len(mini.stub.bodies) < 16 and time.monotonic() < end:
            time.sleep(0.01)
        status, body, _ = mini.ask("/v1/classify", bytes(10))
        sentence = "16000 bytes are waiting, which is all this server takes; try again."
        assert (status, body) == (429, {"error": sentence})
        mini.stub.go.set()
        for thread in asking:
            thread.join()


def test_a_second_header_on_a_connection_is_given_up_too():
    with running(read_timeout_s=0.3) as mini:
        first = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"
        received, seconds = raw(mini.port, first + b"GET /v2 HT")
        assert received.count(b"HTTP/1.1") == 2
        assert b"its header is not whole" in received
        assert seconds < 3


def test_headers_have_a_limit(mini):
    received, _ = raw(mini.port, b"GET /v2 HTTP/1.1\r\nX: " + b"a" * (HEADER_LIMIT_BYTES + 1))
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b'{"error": ' in received


def test_while_it_stops_it_answers_and_closes_connections_and_is_not_ready():
    with running() as mini:
        assert mini.ask("/v2/health/ready")[:2] == (200, {"ready": True})
        mini.front.draining = True
        status, body, _ = mini.ask("/v2/health/ready")
        assert (status, body) == (503, {"error": "not ready: the server is stopping; try again later."})
        status, _, headers = mini.ask("/v1/classify", b"x")
        assert (status, headers["connection"]) == (200, "close")


def test_without_replicas_it_lives_and_is_not_ready():
    with running() as mini:
        mini.front.ready = False
        assert mini.ask("/v2/health/live")[0] == 200
        assert mini.ask("/v2/health/ready")[1] == {
            "error": "not ready: no replica of the engine runs yet; try again later."
        }
        assert mini.ask("/v2/models/mini/ready")[0] == 503


def test_metrics_count_answers_and_calls():
    with running() as mini:
        mini.ask("/v2/models/mini/infer", b"x")
        mini.ask("/v1/classify?top=0", b"x")
        text = mini.ask("/metrics")[1]
    assert 'dat_deploy_requests_total{code="200",endpoint="infer"} 1.0' in text
    assert 'dat_deploy_requests_total{code="400",endpoint="classify"} 1.0' in text
    assert "dat_deploy_batch_images_sum 2.0" in text
    assert "dat_deploy_padding_images_total 1.0" in text
    assert "dat_deploy_requests_in_progress 0.0" in text


def test_the_page_takes_nothing_from_elsewhere(mini):
    status, page, headers = mini.ask("/")
    assert status == 200
    assert page.startswith("<!doctype html>")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "script-src 'sha256-" in headers["content-security-policy"]
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
