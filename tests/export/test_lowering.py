"""What each lowering puts into the file, read from its node list."""

from collections import Counter
from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
import pytest

from dat_deploy.errors import ExportError
from dat_deploy.export import LOWERINGS, export, read_metadata, relower
from dat_deploy.export.records import operator_records
from dat_deploy.plugins.onnx_domain import DOMAIN_NAME, PLUGIN_ATTRIBUTES

INLINED = ("gather", "gridsample", "hat")
ATTRIBUTES = {
    "deformable_sample": set(),
    "deformable_attention": {"num_heads", "half_pixel_queries"},
    "window_attention": {"num_heads", "window_size", "shift_size"},
    "neighborhood_attention": {"num_heads", "kernel_size", "dilation"},
}


@pytest.fixture(scope="module")
def models(tiny_onnx: dict[str, Path]) -> dict[str, onnx.ModelProto]:
    return {lowering: onnx.load(path) for lowering, path in tiny_onnx.items()}


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
    "tiny": {"window_attention": 8, "deformable_sample": 4, "deformable_attention": 4},
    "pp-tiny": {"neighborhood_attention": 12, "deformable_sample": 14, "deformable_attention": 14},
}


@pytest.fixture(scope="module", params=EXPECTED)
def unlowered(request, tiny_onnx, pp_tiny_onnx) -> tuple[dict[str, int], dict[str, Path]]:
    """The operators that a variant has, and its files."""
    return EXPECTED[request.param], {"tiny": tiny_onnx, "pp-tiny": pp_tiny_onnx}[request.param]


@pytest.mark.parametrize("lowering", ["function", "plugin"])
def test_operators_are_single_nodes_that_carry_every_attribute(unlowered, lowering):
    expected, paths = unlowered
    nodes = [node for node in onnx.load(paths[lowering]).graph.node if node.domain == DOMAIN_NAME]
    assert Counter(node.op_type for node in nodes) == expected
    for node in nodes:
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert set(values) == ATTRIBUTES[node.op_type] | set(PLUGIN_ATTRIBUTES)
        assert values["plugin_namespace"] == b"dat_deploy"
        assert values["plugin_version"] == b"1"


def test_function_bodies_declare_every_attribute_and_use_standard_operators_alone(unlowered):
    expected, paths = unlowered
    functions = {function.name: function for function in onnx.load(paths["function"]).functions}
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
    assert operators(models["gridsample"])["GridSample"] == 2 * 4
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
    assert found["GatherND"] == 4 * 4  # four neighbours of each key, in four blocks
    assert found["Gather"] == 4 * 4  # four neighbours in the bias table; the table's padding is folded
    assert found["Pad"] == 4


@pytest.mark.parametrize("lowering", ["function", *INLINED])
def test_inlined_tiny_has_at_most_90_transposes(models, lowering):
    inlined = onnx.inliner.inline_local_functions(models[lowering])
    assert {node.domain for node in inlined.graph.node} == {""}
    assert operators(inlined)["Transpose"] <= 90


@pytest.mark.parametrize("lowering", INLINED)
def test_windows_without_shift_are_not_rolled(models, lowering):
    rolled = {node.name.split("/")[0] for node in models[lowering].graph.node if node.op_type == "Slice"}
    assert rolled == {"stages.0.attns.1", "stages.1.attns.1"}  # the two shifted blocks of tiny


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_node_names_are_unique_and_say_the_module(models, lowering):
    names = [node.name for node in models[lowering].graph.node]
    assert len(names) == len(set(names))
    modules = ("patch_proj", "stages.", "down_projs.", "cls_")
    assert [name for name in names if not name.startswith(modules)] == ["ReduceMean"]  # of the network itself


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_file_lists_where_its_operators_stand(tiny_onnx, lowering):
    model = ir.load(tiny_onnx[lowering])
    records = operator_records(model.metadata_props)
    assert Counter(record.operator for record in records) == {
        "window_attention": 8,
        "deformable_sample": 4,
        "deformable_attention": 4,
    }
    values = {value.name for node in model.graph for value in node.outputs}
    for record in records:
        assert {record.output, *record.inputs.values()} <= values


def test_lowering_of_an_inlined_file_cannot_change(tiny_onnx, tmp_path):
    with pytest.raises(ExportError) as error:
        relower(tiny_onnx["hat"], tmp_path / "x.onnx", "gather")
    assert str(error.value) == (
        "the operators of this file are already inlined, so its lowering cannot change. "
        "Export it again with --lowering, or start from a file of lowering 'function' or 'plugin'."
    )
    assert not list(tmp_path.iterdir())


def test_relowered_file_is_the_one_that_export_makes(tiny_onnx, tmp_path):
    export("tiny", tmp_path / "direct.onnx", lowering="gather")
    direct, relowered = onnx.load(tmp_path / "direct.onnx"), onnx.load(tiny_onnx["gather"])
    assert [node.name for node in direct.graph.node] == [node.name for node in relowered.graph.node]
    assert read_metadata(tmp_path / "direct.onnx") == read_metadata(tiny_onnx["gather"])
