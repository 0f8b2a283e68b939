"""A server on Ray Serve: the front in this process, replicas of the engine in Ray's.

Ray places the replicas, restarts those that die, adds and removes some by load, and gives each request to one of them.
The front is not one of Ray's proxies: those answer in their own words when a replica dies or a request is too large.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dat_deploy.engine.passport import sha256
from dat_deploy.environment import available_cores, tool_version
from dat_deploy.errors import DatDeployError, ServingError, UnsupportedError
from dat_deploy.progress import Progress
from dat_deploy.runners import parse_engine
from dat_deploy.serving.engine_file import EngineFile, check_model_name, read_engine_file
from dat_deploy.serving.own.replica import Replica, Reply, ServedModel
from dat_deploy.serving.own.settings import ServeSettings
from dat_deploy.serving.tensors import TensorSpec, input_spec, output_specs
from dat_deploy.typed_json import plain

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from dat_deploy.serving.own.metrics import Metrics

__all__ = ["serve"]

_log = logging.getLogger("dat_deploy.serving")

_DEPLOYMENT = "Replica"
_WATCH_S = 0.5  # between two looks at the replicas
_RAY_LATE_S = 5.0  # without an answer, after which replicas count as lost
_RAY_GONE_S = 30.0  # after which the server ends; Ray itself would end it, undrained, after 60
_ENDING_S = 10.0  # of each of Ray's parts
_START_S = 900.0  # of one replica, nodes that are added for it included
_USUAL_BATCH = 16  # of an engine without a limit


def serve(settings: ServeSettings, *, progress: Progress, note: Callable[[str], None]) -> None:
    """As `dat_deploy.serving.serve`, with settings that were read."""
    file, model = _served_model(settings)
    with _listening(settings) as listener:
        address = "http://{}:{}".format(*listener.getsockname()[:2])
        if file.note is not None:
            note(file.note)
        with _ray(settings, file, progress) as (threads, gpus), _own_application(settings, model) as application:
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
            f"Export it with: `export(variant={target!r}, output={f'{target}.onnx'!r})`"
        )
    file = read_engine_file(Path(target))
    name = settings.name or file.metadata.variant
    check_model_name(name)
    image, *outputs = (input_spec(file.metadata), *output_specs(file.metadata, file.outputs))
    free = [TensorSpec(spec.name, spec.datatype, (-1, *spec.shape[1:])) for spec in (image, *outputs)]
    limits = [limit for limit in (settings.max_batch, file.most_images) if limit is not None]
    return dataclasses.replace(file, content=b""), ServedModel(
        name=name,
        engine=f"{runtime.name}:{Path(target).absolute()}",
        sha256=sha256(file.content),
        image=free[0],
        outputs=tuple(free[1:]),
        most_images=min(limits, default=_USUAL_BATCH),
        most_pixels=settings.max_pixels,
        most_call_pixels=settings.max_call_pixels,
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
            f"cannot listen on {settings.host}:{settings.port}: {reason}. Choose another `host` or `port`, or stop "
            f"what listens there."
        ) from error
    with listener:
        yield listener


@contextlib.contextmanager
def _ray(settings: ServeSettings, file: EngineFile, progress: Progress) -> Iterator[tuple[int, float]]:
    """Ray, started or joined; the threads and the GPUs of each replica."""
    variables = ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    before = {name: os.environ.get(name) for name in variables}
    try:
        yield from _started(settings, file, progress)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _started(settings: ServeSettings, file: EngineFile, progress: Progress) -> Iterator[tuple[int, float]]:
    """As `_ray`; what Ray reads of the environment is left there."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ours = settings.address is None
    if ours and "RAY_AUTH_MODE" not in os.environ:  # Ray's ports run code, and the network reaches them
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray
    from ray import serve as ray_serve

    progress("starting Ray")
    most = settings.max_replicas or settings.replicas
    threads = settings.threads or max(1, available_cores() // most)
    gpus = (1.0 if _runs_on_cuda(settings, file) else 0.0) if settings.gpus is None else settings.gpus
    folder = tempfile.TemporaryDirectory(prefix="dat-deploy-", ignore_cleanup_errors=True)  # of Ray's logs and sockets
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if settings.address is not None:
            _check_reachable(settings.address)
            place: dict[str, Any] = {"address": settings.address}
        else:  # the cores are shared, not counted: replicas are never left waiting for one
            place = {"address": "local", "num_cpus": most * threads + 1, "_temp_dir": folder.name}
            place["include_dashboard"] = False
        try:
            ray.init(**place, namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            where = "starts on this machine" if ours else f"answers at {settings.address}"
            raise ServingError(f"no Ray {where}: {_line(error)}") from error
        for number, handler in handlers.items():  # Ray has set its own
            signal.signal(number, handler)
        there = ray.cluster_resources().get("GPU", 0.0)
        if gpus * settings.replicas > there:
            raise UnsupportedError(
                f"{settings.engine} needs {gpus:g} GPU for each replica, {gpus * settings.replicas:g} in all, and Ray "
                f"sees {there:g}. Serve an ONNX file on the CPU, or give each replica a share with `gpus`."
            )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        ray_serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        yield threads, gpus
    finally:
        _within(_ENDING_S, ray.shutdown)
        folder.cleanup()


def _check_reachable(address: str) -> None:
    """Raises ServingError where Ray itself would wait for minutes."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    try:
        if not (colon and port.isdigit()):
            raise OSError("it takes HOST:PORT, or auto for this machine's")
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ServingError(
            f"no Ray cluster at `address={address!r}`: {error}. Start one with: ray start --head"
        ) from error


@contextlib.contextmanager
def _own_application(settings: ServeSettings, model: ServedModel) -> Iterator[str]:
    """The name of this server's application on Ray; it is removed in the end.

    Raises:
        ServingError: if there is one already, of another server on the cluster, and it is not to be replaced.
    """
    from ray import serve as ray_serve

    name = f"dat-deploy-{model.name}"
    if name in ray_serve.status().applications:
        if settings.force:
            ray_serve.delete(name)  # first, for the place that its replicas take
        else:
            raise ServingError(
                f"the Ray cluster has a server of a model '{model.name}' already; choose another `name`, or pass "
                f"`force=True` to take its place, such as after it was killed."
            )
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


def _runs_on_cuda(settings: ServeSettings, file: EngineFile) -> bool:
    runtime, _ = parse_engine(settings.engine)
    if file.passport is not None:
        return file.passport.architectures[:1] != ("cpu",)
    return runtime.device == "cuda"


def _try_out(model: ServedModel, threads: int, gpus: float) -> None:
    """Open and run the engine once where a replica would, so that what is wrong with it is said in its own words."""
    import ray

    def open_once() -> None:
        Replica(model, threads=threads, wait_s=0)

    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_calls=1, max_retries=0)(open_once)
    try:
        ray.get(task.remote(), timeout=_START_S)
    except ray.exceptions.GetTimeoutError as error:
        free = ", ".join(
            f"{count:g} {name}" for name, count in ray.available_resources().items() if name in ("CPU", "GPU")
        )
        raise ServingError(
            f"no replica started within {_START_S:g} s; each needs {threads} CPU and {gpus:g} GPU, and Ray has "
            f"{free or 'none'} free. Give it less with `threads` and `gpus`, or free some."
        ) from error
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
    stuck_s = 6 * settings.timeout_s
    bound = deployment.bind(model, threads=threads, wait_s=settings.max_wait_ms / 1000, stuck_s=stuck_s)
    try:
        return ray_serve.run(bound, name=application, route_prefix=None)
    except RuntimeError as error:
        raise ServingError(f"the replicas do not start: {_line(error)}") from error


class _RayReplicas:
    """Those behind a handle."""

    def __init__(self, handle: "DeploymentHandle[Any]", metrics: "Metrics") -> None:
        self._handle, self._metrics = handle, metrics

    async def infer(self, body: bytes, header_length: str | None, seconds: float) -> Reply:
        return await self._ask("infer", seconds, body, header_length)

    async def classify(self, body: bytes, top: int, *, points: bool, seconds: float) -> Reply:
        return await self._ask("classify", seconds, body, top, points=points)

    async def _ask(self, method: str, seconds: float, *arguments: object, **keywords: object) -> Reply:
        """One replica's reply; if it dies meanwhile, that of another.

        Raises:
            RequestError: 503, if the second one dies too, or none can be reached.
        """
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        from dat_deploy.serving.own.protocol import RequestError

        end = time.monotonic() + seconds
        for another in (True, False):
            response = getattr(self._handle, method).remote(*arguments, **keywords, seconds=end - time.monotonic())
            try:
                reply: Reply = await response
                return reply
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RayTaskError:  # a bug of ours
                raise
            except (RayError, RayServeException) as error:
                _log.warning("a replica was lost", extra={"reason": type(error).__name__})
                if another:
                    self._metrics.retries.inc()
        raise RequestError(503, "the engine's process died and is started anew; try again.")


class _Watch(threading.Thread):
    """How many replicas run, looked up again and again; in a thread of its own, since Ray may never answer."""

    def __init__(self, application: str) -> None:
        super().__init__(daemon=True)
        self._application = application
        self.replicas, self.seen = 0, time.monotonic()

    def run(self) -> None:
        from ray import serve as ray_serve

        while True:
            with contextlib.suppress(Exception):  # whatever Ray's parts raise when one of them is away
                states = ray_serve.status().applications[self._application].deployments[_DEPLOYMENT].replica_states
                self.replicas, self.seen = states.get("RUNNING", 0), time.monotonic()
            time.sleep(_WATCH_S)


async def _answer(
    settings: ServeSettings,
    model: ServedModel,
    file: EngineFile,
    application: str,
    handle: "DeploymentHandle[Any]",
    listener: socket.socket,
    ready: Callable[[], None],
) -> None:
    """Until a signal, or until Ray is gone; `ready` is called when requests are taken.

    Raises:
        ServingError: if Ray is gone.
    """
    import uvicorn

    from dat_deploy.serving.own.front import Front
    from dat_deploy.serving.own.http import HEADER_LIMIT_BYTES, protocol_class
    from dat_deploy.serving.own.metrics import Metrics

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
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]  # it would close the port at once
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:
        loop.add_signal_handler(number, stop.set)
    _log_json_lines()
    facts = {"model": model.name, "engine": model.engine, "sha256": model.sha256, "version": tool_version()}
    _log.info("starting", extra=facts | {"settings": settings.model_dump()})
    watch = _Watch(application)
    watch.start()
    answering = asyncio.create_task(server.serve(sockets=[listener]))
    is_first, replicas, age_s = True, 0, 0.0
    while not stop.is_set() and not answering.done() and age_s < _RAY_GONE_S:
        age_s = time.monotonic() - watch.seen
        running = watch.replicas if age_s < _RAY_LATE_S else 0
        if running != replicas:
            event = "replica started" if running > replicas else "replica ended"
            _log.info(event, extra={"replicas": running, "ray_silent_s": round(age_s)})
        replicas, front.ready = running, running > 0
        metrics.ready.set(front.ready)
        metrics.replicas.set(running)
        if front.ready and is_first:
            ready()
            is_first = False
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _WATCH_S)
    _log.info("stopping", extra={"in_progress": front.in_progress})
    front.draining = True
    metrics.ready.set(False)
    await asyncio.sleep(settings.closing_s)
    server.should_exit = True
    await answering
    for number, handler in handlers.items():  # asyncio would leave those of the system
        loop.remove_signal_handler(number)
        signal.signal(number, handler)
    _log.info("stopped", extra={"in_progress": front.in_progress})
    if age_s >= _RAY_GONE_S:
        raise ServingError(f"Ray has not answered for {_RAY_GONE_S:g} s; start the server again.")


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

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
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
