"""The HTTP side of a server: addresses, limits, health, metrics and logs; replicas do the work.

It holds no engine, opens no body and imports no Ray, so that what a request holds cannot hurt it.
"""

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from dat_deploy.environment import tool_version
from dat_deploy.serving.own.metrics import CONTENT_TYPE, Metrics
from dat_deploy.serving.own.protocol import HEADER_LENGTH, RequestError, error_body
from dat_deploy.serving.own.replica import MODEL_VERSION, Reply, ServedModel
from dat_deploy.serving.own.settings import ServeSettings
from dat_deploy.serving.tensors import TensorSpec

__all__ = ["Front", "Replicas"]

_log = logging.getLogger("dat_deploy.serving")

_RETRY = {"retry-after": "1"}
_PROBES = ("live", "ready", "model ready", "metrics")
_TOP_LIMIT = 1000
_DISCARDED_BYTES = 64_000_000
_BODIES_LIMIT = 16  # of the largest size, in memory at a time
_PAGE_POLICY = (
    "default-src 'none'; img-src 'self' blob: data:; style-src 'unsafe-inline'; script-src 'sha256-{}'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Replicas(Protocol):
    """Copies of an engine, wherever they run. Both raise RequestError(503) if none can answer."""

    async def infer(self, body: bytes, header_length: str | None, seconds: float) -> Reply: ...

    async def classify(self, body: bytes, top: int, *, points: bool, seconds: float) -> Reply: ...


class Front:
    """The server's application.

    Attributes:
        ready: whether replicas run; whoever watches them sets it.
        draining: no more requests are wanted; those that come are still answered, and their connections closed.
        in_progress: requests read, waiting or worked on.
    """

    def __init__(
        self,
        settings: ServeSettings,
        model: ServedModel,
        config: dict[str, object],
        replicas: Replicas,
        metrics: Metrics,
    ) -> None:
        self._settings, self._model, self._config = settings, model, config
        self._replicas, self._metrics = replicas, metrics
        self._page = resources.files("dat_deploy").joinpath("data/serve.html").read_bytes()
        script = re.search(rb"<script>(.*)</script>", self._page, re.DOTALL)
        assert script is not None
        self._page_policy = _PAGE_POLICY.format(base64.b64encode(hashlib.sha256(script.group(1)).digest()).decode())
        self.ready, self.draining, self.in_progress = False, False, 0
        self._bytes = 0  # of the bodies that replicas work on
        model_paths = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
        self.app = Starlette(
            routes=[
                self._route("/", "page", self._get_page),
                self._route("/metrics", "metrics", self._get_metrics),
                self._route("/v2", "server", self._get_server),
                self._route("/v2/health/live", "live", self._get_live),
                self._route("/v2/health/ready", "ready", self._get_ready),
                self._route("/v2/repository/index", "index", self._index, "POST"),
                self._route("/v1/classify", "classify", self._classify, "POST"),
                *(self._route(path, "model", self._get_model) for path in model_paths),
                *(self._route(f"{path}/ready", "model ready", self._get_model_ready) for path in model_paths),
                *(self._route(f"{path}/config", "config", self._get_config) for path in model_paths),
                *(self._route(f"{path}/infer", "infer", self._infer, "POST") for path in model_paths),
            ],
            exception_handlers={HTTPException: self._refuse, Exception: self._fail},
        )
        self.app.router.redirect_slashes = False

    def _route(
        self, path: str, endpoint: str, answer: Callable[[Request], Awaitable[Response]], method: str = "GET"
    ) -> Route:
        """With what every answer gets: counts, a line in the log, errors in the protocol's form."""

        async def counted(request: Request) -> Response:
            started = time.monotonic()
            try:
                self._check_names(request)
                response = await answer(request)
            except RequestError as error:
                response = _error(error.status, str(error))
            except ClientDisconnect:
                response = _error(400, "the connection ended before the request did.")  # nobody reads it
            return self._told(request, endpoint, response, time.monotonic() - started)

        return Route(path, counted, methods=[method])

    def _told(self, request: Request, endpoint: str, response: Response, seconds: float) -> Response:
        """Count the answer, and write it into the log unless it is a probe's that went well."""
        identity = response.headers["x-request-id"] = uuid.uuid4().hex[:16]
        if self.draining or response.status_code in (408, 413):  # of these the body may not have ended
            response.headers["connection"] = "close"
        self._metrics.count(endpoint, response.status_code, seconds)
        entry: dict[str, object] = {"endpoint": endpoint, "request": identity, "code": response.status_code}
        entry |= {"ms": round(1000 * seconds, 1), "client": request.client.host if request.client else ""}
        if response.status_code >= 400:
            entry["answer"] = bytes(response.body[:300]).decode(errors="replace")
        level = logging.WARNING if response.status_code >= 500 else logging.INFO
        if endpoint not in _PROBES or response.status_code >= 400:
            _log.log(level, "request", extra=entry)
        return response

    def _check_names(self, request: Request) -> None:
        name, version = request.path_params.get("model"), request.path_params.get("version", MODEL_VERSION)
        if name not in (None, self._model.name):
            raise RequestError(404, f"there is no model {name[:50]!r}; this server has '{self._model.name}'.")
        if version != MODEL_VERSION:
            raise RequestError(404, f"there is no version {version[:20]!r} of {name}; there is {MODEL_VERSION}.")

    async def _get_page(self, _: Request) -> Response:
        headers = {"content-security-policy": self._page_policy, "x-content-type-options": "nosniff"}
        return Response(self._page, media_type="text/html", headers=headers)

    async def _get_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _get_server(self, _: Request) -> Response:
        extensions = ["binary_tensor_data", "classification", "model_configuration", "model_repository"]
        return _json({"name": "dat-deploy", "version": tool_version(), "extensions": extensions})

    async def _get_live(self, _: Request) -> Response:
        return _json({"live": True})

    async def _get_ready(self, _: Request) -> Response:
        if self.draining or not self.ready:
            reason = "the server is stopping" if self.draining else "no replica of the engine runs yet"
            return _error(503, f"not ready: {reason}; try again later.")
        return _json({"ready": True})

    async def _get_model_ready(self, request: Request) -> Response:
        return await self._get_ready(request)

    async def _get_model(self, _: Request) -> Response:
        model = self._model
        return _json(
            {
                "name": model.name,
                "versions": [MODEL_VERSION],
                "platform": "dat-deploy",
                "inputs": [_tensor(model.image)],
                "outputs": [_tensor(output) for output in model.outputs],
            }
        )

    async def _get_config(self, _: Request) -> Response:
        return _json(self._config)

    async def _index(self, request: Request) -> Response:
        await self._body(request)
        ready = self.ready and not self.draining
        state = {"state": "READY"} if ready else {"state": "UNAVAILABLE", "reason": "not ready"}
        return _json([{"name": self._model.name, "version": MODEL_VERSION} | state])

    async def _infer(self, request: Request) -> Response:
        length = request.headers.get(HEADER_LENGTH)
        return await self._work(
            request, lambda body: self._replicas.infer(body, length, seconds=self._settings.timeout_s)
        )

    async def _classify(self, request: Request) -> Response:
        if request.headers.get("content-type", "").startswith("multipart/"):
            await self._body(request)
            raise RequestError(415, "the body is a form; send the image itself: curl --data-binary @photograph.jpg")
        try:
            top = _number(request, "top", 5, most=_TOP_LIMIT)
            points = _number(request, "points", 0, least=0, most=1)
        except RequestError:
            await self._body(request)
            raise
        seconds = self._settings.timeout_s
        return await self._work(
            request, lambda body: self._replicas.classify(body, top, points=bool(points), seconds=seconds)
        )

    async def _work(self, request: Request, call: Callable[[bytes], Awaitable[Reply]]) -> Response:
        """Read the body and have a replica answer, within the limits."""
        if self.in_progress >= self._settings.max_requests:
            await self._body(request, keep=False)
            raise RequestError(
                429, f"{self._settings.max_requests} requests are waiting, which is all this server takes; try again."
            )
        self.in_progress += 1
        self._metrics.in_progress.set(self.in_progress)
        try:
            encoding = request.headers.get("content-encoding", "identity")
            body = await self._body(request, keep=encoding == "identity")
            if encoding != "identity":
                raise RequestError(415, f"the body has content encoding {encoding[:20]!r}; send it as it is.")
            if self._bytes + len(body) > _BODIES_LIMIT * self._settings.max_body_mb * 1e6:
                raise RequestError(429, f"{self._bytes} bytes are waiting, which is all this server takes; try again.")
            self._bytes += len(body)
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    reply = await call(body)
            finally:
                self._bytes -= len(body)
        except TimeoutError:
            raise RequestError(
                503, f"no answer within {self._settings.timeout_s:g} s, which is this server's limit; try again later."
            ) from None
        finally:
            self.in_progress -= 1
            self._metrics.in_progress.set(self.in_progress)
        self._metrics.count_reply(reply)
        retry = _RETRY if reply.status == 503 else {}
        return Response(reply.body, reply.status, headers={**reply.headers, **retry})

    async def _body(self, request: Request, *, keep: bool = True) -> bytes:
        """The body of a request; read to its end also where it is refused, so that the client reads the answer.

        Raises:
            RequestError: 413 if it is too large; 408 if it stops coming.
        """
        limit = int(self._settings.max_body_mb * 1e6)
        length, large = request.headers.get("content-length", ""), f"the body is larger than the {limit} bytes"
        if length.isdigit() and int(length) > limit and "expect" in request.headers:  # it has not been sent yet
            raise RequestError(413, f"{large} that this server takes; send less at once.")
        parts: list[bytes] = []
        size = 0
        stream = request.stream().__aiter__()
        pause_s, rate = self._settings.read_timeout_s, 1000 * self._settings.min_body_kb_per_s
        started = time.monotonic()
        while True:
            late_s = pause_s + size / rate - (time.monotonic() - started) if rate else pause_s
            try:
                async with asyncio.timeout(min(pause_s, late_s)):
                    part = await anext(stream, None)
            except TimeoutError:
                raise RequestError(
                    408, f"the body stopped, or came too slowly, after {size} bytes; send it again, faster."
                ) from None
            if part is None:
                break
            size += len(part)
            if size > 4 * limit + _DISCARDED_BYTES:
                break  # whoever sends so much may lose the answer
            if keep and size <= limit:
                parts.append(part)
            else:
                parts.clear()
        if size > limit:
            raise RequestError(413, f"{large} that this server takes; send less at once.")
        return b"".join(parts)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """Addresses and methods that there are not."""
        assert isinstance(error, HTTPException)
        text = {404: "there is nothing at this address", 405: "this address takes another method"}
        refusal = _error(error.status_code, f"{text.get(error.status_code, error.detail)}; see /v2.")
        return self._told(request, "none", refusal, 0.0)

    async def _fail(self, request: Request, error: Exception) -> Response:
        """A bug of ours; the server's own log has the trace."""
        return self._told(request, "none", _error(500, "an error inside the server; its log says which."), 0.0)


def _number(request: Request, name: str, default: int, *, least: int = 1, most: int) -> int:
    text = request.query_params.get(name, str(default))
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    if not least <= value <= most:
        raise RequestError(400, f"parameter '{name}' is {text[:20]!r}; it takes a number from {least} to {most}.")
    return value


def _tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _json(content: object) -> Response:
    return Response(json.dumps(content), media_type="application/json")


def _error(status: int, message: str) -> Response:
    headers = _RETRY if status in (429, 503) else None
    return Response(error_body(message), status, media_type="application/json", headers=headers)
