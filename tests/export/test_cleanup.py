"""Each pass on graphs small enough to read: what it changes, and what it must leave alone."""

import onnx.parser
import onnx_ir as ir
import pytest

from dat_deploy.export.cleanup import constant_reshape_shapes, name_results, remove_identity_slices


def model(signature: str, body: str) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["": 18]> g {signature}
    <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] four = {{4}},
     int64[1] end = {{9223372036854775807}}, int64[1] minus = {{-1}}> {{ {body} }}"""
    parsed = ir.from_proto(onnx.parser.parse_model(text))
    ir.passes.common.ShapeInferencePass()(parsed)
    return parsed


def operators(graph_model: ir.Model) -> list[str]:
    from onnxscript.optimizer import remove_unused_nodes

    remove_unused_nodes(graph_model)
    return [node.op_type for node in graph_model.graph]


def test_computed_batch_in_a_shape_becomes_minus_one():
    found = model(
        "(float[b, 6] x) => (float[b, 3, 2] y)",
        "s = Shape<end = 1>(x) t = Concat<axis = 0>(s, three, two) y = Reshape<allowzero = 1>(x, t)",
    )
    assert constant_reshape_shapes(found)
    assert operators(found) == ["Reshape"]
    (reshape,) = found.graph
    assert reshape.inputs[1].const_value.numpy().tolist() == [-1, 3, 2]
    assert "allowzero" not in reshape.attributes


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        (
            "(float[b, c, 6] x) => (float[b, c, 3, 2] y)",
            "s = Shape<end = 2>(x) t = Concat<axis = 0>(s, three, two) y = Reshape(x, t)",
        ),
        (
            "(float[b, c, 6] x) => (float[b, c, 6] y)",
            "s = Shape<end = 1>(x) r = Shape<start = 1, end = 2>(x) "
            "t = Concat<axis = 0>(s, r, minus) y = Reshape(x, t)",
        ),
        (
            "(float[b, 6] x) => (float[b, 6] y)",
            "s = Shape<end = 1>(x) t = Concat<axis = 0>(s, minus) y = Reshape(x, t)",
        ),
    ],
    ids=["two sizes in one part", "two parts", "already a -1"],
)
def test_shape_of_which_more_is_computed_stays(signature, body):
    found = model(signature, body)
    assert not constant_reshape_shapes(found)


def test_roll_by_nothing_vanishes():
    found = model(
        "(float[b, 4] x) => (float[b, 4] y)",
        "a = Slice(x, zero, end, one) b = Slice(x, zero, zero, one) c = Concat<axis = 1>(a, b) y = Relu(c)",
    )
    assert remove_identity_slices(found)
    assert [node.op_type for node in found.graph] == ["Slice", "Relu"]  # the empty part, which nothing reads
    assert not remove_identity_slices(found)
    assert operators(found) == ["Relu"]


def test_roll_by_something_stays():
    found = model(
        "(float[b, 4] x) => (float[b, 4] y)",
        "a = Slice(x, one, end, one) b = Slice(x, zero, one, one) c = Concat<axis = 1>(a, b) y = Relu(c)",
    )
    assert not remove_identity_slices(found)
    assert operators(found) == ["Slice", "Slice", "Concat", "Relu"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Slice(x, zero, two, one) y = Relu(a)",
        "a = Slice(x, zero, four, one, two) y = Relu(a)",
        "a = Slice(x, minus, end, one) y = Relu(a)",
        "a = Slice(x, zero, four, zero) y = Relu(a)",
        "a = Slice(x, zero, four, , one) y = Relu(a)",  # steps are no axes
        "y = Slice(x, zero, end, one)",
    ],
    ids=["first half", "every second", "last", "axis of unknown size", "no axes", "output of the graph"],
)
def test_slice_that_must_stay_stays(body):
    found = model("(float[b, 4, 6] x) => (float[b, p, q] y)", body)
    assert not remove_identity_slices(found)


def test_concat_of_nothing_but_empty_parts_stays():
    found = model(
        "(float[b, 4] x) => (float[b, p] y)",
        "a = Slice(x, zero, zero, one) b = Slice(x, four, end, one) c = Concat<axis = 1>(a, b) y = Relu(c)",
    )
    assert not remove_identity_slices(found)


def test_empty_part_leaves_a_concat_of_the_others():
    found = model(
        "(float[b, 4] x) => (float[b, p] y)",
        "a = Slice(x, zero, zero, one) b = Slice(x, one, end, one) c = Concat<axis = 1>(x, a, b) y = Relu(c)",
    )
    assert remove_identity_slices(found)
    assert operators(found) == ["Slice", "Concat", "Relu"]
    concat = found.graph.node(1)
    assert [value.name for value in concat.inputs] == ["x", "b"]


def test_concat_that_makes_the_output_of_the_graph_stays():
    found = model(
        "(float[b, 4] x) => (float[b, p] y)",
        "a = Slice(x, zero, zero, one) b = Slice(x, one, end, one) y = Concat<axis = 1>(a, b)",
    )
    assert not remove_identity_slices(found)


def test_constants_are_called_like_the_node_that_reads_them_and_weights_keep_their_name():
    found = model("(float[b, 4] x) => (float[b, 2] y)", "s = Slice(x, zero, two, one) y = Relu(s)")
    found.graph.initializers["two"].name = "stages.0.weight"
    found.graph.node(0).name = "stages.0/Slice"
    assert name_results(found)
    read = [value.name for value in found.graph.node(0).inputs]
    assert read == ["x", "stages.0/Slice/input_1", "stages.0.weight", "stages.0/Slice/input_3"]
    assert not name_results(found)


def test_results_are_called_like_their_node_and_outputs_keep_their_name():
    found = model("(float[b, 4] x) => (float[b, 2] y)", "p, q = Split<axis = 1, num_outputs = 2>(x) y = Add(p, q)")
    split, add = found.graph
    split.name, add.name = "stages.0/Split", "stages.0/Add"
    assert name_results(found)
    assert [value.name for value in split.outputs] == ["stages.0/Split", "stages.0/Split:1"]
    assert [value.name for value in add.outputs] == ["y"]
