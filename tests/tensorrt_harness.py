"""TensorRT's own layer for ahead-of-time plugins, as far as it runs without TensorRT and without a GPU.

The Python bindings of TensorRT 11.4 load over TensorRT-RTX's libraries, which export the same functions. So
`tensorrt.plugin` checks the signatures and calls the functions with its own descriptors and its own expressions, as in
a build; only the caller of its plugin objects, inside TensorRT, is stood in for here. This file is a script: each run
of it is a process with the libraries in its path, which prints what it found as JSON. `run` starts it.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAMES = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.1",
    "libtensorrt_rtx.so": "libtensorrt_rtx.so.1",  # the parser opens it by this name, and aborts where it is not
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.1",
}
BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
STUB = "libnvinfer_plugin.so.11"
BATCHES = (1, 2, 3, 7, 16, 33, 64)
OPT, MAX = 8, 64  # batches of the profile
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # torch's names by those of trt.DataType


def reason_against() -> str | None:
    """Why the harness cannot run here; None if it can."""
    for module, package in (
        ("tensorrt_bindings", "tensorrt-cu13-bindings"),
        ("tensorrt_rtx_libs", "tensorrt-rtx-cu13"),
    ):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
    return None if shutil.which("gcc") else "there is no gcc to compile a stub with"


def prepare(folder: Path) -> Path:
    """Put TensorRT's library names into the folder, over TensorRT-RTX's libraries."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec is not None
    assert spec.origin is not None
    libraries = Path(spec.origin).parent
    for name, target in NAMES.items():
        (folder / name).symlink_to(libraries / target)
    source = folder / "stub.c"
    source.write_text("int initLibNvInferPlugins(void* logger, char const* name) { return 1; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / STUB, source], check=True)  # noqa: S603, S607  # fixed
    return folder


def run(folder: Path, scenario: str, *arguments: str) -> Any:
    """What a function of this file found, in a process of its own."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, __file__, scenario, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)  # noqa: S603  # fixed
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def load_tensorrt() -> Any:
    """The bindings, and their plugin layer, under the names of the package that would hold them."""
    import tensorrt_bindings

    sys.modules["tensorrt"] = tensorrt_bindings
    spec = importlib.util.find_spec("tensorrt_bindings.plugin")
    assert spec is not None
    assert spec.origin is not None
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", spec.origin, submodule_search_locations=spec.submodule_search_locations
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tensorrt.plugin"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layer = sys.modules["tensorrt.plugin._tensor"]

    class Readable(layer.SymExprImpl):  # type: ignore[misc, name-defined]  # of a module that is no import
        """What the layer hands to TensorRT; there only C++ can read the expression."""

        def __init__(self, symbol: Any) -> None:
            super().__init__(symbol)
            self.kind, self.expression = type(symbol).__name__, symbol._expr

    layer.SymExprImpl = Readable  # type: ignore[attr-defined]  # as above
    return tensorrt_bindings


def with_expressions(trt: Any, job: Callable[[Any, Any], None]) -> None:
    """Call `job` with TensorRT's builder of expressions, and one for a dynamic dimension.

    TensorRT makes such builders for plugins alone, so the job runs while it infers the shape of one.
    """
    import numpy as np
    import onnx

    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    errors: list[Exception] = []

    class Probe(*bases):  # type: ignore[misc]  # of a module that is no import
        def __init__(self) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace, self.num_outputs = "probe", "1", "test", 1

        def get_capability_interface(self, kind: Any) -> "Probe":
            return self

        def clone(self) -> "Probe":
            return Probe()

        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            return [types[0]]

        def get_output_shapes(self, inputs: Any, _: Any, builder: Any) -> list[Any]:
            nonlocal job
            pending, job = job, lambda *_: None  # once
            try:
                pending(builder, inputs[0][0])
            except Exception as error:
                errors.append(error)
            return [inputs[0]]

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = "probe", "1", "test"
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Probe:
            return Probe()

    creator = Creator()
    trt.get_plugin_registry().register_creator(creator, "test")
    image = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in ("x", "y")]
    node = onnx.helper.make_node("probe", ["x"], ["y"], domain="test", plugin_namespace="test", plugin_version="1")
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("test", 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "probe", image[:1], image[1:], [onnx.numpy_helper.from_array(np.zeros(1), "c")]),
        opset_imports=opsets,
        ir_version=10,
    )
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)  # which must outlive the network
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    _ = [network.get_output(i).shape for i in range(network.num_outputs)]
    if errors:
        raise errors[0]


class Planned:
    """One node in the hands of TensorRT's layer: what a build does with it up to the kernel, step by step."""

    def __init__(self, trt: Any, builder: Any, operator: str, attributes: dict[str, Any]) -> None:
        import numpy as np

        self.trt, self.builder = trt, builder
        creator = trt.get_plugin_registry().get_creator(operator, "1", "dat_deploy")
        fields = []
        for name, value in attributes.items():
            array = np.array(value, np.float32 if isinstance(value, (float, list)) else np.int32).reshape(-1)
            fields.append(trt.PluginField(name, array, getattr(trt.PluginFieldType, array.dtype.name.upper())))
        request = trt.QuickPluginCreationRequest.STRICT_AOT
        collection = trt.PluginFieldCollection(fields)
        self.plugin = creator.create_plugin(operator, "dat_deploy", collection, trt.TensorRTPhase.BUILD, request)

    def describe(self, shapes: Sequence[Sequence[Any]], types: Sequence[Any]) -> list[Any]:
        """The output's shape, from expressions or numbers."""
        self.plugin.get_output_data_types(types, [len(shape) for shape in shapes])
        expressions = []
        for shape in shapes:
            dims = self.trt.DimsExprs(len(shape))
            for i, dim in enumerate(shape):
                dims[i] = self.builder.constant(dim) if isinstance(dim, int) else dim
            expressions.append(dims)
        (output,) = self.plugin.get_output_shapes(expressions, [], self.builder)
        return list(output)

    def tactics(self, shapes: Sequence[Sequence[int]], largest: Sequence[Sequence[int]], types: Sequence[Any]) -> Any:
        """The custom tactics for a profile whose batch is between that of the shapes and the largest."""
        self.descriptions = []
        for shape, most, kind in zip(shapes, largest, types, strict=True):
            each = self.trt.DynamicPluginTensorDesc()
            described = self.trt.PluginTensorDesc()
            described.dims = [a if a == b else -1 for a, b in zip(shape, most, strict=True)]
            described.type, described.format = kind, self.trt.TensorFormat.LINEAR
            each.desc, each.min, each.opt, each.max = described, shape, shape, most
            self.descriptions.append(each)
        self.inputs = len(shapes) - 1
        supported = self.plugin.get_supported_format_combinations(self.descriptions, self.inputs)
        assert [each.type for each in supported] == list(types)
        self.plugin.configure_plugin(self.descriptions[: self.inputs], self.descriptions[self.inputs :])
        return self.plugin.get_valid_tactics()

    def launch(self, tactic: int) -> tuple[SimpleNamespace, list[Any]]:
        """The launch parameters and the scalars, as expressions."""

        class Setter(dict[int, Any]):
            nbSymExprs = 0  # noqa: N815  # TensorRT's name

        parameters, scalars = SimpleNamespace(), Setter()
        self.plugin.set_tactic(tactic)
        self.plugin.get_launch_params([], self.descriptions, self.inputs, parameters, scalars, self.builder)
        assert scalars.nbSymExprs == len(scalars)
        return parameters, [scalars[i] for i in range(len(scalars))]

    def kernel(self) -> tuple[str, bytes]:
        described = [each.desc for each in self.descriptions]
        name, ptx = self.plugin.get_kernel(described[: self.inputs], described[self.inputs :])
        return name, ptx


def value_of(readable: Any) -> int:
    assert readable.expression.is_constant()
    return int(readable.expression.get_constant_value())


def all_cases() -> list[Any]:
    """The operators at the shapes of all variants, whatever the batch; benchmarks/gpu_cases.py."""
    sys.path.insert(0, BENCHMARKS)
    from gpu_cases import of_network

    from dat_deploy.errors import ShapeError
    from dat_deploy.networks.dat.variants import RELEASED, VARIANTS

    found = of_network(VARIANTS["pp-tiny"].with_image_size(800, 1344), 1)
    for name in RELEASED:
        for side in (224, 384):
            with contextlib.suppress(ShapeError):  # windows do not tile every size
                found += of_network(VARIANTS[name].with_image_size(side, side), 1)
    return list(dict.fromkeys(found))


def inputs_of(case: Any, batch: int) -> dict[str, tuple[int, ...]]:
    from dataclasses import replace

    return replace(case, batch=batch).inputs


def types_of(trt: Any, names: Sequence[str], kind: str) -> list[Any]:
    """Of the inputs, and of the output; tables in the type of the rest."""
    half = getattr(trt.DataType, kind)
    return [trt.DataType.FLOAT if name == "sampling_locations" else half for name in names] + [half]


def expected_launch(case: Any, batch: int, dtype: Any, tactic: int) -> Any:
    import torch

    from dat_deploy.plugins.tensorrt.node import Node

    shapes = inputs_of(case, batch)
    dtypes = (torch.float32 if name == "sampling_locations" else getattr(torch, dtype) for name in shapes)
    node = Node(case.operator, tuple(case.attributes.values()))
    problem = node.problem(tuple(shapes.values()), tuple(dtypes))
    ordered = sorted(node.kernel.configurations(problem), key=repr)
    return node.kernel.launch(problem, ordered[tactic - 1])


# The scenarios.


def arithmetic() -> dict[str, Any]:
    """Grid, block and scalars at all shapes of all variants, every tactic and several batches, against `launch`."""
    trt = load_tensorrt()
    from dat_deploy.plugins import ptx as ahead_of_time
    from dat_deploy.plugins.tensorrt import registry

    ahead_of_time.compile_launch = lambda launch, *_, **__: ahead_of_time.CompiledLaunch("", "fake", 1234, 0, 0)
    registry.register_ahead_of_time(trt, 90)
    compared, wrong, operators = 0, [], set()

    def job(builder: Any, _: Any) -> None:
        nonlocal compared
        for case in all_cases():
            kind = "FLOAT" if case.height % 5 == 0 else "BF16" if case.heads % 2 else "HALF"
            types = types_of(trt, list(inputs_of(case, 1)), kind)
            for batch in BATCHES:
                planned = Planned(trt, builder, case.operator, case.attributes)
                output = planned.describe(list(inputs_of(case, batch).values()), types[:-1])
                output_shape = (case.output_shape, *(each.get_constant_value() for each in output))
                if tuple(output_shape[0][1:]) != tuple(output_shape[2:]) or output_shape[1] != batch:
                    wrong.append(f"{case}: output {output_shape}")
                shapes, largest = (
                    [*inputs_of(case, size).values(), (size, *case.output_shape[1:])] for size in (OPT, MAX)
                )
                for tactic in planned.tactics(shapes, largest, types):
                    parameters, scalars = planned.launch(tactic)
                    launch = expected_launch(case, batch, DTYPES[kind], tactic)
                    found = {name: value_of(expression) for name, expression in vars(parameters).items()}
                    grid = [found[f"grid_{axis}"] for axis in "xyz"]
                    block = [found[f"block_{axis}"] for axis in "xyz"]
                    got = (grid, block, found["shared_mem"], [value_of(each) for each in scalars])
                    wants = ([*launch.grid], [*launch.block], 1234, [*launch.scalars.values()])
                    if got != wants:
                        wrong.append(f"{case} at batch {batch}, tactic {tactic}: {got} is not {wants}")
                    compared += 1
                    operators.add(case.operator)

    with_expressions(trt, job)
    return {"compared": compared, "wrong": wrong[:5], "operators": sorted(operators), "cases": len(all_cases())}


def sample_kernel() -> list[dict[str, Any]]:
    """`kernels` of the operator that compiles the fastest."""
    return kernels("deformable_sample")


def kernels(*operators: str) -> list[dict[str, Any]]:
    """The real kernels of one shape an operator, for two GPUs and a dynamic batch, as TensorRT would be given them."""
    trt = load_tensorrt()
    sys.path.insert(0, BENCHMARKS)
    from gpu_cases import of_stage

    from dat_deploy.networks.dat.variants import VARIANTS
    from dat_deploy.plugins.tensorrt import registry

    shown: list[dict[str, Any]] = []

    def job(builder: Any, dynamic: Any) -> None:
        wanted = {case.operator: case for name in ("tiny", "pp-tiny") for case in of_stage(VARIANTS[name], 2, 1)}
        for architecture, ptx_version in ((90, None), (80, 85)):
            registry.register_ahead_of_time(trt, architecture, ptx_version)
            for case in (case for operator, case in wanted.items() if operator in (operators or wanted)):
                names = list(inputs_of(case, 1))
                types = types_of(trt, names, "HALF")
                planned = Planned(trt, builder, case.operator, case.attributes)
                shapes = [
                    shape if name in ("relative_position_bias_table", "padding_qkv") else (dynamic, *shape[1:])
                    for name, shape in inputs_of(case, 1).items()
                ]
                output = planned.describe(shapes, types[:-1])
                profile = [[*inputs_of(case, size).values(), (size, *case.output_shape[1:])] for size in (OPT, MAX)]
                tactics = planned.tactics(*profile, types)
                parameters, scalars = planned.launch(tactics[0])
                name, ptx = planned.kernel()
                shown.append(
                    {
                        "operator": case.operator,
                        "architecture": architecture,
                        "inputs": len(names),
                        "output_is_dynamic": not output[0].is_constant(),
                        "grid_is_dynamic": not parameters.grid_x.expression.is_constant(),
                        "block": value_of(parameters.block_x),
                        "shared_memory_bytes": value_of(parameters.shared_mem),
                        "scalars": len(scalars),
                        "scalar_types": sorted({each.kind for each in scalars}),
                        "tactics": list(tactics),
                        "name": name,
                        "ptx": ptx.decode(),
                    }
                )

    with_expressions(trt, job)
    return shown


def forms() -> dict[str, Any]:
    """Both forms in turn in one process, and what is refused."""
    trt = load_tensorrt()
    from dat_deploy.errors import DatDeployError
    from dat_deploy.plugins.operator import OPERATORS
    from dat_deploy.plugins.tensorrt import registry

    def kinds() -> list[str]:
        found = trt.get_plugin_registry()
        creators = [found.get_creator(name, "1", "dat_deploy") for name in OPERATORS]
        return sorted({"none" if each is None else type(each).__mro__[1].__name__ for each in creators})

    steps = [kinds()]
    for step in (
        lambda: registry.register_ahead_of_time(trt, 90),
        lambda: registry.register_plugins(trt),
        lambda: registry.register_ahead_of_time(trt, 80),
        lambda: registry.register_ahead_of_time(trt, 120, 88),
        lambda: registry.deregister_plugins(trt),
        lambda: registry.register_plugins(trt),
        lambda: registry.register_plugins(trt),
    ):
        step()
        steps.append(kinds())
    registry.deregister_plugins(trt)

    class Other(trt.IPluginCreatorV3One):  # type: ignore[misc]  # of a module that is no import
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = "window_attention", "1", "dat_deploy"
            self.field_names = trt.PluginFieldCollection([])

    other = Other()
    trt.get_plugin_registry().register_creator(other, "dat_deploy")
    refusals = []
    for attempt in (
        lambda: registry.register_plugins(trt),
        lambda: registry.register_ahead_of_time(trt, 90),
        lambda: registry.register_ahead_of_time(trt, 91),
    ):
        try:
            attempt()
        except DatDeployError as error:
            refusals.append(f"{type(error).__name__}: {error}")
    return {"steps": steps, "refusals": refusals}


def refusals() -> list[list[str]]:
    """What a build would be told at each step for inputs that no kernel takes."""
    trt = load_tensorrt()
    from dat_deploy.plugins import ptx as ahead_of_time
    from dat_deploy.plugins.tensorrt import registry
    from dat_deploy.plugins.tensorrt.calls import last_error

    compiled = ahead_of_time.CompiledLaunch("", "fake", 50_000, 0, 0)
    ahead_of_time.compile_launch = lambda *_, **__: compiled
    registry.register_ahead_of_time(trt, 90)
    half, whole = trt.DataType.HALF, trt.DataType.FLOAT
    attributes = {"num_heads": 3, "window_size": 7, "shift_size": 0}
    qkv, table = (8, 14, 14, 288), (169, 3)
    heads = {"num_heads": 1, "window_size": 7, "shift_size": 0}
    told = []

    def job(builder: Any, dynamic: Any) -> None:
        def attempt(shapes: Any, types: Any, largest: Any, attributes: Any = attributes) -> None:
            planned = Planned(trt, builder, "window_attention", attributes)
            try:
                planned.describe(shapes[:-1], types[:-1])
                planned.tactics(shapes, largest, types)
                raise AssertionError("nothing was refused")
            except Exception as error:
                recorded = last_error()
                told.append([type(error).__name__, str(error), str(recorded is error)])

        output = (8, 14, 14, 96)
        attempt([qkv, table, output], [half, half, half], [qkv, table, output])  # shared memory
        attempt([qkv, table, output], [half, trt.DataType.INT32, half], [qkv, table, output])
        attempt([(8, 14, 15, 288), table, output], [half, half, half], [(8, 14, 15, 288), table, output])
        attempt([qkv, table, output], [half, half, half], [(8, 28, 14, 288), table, output])  # a dynamic height
        attempt([(8, 14, 14, 288), (169, 1), output], [whole] * 3, [(8, 14, 14, 288), (169, 1), output], heads)
        attempt([qkv, table, output], [half] * 3, [qkv, table, output], {"num_heads": 3, "window_size": 7})
        attempt([qkv[1:], table, output], [half] * 3, [qkv[1:], table, output])

    with_expressions(trt, job)
    return told


def builds(source: str, folder: str) -> list[Any]:
    """What backend `tensorrt` builds of an exported file on a machine that seems to have a GPU of sm_89."""
    load_tensorrt()
    from dat_deploy.engine import build as library
    from dat_deploy.engine.tensorrt import engine as tensorrt_engine
    from dat_deploy.engine.tensorrt import serialize as tensorrt_serialize
    from dat_deploy.errors import DatDeployError

    tensorrt_engine.gpu_architecture = tensorrt_serialize.gpu_architecture = lambda: 89
    asked: list[dict[str, Any]] = [
        {"lowering": "gather"},
        {"lowering": "plugin", "plugin_form": "IPluginV3"},
        {"lowering": "gather", "architectures": [80, 89]},
        {"lowering": "gather", "architectures": [75, 89]},
        {"lowering": "gather", "timing_cache": Path(folder, "timings")},
        {"lowering": "plugin"},
        {"lowering": "plugin", "architectures": [90, 100]},
    ]
    found: list[Any] = []
    for options in asked:
        try:
            report = library.build(Path(source), Path(folder, "x.engine"), force=True, **options)
        except DatDeployError as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            passport = report.passport
            found.append([passport.backend_version, passport.architectures, passport.plugins, passport.plugin_form])
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
