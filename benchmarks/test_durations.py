"""What each test costs, as a plugin of pytest: `python -m pytest -p benchmarks.test_durations --cost FILE.jsonl`.

Seconds of the clock say more of a machine's other work than of a test, and under xdist of the other worker. So the cost
of a test is processor time: of the process and of the children that it waited for, what its fixtures took included.

Two such files make a table: `python benchmarks/test_durations.py BEFORE.jsonl AFTER.jsonl TABLE` writes TABLE.csv, a
row a test, and TABLE.md, a row a file of tests.
"""

import csv
import json
import os
import sys
import time
from collections import Counter
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


def write_table(before: Path, after: Path, table: Path) -> None:
    """Both files of rows side by side; a test that is not in one of them has no number there."""
    costs = []
    for path in (before, after):
        cost: Counter[str] = Counter()
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            cost[row["test"]] += row["cpu_s"]
        costs.append(cost)
    tests = sorted(costs[0].keys() | costs[1].keys())
    with table.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["test", "cpu_s before", "cpu_s after"])
        for test in tests:
            writer.writerow([test, *(f"{cost[test]:.2f}" if test in cost else "" for cost in costs)])
    lines = ["| tests of | before | after | processor seconds before | after |", "|---|---:|---:|---:|---:|"]
    files = sorted({test.partition("::")[0] for test in tests})
    for name in [*files, ""]:
        inside = [[test for test in cost if test.startswith(name)] for cost in costs]
        counts = [str(len(found)) for found in inside]
        seconds = [f"{sum(cost[test] for test in found):.1f}" for cost, found in zip(costs, inside, strict=True)]
        lines.append(f"| {f'`{name}`' if name else 'all'} | {' | '.join(counts + seconds)} |")
    table.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_table(*map(Path, sys.argv[1:]))
