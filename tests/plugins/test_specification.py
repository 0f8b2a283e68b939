"""An operator's specification, torch schema, ONNX bodies and kernel hold to each other; a new operator is a folder."""

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import dat_deploy.plugins
from dat_deploy.export.lowering import function_bodies
from dat_deploy.export.options import LOWERINGS
from dat_deploy.plugins.onnx_domain import DOMAIN_NAME
from dat_deploy.plugins.operator import OPERATORS, Operator, specification
from dat_deploy.plugins.specification import (
    BOOL,
    FLOAT,
    FLOATS,
    INT,
    INTS,
    PLUGIN_ATTRIBUTES,
    STRING,
    Input,
    Kind,
    Role,
    Specification,
)
from dat_deploy.plugins.tensorrt.node import numbered

SCHEMA_TYPES = {
    INT: "int",
    BOOL: "bool",
    FLOAT: "float",
    INTS: "List[int]",
    FLOATS: "List[float]",
    STRING: "str",
}
BODIED = [lowering for lowering in LOWERINGS if lowering != "plugin"]
MAP = {"B": 2, "H": 4, "W": 6, "C": 8, "M": 2}
SAMPLED = {"G": 2, "Hk": 3, "Wk": 3, "Ns": 9}
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {  # sizes by letter, and attributes
    "deformable_sample": (MAP | SAMPLED, {}),
    "deformable_attention": (MAP | SAMPLED | {"Th": 7, "Tw": 11}, {"num_heads": 2, "half_pixel_queries": True}),
    "window_attention": (MAP | {"T": 9}, {"num_heads": 2, "window_size": 2, "shift_size": 1}),
    "neighborhood_attention": (MAP | {"T": 5}, {"num_heads": 2, "kernel_size": 3, "dilation": 1}),
}


def disagreements(operator: Operator, specified: Specification) -> list[str]:
    """Between the files of an operator and a specification of it, a sentence each."""
    return [
        sentence
        for compare in (of_schema, of_roles, of_bodies, of_shapes, of_kernel)
        for sentence in compare(operator, specified)
    ]


def of_schema(operator: Operator, specified: Specification) -> list[str]:
    expected = [(name, "Tensor") for name in specified.inputs]
    expected += [(name, SCHEMA_TYPES[kind]) for name, kind in specified.attributes.items()]
    function = operator.torch_operator
    schema = getattr(torch.ops.dat_deploy, operator.name).default._schema
    has = [(argument.name, str(argument.type)) for argument in schema.arguments]
    wrong = [] if has == expected else [f"the schema has {has}"]
    for what in (function, operator.reference):
        names = list(inspect.signature(what).parameters)
        wrong += [] if names == [name for name, _ in expected] else [f"{what.__module__} has {names}"]
    return wrong


def of_roles(operator: Operator, specified: Specification) -> list[str]:
    """The words of the names, and the letter of the batch."""
    wrong = []
    for name, each in specified.inputs.items():
        for word, role in (("locations", Role.LOCATIONS), ("table", Role.TABLE), ("indices", Role.INDICES)):
            if (word in name) != (each.role is role):
                wrong.append(f"{name} is {each.role}")
        if each.dims.startswith("B ") != each.role.leads_with_batch:
            wrong.append(f"{name} of {each.dims} is {each.role}")
    if (specified.frame is None) != (not specified.named(Role.LOCATIONS)):
        wrong.append("locations have a frame, and nothing else has")
    return wrong


def of_bodies(operator: Operator, specified: Specification) -> list[str]:
    wrong = []
    for lowering in BODIED:
        body = operator.onnx_function.BODIES[lowering].to_function_proto()
        if list(body.input) != list(specified.inputs) or list(body.attribute) != list(specified.attributes):
            wrong.append(f"the body of {lowering} has {list(body.input)} and {list(body.attribute)}")
    return wrong


def tensors_of(operator: Operator, specified: Specification) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes, _ = CASES[operator.name]
    return [torch.rand(each.shape(sizes), generator=generator) for each in specified.inputs.values()]


def of_shapes(operator: Operator, specified: Specification) -> list[str]:
    """The output's, as the specification, the torch operator, its reference and every body have it."""
    _, attributes = CASES[operator.name]
    try:
        tensors = tensors_of(operator, specified)
        expected = specified.shape_of_output([tensor.shape for tensor in tensors], list(attributes.values()))
    except Exception as error:
        return [f"no shape of the output: {error!r}"]
    computing: dict[str, Callable[[], Any]] = {
        "the reference": lambda: operator.reference(*tensors, *attributes.values()),
        "the torch operator": lambda: operator.torch_operator(*tensors, *attributes.values()),
        "traced, it": lambda: operator.torch_operator(*(each.to("meta") for each in tensors), *attributes.values()),
    }
    for lowering in BODIED:
        computing[lowering] = lambda lowering=lowering: run_body(operator.name, lowering, tensors, attributes)
    wrong = []
    for what, compute in computing.items():
        try:
            has = tuple(compute().shape)
        except Exception as error:
            wrong.append(f"{what} fails: {error!r}")
        else:
            wrong += [] if has == tuple(expected) else [f"{what} gives {has}, not {expected}"]
    return wrong


def run_body(operator: str, lowering: str, tensors: list[Tensor], attributes: dict[str, Any]) -> Any:
    body = next(each for each in function_bodies(lowering, 18) if each.name == operator)
    node = onnx.helper.make_node(
        operator, list(body.input), ["out"], domain=DOMAIN_NAME, **attributes, **PLUGIN_ATTRIBUTES
    )
    declare = onnx.helper.make_tensor_value_info
    inputs = [declare(name, 1, list(each.shape)) for name, each in zip(body.input, tensors, strict=True)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "operator", inputs, [declare("out", 1, None)]),
        functions=[body],
        opset_imports=[onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(DOMAIN_NAME, 1)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: each.numpy() for name, each in zip(body.input, tensors, strict=True)}
    return session.run(None, feeds)[0]


def of_kernel(operator: Operator, specified: Specification) -> list[str]:
    """Its problem takes what the specification gives it, and its launches the inputs, scalars and the output."""
    _, attributes = CASES[operator.name]
    kernel, wrong = operator.kernel, []
    tables = ["table_bytes"] * len(specified.named(Role.TABLE))
    takes = list(inspect.signature(kernel.problem).parameters)
    gets = [*specified.sized_by, *specified.attributes, "element_bytes", *tables]
    if len(takes) != len(gets) or not all(got.endswith(taken) for got, taken in zip(gets, takes, strict=True)):
        return [f"the problem takes {takes}, and gets {gets}"]
    for dtype in (torch.float16, torch.float32):
        roles = specified.roles.values()
        element_bytes = [4 if role.stays_float32 else dtype.itemsize for role in roles]
        shapes = [each.shape(CASES[operator.name][0]) for each in specified.inputs.values()]
        try:
            problem = kernel.problem(*specified.problem_arguments(shapes, list(attributes.values()), element_bytes))
        except ValueError as error:
            return [f"the problem does not take {shapes}: {error}"]
        for configuration in numbered(kernel.configurations(problem)).values():
            launch = kernel.launch(problem, configuration)
            order = [each.name for each in launch.kernel.params if each.name not in launch.constants]
            if set(launch.inputs) != set(specified.inputs) or order != [*launch.inputs, *launch.scalars, "output"]:
                wrong.append(f"the kernel takes {order}, and is launched with {launch.inputs}")
    return wrong


@pytest.mark.parametrize("name", OPERATORS)
def test_schema_bodies_kernel_and_specification_of_an_operator_agree(name):
    assert disagreements(Operator(name), specification(name)) == []
    assert specification(name).name == name


def _with_input(specified: Specification, name: str, **changes: Any) -> Specification:
    return replace(specified, inputs=specified.inputs | {name: replace(specified.inputs[name], **changes)})


def _renamed(names: Any, old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in names.items()}


CHANGES: dict[str, tuple[str, Callable[[Specification], Specification]]] = {
    "an input renamed": (
        "window_attention",
        lambda s: replace(s, inputs=_renamed(s.inputs, "qkv", "queries"), sized_by=("queries",)),
    ),
    "inputs in another order": (
        "deformable_attention",
        lambda s: replace(s, inputs={name: s.inputs[name] for name in ("key", "query", *list(s.inputs)[2:])}),
    ),
    "an input too many": ("deformable_sample", lambda s: replace(s, inputs=s.inputs | {"mask": Input("B H W C")})),
    "an input of another rank": ("deformable_sample", lambda s: _with_input(s, "value", dims="B H C")),
    "a table of another rank": (
        "neighborhood_attention",
        lambda s: _with_input(s, "relative_position_bias_table", dims="T M"),
    ),
    "locations as data": ("deformable_sample", lambda s: _with_input(s, "sampling_locations", role=Role.DATA)),
    "a table as a weight": (
        "window_attention",
        lambda s: _with_input(s, "relative_position_bias_table", role=Role.WEIGHT),
    ),
    "a weight with a batch": ("neighborhood_attention", lambda s: _with_input(s, "padding_qkv", role=Role.DATA)),
    "an attribute missing": (
        "window_attention",
        lambda s: replace(s, attributes={"num_heads": INT, "window_size": INT}),
    ),
    "attributes in another order": (
        "window_attention",
        lambda s: replace(s, attributes={"num_heads": INT, "shift_size": INT, "window_size": INT}),
    ),
    "an attribute of another kind": (
        "deformable_attention",
        lambda s: replace(s, attributes=s.attributes | {"half_pixel_queries": INT}),
    ),
    "an output of another rank": (
        "deformable_sample",
        lambda s: replace(s, output_shape=lambda value, *_: tuple(value)),
    ),
    "an output of another size": (
        "window_attention",
        lambda s: replace(s, output_shape=lambda qkv, *_, **__: tuple(qkv)),
    ),
    "sizes in another order": (
        "deformable_attention",
        lambda s: replace(s, sized_by=("key", "query", *s.sized_by[2:])),
    ),
    "locations without a frame": ("deformable_sample", lambda s: replace(s, frame=None)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_specification_that_says_otherwise_is_noticed(change):
    name, changed = CHANGES[change]
    assert disagreements(Operator(name), changed(specification(name))) != []


@pytest.mark.parametrize(
    ("kind", "raw", "value"),
    [
        (INT, np.array([3], np.int32), 3),
        (BOOL, np.array([1], np.int32), True),
        (FLOAT, np.array([0.5], np.float32), 0.5),
        (FLOAT, 2, 2.0),
        (INTS, np.array([3, 4], np.int32), (3, 4)),
        (INTS, [], ()),
        (FLOATS, [1.5, 2], (1.5, 2.0)),
        (STRING, np.frombuffer(b"discrete", np.int8), "discrete"),
        (STRING, "discrete", "discrete"),
    ],
)
def test_an_attribute_is_read_from_what_each_library_gives(kind: Kind, raw: Any, value: Any):
    got = kind.value(raw)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("kind", "raw", "sentence"),
    [
        (INT, 0.5, "0.5; it takes one integer."),
        (INT, [1, 2], "[1, 2]; it takes one integer."),
        (BOOL, 2, "2; it takes 0 or 1."),
        (FLOAT, [], "[]; it takes one number."),
        (INTS, [0.5], "[0.5]; it takes integers."),
        (FLOATS, ["a"], "['a']; it takes numbers."),
    ],
)
def test_an_attribute_of_another_kind_is_refused(kind: Kind, raw: Any, sentence: str):
    with pytest.raises(ValueError, match=r"it takes") as error:
        kind.value(raw)
    assert str(error.value) == sentence


# Public names.

BOTH_ORDERS = """
import importlib, sys
from types import FunctionType
import dat_deploy.plugins
from dat_deploy.plugins.operator import OPERATORS
assert not {"torch", "onnx", "triton", "numpy"} & set(sys.modules), "light"
for part in ("specification", "reference", "torch_op"):
    for name in OPERATORS[::2]:
        importlib.import_module(f"dat_deploy.plugins.{name}.{part}")
for name in OPERATORS:
    assert type(getattr(dat_deploy.plugins, name)) is FunctionType, name
for name in OPERATORS:
    importlib.import_module(f"dat_deploy.plugins.{name}.reference")
    importlib.reload(importlib.import_module(f"dat_deploy.plugins.{name}"))
from dat_deploy.plugins import deformable_attention, deformable_sample, neighborhood_attention, window_attention
from dat_deploy.plugins.deformable_sample import reference
print(type(window_attention) is type(deformable_sample) is FunctionType, reference.__name__)
"""


def test_an_operators_name_is_its_function_whichever_of_the_two_is_imported_first():
    done = subprocess.run([sys.executable, "-c", BOTH_ORDERS], capture_output=True, text=True, check=False)  # noqa: S603  # fixed
    assert done.stderr == ""
    assert done.stdout.strip() == "True dat_deploy.plugins.deformable_sample.reference"


def test_type_checkers_are_told_of_every_operator():
    tree = ast.parse(Path(dat_deploy.plugins.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))  # if TYPE_CHECKING
    typed = {
        alias.asname: (statement.module, alias.name)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    expected = {name: (f"dat_deploy.plugins.{name}.torch_op", name) for name in OPERATORS}
    assert typed == expected | {"cache_key": ("dat_deploy.plugins.dispatch", "cache_key")}
    assert dat_deploy.plugins.__all__ == sorted(typed) == dir(dat_deploy.plugins)


def test_every_folder_with_a_specification_is_an_operator():
    folders = {path.parent.name for path in Path(dat_deploy.plugins.__file__).parent.glob("*/specification.py")}
    assert folders == set(OPERATORS)


# A new operator.


def test_a_new_operator_is_a_folder_and_a_name():
    """Traced, exported in every lowering and in half precision, built by TensorRT-RTX, stressed."""
    pytest.importorskip("tensorrt_rtx")
    script = Path(__file__).with_name("toy") / "walk.py"
    done = subprocess.run([sys.executable, script, "walk"], capture_output=True, text=True, check=False)  # noqa: S603  # fixed
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    errors = found.pop("errors")
    assert errors.pop("fp16") < 1e-2
    assert len(errors) == 8
    assert max(errors.values()) < 1e-5
    assert set(found.pop("opcheck").values()) == {"SUCCESS"}
    values = {"slope": 0.5, "steps": [2.0, -1.5]}
    assert found == {
        "operators": [*OPERATORS, "toy_sample"],
        "attributes": values | PLUGIN_ATTRIBUTES,
        "record": ["toy_sample", values, ["sampling_locations", "value"], 1],
        "mistake": ["x and y of the locations were swapped"],
        "types": ["FLOAT16", "FLOAT", "FLOAT"],
        "layer": ["HALF", [-1, 4, 6, 3]],
        "parsed": [0.5, [2.0, -1.5]],
        "is_in_the_engine": True,
        "restored": [0.5, [2.0, -1.5]],
    }


@pytest.mark.compiler
def test_a_new_operator_is_compiled_ahead_of_time_with_attributes_of_every_kind(libraries):
    script = Path(__file__).with_name("toy") / "walk.py"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, script, "ahead_of_time"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603  # fixed
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"output": [2, 4, 6, 3], "tactics": [1, 2], "kernel": ["toy_sample_kernel", True, True]}
