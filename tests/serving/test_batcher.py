"""What arrives while the engine is busy goes into its next call together, and nobody waits in vain."""

import asyncio
import time
from collections.abc import Sequence

import pytest

from dat_deploy.serving.own.batcher import Batcher, Job

Calls = list[list[str]]


def collected(calls: Calls, seconds: float = 0.2, *, most: int = 4, wait_s: float = 0.0) -> Batcher[str, str]:
    async def run(jobs: Sequence[Job[str, str]]) -> list[str]:
        calls.append([job.work for job in jobs])
        await asyncio.sleep(seconds)
        return [job.work.upper() for job in jobs]

    return Batcher(run, most=most, wait_s=wait_s)


async def submit(batcher: Batcher[str, str], work: str, images: int = 1, key: int = 0, seconds: float = 9) -> str:
    return await batcher.submit(work, images=images, key=key, deadline=time.monotonic() + seconds)


def test_what_arrives_while_the_engine_is_busy_goes_together():
    calls: Calls = []

    async def play() -> list[str]:
        batcher = collected(calls)
        first = asyncio.create_task(submit(batcher, "a"))
        await asyncio.sleep(0.005)
        return [await first, *await asyncio.gather(*(submit(batcher, letter) for letter in "bcdefg"))]

    assert asyncio.run(play()) == list("ABCDEFG")
    assert calls == [["a"], ["b", "c", "d", "e"], ["f", "g"]]


def test_no_call_has_more_images_than_the_engine_takes_and_nothing_starves():
    calls: Calls = []

    async def play() -> None:
        batcher = collected(calls)
        await asyncio.gather(
            *(submit(batcher, name, images) for name, images in [("a", 1), ("b3", 3), ("c2", 2), ("d", 1)])
        )

    asyncio.run(play())
    assert calls == [["a", "b3"], ["c2", "d"]]


def test_an_idle_engine_waits_for_others_only_so_long():
    calls: Calls = []

    async def play() -> float:
        batcher = collected(calls, 0, wait_s=0.05)
        started = time.monotonic()
        await asyncio.gather(submit(batcher, "a"), submit(batcher, "b"))
        return time.monotonic() - started

    assert 0.045 < asyncio.run(play()) < 2
    assert calls == [["a", "b"]]


def test_a_full_batch_waits_for_nobody():
    calls: Calls = []

    async def play() -> None:
        batcher = collected(calls, 0, most=2, wait_s=60)
        await asyncio.wait_for(asyncio.gather(submit(batcher, "a"), submit(batcher, "b")), 5)

    asyncio.run(play())
    assert calls == [["a", "b"]]


def test_images_of_two_sizes_are_not_mixed():
    calls: Calls = []

    async def play() -> None:
        batcher = collected(calls)
        await asyncio.gather(*(submit(batcher, name, key=key) for name, key in [("a", 1), ("b", 2), ("c", 1)]))

    asyncio.run(play())
    assert calls == [["a", "c"], ["b"]]


def test_what_nobody_waits_for_any_more_is_not_run():
    calls: Calls = []

    async def play() -> None:
        batcher = collected(calls, 0.3)
        first = asyncio.create_task(submit(batcher, "a"))
        await asyncio.sleep(0.005)
        late = asyncio.create_task(submit(batcher, "late", seconds=0.01))
        gone = asyncio.create_task(submit(batcher, "gone"))
        last = asyncio.create_task(submit(batcher, "b"))
        await asyncio.sleep(0.005)
        gone.cancel()
        assert await first == "A"
        assert await last == "B"
        with pytest.raises(TimeoutError):
            await late

    asyncio.run(play())
    assert calls == [["a"], ["b"]]


def test_a_call_that_fails_fails_its_requests_alone():
    async def run(jobs: Sequence[Job[str, str]]) -> list[str]:
        if jobs[0].work == "bad":
            raise ValueError("of the engine")
        return [job.work for job in jobs]

    async def play() -> None:
        batcher: Batcher[str, str] = Batcher(run, most=1, wait_s=0)
        bad, good = await asyncio.gather(submit(batcher, "bad"), submit(batcher, "good"), return_exceptions=True)
        assert isinstance(bad, ValueError)
        assert good == "good"

    asyncio.run(play())
