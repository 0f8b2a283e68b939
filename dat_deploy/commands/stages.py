"""What somebody waits for while a command works: its stages and their seconds, on stderr."""

import re
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table

__all__ = ["Stages"]

_LEAST_S = 0.1  # of a stage that is worth a line
_LEAST_S_OF_FORECAST = 5
_STARTING = "starting"
_LEAST_S_OF_START = 0.5  # below it is what every command needs, and an error that comes then stands alone


class Stages:
    """Shows the stage that runs: on a terminal in a line that goes in the end, elsewhere by a line when it has ended.

    `begin` and `count` are what the library's functions take as `progress`. What stands before the first comma or colon
    names the stage, the rest is a detail of it: `calibrating, image 3 of 512`. A stage that fails or is interrupted
    leaves nothing, so that the error stands alone.

    Args:
        command: that the lines begin with.
        console: of stderr.
    """

    def __init__(self, command: str, console: Console) -> None:
        self._command, self._console = command, console
        self._stage = self._text = ""
        self._had_torch = "torch" in sys.modules
        self._bar: tuple[int, int] | None = None
        self._began = time.monotonic()
        self._spinner = Spinner("dots")
        animated = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, transient=True, get_renderable=self._line) if animated else None

    def __enter__(self) -> Self:
        self.begin(_STARTING)
        if self._live is not None:
            try:
                self._live.start(refresh=True)
            except BaseException:  # interrupted before the block begins, whose end would give the cursor back
                self._live.stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif kind is None:
            self._print_finished()

    def begin(self, text: str) -> None:
        """The stage that begins, or goes on with another detail."""
        stage = re.split(r", |: ", text, maxsplit=1)[0]
        if stage != self._stage:
            if self._live is None and self._stage:
                self._print_finished()
            self._stage, self._began = stage, time.monotonic()
        self._text, self._bar = text, None

    def count(self, done: int, of: int, text: str = "") -> None:
        """As `begin`, or of the stage that runs, with how much is done."""
        self.begin(text or self._text)
        self._bar = (done, of)

    def _print_finished(self) -> None:
        seconds = time.monotonic() - self._began
        if seconds >= (_LEAST_S_OF_START if self._stage == _STARTING else _LEAST_S):
            self._console.print(f"{self._command}: {self._named(self._stage)}, {seconds:.1f} s")

    def _named(self, text: str) -> str:
        """Where torch is imported before the first stage, that is what takes the time."""
        imports = text == _STARTING and not self._had_torch and "torch" in sys.modules
        return "importing torch" if imports else text

    def _line(self) -> Table:
        line = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [self._spinner, f"{self._command}: {self._named(self._text)}"]
        done, of = self._bar or (0, 0)
        if self._bar is not None:
            cells += [ProgressBar(of, done, width=20), f"{done}/{of}"]
        seconds = time.monotonic() - self._began
        cells.append(f"{seconds:.0f} s")
        if self._bar is not None and 0 < done < of and seconds > _LEAST_S_OF_FORECAST:
            cells.append(f"{seconds / done * (of - done):.0f} s left")
        line.add_row(*cells)
        return line
