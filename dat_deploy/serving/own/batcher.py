"""Dynamic batching: what arrives while the engine is busy goes into its next call together.

Ray Serve's own `serve.batch` closes a batch when its wait is over, busy engine or not, so that a loaded engine is left
with a queue of small batches. Here a batch is closed when the engine is free for it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["Batcher", "Job"]

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass
class Job(Generic[Work, Result]):
    """One request's share of a batch.

    Attributes:
        images: how many; key: only jobs of one key go together, such as of one image size.
        deadline: of `time.monotonic`, after which nobody waits for it any more.
    """

    work: Work
    images: int
    key: Hashable
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    future: "asyncio.Future[Result]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher(Generic[Work, Result]):
    """Calls `run` with batches of jobs, one call at a time, the oldest first.

    Args:
        run: gives a result for each job, in their order; what it raises, each of them gets.
        most: images in a batch.
        wait_s: how long a job waits for others while the engine is free.
    """

    def __init__(
        self, run: Callable[[Sequence[Job[Work, Result]]], Awaitable[Sequence[Result]]], *, most: int, wait_s: float
    ) -> None:
        self._run, self._most, self._wait_s = run, most, wait_s
        self._waiting: deque[Job[Work, Result]] = deque()
        self._arrived = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None

    @property
    def broken(self) -> bool:
        """Whether nothing is run any more, for a bug."""
        return self._loop_task is not None and self._loop_task.done()

    async def submit(self, work: Work, *, images: int, key: Hashable, deadline: float) -> Result:
        """The result of `run` for this work.

        Raises:
            TimeoutError: if its turn does not come before the deadline; it is not run then.
        """
        if self._loop_task is None:
            self._loop_task = asyncio.get_running_loop().create_task(self._work())
        job: Job[Work, Result] = Job(work, images, key, deadline)
        self._waiting.append(job)
        self._arrived.set()
        return await job.future

    async def _work(self) -> None:
        while True:
            self._arrived.clear()
            if not self._waiting:
                await self._arrived.wait()
                continue
            rest = self._waiting[0].arrived + self._wait_s - time.monotonic()
            if rest > 0 and sum(job.images for job in self._matching()) < self._most:
                try:
                    await asyncio.wait_for(self._arrived.wait(), rest)
                    continue
                except TimeoutError:
                    pass
            jobs = self._take()
            if jobs:
                await self._finish(jobs)

    def _matching(self) -> list[Job[Work, Result]]:
        """The oldest job and those that fit into its batch, in their order."""
        jobs: list[Job[Work, Result]] = []
        images = 0
        for job in self._waiting:
            if job.key == self._waiting[0].key and (not jobs or images + job.images <= self._most):
                jobs.append(job)
                images += job.images
            if images >= self._most:
                break
        return jobs

    def _take(self) -> list[Job[Work, Result]]:
        """The next batch, without those that nobody waits for."""
        now = time.monotonic()
        for job in [job for job in self._waiting if job.future.done() or job.deadline <= now]:
            self._waiting.remove(job)
            if not job.future.done():
                job.future.set_exception(TimeoutError())
        if not self._waiting:
            return []
        jobs = self._matching()
        for job in jobs:
            self._waiting.remove(job)
        return jobs

    async def _finish(self, jobs: Sequence[Job[Work, Result]]) -> None:
        try:
            for job, result in zip(jobs, await self._run(jobs), strict=True):
                if not job.future.done():
                    job.future.set_result(result)
        except Exception as error:
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)
