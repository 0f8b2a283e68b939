"""The command line: its sentences and exit codes, what it leaves on the disk, and what it says to do next.

Most tests call `main` in this process. `mini` is a network of tiny's form with few, narrow blocks for 64×64 pixels.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
import onnx.helper
import pytest
import torch
import typer.main
import yaml
from PIL import ExifTags, Image
from typer.core import TyperCommand, TyperGroup

from dat_deploy import cli
from dat_deploy.export import LOWERINGS, export
from dat_deploy.images.photographs import photographs
from dat_deploy.networks.dat.checkpoint import official_state_dict_shapes
from dat_deploy.networks.dat.variants import VARIANTS, StageConfig, Variant
from dat_deploy.runners import RUNTIMES

MINI = replace(
    VARIANTS["tiny"],
    name="mini",
    image_size=(64, 64),
    trained_size=64,
    resize_size=73,
    stages=(
        StageConfig(16, "LS", 1, 4),
        StageConfig(32, "L", 1, 4),
        StageConfig(64, "D", 2, offset_groups=2, offset_kernel_size=5, offset_range_factor=2.0),
        StageConfig(128, "D", 4, offset_groups=2, offset_kernel_size=3, offset_range_factor=2.0),
    ),
)
GOLDEN = Path(__file__).parent / "golden"
ENTRY_POINT = "from dat_deploy.cli import main; main()"
RUNTIME_NAMES = "pytorch, pytorch-compile, onnxruntime, onnxruntime-cuda, openvino, openvino-bf16, tensorrt"
RUNTIME_NAMES += ", tensorrt-rtx, aotinductor"
COFFEE = photographs(3)[2]

GROUP = typer.main.get_command(cli.app)
assert isinstance(GROUP, TyperGroup)
COMMANDS = GROUP.commands


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The whole of stderr, which must be one line."""
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n")
        assert self.err.startswith("error: ")
        return self.err.removeprefix("error: ").removesuffix("\n")

    @property
    def next_words(self) -> list[str]:
        """The words after `dat-deploy` in the last line of a success; they must parse."""
        assert (self.code, self.err) == (0, "")
        prefix, dat_deploy, name, *words = shlex.split(self.out.splitlines()[-1])
        assert (prefix, dat_deploy) == ("next:", "dat-deploy")
        command = COMMANDS[name]
        assert isinstance(command, TyperCommand)
        if words != ["--help"]:
            command.make_context(name, list(words))
        return [name, *words]


Run = Callable[..., Outcome]


def less_stages(text: str) -> str:
    """What was written on stderr, but for the lines of stages that have ended; tests/test_stages.py is about those."""
    return re.sub(r"^[a-z-]+: .+, \d+\.\d s\n", "", text, flags=re.MULTILINE)


@pytest.fixture
def run(call_main: Callable[..., "subprocess.CompletedProcess[str]"]) -> Run:
    """`run("export", "--variant", "tiny")` as the shell would, with all that any library writes on stderr."""

    def run(*words: object) -> Outcome:
        done = call_main(*words)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="module")
def mini_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mini") / "mini.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "mini", MINI)
        export("mini", path)
    return path


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--variant mini` exists."""
    monkeypatch.setitem(VARIANTS, "mini", MINI)


@contextlib.contextmanager
def files_of_at_most_100_kb() -> Iterator[None]:
    """The kernel refuses the rest, as on a full disk; Python ignores the signal that would come with it.

    Not a fixture: pytest's own output may go to a file too, which must not be cut off.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def checkpoint_of(variant: Variant, path: Path, *, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in official_state_dict_shapes(variant).items()
        if not name.endswith(("relative_position_index", "attn_mask"))
    }
    torch.save({"model": tensors}, path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- a mistake is one sentence and exit code 1 ---

MISTAKES = {
    "unknown variant": (
        ["export", "--variant", "tinny", "--output", "{folder}/out.onnx"],
        "no variant 'tinny'. Did you mean tiny or pp-tiny? Variants: {variants}.",
    ),
    "unknown variant, several near": (
        ["export", "--variant", "base384", "--output", "{folder}/out.onnx"],
        "no variant 'base384'. Did you mean base-384 or pp-base-384 or base? Variants: {variants}.",
    ),
    "no variant": (
        ["export", "--output", "{folder}/out.onnx"],
        "export takes one of --variant NAME, --config FILE.yaml and --from FILE. Variants: {variants}.",
    ),
    "unknown lowering": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--lowering", "hats"],
        "no lowering 'hats'. Lowerings: function, plugin, gather, gridsample, hat.",
    ),
    "opset 20": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--opset", "20"],
        "opset 20 is not supported; it takes 17, 18 or 19. From opset 20 on, TensorRT up to 11.1 reads GridSample's "
        "'linear' as nearest (NVIDIA/TensorRT#4646). Use --opset 18.",
    ),
    "batch is no number": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--batch", "many"],
        "--batch got 'many'; it takes a number, or 'dynamic'.",
    ),
    "batch 0": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--batch", "0"],
        "batch 0 is not possible; give a number from 1, or 'dynamic'.",
    ),
    "image size between two": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--image-size", "300"],
        "image size 300x300 does not fit variant 'tiny': its windows tile only sides that are multiples of 224 px. "
        "Nearest that work: 224x224 or 448x448.",
    ),
    "image size of one wrong side": (
        ["export", "--variant", "base-384", "--output", "{folder}/out.onnx", "--image-size", "384x400"],
        "image size 384x400 does not fit variant 'base-384': its windows tile only sides that are multiples of 384 px. "
        "Nearest that work: 384x384 or 384x768.",
    ),
    "image size is no number": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--image-size", "large"],
        "--image-size got 'large'; it takes a side such as 448, or HEIGHTxWIDTH.",
    ),
    "image size of three sides": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--image-size", "3x224x224"],
        "--image-size got '3x224x224'; it takes a side such as 448, or HEIGHTxWIDTH.",
    ),
    "missing checkpoint": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--checkpoint", "{folder}/missing.pth"],
        "cannot read {folder}/missing.pth: No such file or directory.",
    ),
    "not a checkpoint": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--checkpoint", "{folder}/notes.txt"],
        "{folder}/notes.txt is not a checkpoint: neither torch.save nor safetensors wrote it.",
    ),
    "missing output folder": (
        ["export", "--variant", "tiny", "--output", "{folder}/missing/out.onnx"],
        "folder {folder}/missing does not exist; make it first: mkdir -p {folder}/missing",
    ),
    "output is a folder": (
        ["export", "--variant", "tiny", "--output", "{folder}"],
        "{folder} is a folder; give a file name, such as {folder}/output.",
    ),
    "output exists": (
        ["export", "--variant", "tiny", "--output", "{folder}/notes.txt"],
        "{folder}/notes.txt exists; pass --force to replace it, or choose another name.",
    ),
    "relowering with a setting that needs an export": (
        ["export", "--from", "{mini}", "--output", "{folder}/out.onnx", "--batch", "4"],
        "--from changes nothing but --lowering; every other option needs a new export, without --from.",
    ),
    "variant and configuration": (
        ["export", "--variant", "tiny", "--config", "{folder}/dat.yaml", "--output", "{folder}/out.onnx"],
        "export takes one of --variant NAME, --config FILE.yaml and --from FILE. Variants: {variants}.",
    ),
    "missing configuration": (
        ["export", "--config", "{folder}/dat.yaml", "--output", "{folder}/out.onnx"],
        "cannot read {folder}/dat.yaml: No such file or directory.",
    ),
    "configuration of another ending": (
        ["export", "--config", "{folder}/notes.txt", "--output", "{folder}/out.onnx"],
        "--config got '{folder}/notes.txt'; it takes a .yaml file of LeapLabTHU/DAT or like it.",
    ),
    "size that DAT++ does not take": (
        ["export", "--variant", "pp-tiny", "--output", "{folder}/out.onnx", "--image-size", "230x32"],
        "image size 230x32 does not fit variant 'pp-tiny': its sides are multiples of 32 px, from 64 px on. "
        "Nearest that work: 224x64 or 256x64.",
    ),
    "dynamic size of a network with windows": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--image-size", "dynamic"],
        "variant 'tiny' cannot have a dynamic image size: its windows and bias tables are made for one. "
        "Export it once for each with --image-size HEIGHTxWIDTH.",
    ),
    "sampling locations of a dynamic size": (
        [
            "export",
            "--variant",
            "pp-tiny",
            "-o",
            "{folder}/out.onnx",
            "--image-size",
            "dynamic",
            "--sampling-locations",
        ],
        "--sampling-locations needs a fixed image size, since the number of points follows from it. "
        "Give --image-size HEIGHTxWIDTH.",
    ),
    "features that are no stages": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--features", "1,4"],
        "features 1,4 are not stages of 'tiny'; they are some of 0,1,2,3, in this order, each once.",
    ),
    "features that are no numbers": (
        ["export", "--variant", "tiny", "--output", "{folder}/out.onnx", "--features", "all"],
        "--features got 'all'; it takes numbers such as 0,1,2,3.",
    ),
    "features of a file": (
        ["bench", "--engine", "{mini}", "--features", "0"],
        "--features is for pytorch:VARIANT, but {mini} holds its own; leave the option out.",
    ),
    "another size of a fixed file": (
        ["validate", "--engine", "{mini}", "--image-size", "320"],
        "{mini} is made for images of 64x64, not 320x320. Export it again with --image-size 320x320.",
    ),
    "missing engine file": (
        ["validate", "--engine", "{folder}/tiny.onnx"],
        "there is no file {folder}/tiny.onnx. Export one with: dat-deploy export --variant tiny --output tiny.onnx",
    ),
    "engine of no known kind": (
        ["validate", "--engine", "{folder}/tiny.pt"],
        "cannot tell what runs '{folder}/tiny.pt'; an engine is FILE.onnx, FILE.engine, FILE.pt2 or "
        f"RUNTIME:TARGET, such as pytorch:tiny or openvino:tiny.onnx. Runtimes: {RUNTIME_NAMES}.",
    ),
    "unknown runtime": (
        ["validate", "--engine", "openvinno:{mini}"],
        f"no runtime 'openvinno' in 'openvinno:{{mini}}'. Did you mean openvino or openvino-bf16? "
        f"Runtimes: {RUNTIME_NAMES}.",
    ),
    "runtime without target": (
        ["validate", "--engine", "openvino:"],
        "'openvino:' names no target; write openvino:FILE.onnx",
    ),
    "not an ONNX file": (
        ["validate", "--engine", "onnxruntime:{folder}/notes.txt"],
        "{folder}/notes.txt is not an ONNX file, or it is truncated. Export it again.",
    ),
    "truncated ONNX file": (
        ["validate", "--engine", "{folder}/truncated.onnx"],
        "{folder}/truncated.onnx is not an ONNX file, or it is truncated. Export it again.",
    ),
    "ONNX file of another tool": (
        ["validate", "--engine", "{folder}/foreign.onnx"],
        "{folder}/foreign.onnx was not exported by dat-deploy: it has no dat_deploy.* metadata. Export it with: "
        "dat-deploy export --variant VARIANT --output foreign.onnx",
    ),
    "validating batch 0": (
        ["validate", "--engine", "{mini}", "--batch", "1,0"],
        "batches [1, 0] are not possible; give numbers from 1, such as 1,2,3,8.",
    ),
    "a list with a gap": (
        ["validate", "--engine", "{mini}", "--batch", "1,,2"],
        "--batch got ''; it takes numbers such as 1,8,32.",
    ),
    "missing image": (
        ["classify", "{folder}/missing.png", "--engine", "{mini}"],
        "image '{folder}/missing.png' does not exist; accepted are BMP, GIF, JPEG, PNG, PPM, TIFF and WEBP files. "
        "Check the path.",
    ),
    "unreadable image": (
        ["classify", "{folder}/notes.txt", "--engine", "{mini}"],
        "image '{folder}/notes.txt' is no image that can be read: it starts with b'root:x:0'; accepted are BMP, GIF, "
        "JPEG, PNG, PPM, TIFF and WEBP files. Convert it to PNG or JPEG, or copy it again.",
    ),
    "checkpoint for a file that is only called like PyTorch": (
        ["bench", "--engine", "pytorch_tiny.onnx", "--checkpoint", "{folder}/notes.txt"],
        "--checkpoint is for pytorch:VARIANT, but pytorch_tiny.onnx holds its own; leave the option out.",
    ),
    "no class asked for": (
        ["classify", str(COFFEE), "--engine", "{mini}", "--top", "0"],
        "top_k got k = 0; it takes 1 or more. Ask for at least one class.",
    ),
    "demo in a file": (
        ["demo", "--directory", "{folder}/notes.txt"],
        "cannot make folder {folder}/notes.txt: File exists; choose another --directory.",
    ),
    "points of an engine without them": (
        ["visualize", str(COFFEE), "--engine", "{mini}", "--output", "{folder}/out.png"],
        "{mini} gives logits and no sampling locations. Export it again with --sampling-locations to see its points.",
    ),
    "points of three engines": (
        ["visualize", str(COFFEE), *["--engine", "pytorch:tiny"] * 3, "--output", "{folder}/out.png"],
        "3 engines were named; visualize draws one, or two and their drift. Name one or two.",
    ),
    "missing record": (
        ["compare", "{folder}/a.json", "{folder}/b.json"],
        "cannot read {folder}/a.json: No such file or directory. Check the path.",
    ),
}


@pytest.mark.parametrize(("words", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_whole_sentence_and_exit_code_1(
    words: list[str], sentence: str, run: Run, mini_onnx: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("root:x:0:0 - in rich's markup :x: is an emoji\n")
    (tmp_path / "truncated.onnx").write_bytes(mini_onnx.read_bytes()[:3000])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), tmp_path / "foreign.onnx")
    before = names(tmp_path)
    outcome = run(*(word.format(folder=tmp_path, mini=mini_onnx) for word in words))
    assert outcome.error == sentence.format(folder=tmp_path, mini=mini_onnx, variants=", ".join(VARIANTS))
    assert (outcome.code, outcome.out) == (1, "")
    assert names(tmp_path) == before


def test_a_checkpoint_of_another_variant_names_the_one_it_fits(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "small.pth"
    tensors = {k: torch.zeros(1).expand(v) for k, v in official_state_dict_shapes(VARIANTS["small"]).items()}
    torch.save({k: v for k, v in tensors.items() if not k.endswith(("_index", "_mask"))}, path)
    outcome = run("export", "--variant", "tiny", "--checkpoint", path, "--output", tmp_path / "out.onnx")
    assert outcome.error == (
        f"{path} is not a checkpoint of variant 'tiny': unknown: stages.2.layer_norms.12.norm.weight (384), "
        "stages.2.layer_norms.12.norm.bias (384), stages.2.layer_norms.13.norm.weight (384) and 207 more. "
        "It fits variant 'small'; use --variant small."
    )
    assert outcome.code == 1
    assert names(tmp_path) == ["small.pth"]


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize("command", ["export", "convert"])
def test_a_truncated_checkpoint_is_named(command: str, run: Run, tmp_path: Path) -> None:
    path, output = checkpoint_of(MINI, tmp_path / "mini.pth"), tmp_path / "output"
    path.write_bytes(path.read_bytes()[:100_000])
    words = {"export": ["--variant", "mini", "--checkpoint", path, "--output", output], "convert": [path, output]}
    outcome = run(command, *words[command])
    assert outcome.error == f"{path} is damaged or incomplete: File is not a zip file."
    assert outcome.code == 1
    assert names(tmp_path) == ["mini.pth"]


def test_a_hostile_checkpoint_is_refused_and_does_not_run(run: Run, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {shlex.quote(str(tmp_path / 'canary'))}",)

    path = tmp_path / "evil.pth"
    torch.save({"model": {}, "config": Hostile()}, path)
    outcome = run("export", "--variant", "tiny", "--checkpoint", path, "--output", tmp_path / "out.onnx")
    assert outcome.error == (
        f"refused to load {path}: it asks for the Python object 'posix.system', which a checkpoint does not need. "
        "If you trust its source, save its state dict alone, with torch.save or safetensors."
    )
    assert outcome.code == 1
    assert names(tmp_path) == ["evil.pth"]


@pytest.mark.usefixtures("mini")
def test_validating_against_other_weights_names_both(run: Run, mini_onnx: Path, tmp_path: Path) -> None:
    path = checkpoint_of(MINI, tmp_path / "mini.pth")
    outcome = run("validate", "--engine", mini_onnx, "--checkpoint", path)
    pattern = (
        rf"{re.escape(str(mini_onnx))} holds the weights of seeded random weights \(seed 0\) "
        r"\(sha256 (?P<own>[0-9a-f]{12})\), the PyTorch side those of mini\.pth \((?P<other>[0-9a-f]{12})\)\. "
        r"Pass the same --checkpoint that it was exported with\."
    )
    found = re.fullmatch(pattern, outcome.error)
    assert found is not None, outcome.error
    assert found["own"] != found["other"]
    assert outcome.code == 1


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_plugin_lowering_is_refused_where_nothing_runs_it(
    runtime: str, run: Run, mini_onnx: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plugin.onnx"
    run("export", "--from", mini_onnx, "--lowering", "plugin", "--output", path)
    outcome = run("classify", COFFEE, "--engine", f"{runtime}:{path}")
    assert outcome.error == (
        f"{runtime}:{path} has lowering 'plugin': its operators have no body, so only TensorRT with the plugins runs "
        "it. Export it with --lowering function."
    )
    assert outcome.code == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["bisect"], "'--engine'"),
        (["classify", "--engine", "tiny.onnx"], "'image'"),
        (["export", "--opset", "new"], "'--opset'"),
        (["export", "--varant", "tiny"], "--varant"),
        (["exprt"], "'exprt'"),
    ],
    ids=["missing-option", "missing-argument", "wrong-type", "unknown-option", "unknown-command"],
)
def test_wrong_usage_is_a_user_error_and_not_a_wrong_answer(words: list[str], named: str, run: Run) -> None:
    outcome = run(*words)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("Usage: dat-deploy ")
    assert outcome.err.splitlines()[-1].startswith("Error: ")  # the rest of it is typer's
    assert named in outcome.err.splitlines()[-1]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("a bug")

    monkeypatch.setattr("dat_deploy.export.export", bug)
    monkeypatch.setattr(sys, "argv", ["dat-deploy", "export", "--variant", "tiny"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


# --- what this environment cannot do is exit code 3 ---


def test_a_runtime_that_is_not_installed_is_exit_code_3(
    run: Run, mini_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    outcome = run("classify", COFFEE, "--engine", f"openvino:{mini_onnx}")
    assert outcome.error == (
        "openvino cannot run here: package openvino is not installed: pip install 'dat-deploy[openvino]'"
    )
    assert outcome.code == 3


def test_a_runtime_without_its_device_is_exit_code_3(
    run: Run, mini_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    outcome = run("classify", COFFEE, "--engine", f"onnxruntime-cuda:{mini_onnx}")
    assert outcome.error == (
        "onnxruntime-cuda cannot run here: the installed onnxruntime has no CUDA: "
        "pip install 'dat-deploy[onnxruntime-gpu]'"
    )
    assert outcome.code == 3


# --- a wrong answer is exit code 2 ---


def negated_head(source: Path, path: Path) -> Path:
    """The file with the sign of one weight matrix turned, and the metadata of the right one."""
    model = onnx.load(source)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "cls_head.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, path)
    return path


VERDICT = (
    r"{} differs from pytorch:mini: {} of 18 checks failed, first 'photographs' at batch 1 with an error of "
    r"[\d.e-]+(?: spread)? where [\d.e-]+(?: spread)? is allowed\."
)


@pytest.mark.usefixtures("mini")
def test_an_engine_that_answers_wrongly_is_exit_code_2(run: Run, mini_onnx: Path, tmp_path: Path) -> None:
    right, report = tmp_path / "right.onnx", tmp_path / "report.json"
    run("export", "--from", mini_onnx, "--lowering", "hat", "--output", right)
    wrong = negated_head(right, tmp_path / "wrong.onnx")
    outcome = run("validate", "--engine", wrong, "--batch", "1", "--image", COFFEE, "--json", report)
    assert re.fullmatch(VERDICT.format(re.escape(str(wrong)), 6), outcome.error), outcome.error
    assert outcome.code == 2
    assert outcome.out.count("FAILED") == 6
    assert outcome.out.splitlines()[-1] == f"next: dat-deploy bisect --engine {wrong}"
    written = json.loads(report.read_text())
    assert (written["passed"], written["verdict"]) == (False, outcome.error)


@pytest.mark.usefixtures("mini")
def test_a_right_engine_passes_and_fails_only_at_an_absurd_tolerance(run: Run, mini_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "a:b" / "mini.onnx"  # only the first colon ends the runtime's name
    path.parent.mkdir()
    shutil.copy(mini_onnx, path)
    engine = f"onnxruntime:{path}"
    words = ["validate", "--engine", engine, "--batch", "1", "--image", COFFEE]
    outcome = run(*words, "--json", tmp_path / "report.json")
    assert outcome.next_words == ["bench", "--engine", "pytorch:mini", "--engine", engine]
    verdict = outcome.out.splitlines()[-2]
    pattern = r"{} agrees with pytorch:mini: 18 checks passed, the worst is '[^']+' at [\d.]+% of what is allowed\."
    assert re.fullmatch(pattern.format(re.escape(engine)), verdict), verdict
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["passed"], written["verdict"]) == (True, verdict)

    outcome = run(*words, "--tolerance", "1e-12")
    assert re.fullmatch(VERDICT.format(re.escape(engine), 5), outcome.error), outcome.error
    assert outcome.code == 2


# --- nothing is left behind ---

HALF = b"half of a file"


def test_an_export_to_a_full_disk_leaves_nothing(run: Run, mini_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    with files_of_at_most_100_kb():
        outcome = run("export", "--from", mini_onnx, "--lowering", "hat", "--output", path)
    assert outcome.error == f"cannot write {path}: File too large; free some space or choose another folder."
    assert (outcome.code, outcome.out) == (1, "")
    assert names(tmp_path) == []


@pytest.mark.usefixtures("mini")
def test_a_conversion_to_a_full_disk_leaves_nothing(run: Run, tmp_path: Path) -> None:
    source = checkpoint_of(MINI, tmp_path / "mini.pth")
    path = tmp_path / "out.safetensors"
    with files_of_at_most_100_kb():
        outcome = run("convert", source, path)
    assert outcome.error == f"cannot write {path}: File too large; free some space or choose another folder."
    assert (outcome.code, outcome.out) == (1, "")
    assert names(tmp_path) == ["mini.pth"]


@pytest.mark.parametrize(
    ("interruption", "code", "word"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), 130, "interrupted"),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, "terminated"),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt), 130, "interrupted"),
    ],
    ids=["SIGINT", "SIGTERM", "KeyboardInterrupt"],
)
def test_an_export_interrupted_while_it_writes_leaves_nothing(
    interruption: Callable[[], object],
    code: int,
    word: str,
    run: Run,
    mini_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def interrupted_save(_: object, path: Path) -> None:
        path.write_bytes(HALF)
        seen.extend(names(tmp_path))
        interruption()

    monkeypatch.setattr(onnx, "save", interrupted_save)
    outcome = run("export", "--from", mini_onnx, "--lowering", "hat", "--output", tmp_path / "out.onnx")
    assert (outcome.code, outcome.error, outcome.out) == (code, word, "")
    assert len(seen) == 1
    assert seen[0].endswith(".part")
    assert names(tmp_path) == []


# Says when the network is to be captured, which is where an export spends its time, and waits there to be stopped.
EXPORT_THAT_TELLS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
import dat_deploy.export.onnx_model as library

def announced(*arguments, **settings):
    print("capturing", flush=True)
    time.sleep(60)  # torch itself may lose an exception that comes while it captures

library.onnx_from_model = announced
from dat_deploy.cli import main
main()
"""


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_an_interrupted_export_leaves_nothing_and_prints_no_traceback(
    number: signal.Signals, word: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", EXPORT_THAT_TELLS, "export", "--variant", "demo", "--output", "demo.onnx"]
    with subprocess.Popen(  # noqa: S603  # our own interpreter and code
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "capturing\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, less_stages(err)) == (128 + number, "", f"error: {word}\n")
    assert names(tmp_path) == []


def test_an_interruption_that_a_library_loses_is_still_one(
    run: Run, mini_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:  # torch 2.13 does this when the signal comes while it imports torch._dynamo
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit:
            raise AttributeError("module 'torch._dynamo' has no attribute 'exc'") from None

    monkeypatch.setattr(onnx, "save", lost)
    outcome = run("export", "--from", mini_onnx, "--output", tmp_path / "out.onnx")
    assert (outcome.code, outcome.error) == (143, "terminated")
    assert names(tmp_path) == []


# --- --help is quick, and every command has the same manners ---


def test_help_takes_under_0_4_s() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", ENTRY_POINT, "--help"]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603  # our own interpreter and code
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert statistics.median(seconds() for _ in range(3)) < 0.4  # of a processor, whoever else is busy


@pytest.mark.parametrize("words", [["--help"], ["export", "--help"], ["variants"], ["export", "--variant", "tinny"]])
def test_what_needs_no_network_loads_neither_torch_nor_a_runtime(words: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxscript', 'numpy', 'PIL', 'onnxruntime', 'openvino'}\n"
        "atexit.register(lambda: print('loaded:', sorted(heavy & set(sys.modules))))\n" + ENTRY_POINT
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603  # our own code
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, run: Run) -> None:
    outcome = run(name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].startswith(f"Usage: dat-deploy {name} ")
    assert lines[2].strip()  # what it does
    assert all(option.help for option in COMMANDS[name].params if option.name != "help"), name


# demo replaces the files in its own folder; serve ends when it is told to, without a result
@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"demo", "serve"}))
def test_every_command_takes_json_and_force(name: str) -> None:
    options = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
    assert {"--json", "--force"} <= options


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize(
    "name",
    [
        "variants",
        "convert",
        "export",
        "quantize",
        "build",
        "inspect",
        "validate",
        "bisect",
        "bench",
        "compare",
        "classify",
        "visualize",
        "doctor",
    ],
)
def test_no_command_overwrites_a_json_file_without_force(
    name: str, run: Run, mini_onnx: Path, record: Path, tmp_path: Path
) -> None:
    words = {
        "convert": [checkpoint_of(MINI, tmp_path / "mini.pth"), tmp_path / "out.safetensors"],
        "export": ["--variant", "mini", "--output", tmp_path / "out.onnx"],
        "quantize": [mini_onnx, "--data", tmp_path, "--output", tmp_path / "out.onnx"],
        "build": [mini_onnx, "--backend", "tensorrt-rtx", "--output", tmp_path / "out.engine"],
        "inspect": [mini_onnx],
        "validate": ["--engine", mini_onnx],
        "bisect": ["--engine", mini_onnx],
        "bench": ["--engine", mini_onnx],
        "compare": [record, record],
        "classify": [COFFEE, "--engine", mini_onnx],
        "visualize": [COFFEE, "--engine", "pytorch:mini", "--output", tmp_path / "out.png"],
    }
    path = tmp_path / "mine.json"
    path.write_text("mine")
    outcome = run(name, *words.get(name, []), "--json", path)
    assert outcome.error == f"{path} exists; pass --force to replace it, or choose another name."
    assert outcome.code == 1
    assert path.read_text() == "mine"
    assert not {"out.safetensors", "out.onnx", "out.engine", "out.png"} & set(
        names(tmp_path)
    )  # refused before the work
    if name in ("variants", "inspect", "compare", "classify", "doctor"):
        run(name, *words.get(name, []), "--json", path, "--force")
        json.loads(path.read_text())


# --- what each command prints and does ---


def test_quantize_says_what_it_was_calibrated_on_and_names_the_file_int8(
    run: Run, mini_onnx: Path, tmp_path: Path
) -> None:
    source = tmp_path / "mini.onnx"
    shutil.copy(mini_onnx, source)
    shutil.copy(COFFEE, tmp_path)
    (tmp_path / "half.png").write_bytes(COFFEE.read_bytes()[:1000])
    outcome = run("quantize", source, "--data", tmp_path, "--images", 2, "--json", tmp_path / "report.json")
    path = tmp_path / "mini.int8.onnx"
    report = json.loads((tmp_path / "report.json").read_text())
    calibration = report["metadata"]["calibration"]
    lines = outcome.out.splitlines()
    layers = len(report["layers"])
    assert lines[0].startswith(f"{path}: mini, lowering function, int8, {layers} layers quantized, ")
    assert lines[1].startswith(f"precision: int8 {layers} nodes (")
    assert lines[2] == (
        f"calibrated on 1 images of {tmp_path.name}, sha256 {calibration['sha256'][:12]}, percentile of "
        f"onnxruntime {calibration['library_version']}"
    )
    assert lines[3] == "note: 1 of 2 images cannot be read and were left out: half.png"
    assert outcome.next_words == ["validate", "--engine", str(path), "--data", str(tmp_path)]
    again = run("quantize", source, "--data", tmp_path)
    assert (again.code, again.error) == (1, f"{path} exists; pass --force to replace it, or choose another name.")
    inspected = run("inspect", path)
    rows = dict(re.findall(r"^ (\S[\w ]*?)  +(\S.*?) *$", inspected.out, re.MULTILINE))
    assert rows["precision"] == "int8"
    assert re.match(rf"\d+; that compute: int8 {layers} nodes \(", rows["nodes"])
    assert rows["calibrated on"].startswith(f"1 images of {tmp_path.name}, percentile of onnxruntime ")


@pytest.mark.usefixtures("mini")
def test_visualize_draws_two_engines_and_prints_their_drift(run: Run, tmp_path: Path) -> None:
    exported = run("export", "--variant", "mini", "--sampling-locations", "--output", tmp_path / "points.onnx")
    assert exported.code == 0
    words = ["--engine", "pytorch:mini", "--engine", tmp_path / "points.onnx", "--output", tmp_path / "points.png"]
    outcome = run("visualize", COFFEE, *words, "--json", tmp_path / "points.json")
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out.splitlines()]
    assert [row[0] for row in rows[1:3]] == ["stages.2.attns.0", "stages.3.attns.0"]
    assert all(float(row[-1]) < 0.01 for row in rows[1:3])
    assert outcome.next_words == ["validate", "--engine", str(tmp_path / "points.onnx")]
    with Image.open(tmp_path / "points.png") as picture:
        assert picture.format == "PNG"
    blocks = json.loads((tmp_path / "points.json").read_text())["blocks"]
    assert [(block["stage"], block["block"], block["points"]) for block in blocks] == [(2, 0, 32), (3, 0, 8)]


def test_a_backbone_of_a_configuration_with_any_size_goes_all_the_way(
    run: Run, any_size: Variant, tmp_path: Path
) -> None:
    """The detector's checkpoint, its YAML file, a dynamic file, validation at two sizes, timing."""
    stages = any_size.stages
    section = json.loads((GOLDEN / "manifests" / "pp-tiny.json").read_text())["config"] | {
        "depths": [1, 1, 1, 1],
        "stage_spec": [[stage.blocks] for stage in stages],
        "dims": [stage.channels for stage in stages],
        "dim_stem": stages[0].channels,
        "heads": [stage.heads for stage in stages],
        "groups": [stage.offset_groups or -1 for stage in stages],
    }
    config = tmp_path / "detector.yaml"
    config.write_text(yaml.safe_dump({"MODEL": {"DAT": section}, "DATA": {"IMG_SIZE": 64}}))
    backbone = any_size.as_backbone((0, 1, 2, 3))
    tensors = torch.load(checkpoint_of(backbone, tmp_path / "bare.pth"))
    tensors = {f"backbone.{name}": tensor for name, tensor in tensors.get("model", tensors).items()}
    checkpoint = tmp_path / "mask_rcnn.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": tensors | {"neck.conv.weight": torch.zeros(2)}}, checkpoint)

    words = ["--config", config, "--checkpoint", checkpoint, "--features", "0,1,2,3", "--image-size", "dynamic"]
    outcome = run("export", *words, "--output", tmp_path / "backbone.onnx")
    assert outcome.code == 0, outcome.err
    assert ": detector any size, batch dynamic, lowering function" in outcome.out
    assert "note: left out of the checkpoint: neck" in outcome.out
    assert outcome.next_words[:2] == ["validate", "--engine"]
    words = ["--engine", tmp_path / "backbone.onnx", "--checkpoint", checkpoint, "--batch", "1", "--image", COFFEE]
    words += ["--skip", "stress", "--skip", "drift", "--json", tmp_path / "report.json"]
    outcome = run("validate", *words, "--image-size", "96x128,64")
    assert outcome.code == 0, outcome.err
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert {"photographs, 96x128", "photographs, 64x64", "coordinates: border"} <= {c["name"] for c in checks}
    pytorch = f"pytorch:{config}"
    words = ["--engine", pytorch, "--engine", tmp_path / "backbone.onnx", "--features", "0,1,2,3", "--image-size", "96"]
    outcome = run("bench", *words, "--checkpoint", checkpoint, "--rounds", "1", "--seconds", "0.1")
    assert outcome.code == 0, outcome.err
    assert [line.split()[0] for line in outcome.out.splitlines()[1:3]] == ["pytorch:detector.yaml", "backbone.onnx"]


def test_variants_prints_a_row_each(run: Run, tmp_path: Path) -> None:
    outcome = run("variants", "--json", tmp_path / "variants.json")
    assert outcome.next_words == ["export", "--variant", "tiny"]
    rows = [line.split() for line in outcome.out.splitlines()]
    assert rows[0] == ["variant", "family", "image", "params", "GMACs", "top-1", "checked", "on"]
    assert rows[1][:6] == ["tiny", "DAT", "224x224", "28.3M", "4.6", "82.0%"]
    assert [row[0] for row in rows[1 : 1 + len(VARIANTS)]] == list(VARIANTS)
    assert [row["name"] for row in json.loads((tmp_path / "variants.json").read_text())] == list(VARIANTS)


needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"
)


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_engine_is_built_and_inspected_without_a_gpu(run: Run, mini_onnx: Path, tmp_path: Path) -> None:
    target = tmp_path / "mini.engine"
    words = (mini_onnx, "--backend", "tensorrt-rtx", "--output", target, "--batch", "1,2-8", "--arch", "80,89")
    outcome = run("build", *words, "--json", tmp_path / "build.json")
    assert outcome.next_words == ["inspect", str(target)]
    rows = dict(re.findall(r"^ (\S[\w ]*?)  +(\S.*?) *$", outcome.out, re.MULTILINE))
    assert rows["runs on"] == "sm_80, sm_89"
    assert rows["batch"] == "1, 2-8"
    assert rows["lowering"] == "plugin, plugins in Python: needs this package where it runs"
    assert rows["plugins"] == "3 window_attention, 2 deformable_sample, 2 deformable_attention"
    assert rows["validated"] == "never"
    assert "note: no GPU is at hand to try the lowerings on; took plugin" in outcome.out
    assert names(tmp_path) == ["build.json", "mini.engine", "mini.engine.json"]
    assert json.loads((tmp_path / "build.json").read_text())["passport"]["backend"] == "tensorrt-rtx"

    inspected = run("inspect", target)
    assert inspected.next_words == ["doctor"]
    assert "layers of the built engine: not seen;" in inspected.out
    assert "needs an NVIDIA GPU" in inspected.out

    for command in (["validate"], ["bench"], ["classify", COFFEE]):
        refused = run(*command, "--engine", target)
        assert refused.code == 3
        assert "needs an NVIDIA GPU" in refused.error

    again = run("build", *words)
    assert again.error == f"{target} exists; pass --force to replace it, or choose another name."
    rebuild = json.loads((tmp_path / "mini.engine.json").read_text())["rebuild"]
    assert run(*rebuild[1:]).code == 1  # and the command in the passport works, once it is told to replace the engine
    assert run(*rebuild[1:], "--force").code == 0

    target.write_bytes(target.read_bytes()[:-1])
    for command in (["validate", "--engine"], ["inspect"]):
        refused = run(*command, target)
        assert refused.code == 1
        assert "is not the engine that mini.engine.json describes (its SHA-256 differs)" in refused.error


@pytest.mark.compiler
@pytest.mark.usefixtures("mini")
def test_a_package_is_built_validated_inspected_and_classifies(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "mini.pt2"
    outcome = run("build", "--variant", "mini", "--backend", "aotinductor", "--output", target, "--batch", "2")
    assert outcome.next_words == ["validate", "--engine", str(target)]
    assert "runs on" in outcome.out
    validated = run("validate", "--engine", target)
    assert validated.code == 0, validated.err
    inspected = run("inspect", target)
    assert re.search(r"validated +\d{4}-\d\d-\d\dT\S+: \S*mini.pt2 agrees with pytorch:mini", inspected.out)
    assert run("classify", COFFEE, "--engine", target).code == 0
    refused = run("bench", "--engine", target, "--batch", "3")
    assert refused.code == 1
    assert "was built for batch 2 and cannot run batch 3" in refused.error


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (
            ["--variant", "tiny"],
            1,
            "backend tensorrt builds from an exported file. Make one with: "
            "dat-deploy export --variant tiny --precision fp16 --output tiny.onnx",
        ),
        (
            ["MINI", "--precision", "fp16", "--device", "cuda"],
            1,
            "--precision, --device is for backend aotinductor; tensorrt builds what a file holds. Give it to: "
            "dat-deploy export",
        ),
        (
            ["--variant", "tiny", "--backend", "aotinductor", "--lowering", "gather", "--arch", "80"],
            1,
            "--lowering, --arch is for backend tensorrt and tensorrt-rtx, not for aotinductor; leave it out.",
        ),
        (
            [],
            1,
            "backend tensorrt builds from an exported file. Make one with: "
            "dat-deploy export --variant tiny --precision fp16 --output tiny.onnx",
        ),
        (
            ["x.onnx", "--backend", "aotinductor", "--variant", "tiny"],
            1,
            "AOTInductor builds from PyTorch, not from a file. Build with: "
            "dat-deploy build --variant tiny --backend aotinductor",
        ),
        (
            ["--variant", "tiny", "--backend", "aotinductor", "--batch", "1-8"],
            1,
            "an AOTInductor package has static batches, and --batch got 1-8; give each, as 1,8,32.",
        ),
        (
            ["--variant", "tiny", "--backend", "aotinductor", "--precision", "int4"],
            1,
            "no precision 'int4'. Precisions: fp32, fp16, bf16.",
        ),
        (["x.onnx", "--arch", "sm_80"], 1, "--arch got 'sm_80'; it takes numbers such as 80,86,89."),
        (
            ["MINI", "--backend", "tensorrt"],
            3,
            "backend tensorrt cannot be used here: package tensorrt is not installed: "
            "pip install 'dat-deploy[tensorrt]'",
        ),
    ],
)
def test_what_build_cannot_do_is_one_sentence(
    words: list[str],
    code: int,
    sentence: str,
    run: Run,
    mini_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "tensorrt" in words and importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed")
    monkeypatch.chdir(tmp_path)
    outcome = run("build", *(mini_onnx if word == "MINI" else word for word in words))
    assert outcome.error == sentence
    assert outcome.code == code
    assert names(tmp_path) == []


def test_doctor_prints_what_a_bug_report_needs(run: Run, tmp_path: Path) -> None:
    outcome = run("doctor", "--json", tmp_path / "doctor.json")
    assert outcome.next_words == ["demo"]
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in outcome.out.splitlines()[:-1])
    assert rows["torch"] == torch.__version__
    assert rows["onnx"] == onnx.__version__
    assert rows["python"] == sys.version.split()[0]
    assert rows["cpu"].split(", ")[-2].endswith(" cores")
    assert {"dat-deploy", "os", "onnxruntime", "openvino", "commit", "memory", "gpu"} <= set(rows)
    assert [name.removeprefix("runs ") for name in rows if name.startswith("runs ")] == list(RUNTIMES)
    assert rows["runs pytorch"] == "yes"
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert written["packages"]["torch"] == torch.__version__
    assert list(written["runtimes"]) == list(RUNTIMES)


@pytest.mark.usefixtures("mini")
def test_checkpoint_to_safetensors_to_onnx_to_classes(run: Run, tmp_path: Path) -> None:
    """The pipeline of the README: what one command writes, the next one takes, as its last line says."""
    checkpoint = checkpoint_of(MINI, tmp_path / "mini.pth")
    converted, exported, report = (tmp_path / name for name in ("mini.safetensors", "mini.onnx", "report.json"))

    outcome = run("convert", checkpoint, converted)
    assert outcome.next_words == ["export", "--variant", "mini", "--checkpoint", str(converted)]
    sha256 = re.fullmatch(rf"{converted}: variant mini, weights sha256 (\w{{12}})", outcome.out.splitlines()[0])
    assert sha256 is not None

    outcome = run(*outcome.next_words, "--output", exported, "--batch", "2", "--json", report)
    assert outcome.next_words == ["validate", "--engine", str(exported), "--checkpoint", str(converted)]
    first, precision, second, _ = outcome.out.splitlines()
    assert re.fullmatch(r"precision: fp32 \d+ nodes", precision)
    size_mb = round(exported.stat().st_size / 1e6)
    pattern = (
        rf"{exported}: mini 64x64, batch 2, lowering function, opset 18, fp32, 7 operators, \d+ nodes, "
        rf"{size_mb} MB, \d+ s"
    )
    assert re.fullmatch(pattern, first), first
    assert second == f"weights: mini.safetensors, sha256 {sha256[1]}"
    written = json.loads(report.read_text())
    assert written["metadata"]["batch"] == 2
    assert written["metadata"]["weights_sha256"].startswith(sha256[1])
    assert names(tmp_path) == ["mini.onnx", "mini.pth", "mini.safetensors", "report.json"]

    outcome = run("classify", COFFEE, COFFEE, COFFEE, "--engine", exported, "--top", "2")  # an odd count, batch 2
    assert outcome.next_words == ["bench", "--engine", str(exported)]
    lines = outcome.out.splitlines()
    assert len(lines) == 3 * 3 + 1
    assert lines[:3] == lines[3:6] == lines[6:9]
    assert lines[0] == str(COFFEE)
    assert re.fullmatch(r"\s+\d+\.\d\d%  \S.*", lines[1])


INLINED = tuple(lowering for lowering in LOWERINGS if lowering not in ("function", "plugin"))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_relowering_gives_each_form_and_refuses_what_is_inlined(
    lowering: str, run: Run, mini_onnx: Path, tmp_path: Path
) -> None:
    source = tmp_path / "mini.onnx"
    shutil.copy(mini_onnx, source)
    outcome = run("export", "--from", source, "--lowering", lowering)
    path = tmp_path / f"mini.{lowering}.onnx"
    if lowering == "plugin":  # nothing here runs it
        assert outcome.next_words == ["export", "--from", str(path), "--lowering", "function"]
    else:
        assert outcome.next_words == ["validate", "--engine", str(path)]
    assert f"lowering {lowering}, opset 18, fp32, 7 operators" in outcome.out
    model = onnx.load(path)
    operators = {node.op_type for node in model.graph.node if node.domain == "dat_deploy"}
    assert bool(operators) == (lowering not in INLINED)
    assert bool(model.functions) == (lowering == "function")
    assert ("GridSample" in {node.op_type for node in model.graph.node}) == (lowering == "gridsample")

    outcome = run("export", "--from", path, "--lowering", "function", "--output", tmp_path / "back.onnx")
    if lowering in INLINED:
        assert outcome.error == (
            "the operators of this file are already inlined, so its lowering cannot change. "
            "Export it again with --lowering, or start from a file of lowering 'function' or 'plugin'."
        )
        assert outcome.code == 1
        assert not (tmp_path / "back.onnx").exists()
    else:
        assert outcome.code == 0
        back = onnx.load(tmp_path / "back.onnx")
        assert {function.name for function in back.functions} == operators


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One picture in many forms, by name; those of a row of `SAME` hold the same pixels once they are read."""
    folder = tmp_path_factory.mktemp("pictures")
    with Image.open(COFFEE) as photograph:
        colour = photograph.convert("RGB").resize((300, 200))
    grey, few = colour.convert("L"), colour.quantize(32)
    rotated = Image.Exif()
    rotated[ExifTags.Base.Orientation] = 6  # shown turned by 90 degrees clockwise
    wide = np.asarray(grey).astype(np.uint16) * 257
    colour.save(folder / "colour.png")
    colour.transpose(Image.Transpose.ROTATE_90).save(folder / "exif rotated.png", exif=rotated)
    grey.save(folder / "grey.png")
    Image.fromarray(wide).save(folder / "16 bit.png")
    few.save(folder / "palette.png")
    few.convert("RGB").save(folder / "few colours.png")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    return {path.stem: path for path in folder.iterdir()}


SAME = [("colour", "exif rotated"), ("grey", "16 bit"), ("palette", "few colours")]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_every_kind_of_picture_is_classified(
    runtime: str, run: Run, mini_onnx: Path, pictures: dict[str, Path], tmp_path: Path
) -> None:
    report = tmp_path / "classes.json"
    outcome = run("classify", *pictures.values(), "--engine", f"{runtime}:{mini_onnx}", "--json", report)
    assert outcome.next_words == ["bench", "--engine", f"{runtime}:{mini_onnx}"]
    assert outcome.out.splitlines()[::6][: len(pictures)] == list(map(str, pictures.values()))
    assert outcome.out.splitlines()[-2] == (
        "note: the engine holds seeded random weights (seed 0), so these names mean nothing."
    )
    predictions = dict(zip(pictures, json.loads(report.read_text())["predictions"], strict=True))
    assert {len(entries) for entries in predictions.values()} == {5}
    assert all(math.isfinite(entry["probability"]) for entries in predictions.values() for entry in entries)
    for one, other in SAME:
        assert predictions[one] == predictions[other], (one, other)
    assert predictions["colour"] != predictions["grey"]


@pytest.fixture(scope="module")
def record(mini_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark record, measured through the command line in another process."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["bench", "--engine", mini_onnx, "--rounds", "2", "--seconds", "0.02", "--batch", "1,2"]
    command = [sys.executable, "-c", ENTRY_POINT, *words, "--json", "bench.json", "--plot", "bench.png"]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)  # noqa: S603  # our own code
    (folder / "stdout").write_text(done.stdout)
    assert (done.returncode, less_stages(done.stderr)) == (0, "")
    return folder / "bench.json"


def test_bench_prints_a_row_for_each_batch_and_writes_record_and_plot(record: Path) -> None:
    assert names(record.parent) == ["bench.json", "bench.png", "stdout"]
    outcome = Outcome(0, (record.parent / "stdout").read_text(), "")
    assert outcome.next_words == ["compare", "bench.json", "LATER.json"]
    rows = [line.split() for line in outcome.out.splitlines() if line.startswith(" mini.onnx ")]
    assert [row[:3] for row in rows] == [["mini.onnx", "fp32", "1"], ["mini.onnx", "fp32", "2"]]
    assert all(row[7:] == ["1.000", "1.000", "to", "1.000"] for row in rows)  # of itself
    assert [row["batch"] for row in json.loads(record.read_text())["rows"]] == [1, 2]
    with Image.open(record.parent / "bench.png") as plot:
        plot.verify()


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_measurement(
    run: Run, mini_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_deploy.benchmark.benchmark", lambda *_a, **_k: pytest.fail("it was measured"))
    outcome = run("bench", "--engine", mini_onnx, "--plot", tmp_path / "bench.svg")
    assert outcome.code == 1
    assert outcome.err == (
        f"error: {tmp_path / 'bench.svg'} does not end in .png, and plots are PNG; write {tmp_path / 'bench.png'}\n"
    )


def test_a_plot_without_matplotlib_is_refused_before_the_measurement(
    run: Run, mini_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_deploy.benchmark.benchmark", lambda *_a, **_k: pytest.fail("it was measured"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    outcome = run("bench", "--engine", mini_onnx, "--plot", tmp_path / "bench.png")
    assert outcome.error == "plots need matplotlib: pip install 'dat-deploy[plot]'"
    assert outcome.code == 3


def test_compare_prints_a_row_for_each_batch(record: Path, run: Run, tmp_path: Path) -> None:
    outcome = run("compare", record, record, "--json", tmp_path / "compared.json")
    assert outcome.next_words == ["bench", "--help"]
    rows = [line.split() for line in outcome.out.splitlines() if line.startswith(" mini.onnx ")]
    assert [(row[1], row[4]) for row in rows] == [("1", "1.000"), ("2", "1.000")]
    assert len(json.loads((tmp_path / "compared.json").read_text())["rows"]) == 2


def test_a_path_is_printed_as_it_is_and_quoted_in_the_next_command(run: Run, mini_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "a [bold] :x: [b" / "it's.onnx"  # rich's markup, an emoji's name, and what a shell splits
    path.parent.mkdir()
    outcome = run("export", "--from", mini_onnx, "--output", path)
    assert outcome.out.startswith(f"{path}: mini 64x64, ")
    assert outcome.next_words == ["validate", "--engine", str(path)]


@pytest.mark.slow  # about two minutes
def test_the_demo_runs_and_leaves_its_files(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENTRY_POINT, "demo"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)  # noqa: S603  # our own code
    assert (done.returncode, less_stages(done.stderr)) == (0, "")
    assert names(tmp_path / "demo") == [
        "ankle_boot.png",
        "bench.json",
        "bench.png",
        "demo.onnx",
        "report.html",
        "tiny.onnx",
        "validation.json",
    ]
    assert json.loads((tmp_path / "demo" / "validation.json").read_text())["passed"] is True
    steps = [re.fullmatch(r"\[(\d)/6\] \$ dat-deploy (\w+) .+", line) for line in done.stdout.splitlines()]
    commands = ["export", "validate", "bench", "export", "validate", "classify"]
    assert [step.groups() for step in steps if step] == [(str(i), name) for i, name in enumerate(commands, 1)]
    took = re.findall(r"^\[(\d)/6\] took \d+ s$", done.stdout, re.MULTILINE)
    assert took == list("123456")
    assert re.search(r"^All of it worked in \d+ s; the files are in demo\.", done.stdout, re.MULTILINE)
