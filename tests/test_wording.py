"""The library's errors name parameters; the command line names its options instead, and touches nothing else."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import typer.main

import dat_deploy
from dat_deploy import cli
from dat_deploy.commands import wording
from dat_deploy.commands.wording import in_shell

PACKAGE = Path(dat_deploy.__file__).parent
# Strings outside the commands in which a word of ours stands all the same: what begins the file's name, and the string.
NOT_OURS = {
    ("engine/build.py", r"--[a-z-]+|dat-deploy"): "the words that make the same engine again, as a passport keeps them",
    ("serving/triton/", r"--gpus"): "docker's",
    ("serving/triton/entrypoint.py", r"no NVIDIA GPU .*start it with --gpus all, or with --env.*"): "docker's",
    ("serving/triton/entrypoint.py", r".* GPUs of one kind, such as --gpus device=0\."): "docker's",
}


def said(text: str, command: str) -> str:
    """What `dat-deploy COMMAND` prints of what the library says."""
    context = SimpleNamespace(command=typer.main.get_command(cli.app), invoked_subcommand=command)
    token = wording._CONTEXT.set(context)
    try:
        return in_shell(text)
    finally:
        wording._CONTEXT.reset(token)


@pytest.mark.parametrize(
    ("text", "command", "expected"),
    [
        ("a.onnx exists; pass `force=True` to replace it.", "export", "a.onnx exists; pass --force to replace it."),
        ("`top` got 0; it takes 1 or more.", "client", "--top got 0; it takes 1 or more."),
        ("give `image_size=(448, 224)`, or none.", "tune", "give --image-size 448x224, or none."),
        ("build it for `batches=(1, 8)`.", "build", "build it for --batch 1,8."),
        ("give `image_size=(height, width)`.", "export", "give --image-size HEIGHTxWIDTH."),
        ("export it with `batch=None`.", "bench", "export it with --batch dynamic."),
        ("export it with `dynamic_image_size=True`.", "validate", "export it with --image-size dynamic."),
        # the command's own parameter comes before another command's of that name
        ("name `images`.", "validate", "name --image."),
        ("name `images`.", "quantize", "name --images."),
        ("`source` is missing.", "export", "--from is missing."),
        ("`source` is missing.", "build", "SOURCE is missing."),
        # of another command, where the one that runs has none
        ("export it with `sampling_locations=True`.", "visualize", "export it with --sampling-locations."),
        ("`workspace_bytes` and `plugin_form='IPluginV3'`.", "build", "--workspace-mib and --plugins IPluginV3."),
        (
            'Make one with: `export(variant="tiny", output="my file.onnx")`',
            "validate",
            "Make one with: dat-deploy export --variant tiny --output 'my file.onnx'",
        ),
        (
            '`export(variant="dat.yaml", precision="fp16", features=(0, 3))`',
            "build",
            "dat-deploy export --config dat.yaml --precision fp16 --features 0,3",
        ),
        ('`relower("a.onnx", lowering="hat")`', "build", "dat-deploy export a.onnx --lowering hat"),
        ('`relower(source="a.onnx", lowering="hat")`', "build", "dat-deploy export --from a.onnx --lowering hat"),
        ('`build("a.onnx", batches=(1, 8))`', "bench", "dat-deploy build a.onnx --batch 1,8"),
        ('`quantize("FILE.onnx", data=folder)`', "export", "dat-deploy quantize FILE.onnx --data FOLDER"),
        ('`check_preprocessing(engine="a.onnx")`', "serve", "dat-deploy preprocess --check --engine a.onnx"),
        ("see: `doctor()`", "build", "see: dat-deploy doctor"),
        ("Make one with: `bench(...).to_json()`", "compare", "Make one with: dat-deploy bench --json FILE"),
        ("look at `inspect(...).engine_layers`.", "build", "look at dat-deploy inspect --layers."),
    ],
)
def test_a_marked_parameter_is_an_option_in_the_shell(text: str, command: str, expected: str) -> None:
    assert said(text, command) == expected


@pytest.mark.parametrize(
    "text",
    [
        "cannot read force=True.onnx: top, batch and image_size are words.",
        "cannot read /tmp/`force=True`: No such file or directory.",
        "cannot read `force`.onnx: it is truncated.",
        "torch says: `torch.add(x)` is no `bench.rows`, `compile().x` or `bench().x`",
        "torch says: `aten::add` takes `self`",
        "'`)(`' and `a b` and `1 +` and `open(x)` and `**batch` and `batch=1+x` and `` and `",
    ],
)
def test_what_is_not_marked_as_a_parameter_stays_as_it_is(text: str) -> None:
    assert said(text, "export") == text


def test_python_reads_it_as_the_library_wrote_it() -> None:
    assert in_shell("pass `force=True`") == "pass `force=True`"


def test_an_error_that_leaves_a_command_names_its_options(
    call_main: Callable[..., "CompletedProcess[str]"], tmp_path: Path
) -> None:
    (tmp_path / "`force=True`").touch()
    done = call_main("variants", "--json", tmp_path / "`force=True`")
    expected = f"error: {tmp_path}/`force=True` exists; pass --force to replace it, or choose another name.\n"
    assert (done.returncode, done.stderr) == (1, expected)


def sentences(tree: ast.AST) -> Iterator[str]:
    """Each string in it but docstrings; an f-string as one, with {} for what it fills in."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            bare |= {id(part) for part in node.values}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
OPTIONS = {word for command in COMMANDS.values() for parameter in command.params for word in parameter.opts}
COMMAND = re.compile(rf"dat-deploy (?:{'|'.join(COMMANDS)})\b")


def of_our_shell(text: str) -> list[str]:
    """The options of our commands that it names, and the commands."""
    return [word for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if word in OPTIONS] + COMMAND.findall(text)


@pytest.mark.parametrize(
    "text",
    ["Pass --force.", "`--batch dynamic`", "give (--from)", "see dat-deploy bench", "the {} of dat-deploy export {}"],
)
def test_an_option_or_a_command_is_seen_in_a_sentence(text: str) -> None:
    assert of_our_shell(text)


@pytest.mark.parametrize(
    "text", ["pip install --force-reinstall x", "docker run --volume", "of dat-deploy", "a--force"]
)
def test_what_other_programs_take_is_no_option_of_ours(text: str) -> None:
    assert not of_our_shell(text)


def test_the_library_does_not_speak_of_options() -> None:
    wrong, used = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name == "cli.py" or name.startswith("commands/"):
            continue
        for text in sentences(ast.parse(path.read_text(encoding="utf-8"))):
            allowed = {key for key in NOT_OURS if name.startswith(key[0]) and re.fullmatch(key[1], text)}
            if of_our_shell(text) and not allowed:
                wrong.append(f"{name}: {text}")
            used |= allowed if of_our_shell(text) else set()
    assert not wrong, "\n".join(wrong)
    assert used == NOT_OURS.keys()
