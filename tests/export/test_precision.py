"""Precision lives in the graph: what a file computes in, read from its nodes, and how close it stays to PyTorch."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from PIL import Image

from dat_deploy import cli
from dat_deploy.errors import ExportError, UnsupportedError
from dat_deploy.export import LOWERINGS, export, onnx_model, read_metadata, relower
from dat_deploy.export.census import precision_census
from dat_deploy.export.lowering import function_bodies, lower
from dat_deploy.export.precision import cast_graph
from dat_deploy.export.records import operator_records
from dat_deploy.export.subgraph import operator_model
from dat_deploy.images.photographs import photographs
from dat_deploy.networks.dat.checkpoint import load_model
from dat_deploy.networks.dat.variants import VARIANTS, Variant
from dat_deploy.runners import open_runner
from dat_deploy.runners.pytorch_runner import PytorchRunner
from dat_deploy.validate import validate

BODIED = ("function", "gather", "gridsample", "hat")
HALVES = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
FLOAT = onnx.TensorProto.FLOAT

Exported = Callable[[str, str, str], Path]


def allowed_error(expected: np.ndarray) -> float:
    """2% of the spread of what PyTorch gives in float32."""
    return 0.02 * float(expected.std())


def pytorch_logits(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([model(torch.from_numpy(part)).numpy() for part in np.array_split(images, len(images))])


def logits(engine: str | Path, images: np.ndarray) -> np.ndarray:
    with open_runner(str(engine)) as runner:
        return runner(images)


def noise_of(network: Variant, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(11).standard_normal((batch, 3, *network.image_size)).astype(np.float32)


class Typed:
    """An exported file with its functions inlined, and the element type of each value as ONNX itself infers it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.records = operator_records({entry.key: entry.value for entry in model.metadata_props})
        inlined = onnx.inliner.inline_local_functions(model)
        del inlined.graph.value_info[:]  # what the file says itself
        # plugins have no types; all else is inferred strictly
        strict = all(node.domain == "" for node in inlined.graph.node)
        graph = onnx.shape_inference.infer_shapes(inlined, check_type=strict, strict_mode=strict).graph
        self.nodes = list(graph.node)
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
        self.types |= {tensor.name: tensor.data_type for tensor in graph.initializer}

    def of(self, node: onnx.NodeProto) -> set[int]:
        return {self.types[name] for name in node.output if name}

    def count(self, *op_types: str) -> Counter[int]:
        return Counter(t for node in self.nodes if node.op_type in op_types for t in self.of(node))

    def is_float(self, name: str) -> bool:
        return self.types[name] in {FLOAT, *HALVES}

    def coordinate_nodes(self) -> list[onnx.NodeProto]:
        """What computes locations, and what the operators compute of locations before they meet the features."""
        maker = {name: node for node in self.nodes for name in node.output}
        locations = {record.inputs["sampling_locations"] for record in self.records if record.operator[:3] == "def"}
        behind: set[str] = set()
        pending = sorted(locations)
        while pending:
            node = maker.get(pending.pop())
            if node is not None and node.op_type != "Conv" and node.output[0] not in behind:
                behind.update(node.output)
                pending += [name for name in node.input if self.is_float(name)]
        features = {n for r in self.records for parameter, n in r.inputs.items() if parameter != "sampling_locations"}
        coordinates = set(locations)
        found = []
        for node in self.nodes:
            if node.output[0] in behind:
                found.append(node)
            elif any(name in features and self.is_float(name) for name in node.input if name):
                features.update(node.output)
            elif coordinates.intersection(node.input):
                coordinates.update(node.output)
                found.append(node)
        return found

    def coordinates_in_half(self) -> list[str]:
        """Names of the nodes of the coordinate path that read or give a half type; the Cast that enters it may."""
        maker = {name: node for node in self.nodes for name in node.output}
        wrong = []
        for node in self.coordinate_nodes():
            enters = node.op_type == "Cast" and node.input[0] in maker and maker[node.input[0]].op_type == "Conv"
            touched = [*node.output, *([] if enters else node.input)]
            wrong += [node.name] * any(self.types[name] in HALVES for name in touched if name)
        return wrong


@pytest.fixture(scope="session")
def mini_fp16(exported: Exported) -> Callable[[str], Path]:
    """Lowering -> the small DAT in fp16."""
    return lambda lowering: exported("mini", "fp16", lowering)


@pytest.fixture(scope="module")
def typed_mini_fp16(mini_fp16: Callable[[str], Path]) -> dict[str, Typed]:
    return {lowering: Typed(onnx.load(mini_fp16(lowering))) for lowering in BODIED}


@pytest.fixture(scope="session")
def mini_pp_files(mini_pp: Variant, lowered: Callable[..., dict[str, Path]]) -> dict[str, Path]:
    """The small DAT++ in fp16 for images of 96x160, by lowering."""
    return lowered(mini_pp.with_image_size(96, 160), precision="fp16")


@pytest.fixture
def mini_graph(exported: Exported) -> Callable[[], ir.Model]:
    """A new copy of the small DAT in float32, its operators still nodes."""
    return lambda: ir.load(exported("mini", "fp32", "plugin"))


def save(model: ir.Model, path: Path) -> Path:
    """Its metadata says float32, which it no longer is."""
    ir.save(model, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return path


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_fp16_file_is_valid_onnx_with_a_float32_interface(lowering, mini_fp16):
    model = onnx.load(mini_fp16(lowering))
    onnx.checker.check_model(model, full_check=True)
    (image,), (result,) = model.graph.input, model.graph.output
    assert (image.name, result.name) == ("image", "logits")
    assert image.type.tensor_type.elem_type == result.type.tensor_type.elem_type == FLOAT
    assert read_metadata(mini_fp16(lowering)).precision == "fp16"
    typed = Typed(model)
    said = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    assert len(said) >= len(model.graph.node) - 1  # each result but the graph's own
    assert all(typed.types[name] == kind for name, kind in said.items() if typed.types.get(name))
    names = [node.name for node in model.graph.node]
    assert len(names) == len(set(names))
    assert [name for name in names if not name.startswith(("patch_proj", "stages.", "down_projs.", "cls_"))] == [
        "ReduceMean",
        "Cast",
    ]


def test_fp16_agrees_with_pytorch_on_104_views_of_photographs(mini, mini_fp16):
    views = []
    for path in photographs():
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        width, height = photo.size
        side = min(width, height) * 3 // 4
        for left, top in ((0, 0), (width - side, 0), (0, height - side), (width - side, height - side)):
            crop = photo.resize((224, 224), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
            views += [np.asarray(crop), np.asarray(crop)[:, ::-1]]
    about = mini.preprocessing
    images = ((np.stack(views) / 255 - about.mean) / about.std).transpose(0, 3, 1, 2).astype(np.float32)
    assert len(images) == 104
    expected = pytorch_logits(load_model(mini), images)
    with open_runner(str(mini_fp16("function"))) as runner:
        got = np.concatenate([runner(part) for part in np.array_split(images, 13)])
    assert np.abs(got - expected).max() <= allowed_error(expected)
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.99


@pytest.mark.parametrize("lowering", BODIED)
def test_every_lowering_of_fp16_dat_agrees_with_pytorch(lowering, mini, mini_fp16, noise):
    expected = pytorch_logits(load_model(mini), noise[:3])
    error = np.abs(logits(mini_fp16(lowering), noise[:3]) - expected).max()
    assert 1e-5 < error <= allowed_error(expected)  # or it would not be fp16


@pytest.fixture(scope="module", params=BODIED)
def mini_pp_fp16_dynamic(request, mini_pp_dynamic: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small DAT++ with dynamic batch and image size; cast from the float32 file, since tracing takes long."""
    path: Path = tmp_path_factory.mktemp("pp_fp16_onnx") / f"{request.param}.onnx"
    ir.save(lower(cast_graph(ir.load(mini_pp_dynamic["plugin"]), "fp16"), request.param), path)
    return path


def test_dynamic_fp16_dat_pp_agrees_with_pytorch(mini_pp_fp16_dynamic, mini_pp):
    onnx.checker.check_model(onnx.load(mini_pp_fp16_dynamic), full_check=True)
    session = onnxruntime.InferenceSession(mini_pp_fp16_dynamic)
    for batch, height, width in ((1, 224, 224), (2, 64, 96)):
        images = np.random.default_rng(2).standard_normal((batch, 3, height, width)).astype(np.float32)
        expected = pytorch_logits(load_model(mini_pp), images)
        assert np.abs(session.run(None, {"image": images})[0] - expected).max() <= allowed_error(expected)


@pytest.mark.parametrize("lowering", BODIED)
def test_every_lowering_of_fp16_dat_pp_agrees_with_pytorch(lowering, mini_pp, mini_pp_files):
    network = mini_pp.with_image_size(96, 160)
    expected = pytorch_logits(load_model(network), noise_of(network))
    assert np.abs(logits(mini_pp_files[lowering], noise_of(network)) - expected).max() <= allowed_error(expected)


@pytest.mark.parametrize("opset", [17, 19])
def test_other_opsets_agree_in_fp16(opset, mini_pp, exported, tmp_path):
    """The opset of what was traced is changed as `export` changes it, before the types are."""
    expected = pytorch_logits(load_model(mini_pp), noise_of(mini_pp))
    for lowering in BODIED:
        model = ir.load(exported("mini-pp", "fp32", "plugin"))
        onnx_model._set_opset(model, opset)
        path = save(lower(cast_graph(model, "fp16"), lowering), tmp_path / f"{lowering}.onnx")
        assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == opset
        (got,) = onnxruntime.InferenceSession(path).run(None, {"image": noise_of(mini_pp)})
        assert np.abs(got - expected).max() <= allowed_error(expected)


@pytest.mark.parametrize("lowering", BODIED)
def test_no_node_on_the_coordinate_path_is_half(lowering, typed_mini_fp16):
    typed = typed_mini_fp16[lowering]
    found = Counter(node.op_type for node in typed.coordinate_nodes())
    assert found["LayerNormalization"] == found["Erf"] == found["Tanh"] == 2  # the offsets of two blocks
    assert found["Cast"] >= 2
    assert found["Floor"] if lowering == "gather" else found["Split"] >= 4  # inside of the operators, too
    assert typed.coordinates_in_half() == []


def test_no_node_on_the_coordinate_path_of_dynamic_dat_pp_is_half(mini_pp_fp16_dynamic):
    typed = Typed(onnx.load(mini_pp_fp16_dynamic))
    found = Counter(node.op_type for node in typed.coordinate_nodes())
    assert found["LayerNormalization"] == 3
    assert found["Cast"] >= 6  # reference points of any size, from integers
    assert found["Min"] >= 3
    assert typed.coordinates_in_half() == []


@pytest.mark.parametrize(
    "rounded",
    [
        "stages.2.attns.1/Reshape_4",  # the locations
        "stages.2.attns.1.conv_offset.act/Erf",
        "stages.2.attns.1/deformable_sample/Relu",  # weights of the interpolation
    ],
)
def test_coordinate_check_sees_a_value_that_is_rounded_to_fp16(rounded, mini_fp16):
    model = onnx.load(mini_fp16("hat"))
    index, _ = next((i, node) for i, node in enumerate(model.graph.node) if rounded in node.output)
    for node in model.graph.node:
        node.input[:] = ["back" if name == rounded else name for name in node.input]
    model.graph.node.insert(index + 1, onnx.helper.make_node("Cast", [rounded], ["down"], "down", to=10))
    model.graph.node.insert(index + 2, onnx.helper.make_node("Cast", ["down"], ["back"], "back", to=1))
    assert {"down", "back"} <= set(Typed(model).coordinates_in_half())


@pytest.mark.parametrize("lowering", BODIED)
def test_layer_norms_softmax_and_means_are_float32_and_only_attention_multiplies_in_half(
    lowering, typed_mini_fp16, exported
):
    typed = typed_mini_fp16[lowering]
    plain = Counter(node.op_type for node in onnx.load(exported("mini", "fp32", "plugin")).graph.node)
    assert typed.count("LayerNormalization") == {FLOAT: plain["LayerNormalization"]}
    assert typed.count("ReduceMean") == {FLOAT: 1}
    assert typed.count("Softmax") == {FLOAT: 6}
    assert set(typed.count("GridSample")) <= {FLOAT}
    inside = [node for node in typed.nodes if node.op_type == "MatMul" and "proj" not in node.name]
    inside = [node for node in inside if ".linear" not in node.name and ".pointwise" not in node.name]
    assert Counter(t for node in inside for t in typed.of(node))[onnx.TensorProto.FLOAT16] == 2 * 6
    # two of the offsets, which are coordinates
    outside = Counter(
        t for node in typed.nodes if node not in inside and node.op_type == "MatMul" for t in typed.of(node)
    )
    assert outside == {onnx.TensorProto.FLOAT16: plain["MatMul"] - 2, FLOAT: 2}
    assert typed.count("Conv", "Gemm") == {onnx.TensorProto.FLOAT16: plain["Conv"] + 1}


@pytest.mark.parametrize("lowering", BODIED)
def test_attention_alone_multiplies_in_half_inside_the_operators_of_dat_pp(lowering, mini_pp_files):
    """The `hat` body of the neighborhoods selects pixels by products, and those stay in float32."""
    typed = Typed(onnx.load(mini_pp_files[lowering]))
    outputs = Counter(t for node in typed.nodes if node.op_type == "MatMul" for t in typed.of(node))
    plain = [node for node in onnx.load(mini_pp_files["plugin"]).graph.node if node.op_type == "MatMul"]
    assert outputs[onnx.TensorProto.FLOAT16] == len(plain) - 3 + 2 * 6  # three offset networks, six attentions
    assert typed.count("Softmax") == {FLOAT: 6}


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_each_value_is_cast_once_and_no_weight_at_run_time(lowering, mini_fp16):
    model = onnx.load(mini_fp16(lowering))
    weights = {tensor.name for tensor in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    read = Counter((node.input[0], node.attribute[0].i) for node in casts)
    inside = {node.name.rpartition("/")[0] for node in casts} if lowering in ("gather", "gridsample", "hat") else set()
    assert inside or set(read.values()) == {1}
    for node in casts:
        assert node.input[0] not in weights
        before = maker.get(node.input[0])
        assert before is None or before.op_type != "Cast"


def test_weights_are_stored_in_half_and_in_both_types_only_where_both_are_read(exported):
    plain, half = (
        {tensor.name: tensor for tensor in onnx.load(exported("mini", precision, "plugin")).graph.initializer}
        for precision in ("fp32", "fp16")
    )
    both = {name for name in half if name.endswith("/float16")}
    assert {name.removesuffix("/float16") for name in both} == {
        f"stages.0.mlps.0.act/{name}" for name in ("Mul/input_1", "Div/input_1", "Add/input_1")
    }
    assert set(half) - both == set(plain)
    for name, tensor in half.items():
        stays = name.endswith("relative_position_bias_table") or "norm" in name
        if ("weight" in name or "bias" in name) and "conv_offset" not in name:
            assert (tensor.data_type == FLOAT) == stays, name
    stored = {name for name, tensor in half.items() if tensor.data_type in HALVES} - both
    size, plain_size = (sum(len(tensors[name].raw_data) for name in stored) for tensors in (half, plain))
    assert 2 * size == plain_size > 0.7 * sum(len(tensor.raw_data) for tensor in plain.values())


def types_of(model: ir.Model, prefix: str) -> dict[str, ir.DataType | None]:
    return {
        str(node.name): node.outputs[0].dtype
        for node in model.graph
        if str(node.name).startswith(prefix) and node.op_type != "Cast" and node.outputs[0].dtype != ir.DataType.INT64
    }


def test_added_island_is_float32_with_all_below_it(mini, mini_graph, tmp_path):
    graph = cast_graph(mini_graph(), "fp16", fp32=["stages.3", "stages.*.attns.1"])
    kept = types_of(graph, "stages.3")
    assert len(kept) > 20
    assert set(kept.values()) == {ir.DataType.FLOAT}
    assert set(types_of(graph, "stages.0.attns.1").values()) == {ir.DataType.FLOAT}
    assert types_of(graph, "stages.0.attns.0")["stages.0.attns.0/window_attention"] == ir.DataType.FLOAT16
    images = noise_of(mini)
    expected = pytorch_logits(load_model(mini), images)
    for lowering in BODIED:  # nodes of both types share a body
        lowered = lower(ir.from_proto(ir.to_proto(graph)), lowering)
        path = save(lowered, tmp_path / f"{lowering}.onnx")
        (got,) = onnxruntime.InferenceSession(path).run(None, {"image": images})
        assert np.abs(got - expected).max() <= allowed_error(expected)
        assert lowering == "function" or "CastLike" not in {node.op_type for node in lowered.graph}


def test_removed_island_is_half_and_its_neighbours_are_not(mini_graph):
    patterns = ["stages.0.layer_norms.*", "cls_norm", "stages.2.attns.1.conv_offset"]
    graph = cast_graph(mini_graph(), "fp16", no_fp32=patterns)
    for prefix in ("stages.0.layer_norms.", "cls_norm", "stages.2.attns.1.conv_offset"):
        found = types_of(graph, prefix)
        assert found
        assert set(found.values()) == {ir.DataType.FLOAT16}, prefix
    assert set(types_of(graph, "stages.1.layer_norms.").values()) == {ir.DataType.FLOAT}
    offsets = types_of(graph, "stages.3.attns.0.conv_offset")
    assert offsets.pop("stages.3.attns.0.conv_offset.depthwise/Conv") == ir.DataType.FLOAT16
    assert set(offsets.values()) == {ir.DataType.FLOAT}
    assert types_of(graph, "stages.2.attns.1/Tanh") == {"stages.2.attns.1/Tanh": ir.DataType.FLOAT}


def test_added_island_wins_over_a_removed_one(mini_graph):
    graph = cast_graph(mini_graph(), "fp16", fp32=["stages.3"], no_fp32=["stages.*.layer_norms"])
    assert set(types_of(graph, "stages.3").values()) == {ir.DataType.FLOAT}
    assert set(types_of(graph, "stages.2.layer_norms").values()) == {ir.DataType.FLOAT16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "fp8"},
            "no precision 'fp8'. Precisions: fp32, fp16, bf16.",
        ),
        (
            {"precision": "fp32", "fp32": ["stages.3"]},
            '`fp32` and `no_fp32` change what stays in float32 in a lower precision; with `precision="fp32"` '
            'everything does. Leave them out, or add `precision="fp16"`.',
        ),
        (
            {"precision": "fp16", "fp32": ["stage.3"]},
            "`fp32` 'stage.3' names no module of this network. Did you mean stages.3 or stages.2 or stages.1? "
            "Modules are in: cls_head, cls_norm, down_projs, patch_proj, stages.",
        ),
        (
            {"precision": "fp16", "no_fp32": ["zzz"]},
            "`no_fp32` 'zzz' names no module of this network. "
            "Modules are in: cls_head, cls_norm, down_projs, patch_proj, stages.",
        ),
        (
            {"precision": "bf16", "no_fp32": ["stages.0.mlps"]},
            "`no_fp32` 'stages.0.mlps' names modules in which nothing is in float32 by default. Did you mean "
            "stages.0 or stages.3.attns or stages.3? Modules are in: cls_norm, down_projs, patch_proj, stages.",
        ),
    ],
)
def test_island_that_is_not_there_is_an_error_with_near_matches(options, message, mini_graph):
    with pytest.raises(ExportError) as error:
        cast_graph(mini_graph(), **options)
    assert str(error.value) == message


def test_weight_too_large_for_fp16_is_named_with_the_ways_out(mini_graph):
    def with_large_weight() -> ir.Model:
        model = mini_graph()
        weight = model.graph.initializers["stages.1.mlps.0.linear1.bias"]
        values = weight.const_value.numpy().copy()
        values[3] = -70000
        weight.const_value = ir.tensor(values)
        return model

    with pytest.raises(ExportError) as error:
        cast_graph(with_large_weight(), "fp16")
    assert str(error.value) == (
        "weight 'stages.1.mlps.0.linear1.bias' holds 7e+04, which float16 does not reach. Keep its module in float32 "
        'with `fp32=["stages.1.mlps.0.linear1"]`, or export with `precision="bf16"`.'
    )
    cast_graph(with_large_weight(), "bf16")
    kept = cast_graph(with_large_weight(), "fp16", fp32=["stages.1.mlps.0.linear1"])
    assert kept.graph.initializers["stages.1.mlps.0.linear1.bias"].dtype == ir.DataType.FLOAT


def test_relowered_fp16_file_is_the_one_that_export_makes(mini_pp, mini_pp_files, tmp_path):
    export(mini_pp.with_image_size(96, 160), tmp_path / "direct.onnx", lowering="gather", precision="fp16")
    direct, relowered = onnx.load(tmp_path / "direct.onnx"), onnx.load(mini_pp_files["gather"])
    assert [node.name for node in direct.graph.node] == [node.name for node in relowered.graph.node]
    assert [t.data_type for t in direct.graph.initializer] == [t.data_type for t in relowered.graph.initializer]
    assert read_metadata(tmp_path / "direct.onnx") == read_metadata(mini_pp_files["gather"])


@pytest.mark.parametrize("lowering", BODIED)
def test_float32_bodies_have_no_casts_of_data(lowering):
    for polymorphic in (False, True):
        for body in function_bodies(lowering, 18, polymorphic=polymorphic):
            like = {node.input[1] for node in body.node if node.op_type == "CastLike"}  # others are of constants
            assert (body.input[0] in like) == polymorphic


@pytest.mark.parametrize("lowering", ["function", "gather", "gridsample", "hat"])
def test_census_counts_what_onnx_infers(lowering, mini_fp16, typed_mini_fp16):
    census = precision_census(onnx.load(mini_fp16(lowering)))
    if lowering == "function":
        assert census.nodes["fp16"]["window_attention"] == 4
        assert census.nodes["fp16"]["deformable_attention"] == 2
        assert census.nodes["fp32"]["LayerNormalization"] == 19  # two a block, stem, three steps, head, two of offsets
        assert str(census) == (
            f"precision: fp16 {census.count('fp16')} nodes ({census.share('fp16'):.0%}), "
            f"fp32 {census.count('fp32')} ({census.share('fp32'):.0%}) in {census.islands} islands, "
            f"{census.casts} casts"
        )
        return
    typed = typed_mini_fp16[lowering]
    expected = Counter(t for node in typed.nodes if node.op_type != "Cast" for t in {typed.types[node.output[0]]})
    assert census.count("fp16") == expected[onnx.TensorProto.FLOAT16]
    assert census.count("fp32") == expected[FLOAT]
    assert census.share("fp16") + census.share("fp32") == pytest.approx(1)


def test_island_is_counted_once_however_many_nodes_it_has():
    text = """<ir_version: 10, opset_import: ["": 18]> g (float[2] x) => (float[2] y) {
        a = Relu(x) b = Abs(x) c = Add(a, b) h = Cast<to = 10>(c) i = Relu(h) j = Cast<to = 1>(i)
        s = Shape(x) k = Expand(j, s) y = Relu(k)
    }"""
    census = precision_census(onnx.parser.parse_model(text))
    assert (census.islands, census.casts) == (2, 2)
    assert census.nodes == {"fp16": {"Relu": 1}, "fp32": {"Relu": 2, "Abs": 1, "Add": 1, "Expand": 1}}


def test_census_of_a_float32_file_is_one_number(exported):
    assert str(precision_census(onnx.load(exported("mini", "fp32", "plugin")))) == "precision: fp32 169 nodes"


def test_fp16_backbone_gives_the_maps_and_points_of_pytorch_in_float32(mini_pp, tmp_path):
    network = mini_pp.with_image_size(128, 96).as_backbone((0, 3))
    export(network, tmp_path / "function.onnx", precision="fp16", sampling_locations=True)
    relower(tmp_path / "function.onnx", tmp_path / "hat.onnx", "hat")
    images = noise_of(network)
    with PytorchRunner(network, "pytorch:mini-pp", sampled_points=True) as reference:
        expected = reference.outputs(images)
    for lowering in ("function", "hat"):
        with open_runner(str(tmp_path / f"{lowering}.onnx")) as runner:
            got = runner.outputs(images)
        assert list(got) == list(expected)
        assert {"feature_map_0", "feature_map_3", "sampling_locations_2_0", "attention_2_0"} <= set(got)
        for name, values in got.items():
            assert values.dtype == np.float32
            assert np.abs(values - expected[name]).max() <= allowed_error(expected[name]), name
            if name.startswith("attention"):
                np.testing.assert_allclose(values.sum(axis=(2, 3)), 1, rtol=0, atol=2e-3)


@pytest.mark.parametrize("lowering", BODIED)
def test_operator_cut_out_of_an_fp16_file_has_a_float32_interface(lowering, mini_fp16):
    model = ir.load(mini_fp16(lowering))
    for record in operator_records(model.metadata_props):
        part = onnx.load_from_string(operator_model(model, record))
        onnx.checker.check_model(part, full_check=True)
        assert [value.name for value in part.graph.input] == list(record.inputs)
        assert {value.type.tensor_type.elem_type for value in (*part.graph.input, *part.graph.output)} == {FLOAT}
        casts = [node for node in part.graph.node if node.op_type == "Cast" and node.input[0] in record.inputs]
        assert {node.input[0] for node in casts} == set(record.inputs) - {"sampling_locations"}


def test_fp16_file_passes_validation(mini_pp_files):
    for engine in (mini_pp_files["gather"], f"openvino:{mini_pp_files['gather']}"):
        report = validate(str(engine), images=photographs(2), batches=[1, 2])
        assert report.passed, report.verdict
        assert max(check.tolerance for check in report.checks if check.unit in ("", "spread")) < 0.2
        assert sum(check.name.startswith("coordinates") for check in report.checks) == 4


def test_bf16_file_is_valid_and_passes_validation_where_it_runs(mini_pp, tmp_path):
    path = tmp_path / "mini.onnx"
    export(mini_pp.with_image_size(96, 160), path, precision="bf16")
    typed = Typed(onnx.load(path))
    assert typed.count("Conv") == {FLOAT: sum(node.op_type == "Conv" for node in typed.nodes)}  # see opset 22
    assert typed.count("MatMul")[onnx.TensorProto.BFLOAT16] > 20
    assert typed.coordinates_in_half() == []
    with pytest.raises(UnsupportedError) as error:
        open_runner(str(path))
    assert str(error.value).endswith(
        f"has no kernels here for the bfloat16 of {path}. Run it on OpenVINO (openvino:FILE), build it for TensorRT, "
        'or export it with `precision="fp16"`.'
    )
    report = validate(f"openvino:{path}", images=photographs(2), batches=[2])
    assert report.passed, report.verdict


def test_command_line_takes_a_precision_and_islands_and_prints_the_census(mini, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(VARIANTS, "mini", mini)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # handlers would stay for the tests that follow

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dat-deploy", *map(str, words)])
        with pytest.raises(SystemExit):
            cli.main()
        return "".join(capsys.readouterr())

    path = tmp_path / "mini.onnx"
    options = ("--precision", "fp16", "--fp32", "stages.3", "--no-fp32", "cls_norm", "--no-fp32", "patch_proj.norm")
    said = run("export", "--variant", "mini", "--output", path, *options)
    assert str(precision_census(onnx.load(path))) in said.splitlines()
    metadata = read_metadata(path)
    assert (metadata.fp32_added, metadata.fp32_removed) == (("stages.3",), ("cls_norm", "patch_proj.norm"))
    said = run("export", "--from", path, "--lowering", "hat", "--output", tmp_path / "hat.onnx")
    assert str(precision_census(onnx.load(tmp_path / "hat.onnx"))) in said.splitlines()
    assert read_metadata(tmp_path / "hat.onnx").precision == "fp16"
    refusal = "error: --from changes nothing but --lowering; every other option needs a new export, without --from.\n"
    for extra in (["--precision", "bf16"], ["--fp32", "stages.3"], ["--no-fp32", "cls_norm"]):
        assert run("export", "--from", path, "--lowering", "hat", *extra) == refusal


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("tiny", marks=pytest.mark.released),
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("small", "plus", "pp-tiny", "pp-base", "base-384")),
    ],
)
def test_every_lowering_of_the_larger_variants_agrees_in_fp16(variant, tmp_path):
    network = VARIANTS[variant]
    images = noise_of(network)
    expected = pytorch_logits(load_model(variant), images)
    plugin = tmp_path / "plugin.onnx"
    export(variant, plugin, lowering="plugin", precision="fp16")
    for lowering in BODIED:
        path = tmp_path / "lowered.onnx"
        relower(plugin, path, lowering, force=True)
        assert Typed(onnx.load(path)).coordinates_in_half() == []
        for engine in (str(path), f"openvino:{path}"):
            assert np.abs(logits(engine, images) - expected).max() <= allowed_error(expected)
