"""The operators as TensorRT plugins: what parsers, builders and engines do with them, as far as no GPU is needed."""

import contextlib
import importlib.util
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dat_deploy.engine.tensorrt import library as tensorrt_library
from dat_deploy.errors import ShapeError, UnsupportedError
from dat_deploy.plugins.launch import Configuration
from dat_deploy.plugins.operator import OPERATORS, Operator, specification
from dat_deploy.plugins.tensorrt import iplugin_v3, registry
from dat_deploy.plugins.tensorrt.calls import last_error, launch_counts
from dat_deploy.plugins.tensorrt.node import NAMESPACE, VERSION, Node, numbered

HALF = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
ONNX_TYPES = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64, **HALF}
POINTS = (4, 3, 7, 7, 2)
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "deformable_sample": ((4, 14, 14, 96), POINTS),
    "deformable_attention": ((4, 14, 14, 96), (4, 49, 96), (4, 49, 96), POINTS, (3, 27, 27)),
    "window_attention": ((4, 14, 14, 288), (169, 3)),
    "neighborhood_attention": ((4, 14, 14, 288), (288,), (3, 13, 13)),
}
OUTPUTS = dict.fromkeys(OPERATORS, (14, 14, 96)) | {"deformable_sample": (49, 96)}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "deformable_sample": {},
    "deformable_attention": {"num_heads": 3, "half_pixel_queries": 1},
    "window_attention": {"num_heads": 3, "window_size": 7, "shift_size": 4},
    "neighborhood_attention": {"num_heads": 3, "kernel_size": 7, "dilation": 1},
}
TABLES = ("padding_qkv", "relative_position_bias_table")  # one for all images


@pytest.fixture(scope="session")
def tensorrt_rtx() -> Any:
    if reasons := tensorrt_library.missing("tensorrt-rtx"):
        pytest.skip("; ".join(reasons))
    return tensorrt_library.import_tensorrt("tensorrt-rtx")


@pytest.fixture
def rtx(tensorrt_rtx: Any) -> Iterator[Any]:
    """TensorRT-RTX with the plugins registered, and no error of another test's build."""
    last_error()
    registry.register_plugins(tensorrt_rtx)
    yield tensorrt_rtx
    registry.deregister_plugins(tensorrt_rtx)


@dataclass
class Parsed:
    """A network, with what must outlive it."""

    trt: Any
    builder: Any
    network: Any
    parser: Any

    @property
    def plugin_layers(self) -> list[Any]:
        layers = [self.network.get_layer(i) for i in range(self.network.num_layers)]
        return [layer for layer in layers if layer.type == self.trt.LayerType.PLUGIN_V3]

    def build(self, *batches: int, size: tuple[int, int] = (0, 0)) -> bytes | None:
        """The serialized engine, or None; batches are the profile's, where the batch is dynamic."""
        config = self.builder.create_builder_config()
        profile = self.builder.create_optimization_profile()
        for i in range(self.network.num_inputs):
            tensor = self.network.get_input(i)
            _, *rest = tensor.shape
            if -1 in rest:  # an image
                rest[1:] = size
            if -1 in tensor.shape:
                profile.set_shape(tensor.name, *((batch, *rest) for batch in batches))
        config.add_optimization_profile(profile)
        serialized = self.builder.build_serialized_network(self.network, config)
        return None if serialized is None else bytes(serialized)


def parse(trt: Any, model: bytes) -> Parsed | None:
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    return Parsed(trt, builder, network, parser) if parser.parse(model) else None


def one_operator(
    operator: str,
    dtype: str = "float32",
    *,
    table_dtype: str | None = None,
    dtypes: dict[str, str] | None = None,
    shapes: dict[str, tuple[int | str, ...]] | None = None,
    attributes: dict[str, Any] | None = None,
    batch: int | str = "batch",
) -> bytes:
    """An ONNX file of one node, of which the tables are constants."""
    inputs, constants = [], []
    for name, shape in zip(specification(operator).inputs, SHAPES[operator], strict=True):
        kind = "float32" if name == "sampling_locations" else (table_dtype or dtype) if name in TABLES else dtype
        kind = (dtypes or {}).get(name, kind)
        takes: tuple[int | str, ...] = shape if name in TABLES else (batch, *shape[1:])
        takes = (shapes or {}).get(name, takes)
        if name in TABLES:
            size = 8 if kind == "int64" else getattr(torch, kind).itemsize
            sizes = [int(side) for side in takes]
            content = bytes(size * math.prod(sizes))
            constants.append(onnx.helper.make_tensor(name, ONNX_TYPES[kind], sizes, content, raw=True))
        else:
            inputs.append(onnx.helper.make_tensor_value_info(name, ONNX_TYPES[kind], takes))
    output = onnx.helper.make_tensor_value_info("output", ONNX_TYPES[dtype], None)
    values = ATTRIBUTES[operator] if attributes is None else attributes
    node = onnx.helper.make_node(
        operator,
        list(specification(operator).inputs),
        ["output"],
        "the node",
        domain="dat_deploy",
        plugin_namespace="dat_deploy",
        plugin_version="1",
        **values,
    )
    graph = onnx.helper.make_graph([node], operator, inputs, [output], constants)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("dat_deploy", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def node_of(operator: str) -> Node:
    return Node.from_fields(operator, ATTRIBUTES[operator])


def types_of(operator: str, dtype: torch.dtype = torch.float16) -> tuple[torch.dtype, ...]:
    return tuple(torch.float32 if name == "sampling_locations" else dtype for name in specification(operator).inputs)


# Specifications.


def test_exported_nodes_have_the_attributes_that_the_plugins_declare(exported):
    for network in ("mini", "mini-pp"):
        path = exported(network, "fp32", "plugin")
        nodes = [node for node in onnx.load(path).graph.node if node.domain == "dat_deploy"]
        assert len(nodes) == {"mini": 8, "mini-pp": 9}[network]
        for node in nodes:
            specified = specification(node.op_type)
            attributes = {attribute.name: attribute for attribute in node.attribute}
            assert attributes.pop("plugin_namespace").s.decode() == NAMESPACE
            assert attributes.pop("plugin_version").s.decode() == VERSION
            assert set(attributes) == set(specified.attributes)
            assert {attribute.type for attribute in attributes.values()} <= {onnx.AttributeProto.INT}
            assert len(node.input) == len(specified.inputs)


# IPluginV3 in TensorRT-RTX.


@pytest.mark.parametrize("batch", [2, "dynamic"])
@pytest.mark.parametrize("network", ["mini", "mini-pp"])
def test_each_operator_of_a_network_is_one_plugin_layer(network, batch, rtx, exported, mini_pp_dynamic):
    path = mini_pp_dynamic["plugin"] if network == "mini-pp" else exported("mini", "fp32", "plugin")
    parsed = parse(rtx, path.read_bytes())
    assert parsed is not None
    rest = (3, 224, 224)
    parsed.network.get_input(0).shape = (-1 if batch == "dynamic" else batch, *rest)
    nodes = {node.name: node.op_type for node in onnx.load(path).graph.node if node.domain == "dat_deploy"}
    layers = parsed.plugin_layers
    assert {layer.name for layer in layers} == set(nodes)
    assert len(layers) == len(nodes)
    assert {layer.get_output(0).dtype for layer in layers} == {rtx.DataType.FLOAT}
    shapes = Counter((nodes[layer.name], tuple(layer.get_output(0).shape)) for layer in layers)
    b = -1 if batch == "dynamic" else batch
    if network == "mini":
        assert shapes["window_attention", (b, 56, 56, 16)] == 2
        assert shapes["deformable_attention", (b, 14, 14, 64)] == 1
        assert shapes["deformable_sample", (b, 196, 64)] == 1
        assert shapes["deformable_sample", (b, 49, 128)] == 1
    else:
        assert shapes["neighborhood_attention", (b, 56, 56, 16)] == 1
        assert shapes["deformable_attention", (b, 7, 7, 128)] == 1
    assert last_error() is None


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tiny", "pp-tiny"])
def test_a_network_builds_without_a_gpu(variant, rtx, tiny_onnx, pp_tiny_onnx):
    parsed = parse(rtx, {"tiny": tiny_onnx, "pp-tiny": pp_tiny_onnx}[variant]["plugin"].read_bytes())
    assert parsed is not None
    serialized = parsed.build(1, 4, 8, size=(224, 224))
    assert serialized is not None, last_error()
    for operator in {OPERATORS[i] for i in ((0, 1, 2) if variant == "tiny" else (0, 1, 3))}:
        assert operator.encode() in serialized


@pytest.mark.parametrize(
    ("dtype", "table_dtype"),
    [("float32", "float32"), ("float16", "float16"), ("float16", "float32"), ("bfloat16", "bfloat16")],
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_builds_in_every_type(operator, dtype, table_dtype, rtx):
    for batch in (4, "batch"):
        parsed = parse(rtx, one_operator(operator, dtype, table_dtype=table_dtype, batch=batch))
        assert parsed is not None, last_error()
        (layer,) = parsed.plugin_layers
        assert layer.name == "the node"
        names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
        assert layer.get_output(0).dtype == getattr(rtx.DataType, names[dtype])
        assert tuple(layer.get_output(0).shape) == (4 if batch == 4 else -1, *OUTPUTS[operator])
        assert parsed.build(1, 4, 8) is not None, last_error()


SIXTY_FIVE = {"qkv": ("batch", 14, 14, 3 * 65), "relative_position_bias_table": (169, 1)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a missing attribute": (
        {"operator": "window_attention", "attributes": {"num_heads": 3, "window_size": 7}},
        "the node (window_attention) has the attributes ['num_heads', 'window_size']; it takes ['num_heads', "
        "'shift_size', 'window_size']. Export the file again with this version of dat-deploy.",
    ),
    "an attribute of another type": (
        {"operator": "window_attention", "attributes": {"num_heads": 3, "window_size": [7, 7], "shift_size": 0}},
        "the node (window_attention) has window_size = array([7, 7], dtype=int32); it takes one integer.",
    ),
    "an attribute that is no flag": (
        {"operator": "deformable_attention", "attributes": {"num_heads": 3, "half_pixel_queries": 2}},
        "the node (deformable_attention) has half_pixel_queries = 2; it takes 0 or 1.",
    ),
    "heads that do not divide": (
        {"operator": "neighborhood_attention", "attributes": {"num_heads": 5, "kernel_size": 7, "dilation": 1}},
        "the node: neighborhood_attention got 288 channels of query, key and value and 5 heads; it takes heads that "
        "divide each of the three.",
    ),
    "a map that windows do not tile": (
        {"operator": "window_attention", "shapes": {"qkv": ("batch", 15, 14, 288)}},
        "the node: window_attention got a map of 15x14, window_size 7 and shift_size 4; it takes windows that tile the "
        "map, and a shift of less than a window.",
    ),
    "locations of another rank": (
        {"operator": "deformable_sample", "shapes": {"sampling_locations": ("batch", 7, 7, 2)}},
        "the node: deformable_sample got inputs of [4, 4] dimensions; it takes value of 4, sampling_locations of 5.",
    ),
    "a table of another size": (
        {"operator": "deformable_attention", "shapes": {"relative_position_bias_table": (2, 27, 27)}},
        "the node: deformable_attention got relative_position_bias_table of shape [2, 27, 27]; it takes one table a "
        "head, [3, Th, Tw].",
    ),
    "large heads": (
        {
            "operator": "window_attention",
            "shapes": SIXTY_FIVE,
            "attributes": {"num_heads": 1, "window_size": 7, "shift_size": 0},
        },
        "the node: window_attention got heads of 65 channels; its kernel takes up to 64. Build without plugins: "
        '`build(lowering="gather")`',
    ),
    "half locations": (
        {"operator": "deformable_sample", "dtype": "float16", "dtypes": {"sampling_locations": "float16"}},
        "the node: deformable_sample got sampling_locations of float16 beside value of float16; it takes float32.",
    ),
    "mixed tensors": (
        {"operator": "deformable_attention", "dtype": "float16", "dtypes": {"key": "float32"}},
        "the node: deformable_attention got key of float32 beside query of float16; it takes float16.",
    ),
    "a table of integers": (
        {"operator": "window_attention", "dtype": "float16", "dtypes": {"relative_position_bias_table": "int64"}},
        "the node: window_attention got relative_position_bias_table of a type without a kernel beside qkv of float16; "
        "it takes float16 or float32.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_kernel_takes_is_refused_when_parsed(case, rtx, capfd):
    settings, sentence = REFUSED[case]
    assert parse(rtx, one_operator(**settings)) is None
    error = last_error()
    assert str(error) == sentence
    assert isinstance(error, UnsupportedError if case == "large heads" else ShapeError)
    assert sentence in capfd.readouterr().err
    assert last_error() is None


def test_a_profile_that_does_not_fit_is_refused_when_built(rtx, capfd):
    model = one_operator("window_attention", shapes={"qkv": ("batch", "height", 14, 288)})
    parsed = parse(rtx, model)
    assert parsed is not None
    config, profile = parsed.builder.create_builder_config(), parsed.builder.create_optimization_profile()
    profile.set_shape("qkv", (1, 14, 14, 288), (1, 15, 14, 288), (1, 28, 14, 288))
    config.add_optimization_profile(profile)
    assert parsed.builder.build_serialized_network(parsed.network, config) is None
    assert str(last_error()) == (
        "the node: window_attention got a map of 15x14, window_size 7 and shift_size 4; it takes windows that tile the "
        "map, and a shift of less than a window."
    )
    assert "window_attention got a map of 15x14" in capfd.readouterr().err


def creator_of(trt: Any, operator: str) -> Any:
    return next(each for each in trt.get_plugin_registry().all_creators if each.name == operator)


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_an_engine_holds_of_a_plugin_gives_the_plugin_back(operator, rtx):
    creator = creator_of(rtx, operator)
    assert [field.name for field in creator.field_names] == list(ATTRIBUTES[operator])
    fields = [
        rtx.PluginField(name, np.array([value], np.int32), rtx.PluginFieldType.INT32)
        for name, value in ATTRIBUTES[operator].items()
    ]
    plugin = creator.create_plugin("some node", rtx.PluginFieldCollection(fields), rtx.TensorRTPhase.BUILD)
    serialized = plugin.get_fields_to_serialize()
    overwriting = [np.full(1, 90, np.int32) for _ in range(10_000)]  # any memory that was freed too early
    restored = creator.create_plugin("", serialized, rtx.TensorRTPhase.RUNTIME)
    assert len(overwriting) == 10_000
    assert restored.node.fields == plugin.node.fields == ATTRIBUTES[operator]
    restored.set_tactic(3)
    for copy in (restored.clone(), restored.attach_to_context(None)):
        assert copy is not restored
        assert (copy.node, copy.tactic) == (restored.node, 3)
        assert (copy.plugin_name, copy.plugin_version, copy.plugin_namespace) == (operator, "1", "dat_deploy")
        assert copy.num_outputs == 1
        copy.set_tactic(2)
    assert restored.tactic == 3
    assert restored.get_workspace_size([], []) == 0


def described(trt: Any, shape: tuple[int, ...], kind: str, form: str = "LINEAR") -> Any:
    dims = SimpleNamespace(type=getattr(trt.DataType, kind), format=getattr(trt.TensorFormat, form), dims=shape)
    return SimpleNamespace(desc=dims, opt=shape, max=shape, min=shape)


def test_linear_tensors_of_one_type_are_supported_and_no_others(rtx):
    plugin = creator_of(rtx, "deformable_attention").create_plugin(
        "",
        rtx.PluginFieldCollection(
            [
                rtx.PluginField(name, np.array([value], np.int32), rtx.PluginFieldType.INT32)
                for name, value in ATTRIBUTES["deformable_attention"].items()
            ]
        ),
        rtx.TensorRTPhase.BUILD,
    )
    shapes = [*SHAPES["deformable_attention"], (4, 14, 14, 96)]

    def supported(*kinds: str, form: str = "LINEAR") -> list[bool]:
        tensors = [described(rtx, shape, kind, form) for shape, kind in zip(shapes, kinds, strict=True)]
        return [plugin.supports_format_combination(i, tensors, 5) for i in range(6)]

    for kind in ("FLOAT", "HALF", "BF16"):
        assert all(supported(kind, kind, kind, "FLOAT", kind, kind))
        assert all(supported(kind, kind, kind, "FLOAT", "FLOAT", kind))
    assert supported("HALF", "BF16", "HALF", "HALF", "BF16", "FLOAT") == [True, False, True, False, False, False]
    assert supported("INT8", "INT8", "INT8", "FLOAT", "FLOAT", "INT8") == [False] * 6
    assert not any(supported("HALF", "HALF", "HALF", "FLOAT", "HALF", "HALF", form="CHW2"))


def test_configurations_are_offered_as_tactics(rtx):
    fields = rtx.PluginFieldCollection([])
    plugin = creator_of(rtx, "deformable_sample").create_plugin("", fields, rtx.TensorRTPhase.BUILD)
    assert plugin.get_valid_tactics() == []
    inputs = [described(rtx, SHAPES["deformable_sample"][0], "HALF"), described(rtx, POINTS, "FLOAT")]
    plugin.configure_plugin(inputs, [])
    assert plugin.get_valid_tactics() == plugin.clone().get_valid_tactics() == [1, 2, 3, 4]


def test_registering_again_changes_nothing_and_deregistering_takes_all_out(tensorrt_rtx, capfd):
    def registered() -> list[str]:
        creators = tensorrt_rtx.get_plugin_registry().all_creators
        return sorted(each.name for each in creators if each.plugin_namespace == "dat_deploy")

    registry.deregister_plugins(tensorrt_rtx)  # those of another test's build
    assert registered() == []
    for _ in range(2):
        registry.register_plugins(tensorrt_rtx)
        assert registered() == sorted(OPERATORS)
    for _ in range(2):
        registry.deregister_plugins(tensorrt_rtx)
        assert registered() == []
    assert "[E]" not in "".join(capfd.readouterr())


# Launching, on addresses of no GPU.


@dataclass
class Recorder:
    """In place of a Triton kernel: keeps what it is launched with."""

    grid: Any = None
    arguments: tuple[Any, ...] = ()
    settings: dict[str, Any] | None = None

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **settings: Any) -> None:
            self.grid, self.arguments, self.settings = grid, arguments, settings

        return launch


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The streams that were launched on."""
    seen: list[int] = []

    def on_stream(stream: int) -> contextlib.AbstractContextManager[None]:
        seen.append(stream)
        return contextlib.nullcontext()

    monkeypatch.setattr(iplugin_v3, "_on_stream", on_stream)
    return seen


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    for operator in OPERATORS:
        kernel = Operator(operator).kernel
        launch = kernel.launch
        monkeypatch.setattr(kernel, "launch", lambda *args, launch=launch: replace(launch(*args), kernel=recorder))
    iplugin_v3._launch.cache_clear()
    yield recorder
    iplugin_v3._launch.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_enqueue_launches_what_the_torch_operator_launches(operator, dtype, recorder, streams):
    node = node_of(operator)
    shapes, types = SHAPES[operator], types_of(operator, dtype)
    addresses = [4096 * (i + 1) for i in range(len(shapes))]
    problem = node.problem(shapes, types)
    configurations = node.kernel.configurations(problem)
    ordered = sorted(configurations, key=repr)
    choices = {0: configurations[0], 1000: configurations[0], **dict(enumerate(ordered, start=1))}
    for i, (tactic, configuration) in enumerate(choices.items(), start=1):
        iplugin_v3._enqueue(node, shapes, types, tactic, addresses, 512, 77)
        expected = node.kernel.launch(problem, configuration)
        pointers = dict(zip(node.specification.inputs, zip(addresses, types, strict=True), strict=True))
        inputs = len(expected.inputs)
        assert recorder.grid == expected.grid
        *sent, output = recorder.arguments
        assert [(each.data_ptr(), each.dtype) for each in sent[:inputs]] == [pointers[n] for n in expected.inputs]
        assert tuple(sent[inputs:]) == tuple(expected.scalars.values())
        assert (output.data_ptr(), output.dtype) == (512, dtype)
        launched_by = expected.options
        assert recorder.settings == {**expected.constants, **launched_by}
        assert streams == [77] * i


def test_an_enqueue_goes_to_the_launch_of_its_shapes_and_is_counted(rtx, recorder, streams):
    fields = rtx.PluginFieldCollection([])
    plugin = creator_of(rtx, "deformable_sample").create_plugin("", fields, rtx.TensorRTPhase.RUNTIME)
    contexts = [plugin.attach_to_context(None) for _ in range(2)]
    before = launch_counts()
    assert set(before) == set(OPERATORS)
    for batch, context in zip((1, 5), contexts, strict=True):
        shapes = [(batch, *shape[1:]) for shape in SHAPES["deformable_sample"]]
        inputs = [described(rtx, shape, k).desc for shape, k in zip(shapes, ("HALF", "FLOAT"), strict=True)]
        output = [described(rtx, (batch, 49, 96), "HALF").desc]
        context.on_shape_change(inputs, output)
        context.enqueue(inputs, output, [256, 512], [1024], 0, 3)
        value, locations, *scalars, out = recorder.arguments
        assert (value.data_ptr(), locations.data_ptr(), out.data_ptr()) == (256, 512, 1024)
        assert scalars == [14, 14, 49]
        assert recorder.grid == (batch * 3 * 2, 1, 1)  # images, groups, blocks of 32 points
    after = launch_counts()
    launched = {name: after[name] - before[name] for name in OPERATORS}
    assert launched == {**dict.fromkeys(OPERATORS, 0), "deformable_sample": 2}


def test_an_empty_batch_launches_nothing(recorder, streams):
    shapes = tuple((0, *shape[1:]) for shape in SHAPES["deformable_sample"])
    iplugin_v3._enqueue(node_of("deformable_sample"), shapes, types_of("deformable_sample"), 0, [0, 0], 0, 0)
    assert recorder.grid is None
    assert streams == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_failed_enqueue_raises_and_is_remembered(rtx):
    fields = rtx.PluginFieldCollection([])
    plugin = creator_of(rtx, "deformable_sample").create_plugin("", fields, rtx.TensorRTPhase.RUNTIME)
    inputs = [described(rtx, SHAPES["deformable_sample"][0], "HALF").desc, described(rtx, POINTS, "FLOAT").desc]
    before = launch_counts()
    with pytest.raises(UnsupportedError) as raised:
        plugin.enqueue(inputs, [], [256, 512], [1024], 0, 3)
    assert str(raised.value) == (
        f"torch {torch.__version__} sees no GPU, and the plugins launch through it; install torch for CUDA."
    )
    assert last_error() is raised.value
    assert launch_counts() == before


def test_triton_takes_an_address_for_the_tensor_there():
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = torch.empty(64, dtype=dtype)
        pointer = iplugin_v3._Pointer(tensor.data_ptr(), dtype)
        settings = (False, True, True)
        assert native_specialize_impl(CUDABackend, pointer, *settings) == native_specialize_impl(
            CUDABackend, tensor, *settings
        )


def test_the_number_of_a_tactic_does_not_depend_on_the_batch():
    kernel = Operator("window_attention").kernel
    orders, numbers = set(), set()
    for batch in (1, 8, 64, 512):
        problem = kernel.problem((batch, 56, 56, 288), 3, 7, 4, 2, 2)
        configurations: list[Configuration] = kernel.configurations(problem)
        orders.add(tuple(configurations))
        numbers.add(tuple(numbered(configurations).items()))
    assert len(orders) > 1
    assert len(numbers) == 1


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_compiled_in_does_not_depend_on_the_batch(operator):
    """So the kernel that is compiled ahead of time for one image serves every batch."""
    node, kernel = node_of(operator), Operator(operator).kernel
    names = specification(operator).inputs
    launches = []
    for batch in (1, 2, 64, 512):
        shapes = tuple(
            shape if name in TABLES else (batch, *shape[1:])
            for name, shape in zip(names, SHAPES[operator], strict=True)
        )
        problem = node.problem(shapes, types_of(operator))
        tactics = numbered(kernel.configurations(problem))
        launches.append({number: kernel.launch(problem, each) for number, each in tactics.items()})
    for number, first in launches[0].items():
        for other in launches[1:]:
            for field in ("kernel", "inputs", "constants", "num_warps", "num_stages"):
                assert getattr(other[number], field) == getattr(first, field)


def test_the_measured_configuration_is_taken_where_tensorrt_names_none(monkeypatch):
    kernel = Operator("deformable_sample").kernel
    problem = kernel.problem(*SHAPES["deformable_sample"], 2)
    *_, last = kernel.configurations(problem)
    other = replace(last, num_warps=32)
    arguments = (node_of("deformable_sample"), SHAPES["deformable_sample"], types_of("deformable_sample"), 0)
    for tuned, warps in ((last, last.num_warps), (other, kernel.configurations(problem)[0].num_warps)):
        monkeypatch.setattr(iplugin_v3, "tuned_configuration", lambda *_, tuned=tuned: tuned)
        iplugin_v3._launch.cache_clear()
        assert iplugin_v3._launch(*arguments).num_warps == warps
    iplugin_v3._launch.cache_clear()


def test_sizes_beyond_int32_are_refused():
    node, types = node_of("deformable_sample"), types_of("deformable_sample")
    with pytest.raises(ShapeError) as error:
        node.problem(((1, 40_000, 40_000, 3), (1, 3, 7, 7, 2)), types)
    assert str(error.value) == (
        "deformable_sample got 4800000000 elements of value an image; it takes up to 2147483647."
    )
    batch = 2**30
    with pytest.raises(ShapeError) as error:
        iplugin_v3._launch(node, ((batch, 14, 14, 3), (batch, 3, 7, 7, 2)), types, 0)
    assert str(error.value) == (
        "deformable_sample would take 6442450944 programs; a launch has up to 2147483647. Split the batch."
    )


# What works where.


def a_tensorrt(name: str, version: str) -> Any:
    return SimpleNamespace(__name__=name, __version__=version)


def register_for_sm_90(trt: Any) -> None:
    registry.register_ahead_of_time(trt, 90)


RTX_HAS_NONE = "TensorRT-RTX takes no plugins that are compiled ahead of time"


@pytest.mark.parametrize(
    ("name", "version", "plugins", "ahead_of_time"),
    [
        ("tensorrt", "11.4.0.106", [], []),
        ("tensorrt", "10.16.1.11", [], []),
        (
            "tensorrt",
            "10.14.1.48",
            [],
            [
                "TensorRT 10.14.1.48 cannot build plugins that are compiled ahead of time, no 10.14 can; "
                "use 10.16 or later"
            ],
        ),
        ("tensorrt", "10.9.0", *[["TensorRT 10.9.0 is not supported; it takes 10.10 to below 12"]] * 2),
        ("tensorrt", "12.0.0", *[["TensorRT 12.0.0 is not supported; it takes 10.10 to below 12"]] * 2),
        ("tensorrt_rtx", "1.7.1.116", [], [RTX_HAS_NONE]),
        (
            "tensorrt_rtx",
            "1.6.0.1",
            ["TensorRT-RTX 1.6.0.1 is not supported; it takes 1.7 to below 2"],
            ["TensorRT-RTX 1.6.0.1 is not supported; it takes 1.7 to below 2", RTX_HAS_NONE],
        ),
    ],
)
def test_versions_that_cannot_are_named(name, version, plugins, ahead_of_time):
    trt = a_tensorrt(name, version)
    assert registry.reasons_against_plugins(trt) == plugins
    assert registry.reasons_against_ahead_of_time(trt) == ahead_of_time
    for register, reasons, what in (
        (registry.register_plugins, plugins, "the plugins"),
        (register_for_sm_90, ahead_of_time, "plugins that are compiled ahead of time"),
    ):
        if reasons:
            with pytest.raises(UnsupportedError) as error:
                register(trt)
            assert str(error.value) == f"{what} cannot be registered: {'; '.join(reasons)}."


def test_without_triton_there_are_no_plugins(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (reason,) = registry.reasons_against_plugins(a_tensorrt("tensorrt", "11.4.0"))
    assert reason == "Triton is not installed, which compiles the kernels; install it with: pip install triton"
    with pytest.raises(UnsupportedError):
        registry.register_ahead_of_time(a_tensorrt("tensorrt", "11.4.0"), 90)


def test_importing_the_plugins_loads_neither_kernels_nor_tensorrt():
    code = (
        "import sys; from dat_deploy.plugins.tensorrt import registry; from dat_deploy.plugins.operator import *; "
        "[specification(o) for o in OPERATORS]; "
        "print([m for m in sys.modules if m.startswith('tensorrt') or m.endswith('.kernel')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603  # fixed
    assert done.stdout.strip() == "[]"


# Ahead of time, in TensorRT's own layer: tensorrt_harness.py.


def test_tensorrt_launches_what_the_torch_operator_launches(harness, libraries):
    """All shapes of all nine variants at 224 and 384, and of the detector, every configuration, batches 1 to 64."""
    found = harness.run(libraries, "arithmetic")
    assert found["wrong"] == []
    assert found["operators"] == sorted(OPERATORS)
    assert found["cases"] > 100
    assert found["compared"] > 3000


def check_kernel(shown: dict[str, Any]) -> None:
    entry = re.search(rf"\.entry {shown['name']}\((.*?)\)", shown["ptx"], re.DOTALL)
    assert entry is not None
    kinds = re.findall(r"\.param \.(u\d+)", entry[1])
    assert kinds == ["u64"] * shown["inputs"] + ["u32"] * shown["scalars"] + ["u64"]
    assert shown["name"] in (
        f"{shown['operator']}_kernel",
        "deformable_attention_shared_table_kernel",
        "register_neighbors_kernel",
        "whole_window_kernel",
    )
    assert f".reqntid {shown['block']}" in shown["ptx"]
    assert f".target sm_{shown['architecture']}" in shown["ptx"]
    assert (".version 8.5" in shown["ptx"]) == (shown["architecture"] == 80)
    assert shown["shared_memory_bytes"] <= 48 * 1024
    assert (shown["output_is_dynamic"], shown["grid_is_dynamic"]) == (True, True)
    assert shown["scalar_types"] == ["SymInt32"]


@pytest.mark.compiler
def test_tensorrt_is_given_ptx_of_inputs_scalars_and_output(harness, libraries):
    shown = harness.run(libraries, "sample_kernel")
    assert [each["architecture"] for each in shown] == [90, 80]
    for each in shown:
        assert each["operator"] == "deformable_sample"
        check_kernel(each)
        assert each["tactics"] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.compiler
def test_tensorrt_is_given_ptx_of_every_operator(harness, libraries):
    shown = harness.run(libraries, "kernels")
    assert Counter(each["operator"] for each in shown) == dict.fromkeys(OPERATORS, 2)
    for each in shown:
        check_kernel(each)
        assert len(each["tactics"]) >= 4


def test_one_registry_takes_both_forms_in_turn(harness, libraries):
    found = harness.run(libraries, "forms")
    quick, python = ["IPluginCreatorV3Quick"], ["_Creator"]
    assert found["steps"] == [["none"], quick, python, quick, quick, ["none"], python, python]
    taken = (
        "UnsupportedError: another plugin is registered as dat_deploy::window_attention, and it cannot be taken out; "
        "use a process of its own for each."
    )
    assert found["refusals"] == [
        taken,
        taken,
        "UnsupportedError: the kernels cannot be compiled for architecture 91; it takes 75, 80, 86, 89, 90, 100, 120.",
    ]


def test_what_cannot_be_compiled_ahead_of_time_is_refused(harness, libraries):
    told = harness.run(libraries, "refusals")
    assert [recorded for *_, recorded in told] == ["True"] * len(told)
    assert [f"{kind}: {sentence}" for kind, sentence, _ in told] == [
        "UnsupportedError: window_attention for sm_90 needs 50000 bytes of shared memory; TensorRT gives a plugin "
        "49152. Use another configuration.",
        "ShapeError: window_attention got relative_position_bias_table of a type without a kernel beside qkv of "
        "float16; it takes float16 or float32.",
        "ShapeError: window_attention got a map of 14x15, window_size 7 and shift_size 0; it takes windows that tile "
        "the map, and a shift of less than a window.",
        "ShapeError: window_attention got qkv of shape [8, -1, 14, 288]; compiled ahead of time, it takes a dynamic "
        "batch and no other dynamic size. Fix the image size, or build with the Python plugins.",
        "UnsupportedError: window_attention got heads of 96 channels; its kernel takes up to 64. Build without "
        'plugins: `build(lowering="gather")`',
        "ShapeError: a node (window_attention) has the attributes ['num_heads', 'window_size']; it takes "
        "['num_heads', 'shift_size', 'window_size']. Export the file again with this version of dat-deploy.",
        "ShapeError: window_attention got inputs of [3, 2] dimensions; it takes qkv of 4, relative_position_bias_table "
        "of 2.",
    ]
