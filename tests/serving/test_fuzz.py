"""Requests that no client means crash nothing; `fuzz.py` has them all, by seed."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

SHORT = range(600)
WHOLE = range(10_000)
KEPT = (414, 439)  # once answered by a redirect to nothing


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


def check(fuzz: ModuleType, server, seeds) -> None:
    before = server.replicas()
    problems = []
    for seed in seeds:
        request = fuzz.case(seed)
        received, seconds = fuzz.send(server.port, request.content, half_close=request.half_close)
        problem = fuzz.wrong_with(request, received, seconds)
        if problem:
            problems.append(f"seed {seed} ({request.kind}): {problem}")
    assert not problems
    assert server.replicas() == before, "no replica died of it"
    for pid in before:
        os.kill(pid, 0)
    assert server.process.poll() is None
    assert "Traceback" not in server.log.read_text()


@pytest.mark.server
def test_requests_that_no_client_means_crash_nothing(fuzz, server):
    check(fuzz, server, [*KEPT, *SHORT])


@pytest.mark.server
@pytest.mark.slow
def test_ten_thousand_of_them_crash_nothing(fuzz, server):
    check(fuzz, server, WHOLE)


def test_the_same_seed_makes_the_same_request(fuzz):
    assert {fuzz.case(seed).content for seed in range(40)} == {fuzz.case(seed).content for seed in range(40)}


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 500 x\r\n\r\n",
        b'HTTP/1.1 400 x\r\n\r\n{"error": "Traceback (most recent call last)"}',
        b"HTTP/1.1 400 x\r\n\r\nnot found",
        b'HTTP/1.1 200 x\r\n\r\n{"a": 1}',
        b"nonsense",
    ],
)
def test_a_wrong_answer_is_seen(fuzz, answer):
    assert fuzz.wrong_with(fuzz.Case("kind", b"", refused=True), answer, 0.1)
    assert fuzz.wrong_with(fuzz.Case("kind", b"", refused=True), b'HTTP/1.1 400 x\r\n\r\n{"error": "a"}', 9)
    assert not fuzz.wrong_with(fuzz.Case("kind", b"", refused=True), b'HTTP/1.1 400 x\r\n\r\n{"error": "a"}', 0.1)
