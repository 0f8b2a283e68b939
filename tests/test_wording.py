"""The library's errors name parameters; the command line names its options instead, and touches nothing else."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import typer.main

from dat_deploy import cli
from dat_deploy.commands import wording
from dat_deploy.commands.wording import in_shell


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
