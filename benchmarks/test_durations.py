"""What each test costs, as a plugin of pytest: `python -m pytest -p benchmarks.test_durations --cost FILE.jsonl`.

Seconds of the clock say more of a machine's other work than of a test, and under xdist of the other worker. So the cost
of a test is processor time: of the process and of the children that it waited for, what its fixtures took included.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cost", type=Path, required=True, help="a line of JSON a test is added to this file")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before, started = os.times(), time.monotonic()
    result = yield
    after = os.times()
    row = {
        "test": item.nodeid,
        "cpu_s": round(sum(after[:4]) - sum(before[:4]), 2),
        "wall_s": round(time.monotonic() - started, 2),
    }
    with item.config.getoption("--cost").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return result
