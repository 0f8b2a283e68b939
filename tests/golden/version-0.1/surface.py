"""What users name: commands and their options, functions and their parameters, exceptions and their exit codes."""

import inspect
import re
import types
import typing
from typing import Any

import typer

import dat_deploy
from dat_deploy import api, errors
from dat_deploy.cli import app


def commands() -> dict[str, Any]:
    """Command -> its help, and its options and arguments by their name in Python."""
    group: Any = typer.main.get_command(app)
    return {
        name: {"help": command.help, "parameters": _command_parameters(command)}
        for name, command in group.commands.items()
    }


def _command_parameters(command: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    return {
        parameter.name: {
            "kind": parameter.param_type_name,
            "names": [*parameter.opts, *parameter.secondary_opts],
            "type": _scalar(hints[parameter.name]),
            "repeated": parameter.multiple or parameter.nargs != 1,
            "required": parameter.required,
            "default": parameter.default
            if isinstance(parameter.default, bool | int | float)
            else str(parameter.default),
            "help": parameter.help,
        }
        for parameter in command.params
    }


def _scalar(hint: Any) -> str:
    """`list[Path] | None` -> `Path`"""
    while typing.get_args(hint):
        hint = next(each for each in typing.get_args(hint) if each is not types.NoneType)
    return str(hint.__name__)


def functions() -> dict[str, Any]:
    """Name in `dat_deploy.api` -> its parameters in order, each with its kind and its default; None of what is none."""
    found = {name: getattr(api, name) for name in api.__all__}
    return {name: _parameters(value) if callable(value) else None for name, value in found.items()}


def _parameters(function: Any) -> dict[str, Any]:
    return {
        parameter.name: {
            "kind": parameter.kind.name,
            "default": None if parameter.default is parameter.empty else _shown(parameter.default),
        }
        for parameter in inspect.signature(function).parameters.values()
    }


def _shown(default: object) -> str:
    """Without the address of a function, and without a machine's path."""
    return re.sub(r"^<.*", "a function", repr(default)).replace("WindowsPath", "Path").replace("PosixPath", "Path")


def names() -> dict[str, Any]:
    """What `dat_deploy` offers, and the exit code of each exception."""
    codes = {name: getattr(errors, name).exit_code for name in errors.__all__}
    return {"dat_deploy": list(dat_deploy.__all__), "exit_codes": codes}
