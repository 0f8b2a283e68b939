"""Waiting is shown: stages in a line on a terminal, a line for each that ended elsewhere, and nothing on stdout."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from dat_deploy.commands import stages as module
from dat_deploy.commands.stages import Stages

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor
LINE = r"{command}: {stage}, \d+\.\d s"


class Clock:
    """Seconds that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def console(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=100, markup=False, _environ={"TERM": "xterm"}), text


def test_without_a_terminal_each_stage_is_a_line_with_its_seconds_when_it_ends(clock):
    out, text = console()
    with Stages("export", out) as stages:
        clock.now += 1
        stages.begin("tracing")
        assert text.getvalue() == "export: starting, 1.0 s\n"
        clock.now += 5.06
        stages.begin("writing")
        clock.now += 0.3
    assert text.getvalue() == "export: starting, 1.0 s\nexport: tracing, 5.1 s\nexport: writing, 0.3 s\n"


def test_details_are_of_one_stage_and_a_stage_of_no_time_is_no_line(clock):
    out, text = console()
    with Stages("quantize", out) as stages:
        for number in (1, 2, 3):
            stages.begin(f"calibrating, image {number} of 3")
            clock.now += 2
        stages.begin("coordinates: stages.2.attns.1")
        clock.now += 0.04
        stages.begin("data")
        for done in (1, 2):
            stages.count(done, 2)
            clock.now += 1
    assert text.getvalue() == "quantize: calibrating, 6.0 s\nquantize: data, 2.0 s\n"


@pytest.mark.parametrize(
    ("before", "after", "stage"),
    [(True, True, "starting"), (False, True, "importing torch"), (False, False, "starting")],
    ids=["it is there", "it comes", "it never comes"],
)
def test_the_time_before_the_first_stage_is_torchs_if_it_is_imported_then(before, after, stage, clock, monkeypatch):
    if not before:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    out, text = console()
    with Stages("export", out):
        clock.now += 3
        if after:
            monkeypatch.setitem(sys.modules, "torch", object())
    assert text.getvalue() == f"export: {stage}, 3.0 s\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_that_fails_leaves_nothing_but_the_error(terminal, clock):
    out, text = console(terminal=terminal)

    def fail() -> None:
        clock.now += 3
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), Stages("export", out):
        fail()
    if not terminal:
        assert text.getvalue() == ""
    else:
        assert shown(text.getvalue()) == ""
        assert text.getvalue().count(HIDE) == text.getvalue().count(SHOW) == 1


def shown(text: str) -> str:
    """What is on a terminal after these characters, if each line that is erased is the last."""
    lines = [""]
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[2K":
            lines[-1] = ""
        elif part == "\x1b[1A":
            assert lines.pop() == ""
        elif part[0] not in "\x1b\r":
            lines[-1] += part
    return "\n".join(lines)


def test_on_a_terminal_a_line_lives_while_it_works_and_is_gone_after(clock):
    out, text = console(terminal=True)
    with Stages("export", out) as stages:
        stages.begin("tracing")
        clock.now += 7
        assert stages._live is not None
        stages._live.refresh()
        assert re.fullmatch(r"\S export: tracing 7 s *", shown(text.getvalue()).splitlines()[-1])
        stages.count(3, 8, "batch 1, round 2")
        stages._live.refresh()
        assert re.fullmatch(r"\S export: batch 1, round 2 \S+ +3/8 0 s *", shown(text.getvalue()).splitlines()[-1])
        assert HIDE in text.getvalue()
    assert shown(text.getvalue()) == ""
    assert text.getvalue().rindex(SHOW) > text.getvalue().rindex(HIDE)


def test_a_dumb_terminal_gets_lines(clock):
    text = io.StringIO()
    with Stages("export", Console(file=text, force_terminal=True, _environ={"TERM": "dumb"})):
        clock.now += 1
    assert text.getvalue() == "export: starting, 1.0 s\n"


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
import dat_deploy.export.onnx_model as library

library.onnx_from_model = lambda *_, progress, **__: (progress("tracing"), time.sleep(60))
from dat_deploy.cli import main
main()
"""


def test_ctrl_c_gives_the_cursor_back(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SLOW, "export", "--variant", "demo"]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:  # noqa: S603  # our own code
        os.close(theirs)
        seen = read_until(ours, "tracing")
        process.send_signal(signal.SIGINT)
        seen += read_until(ours, "interrupted")
        assert process.wait(20) == 130
        assert process.stdout is not None
        assert process.stdout.read() == b""
    os.close(ours)
    assert seen.rindex(SHOW) > seen.rindex(HIDE)
    assert shown(seen).strip() == "error: interrupted"


def read_until(descriptor: int, word: str) -> str:
    seen, end = b"", time.monotonic() + 60
    while word.encode() not in seen:
        ready, _, _ = select.select([descriptor], [], [], end - time.monotonic())
        assert ready, seen
        seen += os.read(descriptor, 4096)
    return seen.decode()


def test_an_export_tells_its_stages_on_stderr_and_its_result_on_stdout(tmp_path: Path) -> None:
    code = "from dat_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "export", "--variant", "demo", "--precision", "fp16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)  # noqa: S603  # our own code
    lines = done.stderr.splitlines()
    stages = [re.fullmatch(r"export: (.+), \d+\.\d s", line) for line in lines]
    assert all(stages), lines
    told = [stage[1] for stage in stages if stage is not None]
    order = ["importing torch", "loading weights", "tracing", "optimizing the graph", "casting to fp16", "lowering"]
    assert [name for name in [*order, "writing"] if name in told] == told
    assert {"importing torch", "tracing"} <= set(told)
    assert done.stdout.startswith("demo.onnx: demo 64x64, ")
    assert not re.search(r"^export: ", done.stdout, re.MULTILINE)
