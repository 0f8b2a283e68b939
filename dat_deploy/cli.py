"""The command line: parse, one library call, print. Exit codes: 0 done, 1 user error, 2 wrong answer, 3 cannot here."""

import signal
import sys
from types import FrameType

import typer

from dat_deploy.commands import check, convert, measure, use
from dat_deploy.commands.output import err
from dat_deploy.commands.wording import Commands
from dat_deploy.errors import DatDeployError

# Everything that loads torch, NumPy or a runtime is imported inside the command that needs it, so that --help is quick.

app = typer.Typer(
    name="dat-deploy",
    cls=Commands,
    help="Vision transformers with deformable attention (DAT, DAT++): from checkpoint to validated, fast inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug keeps Python's own traceback
    rich_markup_mode=None,
)

for _command in (  # in this order they stand in --help
    convert.variants,
    convert.convert,
    convert.export,
    convert.quantize,
    convert.build,
    convert.inspect,
    convert.package,
    check.validate,
    check.bisect,
    measure.bench,
    measure.compare,
    use.classify,
    check.preprocess,
    measure.tune,
    use.visualize,
    use.serve,
    use.client,
    measure.doctor,
    use.demo,
):
    app.command()(_command)

# Exit codes as a shell reports them; typer makes 130 of a KeyboardInterrupt.
_SIGNALS = {128 + signal.SIGINT: "interrupted", 128 + signal.SIGTERM: "terminated"}


def main() -> None:
    """Entry point: an expected failure is one line on stderr and its exit code; a bug keeps its traceback."""
    received: list[int] = []

    def unwind(signal_number: int, _: FrameType | None) -> None:
        received.append(signal_number)
        sys.exit(128 + signal_number)  # so that half-written files and workers go

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell has background jobs ignore SIGINT
            signal.signal(number, unwind)
    code: int | str | None = 0
    try:
        code = _run()
    except Exception:
        if not received:  # torch may lose our SystemExit while it imports, and then fail in another way
            raise
    if received:
        code = 128 + received[0]
    if code in _SIGNALS:
        err.print(f"error: {_SIGNALS[code]}")
    sys.exit(code)


def _run() -> int | str | None:
    """The exit code."""
    try:
        app(prog_name="dat-deploy")
    except DatDeployError as error:
        err.print(f"error: {error}")
        return error.exit_code
    except SystemExit as stop:
        # the parser of options exits with 2, which here means that an answer is wrong
        return 1 if stop.code == 2 else stop.code
    return 0
