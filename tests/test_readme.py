"""The README says what is true: its commands, files, links and numbers exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import dat_deploy.api
from dat_deploy.cli import app
from dat_deploy.export import LOWERINGS
from dat_deploy.networks.dat.variants import VARIANTS
from dat_deploy.runners import RUNTIMES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str = README) -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("sh", text) for line in block.splitlines()]
    inline = re.findall(r"`(dat-deploy [^`]+)`", text)
    return [line for line in lines if line] + inline


@pytest.mark.parametrize("line", [line for line in commands(README + SERVING) if line.startswith("dat-deploy ")])
def test_command_is_one_that_the_command_line_takes(line):
    command, *words = shlex.split(line)[1:]
    group = typer.main.get_command(app)
    options = {name for parameter in group.commands[command].params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_no_number_is_left_to_be_filled_in():
    assert not re.search(r"@[A-Z]+@|TODO|TBD", README + SERVING)


def test_first_two_commands_are_make_demo_and_make_test():
    assert [line for line in commands() if not line.startswith("dat-deploy")][:2] == ["make demo", "make test"]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))))
def test_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("link", [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link])
def test_link_inside_the_repository_leads_somewhere(link):
    if link.startswith("#"):
        headings = {re.sub(r"[^a-z ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", README, re.M)}
        assert link[1:] in headings
    else:
        assert (ROOT / link).exists()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_table_of_variants_is_that_of_the_code(variant):
    height, width = variant.image_size
    top1 = "–" if variant.published_top1 is None else f"{variant.published_top1:.1f} %"
    row = f"{height}×{width} | {variant.parameters / 1e6:.1f} M | {variant.gmacs:.1f} | {top1} |"
    assert re.search(rf"^\| `{variant.name}`[^|]* \| {re.escape(row)}", README, re.MULTILINE)


def test_every_lowering_and_runtime_is_explained():
    for lowering in LOWERINGS:
        assert re.search(rf"^\| `{lowering}`", README, re.MULTILINE)
    for runtime in RUNTIMES:
        assert runtime == "onnxruntime" or f"`{runtime}:" in README


def test_python_example_uses_names_that_exist():
    names = {
        node.attr
        for block in blocks("python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "api"
    }
    assert names
    assert names <= set(dat_deploy.api.__all__)


def test_code_map_names_every_module():
    (code_map,) = (block for block in blocks("text") if block.startswith("dat_deploy/"))
    modules = [path.name for path in (ROOT / "dat_deploy").glob("*.py") if path.name != "__init__.py"]
    packages = [path.parent.name for path in (ROOT / "dat_deploy").glob("*/__init__.py")]
    assert [name for name in modules + packages if name not in code_map] == []
