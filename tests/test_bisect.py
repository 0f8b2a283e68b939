"""bisect names the block and the operator that a fault was put into, in few runs, one tensor a run."""

import functools
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import dat_deploy.validate.bisect_search as library
from dat_deploy import cli
from dat_deploy.errors import DatDeployError, UnsupportedError, VerificationError
from dat_deploy.export import LOWERINGS, export, relower
from dat_deploy.export.boundaries import block_boundaries
from dat_deploy.export.records import operator_records
from dat_deploy.networks.dat.boundaries import network_blocks
from dat_deploy.networks.dat.checkpoint import load_model, official_state_dict_shapes
from dat_deploy.networks.dat.model import DAT
from dat_deploy.networks.dat.variants import VARIANTS, StageConfig, Variant
from dat_deploy.runners import EngineDescription, Runner, onnxruntime_runner, open_runner, openvino_runner
from dat_deploy.validate.bisect import bisect
from dat_deploy.validate.reference import Reference, open_reference

INLINED = ("gather", "gridsample", "hat")
BLOCKS = 9
LIMIT = int(2 * math.log2(BLOCKS) + 4)


@pytest.fixture(scope="module")
def network() -> Variant:
    """Every kind of block."""
    return replace(VARIANTS["demo"], name="mini-demo")


@pytest.fixture(scope="module")
def checkpoint(network: Variant, deterministic_weights: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights large enough that each of them matters."""
    state = {name: torch.zeros(shape) for name, shape in official_state_dict_shapes(network).items()}
    deterministic_weights.fill_(state)
    path = tmp_path_factory.mktemp("weights") / "mini_demo.pth"
    computed = ("relative_position_index", "attn_mask")
    torch.save({"model": {name: value for name, value in state.items() if not name.endswith(computed)}}, path)
    return path


@pytest.fixture(scope="module")
def reference(files: dict[tuple[str, str], Path], checkpoint: Path) -> Iterator[Reference]:
    """PyTorch's side, whose answers all tests share."""
    with open_runner(str(files["fp32", "function"])) as runner, open_reference(runner.description, checkpoint) as side:
        yield side


@pytest.fixture(scope="module")
def find(checkpoint: Path, reference: Reference) -> Callable[..., library.BisectReport]:
    return functools.partial(bisect, reference=reference)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is so small that threads only wait for each other."""
    for module in (onnxruntime_runner, openvino_runner):
        monkeypatch.setattr(module, "available_cores", lambda: 1)


@pytest.fixture(scope="module")
def files(network: Variant, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By precision and lowering."""
    folder = tmp_path_factory.mktemp("bisect")
    paths = {(p, low): folder / f"{p}.{low}.onnx" for p in ("fp32", "fp16", "bf16") for low in LOWERINGS}
    for (precision, lowering), path in paths.items():
        if lowering == "function":
            export(network, path, checkpoint=checkpoint, precision=precision)
        else:
            relower(paths[precision, "function"], path, lowering)
    return paths


Fault = Callable[[onnx.ModelProto], None]


def scaled(name: str, factor: float) -> Fault:
    """A weight, multiplied; by NaN, its first element alone."""

    def change(model: onnx.ModelProto) -> None:
        (weight,) = (t for t in model.graph.initializer if t.name == name)
        values = numpy_helper.to_array(weight).copy()
        if math.isnan(factor):
            values.flat[0] = np.nan
        else:
            values = (values * factor).astype(values.dtype)
        weight.CopyFrom(numpy_helper.from_array(values, name))

    return change


def shuffled(name: str) -> Fault:
    """A weight, its elements in another order."""

    def change(model: onnx.ModelProto) -> None:
        (weight,) = (t for t in model.graph.initializer if t.name == name)
        values = numpy_helper.to_array(weight)
        other = np.random.default_rng(0).permutation(values.ravel()).reshape(values.shape)
        weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(other + 0.1 * (name[-5:] == ".bias")), name))

    return change


def transposed(name: str) -> Fault:
    def change(model: onnx.ModelProto) -> None:
        (weight,) = (t for t in model.graph.initializer if t.name == name)
        values = np.ascontiguousarray(numpy_helper.to_array(weight).transpose(0, 2, 1))
        weight.CopyFrom(numpy_helper.from_array(values, name))

    return change


def gathered(place: str, axis: int, indices: list[int], readers: str = "") -> Fault:
    """A tensor, its elements in another order along one axis, for all that read it or for one operator."""

    def change(model: onnx.ModelProto) -> None:
        nodes = list(model.graph.node)
        tensor = _locations(model) if place == "locations" else place
        position = next(i for i, node in enumerate(nodes) if tensor in node.output)
        if readers:
            (reader,) = (node for node in nodes if node.op_type == readers and tensor in node.input)
            reader.input[list(reader.input).index(tensor)] = "reordered"
            source, result = tensor, "reordered"
        else:
            nodes[position].output[list(nodes[position].output).index(tensor)] = "in order"
            source, result = "in order", tensor
        model.graph.initializer.append(numpy_helper.from_array(np.array(indices), "order"))
        model.graph.node.insert(position + 1, helper.make_node("Gather", [source, "order"], [result], axis=axis))

    return change


def _locations(model: onnx.ModelProto) -> str:
    records = operator_records({entry.key: entry.value for entry in model.metadata_props})
    return next(record.inputs["sampling_locations"] for record in records if record.name.startswith(f"{D}/"))


def epsilon(node_name: str) -> Fault:
    def change(model: onnx.ModelProto) -> None:
        (node,) = (node for node in model.graph.node if node.name == node_name)
        (attribute,) = (attribute for attribute in node.attribute if attribute.name == "epsilon")
        attribute.f = 1.0

    return change


def swapped_outputs(node_name: str) -> Fault:
    """The two results of the Split that takes locations apart change places."""

    def change(model: onnx.ModelProto) -> None:
        (node,) = (node for node in model.graph.node if node.name == node_name)
        first, second = node.output
        node.output[0], node.output[1] = second, first

    return change


def faulty(source: Path, target: Path, fault: Fault) -> str:
    model = onnx.load(source)
    fault(model)
    onnx.save(model, target)
    return str(target)


D = "stages.2.attns.1"
SWAP = [1, 0]
FAULTS: dict[str, tuple[Fault, str, str]] = {
    "linear1": (scaled("stages.1.mlps.0.linear1/MatMul/input_1", 1.1), "stages.1.mlps.0: linear1", ""),
    "depthwise": (shuffled("stages.2.mlps.3.depthwise.bias"), "stages.2.mlps.3: depthwise", ""),
    "linear2": (scaled("stages.0.mlps.1.linear2/MatMul/input_1", 1.1), "stages.0.mlps.1: linear2", ""),
    "local perception": (
        shuffled("stages.1.local_perception_units.1.bias"),
        "stages.1.local_perception_units.1",
        "",
    ),
    "locations": (
        gathered("locations", 4, SWAP),
        f"{D}: conv_offset",
        "it behaves as if x and y of the locations were swapped",
    ),
    "locations of the sample": (
        gathered("locations", 4, SWAP, "deformable_sample"),
        f"{D}: deformable_sample",
        "it behaves as if x and y of the locations were swapped",
    ),
    "locations of the attention": (
        gathered("locations", 4, SWAP, "deformable_attention"),
        f"{D}: deformable_attention, bias",
        "it behaves as if x and y of the locations were swapped",
    ),
    "bias table": (shuffled(f"{D}.relative_position_bias_table"), f"{D}: deformable_attention, bias", ""),
    "no bias table": (
        scaled(f"{D}.relative_position_bias_table", 0),
        f"{D}: deformable_attention, bias",
        "it behaves as if the bias table were zero",
    ),
    "bias table transposed": (
        transposed(f"{D}.relative_position_bias_table"),
        f"{D}: deformable_attention, bias",
        "it behaves as if the bias table were transposed",
    ),
    "proj_q": (scaled(f"{D}.proj_q/MatMul/input_1", 1.5), f"{D}: proj_q", ""),
    "proj_k": (scaled(f"{D}.proj_k/MatMul/input_1", 1.5), f"{D}: proj_k", ""),
    "proj_v": (scaled(f"{D}.proj_v/MatMul/input_1", 1.5), f"{D}: proj_v", ""),
    "proj_out": (scaled(f"{D}.proj_out/MatMul/input_1", 1.5), f"{D}: proj_out", ""),
    "window": (
        gathered("stages.0.attns.1/window_attention", 3, [*range(1, 16), 0]),
        "stages.0.attns.1: window_attention",
        "",
    ),
    "neighborhood": (
        scaled("stages.1.attns.0.relative_position_bias_table", 0),
        "stages.1.attns.0: neighborhood_attention",
        "it behaves as if the bias table were zero",
    ),
    "layer norm": (epsilon("stages.2.layer_norms.4/LayerNormalization"), "stages.2.attns.2: layer_norms.4", ""),
    "patch_proj": (shuffled("patch_proj.conv2.bias"), "patch_proj: conv2", ""),
    "down_projs": (shuffled("down_projs.1.conv.weight"), "down_projs.1: conv", ""),
    "cls_head": (shuffled("cls_head.bias"), "cls_head", ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_by_block_and_operator(find, name, files, tmp_path):
    fault, place, hint = FAULTS[name]
    report = find(faulty(files["fp32", "function"], tmp_path / "wrong.onnx", fault))
    assert (report.place, report.hint) == (place, hint)
    assert report.runs == len(report.steps) <= LIMIT
    assert report.blocks == BLOCKS


@pytest.mark.parametrize("lowering", INLINED)
@pytest.mark.parametrize("operator", ["deformable_sample", "deformable_attention"])
def test_swapped_coordinates_inside_an_inlined_operator_are_named(find, operator, lowering, files, tmp_path):
    fault = swapped_outputs(f"{D}/{operator}/Split")
    report = find(faulty(files["fp32", lowering], tmp_path / "wrong.onnx", fault))
    part = ", bias" * (operator == "deformable_attention")
    assert report.place == f"{D}: {operator}{part}"
    assert report.hint == "it behaves as if x and y of the locations were swapped"
    assert report.runs <= LIMIT


@pytest.mark.parametrize("lowering", INLINED)
@pytest.mark.parametrize("name", ["linear1", "layer norm"])
def test_fault_is_named_in_every_inlined_lowering(find, name, lowering, files, tmp_path):
    fault, place, _ = FAULTS[name]
    report = find(faulty(files["fp32", lowering], tmp_path / "wrong.onnx", fault))
    assert report.place == place
    assert report.runs <= LIMIT


@pytest.mark.parametrize("lowering", ["function", "hat"])
def test_fault_in_a_float16_file_is_named(find, lowering, files, tmp_path):
    fault = scaled("stages.1.mlps.0.linear1/MatMul/input_1", 2)
    report = find(faulty(files["fp16", lowering], tmp_path / "wrong.onnx", fault))
    assert report.place == "stages.1.mlps.0: linear1"
    assert report.runs <= LIMIT


def test_operator_of_a_float16_file_is_tried_alone(find, files, tmp_path):
    fault = scaled(f"{D}.relative_position_bias_table", 0)
    report = find(faulty(files["fp16", "function"], tmp_path / "wrong.onnx", fault))
    assert (report.place, report.hint) == FAULTS["no bias table"][1:]


def test_openvino_is_bisected_on_openvino(find, files, tmp_path):
    fault, place, _ = FAULTS["linear1"]
    report = find("openvino:" + faulty(files["fp32", "function"], tmp_path / "wrong.onnx", fault))
    assert (report.place, report.engine.runtime) == (place, "openvino")


def test_nan_is_a_difference(find, files, tmp_path):
    fault = scaled("stages.2.mlps.2.linear2/MatMul/input_1", math.nan)
    report = find(faulty(files["fp32", "function"], tmp_path / "wrong.onnx", fault))
    assert report.place == "stages.2.mlps.2: linear2"
    assert math.isnan(report.steps[0].error)
    assert json.loads(report.to_json())["steps"][0]["error"] == "nan"


@pytest.mark.parametrize(("precision", "lowering"), [("fp32", "function"), ("fp32", "gather"), ("fp16", "hat")])
def test_file_that_agrees_takes_one_run_and_has_no_block(find, precision, lowering, files):
    report = find(str(files[precision, lowering]))
    assert report.agrees
    assert (report.block, report.operator, report.place, report.runs) == (None, None, "", 1)
    report.raise_if_found()
    assert f"{files[precision, lowering]} and pytorch:mini-demo agree, the worst error is " in report.finding
    assert report.finding.endswith("of what is allowed; 1 run.")


def test_file_of_a_fixed_batch_is_run_at_that(find, checkpoint, network, tmp_path):
    export(
        network, tmp_path / "fixed.onnx", checkpoint=checkpoint, batch=4
    )  # two batches for six images, the second filled up
    assert find(str(tmp_path / "fixed.onnx")).agrees
    fault, place, hint = FAULTS["no bias table"]
    report = find(faulty(tmp_path / "fixed.onnx", tmp_path / "wrong.onnx", fault))
    assert (report.place, report.hint) == (place, hint)


def test_backbone_with_points_is_bisected_from_its_first_wrong_output(checkpoint, network, tmp_path):
    backbone = replace(network, features=(1, 2, 3))
    export(backbone, tmp_path / "points.onnx", checkpoint=checkpoint, sampling_locations=True)
    for fault, place in (
        (scaled("norms.2.weight", 1.5), "norms.2"),
        (FAULTS["linear1"][0], "stages.1.mlps.0: linear1"),
        (gathered("sampling_locations_2_1", 4, SWAP), f"{D}: conv_offset"),
        (gathered("attention_2_1", 3, [1, 2, 3, 0]), f"{D}: deformable_attention"),
    ):
        report = bisect(faulty(tmp_path / "points.onnx", tmp_path / "wrong.onnx", fault), checkpoint=checkpoint)
        assert report.place == place
        assert report.runs <= LIMIT


def test_each_run_opens_one_graph_with_one_output(find, files, tmp_path, monkeypatch):
    opened: list[onnx.ModelProto] = []

    def spied(*args, **kwargs) -> Runner:
        runner = open_runner(*args, **kwargs)
        inner = runner.open_graph
        monkeypatch.setattr(
            runner, "open_graph", lambda part: (opened.append(onnx.load_from_string(part)), inner(part))[1]
        )
        return runner

    monkeypatch.setattr(library, "open_runner", spied)
    fault, place, _ = FAULTS["bias table"]
    report = find(faulty(files["fp32", "function"], tmp_path / "wrong.onnx", fault))
    assert report.place == place
    assert len(opened) == report.runs - 1  # the first is the engine itself
    assert [len(part.graph.output) for part in opened] == [1] * len(opened)
    inputs = [[value.name for value in part.graph.input] for part in opened]
    alone = ["query", "key", "value", "sampling_locations"]
    assert all(names in (["image"], alone) for names in inputs)
    assert alone in inputs


def test_what_is_named_begins_right_and_ends_wrong(find, files, tmp_path):
    fault, _, _ = FAULTS["linear1"]
    report = find(faulty(files["fp32", "function"], tmp_path / "wrong.onnx", fault))
    verdicts = {run.place: run.passed for run in report.steps}
    assert verdicts["stages.1.attns.0"] is True  # what is before the block
    assert verdicts["stages.1.mlps.0"] is False
    assert verdicts["stages.1.mlps.0: layer_norms.1"] is True
    assert verdicts["stages.1.mlps.0: linear1"] is False


def test_no_released_network_takes_more_runs_than_the_limit():
    for variant in VARIANTS.values():
        costs = tuple(library._worst_case(block) for block in network_blocks(variant))
        blocks = sum(len(stage.blocks) for stage in variant.stages)
        assert 1 + library._runs_needed(costs) <= 2 * math.log2(blocks) + 4, variant.name


def test_limit_leaves_the_operator_open_in_a_network_of_few_blocks(find, files, tmp_path, monkeypatch):
    monkeypatch.setattr(library.math, "log2", lambda x: math.log(x, 2) if x != BLOCKS else 1.0)  # as if of 2 blocks
    fault, _, _ = FAULTS["linear1"]
    report = find(faulty(files["fp32", "function"], tmp_path / "wrong.onnx", fault))
    assert (report.place, report.runs) == ("stages.1.mlps.0", 6)
    assert report.hint == "which of its operators it is would take more than 6 runs"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_metadata_names_every_boundary_in_every_lowering(precision, files):
    listed = [block_boundaries(_properties(files[precision, lowering])) for lowering in LOWERINGS]
    assert all(names == listed[0] for names in listed)
    network = VARIANTS["demo"]
    steps = [step for block in network_blocks(network) for step in block.steps if step.ends]
    assert list(listed[0]) == [step.ends for step in steps]
    for lowering in LOWERINGS:
        model = onnx.load(files[precision, lowering])
        made = {name for node in model.graph.node for name in node.output}
        # the output of the network is called as it is, and a Cast may stand before it
        assert set(listed[0].values()) <= made, lowering


@pytest.mark.parametrize(
    ("precision", "lowering"), [(p, low) for p in ("fp32", "fp16") for low in LOWERINGS if low != "plugin"]
)
def test_boundaries_hold_what_pytorch_has_there(precision, lowering, network, checkpoint, files):
    """All at once, which is for a test: here nothing is being looked for."""
    path = files[precision, lowering]
    properties = _properties(path)
    steps = {step: block for block in network_blocks(network) for step in block.steps}
    records = {tuple(r.name.split("/")): r for r in operator_records(properties)}
    tensors = {}
    for step, block in steps.items():
        if step.operator:
            tensors[step] = records[block.name, step.name].output
        elif step.side == "locations":
            tensors[step] = records[block.name, "deformable_sample"].inputs["sampling_locations"]
        else:
            tensors[step] = block_boundaries(properties)[step.ends]
    model = onnx.load(path)
    existing = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in {*tensors.values()} - existing)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((3, 64, 64)).astype(np.float32)
    names = list(tensors.values())
    got = dict(zip(names, session.run(names, {"image": image[None]}), strict=True))
    exact = library.captured(load_model(network, checkpoint), [(s.module, s.side) for s in steps], image[None])
    allowed = 1e-5 if precision == "fp32" else 2e-2
    for step, tensor in tensors.items():
        right = exact[step.module, step.side]
        assert got[tensor].shape == right.shape, step
        assert np.abs(got[tensor] - right).max() <= allowed * max(1, np.abs(right).max()), step


def _properties(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


@pytest.mark.parametrize(
    ("engine", "runtime"),
    [
        ("pytorch:tiny", "pytorch"),
        ("pytorch-compile:tiny", "pytorch-compile"),
        ("tiny.pt2", "aotinductor"),
        ("tensorrt:tiny.engine", "tensorrt"),
        ("tiny.engine", "tensorrt"),
    ],
)
def test_runtime_that_takes_no_onnx_is_refused(engine, runtime):
    with pytest.raises(UnsupportedError) as error:
        bisect(engine)
    assert str(error.value) == (
        f"{engine} cannot be bisected: that runs pieces of an ONNX file, and {runtime} takes none. "
        f"Bisect the file that it was made from: `bisect(engine='FILE.onnx')`"
    )


def test_file_without_the_list_of_boundaries_is_refused(find, files, tmp_path):
    def bare(model: onnx.ModelProto) -> None:
        kept = [entry for entry in model.metadata_props if entry.key != "dat_deploy.boundaries"]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)

    path = faulty(files["fp32", "function"], tmp_path / "bare.onnx", bare)
    with pytest.raises(DatDeployError) as error:
        find(path)
    assert str(error.value) == (
        f"{path} does not list the tensors between its blocks: it was made by another version, or edited. "
        f"Export it again with: `export(variant='mini-demo')`"
    )


def test_file_that_lost_a_tensor_or_an_operator_is_refused(find, files, tmp_path):
    def renamed(model: onnx.ModelProto) -> None:
        FAULTS["linear1"][0](model)
        (entry,) = (entry for entry in model.metadata_props if entry.key == "dat_deploy.boundaries")
        entry.value = json.dumps(dict.fromkeys(json.loads(entry.value), "nowhere"))

    path = faulty(files["fp32", "function"], tmp_path / "renamed.onnx", renamed)
    with pytest.raises(DatDeployError) as error:
        find(path)
    assert str(error.value).startswith(f"{path} lists the tensor 'nowhere' after stages.")
    assert str(error.value).endswith(
        "but has none of that name: it was edited. Export it again with: `export(variant='mini-demo')`"
    )

    def unlisted(model: onnx.ModelProto) -> None:
        FAULTS["bias table"][0](model)
        (entry,) = (entry for entry in model.metadata_props if entry.key == "dat_deploy.operators")
        entry.value = "[]"

    path = faulty(files["fp32", "function"], tmp_path / "unlisted.onnx", unlisted)
    with pytest.raises(DatDeployError) as error:
        find(path)
    assert str(error.value) == (
        f"the metadata of {path} lists no deformable_sample in {D}, so it cannot be cut out. "
        f"Export it again with: `export(variant='mini-demo')`"
    )


def test_other_weights_are_an_error(files):
    with pytest.raises(DatDeployError, match=r"Pass the same `checkpoint` that it was exported with\.$"):
        bisect(str(files["fp32", "function"]))  # whose checkpoint is left out


def test_precision_that_pytorch_lacks_needs_a_tolerance(find, files, monkeypatch):
    monkeypatch.setattr(EngineDescription, "answer_precision", "int8")
    path = files["fp32", "function"]
    with pytest.raises(DatDeployError) as error:
        find(str(path))
    assert str(error.value) == (
        f"{path} is in int8, in which PyTorch's own error is not known. Say what is allowed: `tolerance=0.01`"
    )
    assert find(str(path), tolerance=0.01).agrees


@pytest.mark.parametrize(("value", "precision"), [(math.nan, "fp32"), (1e5, "fp16")])
def test_reference_that_is_no_measure_is_an_error(checkpoint, value, precision, files, monkeypatch):
    original = library.open_reference

    def spoilt(*args):
        reference = original(*args)
        with torch.no_grad():
            reference.model.cls_head.bias[0] = value
        return reference

    monkeypatch.setattr(library, "open_reference", spoilt)
    path = files[precision, "function"]
    with pytest.raises(DatDeployError) as error:
        bisect(str(path), checkpoint=checkpoint)
    assert isinstance(error.value, VerificationError)
    assert str(error.value) == (
        "pytorch:mini-demo itself gives NaN or infinity as logits of photograph 1, so no engine can be judged by it. "
        "Check the checkpoint."
        if math.isnan(value)
        else f"eager PyTorch in fp16 overflows first in cls_head, so it cannot judge {path}; keep it in float32, "
        "`export(fp32=['cls_head'])`, or export with `precision=\"bf16\"`."
    )


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["dat-deploy", *map(str, words)])
    code = cli._run()  # main, less its signal handlers
    captured = capsys.readouterr()
    stages = r"^bisect: .+, \d+\.\d s\n"  # that have ended
    return int(code or 0), captured.out, re.sub(stages, "", captured.err, flags=re.MULTILINE)


def test_command_prints_the_runs_then_the_finding_then_what_is_next(
    find, checkpoint, files, tmp_path, capsys, monkeypatch
):
    fault, place, _ = FAULTS["linear1"]
    path = faulty(files["fp32", "function"], tmp_path / "wrong.onnx", fault)
    code, out, err = run(
        capsys, monkeypatch, "bisect", "--engine", path, "--checkpoint", checkpoint, "--json", tmp_path / "report.json"
    )
    *table, finding, following = out.splitlines()
    content = json.loads((tmp_path / "report.json").read_text())
    assert code == 2
    assert table[0].split() == ["after", "tensor", "error", "allowed", "verdict"]
    assert [row.split()[-1] for row in table[1:]] == ["ok" if step["passed"] else "WRONG" for step in content["steps"]]
    assert content["runs"] == len(table) - 1 <= LIMIT
    assert (
        finding
        == content["finding"]
        == (
            f"{path} and pytorch:mini-demo part at {place}; what goes in is right, what comes out is not; "
            f"{content['runs']} runs."
        )
    )
    assert following == f"next: dat-deploy bisect --engine openvino:{path} --checkpoint {checkpoint}"
    assert err == f"error: {path} differs from pytorch:mini-demo at {place}.\n"
    with pytest.raises(VerificationError):
        find(path).raise_if_found()


def test_command_for_a_file_that_agrees_exits_with_0(checkpoint, files, tmp_path, capsys, monkeypatch):
    path = shutil.copy(files["fp32", "function"], tmp_path / "right.onnx")
    code, out, err = run(capsys, monkeypatch, "bisect", "--engine", path, "--checkpoint", checkpoint)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"next: dat-deploy validate --engine {path} --checkpoint {checkpoint}"


def test_validate_says_to_bisect_what_differs(checkpoint, files, tmp_path, capsys, monkeypatch):
    path = faulty(files["fp32", "function"], tmp_path / "wrong.onnx", FAULTS["linear1"][0])
    code, out, _ = run(capsys, monkeypatch, "validate", "--engine", path, "--checkpoint", checkpoint, "--batch", "1")
    assert code == 2
    assert out.splitlines()[-1] == f"next: dat-deploy bisect --engine {path} --checkpoint {checkpoint}"


@pytest.mark.parametrize("letters", [*itertools.product(("L", "D"), ("N", "DN"), ("D",), ("ND",))])
def test_every_step_of_a_network_is_listed(letters):
    shared = {"window_size": 2, "neighborhood_size": 3, "offset_range_factor": -1.0, "offset_kernel_size": 3}
    stages = tuple(
        StageConfig(8 << i, blocks, 1, offset_groups=1, offset_stride=1, **shared) for i, blocks in enumerate(letters)
    )
    variant = replace(VARIANTS["demo"], stages=stages)
    model_modules = dict(DAT(variant).named_modules())
    for block in network_blocks(variant):
        assert all(step.module in model_modules for step in block.steps)
        assert all(step.ends in model_modules for step in block.steps if step.ends)
