"""One copy of an engine behind a server: request bodies in, answers out, what waits together in one call of the engine.

Ray Serve runs it in a process of its own, so that neither a body nor an image that brings its reader down takes more
with it than this copy. Nothing here imports Ray.
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dat_deploy.engine.passport import sha256
from dat_deploy.errors import EngineRunError, ImageError, PassportError, ShapeError, VerificationError
from dat_deploy.images.labels import top_k
from dat_deploy.images.preprocess import image_from_bytes, preprocess
from dat_deploy.networks.sampling import SampledBlock
from dat_deploy.runners import EngineDescription, Outputs, engine_path, open_runner
from dat_deploy.serving.engine_file import read_engine_file
from dat_deploy.serving.own.batcher import Batcher, Job
from dat_deploy.serving.own.protocol import RequestError, error_body, infer_response, parse_infer
from dat_deploy.serving.tensors import TensorSpec

__all__ = ["MODEL_VERSION", "Call", "Replica", "Reply", "ServedModel"]

MODEL_VERSION = "1"
Found = TypeVar("Found")


@dataclass(frozen=True)
class ServedModel:
    """What is served.

    Attributes:
        name: in addresses; engine: as `open_runner` takes it, and the `sha256` of its file.
        image, outputs: its tensors, with a free batch.
        most_images: in one request and in one call of the engine.
        most_pixels: of an image that is decoded.
        most_call_pixels: in one call of the engine, if it takes images of any size.
    """

    name: str
    engine: str
    sha256: str
    image: TensorSpec
    outputs: tuple[TensorSpec, ...]
    most_images: int
    most_pixels: int
    most_call_pixels: int


@dataclass(frozen=True)
class Call:
    """One call of the engine: how many images were in it, of which `padding` belong to nobody, and its seconds."""

    images: int
    padding: int
    seconds: float


@dataclass(frozen=True)
class Reply:
    """An HTTP answer, and what became of the request on its way.

    Attributes:
        images: of the request; prepare_s: reading and preprocessing; queue_s: waiting for the engine.
        calls: those of the engine that this request reports; of several requests in one call, the first does.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    images: int = 0
    prepare_s: float = 0.0
    queue_s: float = 0.0
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class _Answer:
    """Of the engine, to one request."""

    outputs: Outputs
    queue_s: float
    calls: tuple[Call, ...]


class Replica:
    """An opened engine that answers requests.

    Args:
        threads: of one call of the engine.
        wait_s: how long a request waits for others while the engine is free.
        stuck_s: after which a call of the engine, or the reading of a request, is taken to never end.

    Raises:
        PassportError: if the engine's file is not the one that the server was started with.
        DatDeployError: if the engine may not be served here, cannot be opened, or cannot be run.
    """

    def __init__(self, model: ServedModel, *, threads: int | None, wait_s: float, stuck_s: float = 60) -> None:
        path = engine_path(model.engine)
        assert path is not None  # `serve` has refused what is no file
        if sha256(read_engine_file(path).content) != model.sha256:
            raise PassportError(f"{path} is not the file that the server was started with; start the server again.")
        self._model, self._stuck_s = model, stuck_s
        self._started: dict[int, float] = {}  # of what the threads work on now
        self._runner = open_runner(model.engine, threads=threads)
        self._names = self.about.network.answer.class_names
        self._batcher: Batcher[NDArray[np.float32], _Answer] = Batcher(self._run, most=model.most_images, wait_s=wait_s)
        self._readers = ThreadPoolExecutor(2, "reader")
        self._engine = ThreadPoolExecutor(1, "engine")
        self._failure = ""
        for images in {1, model.most_images}:  # memory and kernels are there before the first request
            self._call(np.zeros((images, 3, *self.about.image_size), np.float32))

    @property
    def about(self) -> EngineDescription:
        return self._runner.description

    async def infer(self, body: bytes, header_length: str | None, seconds: float) -> Reply:
        """The answer to an inference request of the protocol, see `parse_infer`; nobody waits longer than `seconds`."""
        try:
            return await self._infer(body, header_length, time.monotonic() + seconds)
        except RequestError as error:
            return Reply(error.status, error_body(str(error)))

    async def classify(self, body: bytes, top: int, *, points: bool, seconds: float) -> Reply:
        """The `top` classes of the image in `body`, and on request the points that the network sampled, as JSON."""
        try:
            return await self._classify(body, top, points, time.monotonic() + seconds)
        except RequestError as error:
            return Reply(error.status, error_body(str(error)))

    def check_health(self) -> None:
        """Ray asks; what raises is replaced."""
        oldest = min(self._started.copy().values(), default=time.monotonic())
        if self._failure or self._batcher.broken or time.monotonic() - oldest > self._stuck_s:
            raise RuntimeError(self._failure or f"a thread has worked on one thing for {self._stuck_s:g} s")

    async def _in(self, threads: ThreadPoolExecutor, work: Callable[[], Found]) -> Found:
        """What `work` gives, called in one of the threads; `check_health` sees when it does not end."""

        def watched() -> Found:
            number = threading.get_ident()
            self._started[number] = time.monotonic()
            try:
                return work()
            finally:
                del self._started[number]

        return await asyncio.get_running_loop().run_in_executor(threads, watched)

    async def _infer(self, body: bytes, header_length: str | None, deadline: float) -> Reply:
        model, started = self._model, time.monotonic()
        request = await self._in(
            self._readers,
            lambda: parse_infer(body, header_length, model.image, model.outputs, most=model.most_images),
        )
        self._check_size(*request.images_nchw.shape)
        prepare_s = time.monotonic() - started
        answer = await self._submit(request.images_nchw, deadline)
        content, headers = await self._in(
            self._readers,
            lambda: infer_response(model.name, MODEL_VERSION, request, answer.outputs, self._names),
        )
        return Reply(200, content, headers, len(request.images_nchw), prepare_s, answer.queue_s, answer.calls)

    async def _classify(self, body: bytes, top: int, points: bool, deadline: float) -> Reply:
        if "logits" not in self.about.outputs:
            raise RequestError(
                400, f"{self._model.name} is a backbone and gives no classes; use /v2/models for its maps."
            )
        if points and not self._blocks:
            raise RequestError(
                400, f"{self._model.name} gives no sampled points. Export it with `sampling_locations=True` for them."
            )
        started = time.monotonic()
        try:
            image_nchw, size = await self._in(self._readers, lambda: self._read(body))
        except ImageError as error:
            raise RequestError(400, str(error)) from None
        prepare_s = time.monotonic() - started
        answer = await self._submit(image_nchw, deadline)
        try:
            best = top_k(answer.outputs["logits"], self._names, top)[0]
        except VerificationError as error:
            raise RequestError(400, str(error)) from None
        rule = self.about.preprocessing
        content = {
            "model_name": self._model.name,
            "model_version": MODEL_VERSION,
            "image": {"width": size[0], "height": size[1]},
            "predictions": [{"index": i, "name": name, "probability": share} for i, name, share in best],
            "preprocessing": {"resize_size": rule.resize_size, "image_size": rule.image_size},
        }
        if points:
            content["sampled_points"] = [_points(answer.outputs, block) for block in self._blocks]
        headers = {"content-type": "application/json"}
        return Reply(200, json.dumps(content).encode(), headers, 1, prepare_s, answer.queue_s, answer.calls)

    @property
    def _blocks(self) -> list[SampledBlock]:
        """Those whose points the engine gives."""
        return [block for block in self.about.network.sampled_blocks if block.locations in self.about.outputs]

    def _read(self, body: bytes) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """The image in `body` as the network takes it, [1, 3, H, W], and its own (width, height)."""
        image = image_from_bytes(body, "in the body", most_pixels=self._model.most_pixels)
        return preprocess(image, self.about.preprocessing)[None], image.size

    def _check_size(self, images: int, _: int, height: int, width: int) -> None:
        if self.about.dynamic_image_size and images * height * width > self._model.most_call_pixels:
            raise RequestError(
                400,
                f"input '{self._model.image.name}' has {images} images of {height}x{width}; all of a request may have "
                f"{self._model.most_call_pixels} pixels. Send smaller ones, or fewer at once.",
            )
        try:
            self.about.at_image_size(height, width)
        except ShapeError as error:
            raise RequestError(400, str(error)) from None

    async def _submit(self, images_nchw: NDArray[np.float32], deadline: float) -> _Answer:
        try:
            return await self._batcher.submit(
                images_nchw, images=len(images_nchw), key=images_nchw.shape[2:], deadline=deadline
            )
        except TimeoutError:
            raise RequestError(503, "the engine did not come to this request in time; try again later.") from None
        except ShapeError as error:
            raise RequestError(400, str(error)) from None
        except EngineRunError as error:
            self._failure = str(error)
            raise RequestError(503, "the engine failed and is started anew; try again.") from None

    async def _run(self, jobs: Sequence[Job[NDArray[np.float32], _Answer]]) -> list[_Answer]:
        started = time.monotonic()
        images = jobs[0].work if len(jobs) == 1 else np.concatenate([job.work for job in jobs])
        outputs, calls = await self._in(self._engine, lambda: self._call(images))
        ends = np.cumsum([job.images for job in jobs])
        return [
            _Answer(
                {name: values[end - job.images : end] for name, values in outputs.items()},
                started - job.arrived,
                calls if job is jobs[0] else (),
            )
            for job, end in zip(jobs, ends, strict=True)
        ]

    def _call(self, images_nchw: NDArray[np.float32]) -> tuple[Outputs, tuple[Call, ...]]:
        """The outputs for any number of images, in batches that the engine takes."""
        parts, calls = [], []
        first, most = 0, len(images_nchw)
        if self.about.dynamic_image_size:
            most = max(1, self._model.most_call_pixels // (images_nchw.shape[2] * images_nchw.shape[3]))
        while first < len(images_nchw):
            size = self.about.next_batch(min(most, len(images_nchw) - first))
            part = images_nchw[first : first + size]
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            started = time.monotonic()
            outputs = self._runner.outputs(padded)
            calls.append(Call(len(part), size - len(part), time.monotonic() - started))
            parts.append({name: values[: len(part)] for name, values in outputs.items()})
            first += size
        whole = parts[0] if len(parts) == 1 else {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        return whole, tuple(calls)


def _points(outputs: Outputs, block: SampledBlock) -> dict[str, object]:
    """Of one block, for the first image: [G, Ns, 2] in pixels of the network's input (y, x); [G, Ns] attention."""
    locations, attention = outputs[block.locations][0], outputs[block.attention][0]
    if not (np.isfinite(locations).all() and np.isfinite(attention).all()):
        raise RequestError(400, "the sampled points hold NaN or infinity for this image; ask without points.")
    return {
        "stage": block.stage,
        "block": block.block,
        "points": block.pixels(locations).reshape(block.groups, -1, 2).round(2).tolist(),
        "attention": attention.reshape(block.groups, -1).round(6).tolist(),
    }
