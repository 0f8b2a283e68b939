"""A server on Ray Serve: the front in this process, replicas of the engine in Ray's.

Ray places the replicas, restarts those that die, adds and removes some by load, and gives each request to one of them.
The front is not one of Ray's proxies: those answer in their own words when a replica dies or a request is too large.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dat_deploy.errors import DatDeployError, ServingError, UnsupportedError
from dat_deploy.runners import parse_engine
from dat_deploy.runners.base import available_cores
from dat_deploy.serving.engine_file import EngineFile, check_model_name, read_engine_file
from dat_deploy.serving.replica import Replica, Reply, ServedModel
from dat_deploy.serving.settings import ServeSettings
from dat_deploy.serving.tensors import TensorSpec, input_spec, output_specs
from dat_deploy.typed_json import plain

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from dat_deploy.serving.front import Front
    from dat_deploy.serving.metrics import Metrics

__all__ = ["serve"]

_log = logging.getLogger("dat_deploy.serving")

_DEPLOYMENT = "Replica"
_WATCH_S = 0.5  # between two looks at the replicas
_RAY_GONE_S = 30.0
_ENDING_S = 10.0  # of each of Ray's parts
_CLOSING_S = 1.0  # in which connections learn that they are to close, before no more are taken


def serve(settings: ServeSettings, *, progress: Callable[[str], None], note: Callable[[str], None]) -> None:
    """As `dat_deploy.serving.serve`, with settings that were read."""
    file, model = _served_model(settings)
    with _listening(settings) as listener:
        address = "http://{}:{}".format(*listener.getsockname()[:2])
        if file.note is not None:
            note(file.note)
        with _ray(settings, file, progress) as (threads, gpus), _own_application(model) as application:
            progress("opening the engine")
            _try_out(model, threads, gpus)
            handle = _deployed(settings, model, application, threads, gpus)

            def ready() -> None:
                progress("")
                note(f"{model.name} at {address}; stop it with Ctrl-C")

            asyncio.run(_answer(settings, model, file, application, handle, listener, ready))


def _served_model(settings: ServeSettings) -> tuple[EngineFile, ServedModel]:
    runtime, target = parse_engine(settings.engine)
    if runtime.target == "VARIANT":
        raise ServingError(
            f"'{settings.engine}' is no file; a server takes FILE.onnx, FILE.engine or FILE.pt2. "
            f"Export it with: dat-deploy export --variant {target} --output {target}.onnx"
        )
    file = read_engine_file(Path(target))
    name = settings.name or file.metadata.variant
    check_model_name(name)
    image, *outputs = (input_spec(file.metadata), *output_specs(file.metadata, file.outputs))
    free = [TensorSpec(spec.name, spec.datatype, (-1, *spec.shape[1:])) for spec in (image, *outputs)]
    most = settings.max_batch if file.profiles == () and file.metadata.batch is None else file.most_images or 1
    return file, ServedModel(
        name=name,
        engine=f"{runtime.name}:{Path(target).absolute()}",
        image=free[0],
        outputs=tuple(free[1:]),
        most_images=max(most, 1),
        most_pixels=settings.max_pixels,
    )


@contextlib.contextmanager
def _listening(settings: ServeSettings) -> Iterator[socket.socket]:
    """A socket on the port, before anything that takes time."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family, backlog=512)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
        raise ServingError(
            f"cannot listen on {settings.host}:{settings.port}: {reason}. Choose another --host or --port, or stop "
            f"what listens there."
        ) from error
    with listener:
        yield listener


@contextlib.contextmanager
def _ray(settings: ServeSettings, file: EngineFile, progress: Callable[[str], None]) -> Iterator[tuple[int, float]]:
    """Ray, started or joined; the threads and the GPUs of each replica."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if (
        settings.address is None and "RAY_AUTH_MODE" not in os.environ
    ):  # its ports are open to the network, and run code
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray
    from ray import serve as ray_serve

    progress("starting Ray")
    most = settings.max_replicas or settings.replicas
    threads = settings.threads or max(1, available_cores() // most)
    gpus = (1.0 if _runs_on_cuda(settings, file) else 0.0) if settings.gpus is None else settings.gpus
    place: dict[str, Any] = {"address": settings.address}
    if settings.address is None:  # the cores are shared, not counted: replicas are never left waiting for one
        place = {"address": "local", "num_cpus": most * threads + 1, "include_dashboard": False}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with _own_process_group():
            ray.init(**place, **quiet, namespace="serve")
    except (OSError, RuntimeError, ValueError) as error:
        where = settings.address or "this machine"
        raise ServingError(
            f"Ray does not start on {where}: {_line(error)} Look at its logs with: ray status"
        ) from error
    try:
        there = ray.cluster_resources().get("GPU", 0.0)
        if gpus * settings.replicas > there:
            raise UnsupportedError(
                f"{settings.engine} needs {gpus:g} GPU for each replica, {gpus * settings.replicas:g} in all, and Ray "
                f"sees {there:g}. Serve an ONNX file on the CPU, or give each replica a share with --gpus."
            )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        ray_serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        yield threads, gpus
    finally:
        _within(_ENDING_S, ray.shutdown)


@contextlib.contextmanager
def _own_application(model: ServedModel) -> Iterator[str]:
    """The name of this server's application on Ray; it is removed in the end.

    Raises:
        ServingError: if there is one already, of another server on the cluster.
    """
    from ray import serve as ray_serve

    name = f"dat-deploy-{model.name}"
    if name in ray_serve.status().applications:
        raise ServingError(f"the Ray cluster has a server of a model '{model.name}' already; choose another --name.")
    try:
        yield name
    finally:
        _within(_ENDING_S, lambda: ray_serve.delete(name))


def _within(seconds: float, ending: Callable[[], object]) -> None:
    """Call it, but do not wait longer: Ray may be what died."""

    def call() -> None:
        with contextlib.suppress(Exception):
            ending()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


@contextlib.contextmanager
def _own_process_group() -> Iterator[None]:
    """What is started meanwhile gets none of the signals to this process's group: it is to outlive the last request."""
    group = os.getpgrp()
    try:
        os.setpgid(0, 0)
    except PermissionError:  # the leader of a session, such as a container's first process
        yield
        return
    try:
        yield
    finally:
        os.setpgid(0, group)


def _runs_on_cuda(settings: ServeSettings, file: EngineFile) -> bool:
    runtime, _ = parse_engine(settings.engine)
    if file.passport is not None:
        return file.passport.architectures[:1] != ("cpu",)
    return runtime.name == "onnxruntime-cuda"


def _try_out(model: ServedModel, threads: int, gpus: float) -> None:
    """Open and run the engine once where a replica would, so that what is wrong with it is said in its own words."""
    import ray

    def open_once() -> None:
        Replica(model, threads=threads, wait_s=0)

    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_calls=1, max_retries=0)(open_once)
    try:
        ray.get(task.remote())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DatDeployError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise ServingError(f"opening {model.engine} ended its process: {_line(error)}") from error


def _deployed(
    settings: ServeSettings, model: ServedModel, application: str, threads: int, gpus: float
) -> "DeploymentHandle[Any]":
    from ray import serve as ray_serve

    options: dict[str, Any] = {
        "name": _DEPLOYMENT,
        "ray_actor_options": {"num_cpus": threads, "num_gpus": gpus},
        "max_ongoing_requests": max(settings.max_requests, 2 * model.most_images),
        "health_check_period_s": 2,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": settings.drain_s,
    }
    if settings.max_replicas is None:
        options["num_replicas"] = settings.replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": settings.replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_requests,
        }
    deployment = ray_serve.deployment(**options)(Replica)
    bound = deployment.bind(model, threads=threads, wait_s=settings.max_wait_ms / 1000)
    try:
        return ray_serve.run(bound, name=application, route_prefix=None)
    except RuntimeError as error:
        raise ServingError(f"the replicas do not start: {_line(error)}") from error


class _RayReplicas:
    """Those behind a handle."""

    def __init__(self, handle: "DeploymentHandle[Any]", metrics: "Metrics") -> None:
        self._handle, self._metrics = handle, metrics

    async def infer(self, body: bytes, header_length: str | None, seconds: float) -> Reply:
        return await self._ask("infer", body, header_length, seconds)

    async def classify(self, body: bytes, top: int, *, points: bool, seconds: float) -> Reply:
        return await self._ask("classify", body, top, points=points, seconds=seconds)

    async def _ask(self, method: str, *arguments: object, **named: object) -> Reply:
        """One replica's reply; if it dies meanwhile, that of another.

        Raises:
            RequestError: 503, if the second one dies too, or none can be reached.
        """
        from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
        from ray.serve.exceptions import RayServeException

        from dat_deploy.serving.protocol import RequestError

        for another in (True, False):
            response = getattr(self._handle, method).remote(*arguments, **named)
            try:
                reply: Reply = await response
                return reply
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RayTaskError:  # a bug of ours
                raise
            except (RayActorError, RayServeException, TaskCancelledError) as error:
                _log.warning("a replica died", extra={"reason": type(error).__name__})
                if another:
                    self._metrics.retries.inc()
        raise RequestError(503, "the engine's process died and is started anew; try again.")


async def _answer(
    settings: ServeSettings,
    model: ServedModel,
    file: EngineFile,
    application: str,
    handle: "DeploymentHandle[Any]",
    listener: socket.socket,
    ready: Callable[[], None],
) -> None:
    import uvicorn

    from dat_deploy.serving.front import Front
    from dat_deploy.serving.http import HEADER_LIMIT_BYTES, protocol_class
    from dat_deploy.serving.metrics import Metrics

    metrics = Metrics()
    front = Front(settings, model, _config(model, file), _RayReplicas(handle, metrics), metrics)
    server = uvicorn.Server(
        uvicorn.Config(
            front.app,
            http=protocol_class(settings.read_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=HEADER_LIMIT_BYTES,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        )
    )
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _log_json_lines()
    watching = asyncio.create_task(_watch(front, metrics, application, stop, ready))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_own_signals(server))
        answering = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.wait([asyncio.create_task(stop.wait()), answering], return_when=asyncio.FIRST_COMPLETED)
        _log.info("stopping", extra={"in_progress": front.in_progress})
        front.draining = True
        await asyncio.sleep(_CLOSING_S)
        server.should_exit = True
        await answering
    gone = watching.done() and watching.exception()
    watching.cancel()
    _log.info("stopped", extra={"in_progress": front.in_progress})
    if gone:
        raise gone


@contextlib.contextmanager
def _own_signals(server: Any) -> Iterator[None]:
    """Uvicorn takes no signals: it would close at once."""
    server.capture_signals = contextlib.nullcontext
    yield


async def _watch(
    front: "Front", metrics: "Metrics", application: str, stop: asyncio.Event, ready: Callable[[], None]
) -> None:
    """Keep the front's readiness, and call `ready` the first time; stop the server when Ray is gone for good.

    Raises:
        ServingError: then.
    """
    from ray import serve as ray_serve

    seen, told = time.monotonic(), False
    while True:
        running = 0
        try:
            status = await asyncio.to_thread(ray_serve.status)
            states = status.applications[application].deployments[_DEPLOYMENT].replica_states
            running, seen = states.get("RUNNING", 0), time.monotonic()
        except Exception as error:  # whatever Ray's parts raise when one of them is away
            _log.warning("Ray does not answer", extra={"reason": type(error).__name__})
            if time.monotonic() - seen > _RAY_GONE_S:
                stop.set()
                raise ServingError(f"Ray has not answered for {_RAY_GONE_S:g} s; start the server again.") from error
        if front.ready != (running > 0):
            _log.info("ready" if running else "not ready", extra={"replicas": running})
        front.ready = running > 0
        if running and not told:
            ready()
            told = True
        metrics.ready.set(front.ready and not front.draining)
        metrics.replicas.set(running)
        await asyncio.sleep(_WATCH_S)


def _config(model: ServedModel, file: EngineFile) -> dict[str, object]:
    """As Triton tells it, so that a client finds how to preprocess in one place on both."""
    return {
        "name": model.name,
        "backend": "dat-deploy",
        "max_batch_size": model.most_images,
        "input": [_config_tensor(model.image)],
        "output": [_config_tensor(output) for output in model.outputs],
        "parameters": {"dat_deploy.preprocessing": {"string_value": json.dumps(plain(file.metadata.preprocessing))}},
    }


def _config_tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape[1:])}


class _JsonLines(logging.Formatter):
    _usual = frozenset({*vars(logging.makeLogRecord({})), "message", "taskName", "_ray_timestamp_ns"})

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        entry |= {name: value for name, value in vars(record).items() if name not in self._usual}
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _log_json_lines() -> None:
    """One JSON object a line on stderr, of our own and of uvicorn's errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name, level in (("dat_deploy.serving", logging.INFO), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
