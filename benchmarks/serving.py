"""The server under load on a machine without a GPU: how much it takes, and what becomes of requests beyond that.

    python benchmarks/serving.py [--engine FILE.onnx | --variant tiny] [--seconds 600]

One server with its usual settings, and in this process a client that sends photographs to POST /v1/classify, each
request on time whether or not the one before was answered. In turns: as fast as answers come, for the maximum; 80 % of
it for `--seconds`; three times it; half of it while a replica is killed; half of it while the server is stopped.
Writes benchmarks/results/serving/DATE-MODEL.json and .md. The client takes part of the machine, too.
"""

import argparse
import asyncio
import collections
import dataclasses
import datetime
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
from server_process import ServerProcess

from dat_deploy.environment import commit, hardware, versions
from dat_deploy.export import export
from dat_deploy.images.photographs import photographs

RESULTS = Path(__file__).parent / "results" / "serving"
CLIENTS = 32  # that ask for the maximum
LATE_S = 60  # after which a request counts as never answered


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one request: when it was due, after how long it ended, and its HTTP status, or what went wrong."""

    due: float
    seconds: float
    outcome: str


class Load:
    """A client of one server."""

    def __init__(self, port: int, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._address = f"http://127.0.0.1:{port}"
        self._bodies = [path.read_bytes() for path in photographs()]
        self._sent = 0

    async def ask(self, due: float) -> Result:
        self._sent += 1
        body = self._bodies[self._sent % len(self._bodies)]
        try:
            async with self._session.post(f"{self._address}/v1/classify", data=body) as answer:
                await answer.read()
                outcome = str(answer.status)
        except aiohttp.ClientConnectorError:
            outcome = "refused"  # no connection, so no request
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome = type(error).__name__
        return Result(due, time.monotonic() - due, outcome)

    async def as_fast_as_answered(self, seconds: float) -> float:
        """Answers a second."""
        end, done = time.monotonic() + seconds, 0

        async def one() -> None:
            nonlocal done
            while time.monotonic() < end:
                result = await self.ask(time.monotonic())
                done += result.outcome == "200"

        await asyncio.gather(*(one() for _ in range(CLIENTS)))
        return done / seconds

    async def at_rate(self, rate: float, seconds: float) -> list[Result]:
        """Requests on time, answered or not."""
        started = time.monotonic()
        tasks = []
        for i in range(int(rate * seconds)):
            due = started + i / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(self.ask(due)))
        return await asyncio.gather(*tasks)

    async def metric(self, name: str) -> float:
        async with self._session.get(f"{self._address}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return float(next(line.split()[1] for line in lines if line.split(" ")[0] == name))


def summary(results: list[Result]) -> dict[str, object]:
    good = sorted(result.seconds for result in results if result.outcome == "200")
    found: dict[str, object] = {
        "requests": len(results),
        "outcomes": dict(collections.Counter(result.outcome for result in results)),
        "longest_s": round(max(result.seconds for result in results), 3),
    }
    for share in (50, 90, 99):
        found[f"p{share}_ms"] = round(1000 * good[min(len(good) - 1, len(good) * share // 100)], 1) if good else None
    return found


def resident_mib(server: ServerProcess) -> dict[str, float]:
    """Of the front, the replicas, and all of the server's processes together."""
    sizes = {}
    for pid, words in server.processes().items():
        status = Path(f"/proc/{pid}/status").read_text()
        line = next((line for line in status.splitlines() if line.startswith("VmRSS")), "VmRSS: 0 kB")
        sizes[pid, b"ServeReplica" in words] = int(line.split()[1]) / 1024
    return {
        "front": next(size for (pid, _), size in sizes.items() if pid == server.process.pid),
        "replicas": sum(size for (_, replica), size in sizes.items() if replica),
        "all": sum(sizes.values()),
    }


async def watched(server: ServerProcess, seconds: float) -> list[dict[str, float]]:
    """Resident memory, every five seconds."""
    rows, started = [], time.monotonic()
    while time.monotonic() < started + seconds:
        rows.append({"second": round(time.monotonic() - started)} | await asyncio.to_thread(resident_mib, server))
        await asyncio.sleep(5)
    return rows


def growth(rows: list[dict[str, float]], part: str) -> float | None:
    """In percent, from the minute after the second to the last minute; None of a run too short for that."""
    last = rows[-1]["second"]
    if last < 240:
        return None
    before = statistics.mean(row[part] for row in rows if 120 <= row["second"] < 180)
    after = statistics.mean(row[part] for row in rows if row["second"] >= last - 60)
    return round(100 * (after / before - 1), 2)


async def measure(server: ServerProcess, seconds: float) -> dict[str, object]:
    timeout = aiohttp.ClientTimeout(total=LATE_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        load = Load(server.port, session)
        await load.as_fast_as_answered(5)
        most = await load.as_fast_as_answered(20)
        say(f"maximum: {most:.1f} requests/s")
        calls, images = await load.metric("dat_deploy_batch_images_count"), await load.metric("dat_deploy_images_total")
        watching = asyncio.create_task(watched(server, seconds))
        steady = await load.at_rate(0.8 * most, seconds)
        memory = await watching
        calls = await load.metric("dat_deploy_batch_images_count") - calls
        images = await load.metric("dat_deploy_images_total") - images
        found = {
            "requests_per_s": round(most, 1),
            "steady": summary(steady)
            | {"rate": round(0.8 * most, 1), "seconds": seconds, "images_a_call": round(images / calls, 2)}
            | {f"growth_{part}_percent": growth(memory, part) for part in ("front", "replicas", "all")},
            "memory_mib": [{name: round(value, 1) for name, value in row.items()} for row in memory],
        }
        say(f"steady: {found['steady']}")
        overload = await load.at_rate(3 * most, 60)
        usual_s = found["steady"]["p99_ms"] / 1000
        found["overload"] = summary(overload) | {
            "rate": round(3 * most, 1),
            "recovered_s": round(await good_again(load, usual_s) - overload[-1].due, 2),
        }
        say(f"overload: {found['overload']}")
        found["killed"] = await killed(server, load, 0.5 * most)
        say(f"killed: {found['killed']}")
        asking = asyncio.create_task(load.at_rate(0.5 * most, 10))
        await asyncio.sleep(5)
        server.process.send_signal(signal.SIGTERM)
        found["stopped"] = summary(await asking) | {"rate": round(0.5 * most, 1)}
        await asyncio.to_thread(server.process.communicate, timeout=60)
        say(f"stopped: {found['stopped']}")
    return found


async def good_again(load: Load, usual_s: float) -> float:
    """When ten requests in a row began to be answered, none slower than the slowest hundredth usually is."""
    row, first = 0, 0.0
    while row < 10:
        result = await load.ask(time.monotonic())
        good = result.outcome == "200" and result.seconds <= usual_s
        first = first if row and good else result.due
        row = row + 1 if good else 0
        await asyncio.sleep(0.05)
    return first


async def killed(server: ServerProcess, load: Load, rate: float) -> dict[str, object]:
    asking = asyncio.create_task(load.at_rate(rate, 40))
    await asyncio.sleep(5)
    moment = time.monotonic()
    os.kill(server.replicas()[0], signal.SIGKILL)
    results = await asking
    wrong = [result.due for result in results if result.outcome != "200"]
    answers = [result.due + result.seconds for result in results if result.outcome == "200"]
    pause = next((end for end in sorted(answers) if end > moment + 0.5), float("inf")) - moment
    return summary(results) | {
        "rate": round(rate, 1),
        "last_not_answered_s": round(max(wrong) - moment, 2) if wrong else None,
        "first_answer_after_s": round(pause, 2),
    }


def markdown(record: dict[str, object]) -> str:
    steady, overload, killed_, stopped = (record[name] for name in ("steady", "overload", "killed", "stopped"))
    rows = [
        ("maximum", record["requests_per_s"], {"requests": "", "outcomes": ""}, ""),
        (
            f"80 % for {steady['seconds']:g} s",
            steady["rate"],
            steady,
            f"memory after minute 2: {steady['growth_all_percent']} %; {steady['images_a_call']} images a call",
        ),
        ("3 times", overload["rate"], overload, f"recovered after {overload['recovered_s']} s"),
        ("replica killed", killed_["rate"], killed_, f"next answer after {killed_['first_answer_after_s']} s"),
        ("SIGTERM", stopped["rate"], stopped, "refused: not connected any more"),
    ]
    lines = [
        "| load | requests/s | requests | outcomes | p50 ms | p99 ms | longest s | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rate, row, remark in rows:
        outcomes = ", ".join(f"{code}: {count}" for code, count in dict(row["outcomes"] or {}).items())
        cells = [
            name,
            rate,
            row["requests"],
            outcomes,
            *(row.get(key, "") for key in ("p50_ms", "p99_ms", "longest_s")),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} | {remark} |")
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="default: an export of --variant")
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--seconds", type=float, default=600, help="of the steady load")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = arguments.engine or Path(folder, f"{arguments.variant}.onnx")
        if arguments.engine is None:
            export(arguments.variant, engine)
        server = ServerProcess("--engine", engine, log=Path(folder, "log"))
        try:
            found = asyncio.run(measure(server, arguments.seconds))
        finally:
            code = server.stop()
    about = dataclasses.asdict(hardware())
    record = {"model": engine.stem, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"}
    record |= {"hardware": about, "versions": versions(), "commit": commit(), "exit_code": code, **found}
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = RESULTS / f"{datetime.date.today()}-{engine.stem}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
