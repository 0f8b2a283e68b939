"""What the library says in Python's words, said in the shell's: `force=True` is --force there.

The library marks the parameters that a sentence names by backquotes, with a value where it proposes one; it may propose
whole calls: `force=True`, `image_size`, `batches=(1, 8)`, `export(variant="tiny", output="tiny.onnx")`,
`bench(...).to_json()`.
"""

import ast
import re
import shlex
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import typer.core

from dat_deploy.errors import DatDeployError

__all__ = ["Commands", "in_shell"]

# Of the group whose command runs. Not typed, here and below: typer has click's classes inside since 0.26, before not.
_CONTEXT: ContextVar[Any] = ContextVar("context", default=None)

# A mark stands between spaces or punctuation, so that no part of a path is one.
_MARK = re.compile(r"(?<![^\s(])`([^`\n]+)`(?=[,;:.)]*(?:\s|$))")
# What a command calls otherwise than the library does; its own name comes before these.
_OPTIONS = {
    "architectures": "arch",
    "arrays": "array",
    "batches": "batch",
    "dynamic_image_size": "image_size",
    "engines": "engine",
    "gates": "gate",
    "image_sizes": "image_size",
    "images": "image",
    "opset_version": "opset",
    "plugin_form": "plugins",
    "tolerance_units": "tolerance",
    "workspace_bytes": "workspace_mib",
}
_COMMANDS = {"benchmark": "bench", "check_preprocessing": "preprocess --check", "relower": "export"}
_PARTS = {"engine_layers": "--layers", "to_json": "--json FILE"}  # of what a command returns


class Commands(typer.core.TyperGroup):
    """The commands of an app; an error that leaves them names options where the library named parameters."""

    def invoke(self, ctx: Any) -> Any:
        token = _CONTEXT.set(ctx)
        try:
            return super().invoke(ctx)
        except DatDeployError as error:
            error.args = (in_shell(str(error)),)
            raise
        finally:
            _CONTEXT.reset(token)


def in_shell(text: str) -> str:
    """Each parameter that is marked in it as an option of the command that runs, or else of one that has it.

    What is no parameter of a command stays as it is; so does all of it where no command runs.
    """
    context = _CONTEXT.get()
    if context is None:
        return text
    commands = context.command.commands
    scope = [commands[name] for name in (context.invoked_subcommand, *commands) if name in commands]

    def translated(mark: re.Match[str]) -> str:
        try:
            call = ast.parse(f"_({mark[1]})", mode="eval").body
            return _words(call, scope, commands) if isinstance(call, ast.Call) else mark[0]
        except (SyntaxError, ValueError, KeyError):
            return mark[0]

    return _MARK.sub(translated, text)


def _words(call: ast.Call, scope: Sequence[Any], commands: Mapping[str, Any]) -> str:
    """What stands between the parentheses, as words of a shell.

    Raises:
        KeyError: if something in it is no parameter and no command.
        ValueError: if a value is no literal.
    """
    words = []
    for argument in call.args:
        if isinstance(argument, ast.Name):  # a parameter without a value
            words.append(" ".join(_option(argument.id, scope)) or argument.id.upper())
        elif isinstance(argument, ast.Call | ast.Attribute):
            words.append(_command(argument, commands))
        elif ast.unparse(argument) != "...":  # what a command takes without an option
            words.append(_value(argument))
    for keyword in call.keywords:
        name = keyword.arg or ""
        value = _value(keyword.value, between="x" if name == "image_size" else ",")
        if name == "variant" and value.endswith((".yaml", ".yml")):
            name = "config"
        elif name == "dynamic_image_size":
            value = "dynamic"
        words += [*_option(name, scope), *([value] if value else [])]
    return " ".join(words)


def _command(node: ast.expr, commands: Mapping[str, Any]) -> str:
    """A call, and an option for what its answer is asked for: `inspect(...).engine_layers` is `inspect --layers`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        command = _COMMANDS.get(node.func.id, node.func.id)
        return f"dat-deploy {command} {_words(node, [commands[command.split()[0]]], commands)}".rstrip()
    part = node.func if isinstance(node, ast.Call) else node
    if isinstance(part, ast.Attribute):
        return f"{_command(part.value, commands)} {_PARTS[part.attr]}"
    raise KeyError(ast.unparse(node))


def _option(name: str, scope: Sequence[Any]) -> list[str]:
    """The option of the first command that has it; none for an argument, which has no name in a shell."""
    for command in scope:
        options = {parameter.name: parameter.opts for parameter in command.params}
        for own in (name, _OPTIONS.get(name)):
            if own in options:
                return [option for option in options[own][:1] if option.startswith("-")]
    raise KeyError(name)


def _value(node: ast.expr, between: str = ",") -> str:
    """As the command takes it; nothing for True, since the option alone says that."""
    if isinstance(node, ast.Tuple | ast.List):
        return between.join(_value(element) for element in node.elts)
    if isinstance(node, ast.Name):  # stands for a value
        return node.id.upper()
    value = ast.literal_eval(node)
    return "" if value is True else "dynamic" if value is None else shlex.quote(str(value))
