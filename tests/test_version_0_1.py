"""What version 0.1 wrote is read, what it wrote is still written, and its commands, options and functions are there.

tests/golden/version-0.1/README.md says what each file is. Reports may gain fields; what an exported file or a passport
gains must be optional, and stands in `LATER_PROPERTIES` and `LATER_PASSPORT_FIELDS`.
"""

import importlib
import importlib.util
import inspect
import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
import yaml

from dat_deploy import api
from dat_deploy.errors import PassportError

GOLDEN = Path(__file__).parent / "golden" / "version-0.1"
LATER_PROPERTIES: set[str] = set()  # of an exported file, that 0.1 did not write
LATER_PASSPORT_FIELDS: set[str] = set()

OUTPUTS = dict(np.load(GOLDEN / "outputs.npz"))
# What differs from one CPU to another: the order of summation, in int8 also which way a value is rounded.
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.1}
DISC = "pictures/class 1/disc.png"

Call = Callable[..., "subprocess.CompletedProcess[str]"]


def _surface() -> ModuleType:
    spec = importlib.util.spec_from_file_location("surface", GOLDEN / "surface.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SURFACE = _surface()
COMMANDS, FUNCTIONS, NAMES = (
    json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("commands", "functions", "names")
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, in which commands run."""
    copy = Path(shutil.copytree(GOLDEN, tmp_path / "version-0.1"))
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def written(folder: Path, call_main: Call) -> Callable[..., Any]:
    """`written("inspect", "dat.onnx")` is what the command writes with --json."""

    def run(*words: str, code: int = 0) -> Any:
        done = call_main(*words, "--json", "written.json", "--force")
        assert done.returncode == code, done.stderr
        return json.loads((folder / "written.json").read_text())

    return run


def report(name: str) -> Any:
    """What the command wrote in 0.1."""
    return json.loads((GOLDEN / "reports" / f"{name}.json").read_text())


def lost(old: Any, new: Any, where: str = "report") -> list[str]:
    """What of `old` is not in `new`, or of another type there, at any depth."""
    if type(old) is not type(new):
        return [f"{where} was {old!r:.60} and is {new!r:.60}"]
    if isinstance(old, dict):
        gone = [f"{where} has no {key}" for key in old if key not in new]
        return gone + [text for key in old if key in new for text in lost(old[key], new[key], f"{where}.{key}")]
    if isinstance(old, list):
        different = [] if len(old) == len(new) else [f"{where} has {len(new)} entries, not {len(old)}"]
        pairs = enumerate(zip(old, new, strict=False))
        return different + [text for i, pair in pairs for text in lost(*pair, f"{where}[{i}]")]
    return []


def of_then(old: Any, new: Any) -> Any:
    """`new` without the fields that `old` does not have, at any depth."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: of_then(old[key], value) for key, value in new.items() if key in old}
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [of_then(*pair) for pair in zip(old, new, strict=True)]
    return new


def properties(path: Path) -> dict[str, Any]:
    return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}


def images(height: int) -> np.ndarray:
    """As in generate.py."""
    values = np.arange(2 * 3 * height * 64) * 7919 % 256 / 128 - 1
    return values.astype(np.float32).reshape(2, 3, height, 64)


def check_outputs(path: Path | str, name: str) -> None:
    """`path` gives what `name` gave in 0.1."""
    expected = {key.partition(":")[2]: value for key, value in OUTPUTS.items() if key.startswith(f"{name}:")}
    with api.open_runner(str(path), threads=1) as runner:
        found = runner.outputs(images(96 if name == "dat_plus.onnx" else 64))
        tolerance = TOLERANCES[runner.description.answer_precision]
    assert list(found) == list(expected)
    for output, value in expected.items():
        assert np.abs(found[output] - value).max() <= tolerance, output


FILES = sorted(path.name for path in GOLDEN.glob("*.onnx"))
RUNNABLE = [name for name in FILES if "plugin" not in name]  # a file without bodies runs in an engine alone


@pytest.mark.parametrize("name", FILES)
def test_an_exported_file_of_0_1_is_read_and_says_the_same(name: str, written: Callable[..., Any]) -> None:
    old = report(f"inspect-{name}")
    assert of_then(old, written("inspect", name)) == old


@pytest.mark.parametrize("name", RUNNABLE)
def test_an_exported_file_of_0_1_gives_what_it_gave(name: str, folder: Path) -> None:
    check_outputs(folder / name, name)


def test_a_checkpoint_that_0_1_wrote_gives_what_it_gave(folder: Path) -> None:
    model = api.load_model("dat_pp.yaml", Path("dat_pp.safetensors"))
    logits = model(torch.from_numpy(images(64))).numpy()
    assert np.abs(logits - OUTPUTS["dat_pp.safetensors:logits"]).max() <= TOLERANCES["fp32"]


@pytest.mark.parametrize(
    ("name", "lowering", "as_it_was"),
    [
        ("dat.onnx", "gridsample", "dat.gridsample.onnx"),
        ("dat_plus.plugin.onnx", "function", "dat_plus.onnx"),
        ("dat_pp.onnx", "function", "dat_pp.onnx"),
    ],
)
def test_the_lowering_of_a_file_of_0_1_can_be_changed(name: str, lowering: str, as_it_was: str, folder: Path) -> None:
    new = folder / "new.onnx"
    api.relower(folder / name, new, lowering)
    check_outputs(new, as_it_was)
    before, after = properties(folder / name), properties(new)
    assert after["dat_deploy.lowering"] == lowering
    for entry in ("dat_deploy.lowering", "dat_deploy.operators"):  # lowering renames the tensors of operators
        before.pop(entry)
        after.pop(entry)
    assert after == before
    if (folder / as_it_was).name == f"dat.{lowering}.onnx":
        assert properties(new) == properties(folder / as_it_was)


@pytest.mark.parametrize("name", FILES)
def test_the_tensors_that_a_file_of_0_1_lists_are_in_it(name: str) -> None:
    model = onnx.load(GOLDEN / name)
    listed = properties(GOLDEN / name)
    made = {output for node in model.graph.node for output in node.output}
    operators = listed["dat_deploy.operators"]
    assert set(listed["dat_deploy.boundaries"].values()) <= made
    assert {tensor for entry in operators for tensor in (*entry["inputs"].values(), entry["output"])} <= made


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_that_bisect_looks_for_is_listed_in_a_file_of_0_1(name: str) -> None:
    family: Any = importlib.import_module("dat_deploy.networks.family")  # what `bisect` runs depends on the fault
    listed = properties(GOLDEN / name)
    network = api.inspect(GOLDEN / name).metadata.network
    blocks = family.family_of(network).blocks(network)
    steps = [step for block in blocks for step in block.steps]
    assert {step.ends for step in steps if step.ends} == set(listed["dat_deploy.boundaries"])
    operators = {(entry["name"].partition("/")[0], entry["operator"]) for entry in listed["dat_deploy.operators"]}
    inside = {(block.name, step.name) for block in blocks for step in block.steps if step.operator}
    assert inside == operators


def test_bisect_finds_a_fault_in_a_file_of_0_1_in_the_same_steps(folder: Path, written: Callable[..., Any]) -> None:
    model = onnx.load("dat.gridsample.onnx")
    (bias,) = (weight for weight in model.graph.initializer if weight.name == "stages.2.attns.1.proj_v.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(model, "faulty.onnx")
    old, new = report("bisect-faulty"), written("bisect", "--engine", "faulty.onnx", "--image", DISC, code=2)
    assert lost(old, new) == []
    assert new["place"] == old["place"] == "stages.2.attns.1: proj_v"
    assert [step["place"] for step in new["steps"]] == [step["place"] for step in old["steps"]]


def test_bisect_writes_what_it_wrote(written: Callable[..., Any]) -> None:
    old, new = report("bisect"), written("bisect", "--engine", "dat.onnx", "--image", DISC)
    assert lost(old, new) == []
    assert new["agrees"]


def test_export_writes_what_it_wrote(written: Callable[..., Any], folder: Path) -> None:
    words = ("--config", "dat.yaml", "--batch", "2", "--opset", "17", "--output", "new.onnx")
    old, new = report("export"), written("export", *words)
    assert lost(old, new) == []
    assert (new["operators"], new["outputs"], new["notes"]) == (old["operators"], old["outputs"], old["notes"])
    before, after = properties(folder / "dat.onnx"), properties(folder / "new.onnx")
    assert set(after) - set(before) <= LATER_PROPERTIES
    assert lost(before, after) == []
    for entry in set(before) - {"dat_deploy.version"}:
        assert of_then(before[entry], after[entry]) == before[entry], entry
    check_outputs(folder / "new.onnx", "dat.onnx")


def test_quantize_writes_what_it_wrote(written: Callable[..., Any], folder: Path) -> None:
    words = ("--data", "pictures", "--images", "2", "--method", "minmax", "-o", "new.onnx")
    old, new = report("quantize"), written("quantize", "dat.onnx", *words)
    assert lost(old, new) == []
    assert new["layers"] == old["layers"]
    calibration = dict.fromkeys(("library_version",), "")
    assert new["metadata"]["calibration"] | calibration == old["metadata"]["calibration"] | calibration
    assert set(properties(folder / "new.onnx")) - set(properties(folder / "dat.int8.onnx")) <= LATER_PROPERTIES
    check_outputs(folder / "new.onnx", "dat.int8.onnx")


@pytest.mark.parametrize("name", ["dat_pp.engine", "dat.pt2"])
def test_an_engine_of_0_1_is_read_and_says_the_same(name: str, written: Callable[..., Any]) -> None:
    old, new = report(f"inspect-{name}"), written("inspect", name)
    for machines in ("unseen", "engine_layers"):  # depends on what is installed
        assert machines in new
        old.pop(machines)
    assert of_then(old, new) == old


@pytest.mark.parametrize("name", ["dat_pp.engine", "dat.pt2"])
def test_a_passport_of_0_1_is_written_again_as_it_was(name: str, folder: Path) -> None:
    passport = api.inspect(folder / name).passport
    assert passport is not None
    assert passport.to_bytes() == (folder / f"{name}.json").read_bytes()


def test_a_passport_of_0_1_that_was_edited_is_refused(folder: Path) -> None:
    path = folder / "dat_pp.engine.json"
    path.write_text(path.read_text().replace('"passed": true', '"passed": false'))
    with pytest.raises(PassportError, match=r"was edited or is damaged: its digest does not fit its content"):
        api.inspect(folder / "dat_pp.engine")


def test_a_passport_has_all_that_it_had(folder: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx-cu13 is not installed")
    api.build(Path("dat_pp.onnx"), Path("new.engine"), backend="tensorrt-rtx", batches=["1", "2-4"])
    old, new = (json.loads((folder / f"{name}.engine.json").read_text()) for name in ("dat_pp", "new"))
    for passport in (old, new):  # by whether a GPU is at hand, and whether there has been a validation
        passport.pop("engine_layers")
        passport.pop("verdict")
    for which in ("versions", "kinds", "layers"):  # by what is installed
        assert set(old.pop(which)) == set(new.pop(which)), which
    assert set(new) - set(old) <= LATER_PASSPORT_FIELDS
    assert lost(old, new) == []
    assert new["plugins"] == old["plugins"]
    assert new["rebuild"] == [word.replace("dat_pp.engine", "new.engine") for word in old["rebuild"]]


def test_validate_writes_what_it_wrote(written: Callable[..., Any]) -> None:
    given = ("--checkpoint", "dat_pp.safetensors", "--image", DISC, "--batch", "1,2", "--data", "pictures")
    old = report("validate")
    new = written("validate", "--engine", "dat_pp.onnx", *given, "--gate", "disagreement=100")
    names = {check["name"] for check in old["checks"]}
    new["checks"] = [check for check in new["checks"] if check["name"] in names]  # there are more since
    assert lost(old, new) == []
    fields = ("kind", "name", "batch", "passed")
    rows = [[tuple(check[field] for field in fields) for check in side["checks"]] for side in (old, new)]
    assert rows[0] == rows[1]
    assert (new["passed"], new["gates"], new["file_sha256"]) == (old["passed"], old["gates"], old["file_sha256"])


def test_bench_writes_what_it_wrote(written: Callable[..., Any]) -> None:
    old = report("bench")
    timed = ("--rounds", "2", "--seconds", "0.05", "--batch", "2", "--threads", "1")
    new = written("bench", "--engine", "dat.onnx", *timed)
    del old["settings"]["engines"]["dat.int8.onnx"], old["rows"][1:]
    for record in (old, new):  # by where it runs
        record.pop("commit")
        for name in ("cpu_flags", "gpus"):
            assert isinstance(record["hardware"].pop(name), list)
    assert lost(old, new) == []
    assert of_then(old["settings"], new["settings"]) == old["settings"]


def test_records_of_0_1_are_compared_as_they_were(written: Callable[..., Any]) -> None:
    old = report("compare")
    assert of_then(old, written("compare", "reports/bench.json", "reports/bench-later.json")) == old


def test_a_record_of_0_1_is_written_again_as_it_was() -> None:
    path = GOLDEN / "reports" / "bench.json"
    record = inspect.signature(api.compare).parameters["first"].annotation  # the class, wherever it is
    assert record.read(path).to_json() == path.read_text()


def test_classify_says_and_writes_what_it_did(written: Callable[..., Any]) -> None:
    old, new = report("classify"), written("classify", DISC, "--engine", "dat.onnx")
    assert lost(old, new) == []
    (before,), (after,) = old["predictions"], new["predictions"]
    assert [row["name"] for row in after] == [row["name"] for row in before]
    assert [row["probability"] for row in after] == pytest.approx([row["probability"] for row in before], abs=1e-5)


def test_preprocess_writes_what_it_wrote(written: Callable[..., Any]) -> None:
    old, new = report("preprocess"), written("preprocess", DISC, "--check", "--engine", "dat.onnx")
    assert lost(old, new) == []
    assert new["golden_here"] == old["golden_here"] == new["golden_expected"]


def test_visualize_writes_what_it_wrote(written: Callable[..., Any]) -> None:
    old, new = report("visualize"), written("visualize", DISC, "--engine", "pytorch:dat.yaml", "-o", "points.png")
    assert lost(old, new) == []


def test_package_writes_what_it_wrote(written: Callable[..., Any], folder: Path) -> None:
    old, new = report("package"), written("package", "--engine", "dat.onnx", "-o", "repository", "--images")
    new["server"] = [word.replace(str(folder), "HERE") for word in new["server"]]
    assert of_then(old, new) == old


def test_the_networks_are_those_of_0_1(written: Callable[..., Any]) -> None:
    old, new = report("variants"), written("variants")
    names = [row["name"] for row in old]
    assert of_then(old, [row for row in new if row["name"] in names]) == old


def test_the_verdicts_on_lowerings_that_0_1_kept_are_read(
    written: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAT_DEPLOY_CONFIGURATIONS", "kept/configurations.json")
    old, new = report("doctor"), written("doctor")
    assert of_then(old["lowerings"], new["lowerings"]) == old["lowerings"]
    for found in (old, new):  # by where it runs
        for name in ("commit", "versions", "packages", "hardware"):
            found.pop(name)
        found["runtimes"] = dict.fromkeys(found["runtimes"])
    assert lost(old, new) == []


def test_the_choices_of_kernels_that_0_1_kept_stay_and_hold_for_the_same_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning: Any = importlib.import_module("dat_deploy.plugins.tuning")  # only a launch on a GPU reads it
    path = folder / "kept" / "configurations.json"
    old = json.loads(path.read_text())
    monkeypatch.setenv("DAT_DEPLOY_CONFIGURATIONS", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    problem, tensor = {"batch": 8, "height": 4, "width": 4}, torch.zeros(1)
    path.write_text(path.read_text().replace(_only_kernels(old), tuning.kernels_hash()))
    other = {"batch": 1, "height": 8, "width": 8}
    tuning.store("NVIDIA H200", [("deformable_sample", other, _configuration(tuning, problem, tensor), 1.0)])
    new = json.loads(path.read_text())
    assert lost(old, new) == []
    ((_, by_batch), (_, added)) = new["NVIDIA H200"]["deformable_sample"].items()
    assert added["1"] == by_batch["8"] | {"us": 1.0}


def _only_kernels(kept: Any) -> str:
    ((_, by_batch),) = kept["NVIDIA H200"]["deformable_sample"].items()
    (kernels,) = {choice["kernels"] for choice in by_batch.values()}
    return str(kernels)


def _configuration(tuning: Any, problem: dict[str, int], tensor: torch.Tensor) -> Any:
    tuning._read.cache_clear()
    found = tuning.tuned_configuration("deformable_sample", problem, tensor)
    assert (dict(found.tiles), found.num_warps, found.num_stages, found.max_registers) == ({"BLOCK": 64}, 4, 2, 128)
    return found


def test_a_file_of_settings_of_0_1_serves_an_exported_file_of_0_1(folder: Path, call_main: Call) -> None:
    """Up to the port, which is taken; behind it Ray would be started."""
    pytest.importorskip("ray", reason="the extra `serve` is not installed")
    settings = yaml.safe_load(Path("serve.yaml").read_text())
    options = {each["names"][0].removeprefix("--") for each in COMMANDS["serve"]["parameters"].values()}
    assert {name.replace("_", "-") for name in settings} >= options - {"config", "address"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = call_main("serve", "--config", "serve.yaml", "--port", port)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{port}: ")
    Path("serve.yaml").write_text("engin: dat.onnx\n")
    refused = call_main("serve", "--config", "serve.yaml", "--engine", "dat.onnx")
    assert refused.stderr.startswith("error: serve.yaml: engin: is no setting; those are ")
    known = refused.stderr.partition("those are ")[2].strip().removesuffix(".").split(", ")
    assert set(settings) <= set(known)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_0_1_takes_what_it_took(command: str) -> None:
    now = SURFACE.commands()
    assert command in now
    before, after = (commands[command]["parameters"] for commands in (COMMANDS, now))
    for name, parameter in before.items():
        said = {key: value for key, value in parameter.items() if key not in ("help", "names")}
        assert name in after
        assert of_then(said, after[name]) == said, name
        assert set(parameter["names"]) <= set(after[name]["names"]), name
    assert not [name for name in set(after) - set(before) if after[name]["required"]]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_of_0_1_takes_what_it_took(function: str) -> None:
    assert function in api.__all__
    now = SURFACE.functions()[function]
    before = FUNCTIONS[function]
    if before is None:
        assert now is None
        return
    assert of_then(before, now) == before
    assert not [name for name in set(now) - set(before) if now[name]["default"] is None]
    positional, positional_now = (
        [name for name, each in parameters.items() if each["kind"].startswith("POSITIONAL")]
        for parameters in (before, now)
    )
    assert positional_now[: len(positional)] == positional


def test_the_names_and_exit_codes_of_0_1_are_there() -> None:
    now = SURFACE.names()
    assert set(NAMES["dat_deploy"]) <= set(now["dat_deploy"])
    assert of_then(NAMES["exit_codes"], now["exit_codes"]) == NAMES["exit_codes"]
