"""What each lowering puts into the file, read from its node list.

`mini` is a small network of the blocks of tiny: four windows, of which one is shifted, and two deformable blocks.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
import pytest

from dat_deploy.errors import ExportError
from dat_deploy.export import LOWERINGS, export, read_metadata, relower
from dat_deploy.export.records import operator_records
from dat_deploy.networks.dat.variants import VARIANTS, Variant
from dat_deploy.plugins.onnx_domain import DOMAIN_NAME
from dat_deploy.plugins.specification import PLUGIN_ATTRIBUTES

INLINED = ("gather", "gridsample", "hat")
ATTRIBUTES = {
    "deformable_sample": set(),
    "deformable_attention": {"num_heads", "half_pixel_queries"},
    "window_attention": {"num_heads", "window_size", "shift_size"},
    "neighborhood_attention": {"num_heads", "kernel_size", "dilation"},
}


@pytest.fixture(scope="module")
def models(exported: Callable[[str, str, str], Path]) -> dict[str, onnx.ModelProto]:
    return {lowering: onnx.load(exported("mini", "fp32", lowering)) for lowering in LOWERINGS}


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_file_is_valid_onnx_with_the_promised_interface(models, lowering):
    model = models[lowering]
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 10
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 18
    (image,), (logits,) = model.graph.input, model.graph.output
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (image, logits)]
    assert (image.name, logits.name) == ("image", "logits")
    assert shapes == [["batch", 3, 224, 224], ["batch", 1000]]
    assert image.type.tensor_type.elem_type == logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert not any(tensor.external_data for tensor in model.graph.initializer)


EXPECTED = {
    "mini": {"window_attention": 4, "deformable_sample": 2, "deformable_attention": 2},
    "mini-pp": {"neighborhood_attention": 3, "deformable_sample": 3, "deformable_attention": 3},
}


@pytest.fixture(scope="module", params=EXPECTED)
def unlowered(request, exported) -> tuple[dict[str, int], Callable[[str], Path]]:
    """The operators that a network has, and its files."""
    return EXPECTED[request.param], lambda lowering: exported(request.param, "fp32", lowering)


@pytest.mark.parametrize("lowering", ["function", "plugin"])
def test_operators_are_single_nodes_that_carry_every_attribute(unlowered, lowering):
    expected, path = unlowered
    nodes = [node for node in onnx.load(path(lowering)).graph.node if node.domain == DOMAIN_NAME]
    assert Counter(node.op_type for node in nodes) == expected
    for node in nodes:
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert set(values) == ATTRIBUTES[node.op_type] | set(PLUGIN_ATTRIBUTES)
        assert values["plugin_namespace"] == b"dat_deploy"
        assert values["plugin_version"] == b"1"


def test_function_bodies_declare_every_attribute_and_use_standard_operators_alone(unlowered):
    expected, path = unlowered
    functions = {function.name: function for function in onnx.load(path("function")).functions}
    assert set(functions) == set(expected)
    for name, function in functions.items():
        assert set(function.attribute) == ATTRIBUTES[name] | set(PLUGIN_ATTRIBUTES)
        assert {node.domain for node in function.node} == {""}
        assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", 18)]


def test_plugin_file_has_no_body_to_fall_back_to(models):
    assert not models["plugin"].functions


@pytest.mark.parametrize("lowering", INLINED)
def test_inlined_file_holds_standard_operators_alone(models, lowering):
    model = models[lowering]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert DOMAIN_NAME not in {entry.domain for entry in model.opset_import}


def test_gridsample_file_has_two_gridsamples_a_deformable_block(models):
    assert operators(models["gridsample"])["GridSample"] == 2 * 2
    modes = {
        onnx.helper.get_attribute_value(attribute)
        for node in models["gridsample"].graph.node
        if node.op_type == "GridSample"
        for attribute in node.attribute
        if attribute.name == "mode"
    }
    assert modes == {b"bilinear"}


@pytest.mark.parametrize("lowering", ["gather", "hat"])
def test_inlined_file_has_no_gridsample(models, lowering):
    assert operators(models[lowering])["GridSample"] == 0


def test_function_bodies_have_no_gridsample(models):
    assert operators(onnx.inliner.inline_local_functions(models["function"]))["GridSample"] == 0


def test_hat_file_gathers_nothing(models):
    found = operators(models["hat"])
    assert not [name for name in found if name.startswith(("Gather", "Scatter"))]
    assert found["MatMul"] > operators(models["gridsample"])["MatMul"]


def test_gather_file_pads_and_gathers(models):
    found = operators(models["gather"])
    assert found["GatherND"] == 4 * 2  # four neighbours of each key, in two blocks
    assert found["Gather"] == 4 * 2  # four neighbours in the bias table; the table's padding is folded
    assert found["Pad"] == 2


def transposes_of(network: Variant, model: onnx.ModelProto, sample: Variant) -> int:
    """How many a network would have, by those of the same blocks of a smaller one."""
    of_body = {body.name: sum(node.op_type == "Transpose" for node in body.node) for body in model.functions}
    found: Counter[str] = Counter()
    for node in model.graph.node:
        module = re.match(r"stages\.\d\.attns\.\d", node.name)
        found[module[0] if module else node.name] += of_body.get(node.op_type, int(node.op_type == "Transpose"))
    of_block = {
        letter: found.pop(f"stages.{i}.attns.{j}")
        for i, stage in enumerate(sample.stages)
        for j, letter in enumerate(stage.blocks)
    }
    others = {name: count for name, count in found.items() if count}
    assert all(name.startswith(("patch_proj", "down_projs.", "cls_")) for name in others)
    return sum(others.values()) + sum(of_block[letter] for stage in network.stages for letter in stage.blocks)


@pytest.mark.parametrize("lowering", ["function", *INLINED])
def test_inlined_tiny_has_at_most_90_transposes(models, lowering, mini):
    inlined = onnx.inliner.inline_local_functions(models[lowering])
    assert {node.domain for node in inlined.graph.node} == {""}
    assert transposes_of(mini, models[lowering], mini) == operators(inlined)["Transpose"]
    of_tiny = {"function": 72, "gather": 60, "gridsample": 60, "hat": 68}  # counted in its files, too
    assert transposes_of(VARIANTS["tiny"], models[lowering], mini) == of_tiny[lowering]


@pytest.mark.parametrize("lowering", INLINED)
def test_windows_without_shift_are_not_rolled(models, lowering):
    rolled = {node.name.split("/")[0] for node in models[lowering].graph.node if node.op_type == "Slice"}
    assert rolled == {"stages.0.attns.1"}  # the shifted one


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_node_names_are_unique_and_say_the_module(models, lowering):
    names = [node.name for node in models[lowering].graph.node]
    assert len(names) == len(set(names))
    modules = ("patch_proj", "stages.", "down_projs.", "cls_")
    assert [name for name in names if not name.startswith(modules)] == ["ReduceMean"]  # of the network itself


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_file_lists_where_its_operators_stand(exported, lowering):
    model = ir.load(exported("mini", "fp32", lowering))
    records = operator_records(model.metadata_props)
    assert Counter(record.operator for record in records) == EXPECTED["mini"]
    values = {value.name for node in model.graph for value in node.outputs}
    for record in records:
        assert {record.output, *record.inputs.values()} <= values


def test_lowering_of_an_inlined_file_cannot_change(exported, tmp_path):
    with pytest.raises(ExportError) as error:
        relower(exported("mini", "fp32", "hat"), tmp_path / "x.onnx", "gather")
    assert str(error.value) == (
        "the operators of this file are already inlined, so its lowering cannot change. "
        "Export it again with `lowering`, or start from a file of lowering 'function' or 'plugin'."
    )
    assert not list(tmp_path.iterdir())


def test_relowered_file_is_the_one_that_export_makes(mini, exported, tmp_path):
    export(mini, tmp_path / "direct.onnx", lowering="gather")
    direct, relowered = onnx.load(tmp_path / "direct.onnx"), onnx.load(exported("mini", "fp32", "gather"))
    assert [node.name for node in direct.graph.node] == [node.name for node in relowered.graph.node]
    assert read_metadata(tmp_path / "direct.onnx") == read_metadata(exported("mini", "fp32", "gather"))
