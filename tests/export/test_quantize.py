"""INT8: which nodes are quantized and which are not, on what, how close it stays, and what is refused."""

import hashlib
import importlib.util
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest
from PIL import Image

from dat_deploy import api
from dat_deploy.engine.tensorrt.library import Log, import_tensorrt
from dat_deploy.engine.tensorrt.network import parsed_network
from dat_deploy.environment import cpu_flags
from dat_deploy.errors import DatDeployError, ExportError, ImageError, OutputError, UnsupportedError
from dat_deploy.export import export, read_metadata, relower
from dat_deploy.export.quantize import METHODS, QuantizeReport, quantize
from dat_deploy.export.records import operator_records
from dat_deploy.images.photographs import photographs
from dat_deploy.images.preprocess import preprocess, read_image
from dat_deploy.metadata import Calibration
from dat_deploy.networks.dat.variants import VARIANTS, Variant
from dat_deploy.runners import open_runner

MINI = replace(VARIANTS["demo"], name="mini")  # with random weights, since none ship under this name
LOWERINGS = ("function", "gather", "hat")
PRODUCTS = ("MatMul", "Gemm", "Conv")
# The rounding to 127 steps of the largest magnitude, of about 4 deviations, is 1% of a tensor in the mean, for data and
# weights alike; through two products in each of a dozen residual branches that adds up to 5% of what comes out.
ALLOWED = 0.1

needs_vnni = pytest.mark.skipif(
    platform.machine() == "x86_64" and not {"avx_vnni", "avx512_vnni"} & set(cpu_flags()),
    reason="ONNX Runtime's int8 products saturate on an x86 CPU without VNNI",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures in two folders, beside what is no picture."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    random = np.random.default_rng(3)
    for index in range(24):
        path = folder / ("even" if index % 2 == 0 else "odd") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8))
        coarse.resize((40 + index, 50), Image.Resampling.BICUBIC).save(path)
    (folder / "README.txt").write_text("not a picture")
    (folder / ".hidden.png").write_text("not seen")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small network in fp32, once for each lowering."""
    folder = tmp_path_factory.mktemp("fp32")
    paths = {lowering: folder / f"{lowering}.onnx" for lowering in (*LOWERINGS, "plugin")}
    export(MINI, paths["function"])
    for lowering, path in paths.items():
        if lowering != "function":
            relower(paths["function"], path, lowering)
    return paths


@pytest.fixture(scope="module")
def reports(
    files: dict[str, Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, QuantizeReport]:
    folder = tmp_path_factory.mktemp("int8")
    return {name: quantize(files[name], folder / f"{name}.onnx", pictures, images=12) for name in LOWERINGS}


@pytest.fixture(scope="module")
def report(reports: dict[str, QuantizeReport]) -> QuantizeReport:
    return reports["function"]


class Graph:
    """A file's main graph by names."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.nodes = {node.name: node for node in self.model.graph.node}
        self.maker = {name: node for node in self.model.graph.node for name in node.output}
        self.constants = {t.name: onnx.numpy_helper.to_array(t) for t in self.model.graph.initializer}

    def made_by(self, name: str) -> str:
        return self.maker[name].op_type if name in self.maker else ""

    def quantized(self) -> set[str]:
        """Nodes that read dequantized data and weights."""
        both = ["DequantizeLinear", "DequantizeLinear"]
        return {name for name, node in self.nodes.items() if [self.made_by(i) for i in node.input[:2]] == both}

    def behind(self, name: str) -> set[str]:
        """Names of the nodes that compute a value, at any distance."""
        found: set[str] = set()
        pending = [name]
        while pending:
            node = self.maker.get(pending.pop())
            if node is not None and node.name not in found:
                found.add(node.name)
                pending += node.input
        return found


def noise(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(11).standard_normal((batch, 3, *MINI.image_size)).astype(np.float32)


def logits(engine: Path | str, images: np.ndarray) -> np.ndarray:
    with open_runner(str(engine)) as runner:
        return runner(images)


# --- which nodes ---


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_linear_layer_is_quantized_but_those_of_offsets_and_depthwise_ones(lowering, files, reports):
    source, graph = Graph(files[lowering]), Graph(reports[lowering].path)
    operators = {r.name for r in operator_records({p.key: p.value for p in source.model.metadata_props})}
    expected = {
        name
        for name, node in source.nodes.items()
        if node.op_type in PRODUCTS
        and node.input[1] in source.constants
        and not any(word in name for word in ("conv_offset", "local_perception_units", "depthwise"))
        and name.rpartition("/")[0] not in operators
    }
    assert graph.quantized() == expected == set(reports[lowering].layers)
    assert len(expected) == 50
    kinds = {"proj_q", "proj_k", "proj_v", "proj_qkv", "proj_out", "linear1", "linear2", "conv", "conv2", "cls_head"}
    assert {name.split("/")[0].split(".")[-1] for name in expected} == kinds


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_other_node_reads_what_it_read_in_float32(lowering, files, reports):
    source, graph = Graph(files[lowering]), Graph(reports[lowering].path)
    inserted = {"QuantizeLinear", "DequantizeLinear"}
    others = {name: node for name, node in graph.nodes.items() if node.op_type not in inserted}
    assert list(others) == list(source.nodes)
    for name, node in others.items():
        kept = 2 if name in reports[lowering].layers else 0
        assert list(node.input[kept:]) == list(source.nodes[name].input[kept:])
        assert (node.op_type, node.output, node.attribute) == (
            source.nodes[name].op_type,
            source.nodes[name].output,
            source.nodes[name].attribute,
        )
    kinds = {node.op_type for node in others.values()}
    assert "LayerNormalization" in kinds
    assert ("deformable_attention" if lowering == "function" else "Softmax") in kinds


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_between_queries_and_sampling_locations_nothing_is_rounded(lowering, reports):
    graph = Graph(reports[lowering].path)
    records = operator_records({p.key: p.value for p in graph.model.metadata_props})
    locations = {r.inputs["sampling_locations"]: r.name.partition("/")[0] for r in records if "sam" in str(r.inputs)}
    assert len(locations) == 4
    for value, block in locations.items():
        behind = graph.behind(value)
        own = {name for name in behind if name.startswith((f"{block}/", f"{block}.conv_offset"))}
        assert {f"{block}.conv_offset.depthwise/Conv", f"{block}.conv_offset.pointwise/MatMul"} <= own
        assert {graph.nodes[name].op_type for name in own}.isdisjoint({"QuantizeLinear", "DequantizeLinear"})
        assert f"{block}.proj_q/QuantizeLinear" in behind  # so the walk went as far as the queries


def test_functions_opset_and_everything_else_of_the_file_stay(files, reports):
    for lowering in LOWERINGS:
        source, result = onnx.load(files[lowering]), onnx.load(reports[lowering].path)
        assert result.functions == source.functions
        assert (result.ir_version, result.opset_import) == (source.ir_version, source.opset_import)
        assert result.ir_version <= 10
        assert (result.graph.input, result.graph.output) == (source.graph.input, source.graph.output)
        assert (result.producer_name, result.graph.name) == (source.producer_name, source.graph.name)
        onnx.checker.check_model(result, full_check=True)
        assert all(tensor.data_location == tensor.DEFAULT for tensor in result.graph.initializer)
        changed = {p.key: p.value for p in result.metadata_props}.items() - {
            p.key: p.value for p in source.metadata_props
        }.items()
        assert {key for key, _ in changed} == {"dat_deploy.precision", "dat_deploy.calibration"}


# --- how ---


def test_scales_are_positive_and_zero_points_zero_one_a_tensor_or_one_a_channel(report):
    graph = Graph(report.path)
    for name in report.layers:
        node = graph.nodes[name]
        data, weight = (graph.maker[value] for value in node.input[:2])
        pair = graph.maker[data.input[0]]
        assert pair.op_type == "QuantizeLinear"
        assert pair.input[1:] == data.input[1:]
        scale, zero_point = (graph.constants[value] for value in data.input[1:])
        assert (scale.shape, scale.dtype, zero_point.shape, zero_point.dtype) == ((), np.float32, (), np.int8)
        assert scale > 0
        assert zero_point == 0
        integers, scales, zeros = (graph.constants[value] for value in weight.input)
        (axis,) = (attribute.i for attribute in weight.attribute if attribute.name == "axis")
        assert axis == {"MatMul": 1, "Gemm": 0, "Conv": 0}[node.op_type]
        assert integers.dtype == zeros.dtype == np.int8
        assert scales.shape == zeros.shape == (integers.shape[axis],)
        assert (scales > 0).all()
        assert not zeros.any()


def test_weights_are_rounded_to_the_nearest_step_and_reach_the_last(files, report):
    source, graph = Graph(files["function"]), Graph(report.path)
    for name in report.layers:
        exact = source.constants[source.nodes[name].input[1]]
        weight = graph.maker[graph.nodes[name].input[1]]
        integers, scales, _ = (graph.constants[value] for value in weight.input)
        axis = next(attribute.i for attribute in weight.attribute)
        others = tuple(i for i in range(exact.ndim) if i != axis)
        steps = np.expand_dims(scales, others)
        assert (np.abs(integers * steps - exact) <= steps * 0.5001).all()
        assert (np.abs(integers).max(axis=others) == 127).all()
        assert source.nodes[name].input[1] not in graph.constants  # the float32 weight is gone


def test_a_channel_of_zeros_has_a_scale_all_the_same(files, pictures, tmp_path):
    model = onnx.load(files["function"])
    (weight,) = (t for t in model.graph.initializer if t.name == "cls_head.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[3] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "zeros.onnx")
    graph = Graph(quantize(tmp_path / "zeros.onnx", tmp_path / "int8.onnx", pictures, images=2).path)
    assert graph.constants["cls_head/weight/scale"][3] == 1
    assert not graph.constants["cls_head/weight"][3].any()


@pytest.mark.parametrize("method", METHODS)
def test_range_of_the_image_is_what_the_method_says(method, files, pictures, tmp_path, monkeypatch):
    if method == "entropy":  # its search over all tensors takes a minute; with fewer bins it is the same search
        monkeypatch.setitem(METHODS, method, ("Entropy", {**METHODS[method][1], "num_bins": 160}))
    result = quantize(files["function"], tmp_path / "int8.onnx", pictures, images=6, method=method)
    scale = Graph(result.path).constants["patch_proj.conv/input/scale"]
    chosen = sorted(pictures.rglob("*/*.png"))[::4]
    seen = np.abs([preprocessed(path) for path in chosen])
    largest = {"minmax": seen.max(), "percentile": np.percentile(seen, 99.999), "entropy": None}[method]
    if largest is None:
        assert 0.2 * seen.max() < scale * 127 <= seen.max() * 1.001
    else:
        assert scale * 127 == pytest.approx(largest, rel=0.01)  # bins of a histogram
    assert result.metadata.calibration.method == method


def preprocessed(path: Path) -> np.ndarray:
    return preprocess(read_image(path), MINI.preprocessing)


@needs_vnni
def test_logits_stay_close_on_onnx_runtime_and_openvino(files, reports, pictures):
    images = np.stack([preprocessed(path) for path in sorted(pictures.rglob("*/*.png"))[1::5]])
    expected = logits(files["function"], images)
    for engine in (*(result.path for result in reports.values()), f"openvino:{reports['function'].path}"):
        with open_runner(str(engine)) as runner:
            assert runner.description.precision == "int8"
            difference = runner(images) - expected
        assert 0 < np.sqrt((difference**2).mean()) <= ALLOWED * expected.std()


def test_onnx_runtime_multiplies_matrices_in_int8(report, tmp_path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(report.path), options, providers=["CPUExecutionProvider"])
    run = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    matrices = [name for name in report.layers if name.endswith("MatMul")]
    assert run.count("MatMulIntegerToFloat") == len(matrices) == 44


@pytest.mark.parametrize("lowering", ["function", "hat"])
def test_tensorrt_parses_every_quantized_layer_as_one_in_int8(lowering, reports):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed")
    trt = import_tensorrt("tensorrt-rtx")
    parsed = parsed_network(trt, onnx.load(reports[lowering].path), Log(trt), plugins=False)
    assert parsed.layers["int8"] == parsed.kinds["QUANTIZE"] == len(reports[lowering].layers)
    assert parsed.kinds["DEQUANTIZE"] == 2 * len(reports[lowering].layers)
    assert parsed.kinds["NORMALIZATION"] == 28


def test_census_counts_what_was_quantized(report):
    census = report.census
    assert census.nodes["int8"] == {"MatMul": 44, "Conv": 5, "Gemm": 1}
    assert census.casts == 150
    assert str(census).startswith("precision: int8 50 nodes (15%), fp32 290 (85%) in ")
    assert api.inspect(report.path).layers == {"int8": 50, "fp32": 290, "cast": 150}


# --- on what ---


def test_provenance_is_that_of_evenly_spaced_images_by_sorted_name(files, pictures, tmp_path):
    result = quantize(files["function"], tmp_path / "int8.onnx", pictures, images=5)
    names = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*/*.png"))
    digest = hashlib.sha256()
    for name in (names[index] for index in (0, 4, 9, 14, 19)):
        for part in (name.encode(), (pictures / name).read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    expected = Calibration("pictures", 5, digest.hexdigest(), "percentile", "onnxruntime", onnxruntime.__version__)
    assert result.metadata.calibration == expected
    assert read_metadata(result.path) == result.metadata
    assert replace(result.metadata, precision="fp32", calibration=None) == read_metadata(files["function"])


def test_same_inputs_give_the_same_bytes(files, pictures, report, tmp_path):
    again = quantize(files["function"], tmp_path / "again.onnx", pictures, images=12)
    assert again.path.read_bytes() == report.path.read_bytes()


def test_other_images_have_another_digest_and_other_scales(files, pictures, report, tmp_path):
    for path in pictures.rglob("*/*.png"):
        copy = tmp_path / "dark" / path.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(path)) // 4).save(copy)
    dark = quantize(files["function"], tmp_path / "dark.onnx", tmp_path / "dark", images=12)
    assert dark.metadata.calibration.images == report.metadata.calibration.images
    assert dark.metadata.calibration.sha256 != report.metadata.calibration.sha256
    scales = [Graph(r.path).constants["patch_proj.conv/input/scale"] for r in (dark, report)]
    assert scales[0] != scales[1]


def test_images_that_cannot_be_read_are_left_out_and_named(files, pictures, report, tmp_path):
    folder = tmp_path / "some"
    (folder / "bad").mkdir(parents=True)
    for path in sorted(pictures.rglob("*/*.png"))[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "bad" / "half.png").write_bytes(path.read_bytes()[:100])
    (folder / "empty.jpg").write_bytes(b"")
    result = quantize(files["function"], tmp_path / "int8.onnx", folder, images=9)
    assert result.notes == (
        f"{folder} holds 5 images, all of which were taken; 9 were asked for.",
        "2 of 5 images cannot be read and were left out: bad/half.png, empty.jpg",
    )
    assert result.metadata.calibration.images == 3


def test_a_file_without_calibration_in_its_metadata_is_read(files):
    assert "dat_deploy.calibration" not in {entry.key for entry in onnx.load(files["function"]).metadata_props}
    assert read_metadata(files["function"]).calibration is None


# --- other files, and what comes after ---


def test_lowering_of_an_int8_file_can_change(files, report, reports, tmp_path):
    images = noise()
    expected = logits(report.path, images)
    for lowering in ("gather", "gridsample", "hat", "plugin"):
        relowered = relower(report.path, tmp_path / f"{lowering}.onnx", lowering)
        assert (relowered.metadata.precision, relowered.metadata.lowering) == ("int8", lowering)
        assert relowered.metadata.calibration == report.metadata.calibration
        assert Graph(relowered.path).quantized() == set(report.layers)
        if lowering != "plugin":
            # a step of an activation more or less, where two orders of summation round to different sides
            np.testing.assert_allclose(logits(relowered.path, images), expected, rtol=0, atol=0.01 * expected.std())


def test_fixed_batch_is_filled_up_with_images_that_change_no_range(files, pictures, tmp_path):
    export(MINI, tmp_path / "fixed.onnx", batch=4)
    results = [
        quantize(path, tmp_path / f"{path.stem}.int8.onnx", pictures, images=6, method="minmax")
        for path in (tmp_path / "fixed.onnx", files["function"])
    ]
    fixed, dynamic = results
    assert fixed.metadata.calibration == dynamic.metadata.calibration
    scales = [Graph(result.path).constants for result in results]
    for layer in fixed.layers:
        name = f"{layer.rpartition('/')[0]}/input/scale"
        assert scales[0][name] == pytest.approx(scales[1][name], rel=1e-4)  # sums in another order


@needs_vnni
def test_backbone_of_dynamic_size_is_quantized_at_the_size_of_its_preprocessing(mini_pp, pictures, tmp_path):
    stages = tuple(replace(stage, blocks=stage.blocks[-1]) for stage in mini_pp.stages)
    network: Variant = replace(mini_pp, stages=stages).with_image_size(64, 96).as_backbone((1, 3))
    export(network, tmp_path / "maps.onnx", dynamic_image_size=True)
    result = quantize(tmp_path / "maps.onnx", tmp_path / "int8.onnx", pictures, images=4)
    assert "stages.3.attns.0.proj_qkv/MatMul" in result.layers
    images = np.random.default_rng(5).standard_normal((1, 3, 96, 64)).astype(np.float32)
    with open_runner(str(tmp_path / "maps.onnx")) as exact, open_runner(str(result.path)) as rounded:
        expected, got = exact.outputs(images), rounded.outputs(images)
    assert list(got) == ["feature_map_1", "feature_map_3"]
    for name, values in expected.items():
        assert np.abs(got[name] - values).mean() <= ALLOWED * values.std()  # noise, on scales of pictures


@needs_vnni
def test_validate_passes_an_int8_file_and_says_that_its_accuracy_needs_data(report):
    found = api.validate(str(report.path), images=photographs(2), batches=[1, 2])
    assert found.passed, found.verdict
    coordinates = [check for check in found.checks if check.kind == "coordinates"]
    assert {check.tolerance for check in coordinates} == {1e-4}  # the operators are as exact as in fp32
    assert [(check.passed, check.detail) for check in found.checks if check.kind == "data"] == [
        (None, "what eight bits cost shows on images alone: give `data`")
    ]


def test_a_layer_that_was_left_out_fails_validation(report, tmp_path):
    model = onnx.load(report.path)
    node = next(node for node in model.graph.node if node.name == report.layers[-1])
    (maker,) = (other for other in model.graph.node if node.input[1] in other.output)
    weight = onnx.numpy_helper.from_array(
        np.ones([d.dim_value for d in _shape(model, node.input[1])], np.float32), "left_out"
    )
    assert maker.op_type == "DequantizeLinear"
    model.graph.initializer.append(weight)
    node.input[1] = "left_out"
    onnx.save(model, tmp_path / "less.onnx")
    found = api.validate(
        str(tmp_path / "less.onnx"),
        images=photographs(1),
        batches=[1],
        skip=["photographs", "decisions", "stress", "slots", "drift"],
    )
    assert [check.detail for check in found.checks if check.passed is False] == [
        f"asked int8, but {node.name} is not quantized"
    ]


def _shape(model: onnx.ModelProto, name: str):
    inferred = onnx.shape_inference.infer_shapes(model)
    return next(value for value in inferred.graph.value_info if value.name == name).type.tensor_type.shape.dim


# --- refusals ---


def refusal(kind: type[DatDeployError], *arguments: object, **options: object) -> str:
    with pytest.raises(kind) as error:
        quantize(*arguments, **options)
    assert type(error.value) is kind
    return str(error.value)


def test_a_file_of_another_tool_is_refused(pictures, tmp_path):
    path = tmp_path / "other.onnx"
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["": 18]> g (float[2] x) => (float[2] y) { y = Abs(x) }'
        ),
        path,
    )
    assert refusal(ExportError, path, tmp_path / "out.onnx", pictures) == (
        f"{path} was not exported by dat-deploy: it has no dat_deploy.* metadata. "
        f'Export it with: `export(variant=variant, output="other.onnx")`'
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_a_file_that_is_not_in_fp32_is_refused(precision, report, pictures, tmp_path):
    path = tmp_path / "other.onnx"
    model = onnx.load(report.path)
    (said,) = (entry for entry in model.metadata_props if entry.key == "dat_deploy.precision")
    said.value = json.dumps(precision)
    onnx.save(model, path)
    assert refusal(ExportError, path, tmp_path / "out.onnx", pictures) == (
        f'{path} is {precision} already; quantize takes fp32. Export it again with `precision="fp32"`, or find the '
        f"file that it was made from."
    )


def test_operators_without_bodies_are_refused_with_the_way_out(files, pictures, tmp_path):
    assert refusal(ExportError, files["plugin"], tmp_path / "out.onnx", pictures) == (
        f"{files['plugin']} has lowering plugin, whose operators have no bodies that could run for calibration. "
        f"Quantize a file of another lowering: `relower(source='{files['plugin']}', lowering='function')`"
    )


def test_a_file_that_lost_the_list_of_its_operators_is_refused(files, pictures, tmp_path):
    path = tmp_path / "lost.onnx"
    model = onnx.load(files["gather"])
    kept = [entry for entry in model.metadata_props if entry.key != "dat_deploy.operators"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, path)
    assert refusal(ExportError, path, tmp_path / "out.onnx", pictures) == (
        f"the metadata of {path} no longer lists its operators, so what computes coordinates cannot be told from the "
        f"rest. Export it again."
    )


def test_folders_that_hold_no_image_are_refused(files, tmp_path):
    arguments = (files["function"], tmp_path / "out.onnx")
    missing, empty, bad = tmp_path / "missing", tmp_path / "empty", tmp_path / "bad"
    assert refusal(ImageError, *arguments, missing) == (
        f"'{missing}' does not exist; name a folder of images, at any depth."
    )
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    assert refusal(ImageError, *arguments, empty) == (
        f"folder '{empty}' holds no images; accepted are files that end in .bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, "
        f".tif, .tiff, .webp, at any depth."
    )
    bad.mkdir()
    for name in ("a.png", "b.png"):
        (bad / name).write_bytes(b"")
    assert refusal(ImageError, *arguments, bad) == (
        f"none of the 2 images of folder {bad} can be read; the last: image '{bad / 'b.png'}' is empty; accepted are "
        f"BMP, GIF, JPEG, PNG, PPM, TIFF and WEBP files. Copy it again."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "empty"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "0 images cannot calibrate anything; give a number from 1, such as 512."),
        ({"method": "mse"}, "no calibration method 'mse'. Methods: percentile, minmax, entropy."),
    ],
    ids=["no images", "unknown method"],
)
def test_arguments_that_make_no_sense_are_refused(options, message, files, pictures, tmp_path):
    assert refusal(ExportError, files["function"], tmp_path / "out.onnx", pictures, **options) == message


def test_export_itself_names_the_way_to_int8(tmp_path):
    with pytest.raises(ExportError) as error:
        export(MINI, tmp_path / "int8.onnx", precision="int8")
    assert str(error.value) == (
        '`precision="int8"` needs images to measure ranges on. Export in fp32, then: '
        '`quantize("FILE.onnx", data="FOLDER")`'
    )


def test_output_is_replaced_with_force_alone(files, pictures, tmp_path):
    path = tmp_path / "out.onnx"
    path.write_text("mine")
    arguments = (files["function"], path, pictures)
    sentence = f"{path} exists; pass `force=True` to replace it, or choose another name."
    assert refusal(OutputError, *arguments) == sentence
    assert path.read_text() == "mine"
    assert quantize(*arguments, images=2, force=True).path == path
    assert read_metadata(path).precision == "int8"


def test_without_onnx_runtime_the_package_to_install_is_named(files, pictures, tmp_path, monkeypatch):
    find: Callable[..., object] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name))
    assert refusal(UnsupportedError, files["function"], tmp_path / "out.onnx", pictures) == (
        "quantize cannot run here: package onnxruntime is not installed: pip install 'dat-deploy[onnxruntime]'"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cls_head.weight", "weight cls_head.weight is not finite, so it has no range in int8."),
        ("patch_proj.conv.bias", "the input of patch_proj.conv2/Conv is not finite, so it has no range in int8."),
    ],
    ids=["weight", "activation"],
)
def test_what_is_not_finite_has_no_range(name, message, files, pictures, tmp_path):
    model = onnx.load(files["function"])
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "nan.onnx")
    said = refusal(ExportError, tmp_path / "nan.onnx", tmp_path / "out.onnx", pictures, images=2, method="minmax")
    assert said == f"{message} Validate the fp32 file first."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.onnx"]


def test_calibration_that_fails_is_one_sentence(files, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "percentile", ("Percentile", {"symmetric": True, "percentile": 200}))
    said = refusal(ExportError, files["function"], tmp_path / "out.onnx", pictures, images=2)
    assert said == (
        f"ONNX Runtime cannot calibrate {files['function']}: Invalid percentile. Must be in range 0 <= percentile <= "
        f"100. Validate that file first."
    )


def test_report_is_json(report):
    told = json.loads(json.dumps(asdict(report), default=str))
    assert told["metadata"]["calibration"]["folder"] == "pictures"
    assert told["layers"][0] == "patch_proj.conv/Conv"
