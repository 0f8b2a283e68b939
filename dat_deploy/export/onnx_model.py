"""PyTorch network -> ONNX graph whose deformable operators are nodes of domain dat_deploy, still without bodies."""

import ast
import contextlib
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as passes
from onnxscript import opset18 as op

from dat_deploy.errors import ExportError
from dat_deploy.export.boundaries import record_boundaries
from dat_deploy.export.cleanup import constant_reshape_shapes, name_results
from dat_deploy.export.options import check_opset
from dat_deploy.networks.family import Network, family_of
from dat_deploy.plugins.onnx_domain import DOMAIN, DOMAIN_NAME, DOMAIN_VERSION
from dat_deploy.plugins.operator import OPERATORS, Operator
from dat_deploy.plugins.specification import PLUGIN_ATTRIBUTES, Kind, Role, Specification
from dat_deploy.progress import Progress

__all__ = ["IR_VERSION", "onnx_from_model"]

IR_VERSION = 10

_SCOPES = "pkg.torch.onnx.name_scopes"  # torch's own property of a node: the modules around it, outermost first
_Value = ir.Value


def onnx_from_model(
    model: torch.nn.Module,
    network: Network,
    *,
    sampled_points: bool = False,
    batch: int | None = None,
    dynamic_image_size: bool = False,
    opset_version: int = 18,
    progress: Progress = lambda _: None,
) -> ir.Model:
    """Capture `model` with torch.export; every operator is one node that carries all its attributes.

    Args:
        model: what the family of `network` makes of it with `fused=True`, and with these `sampled_points`.
        batch: the fixed batch, or None for a dynamic one.
        dynamic_image_size: height and width are free, in the multiples that the network takes.
        opset_version: 17, 18 or 19.
        progress: called with what is being done.

    Returns:
        A graph with input `image` [batch, 3, H, W] and outputs as `network.outputs` says, all float32. A node's
        name starts with the module that made it: `stages.2.attns.1/deformable_attention`. Its metadata lists the
        tensors between the blocks (see `export.boundaries`).

    Raises:
        ExportError: for another opset; TensorRT reads opset 20's GridSample wrongly, so none above 19 is made.
    """
    check_opset(opset_version)
    height, width = network.image_size
    example = torch.zeros(batch or 2, 3, height, width)
    dims: dict[int, Any] = {} if batch else {0: torch.export.Dim("batch")}
    if dynamic_image_size:
        step, least = network.side_multiple, network.min_side
        for axis, name in ((2, "height"), (3, "width")):
            dims[axis] = step * torch.export.Dim(f"{name}_{step}", min=least // step)
    progress("tracing")
    with _quiet():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            optimize=False,  # torch's own pass would rename what the passes below name
            verbose=False,
            opset_version=18,
            input_names=["image"],
            output_names=list(network.output_names(sampled_points=sampled_points)),
            dynamic_shapes=(dims,) if dims else None,
            custom_translation_table=_translations(),
        )
    assert program is not None
    progress("optimizing the graph")
    graph_model = program.model
    graph_model.functions.clear()
    onnxscript.optimizer.fold_constants(graph_model)
    onnxscript.optimizer.remove_unused_nodes(graph_model)
    _set_opset(graph_model, opset_version)
    _name_after_modules(graph_model)
    constant_reshape_shapes(graph_model)
    onnxscript.optimizer.remove_unused_nodes(graph_model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph_model)
    name_results(graph_model)
    record_boundaries(graph_model, family_of(network).blocks(network))
    if dynamic_image_size:
        _name_sides(graph_model, network)
    return graph_model


def _translations() -> dict[Callable[..., object], Callable[..., object]]:
    """What torch.onnx makes of each torch operator."""

    def gelu(x: _Value, approximate: str = "none") -> _Value:
        """An order of factors that ONNX Runtime's and TensorRT's fusions look for; torch's own differs.

        The half comes first: `x * (1 + erf)` is twice `x`, which float16 does not hold from 32768 on.
        """
        assert approximate == "none"
        return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Div(x, math.sqrt(2.0))), 1.0))  # type: ignore[no-any-return]  # untyped library

    table: dict[Callable[..., object], Callable[..., object]] = {torch.ops.aten.gelu.default: gelu}
    for name in OPERATORS:
        operator = Operator(name)
        _ = operator.torch_operator  # whose import makes the next line's
        table[getattr(torch.ops.dat_deploy, name).default] = _translation(operator.specification)
    return table


def _translation(specified: Specification) -> Callable[..., _Value]:
    """A function that adds one node of domain dat_deploy to the graph being built.

    It has the signature of the torch operator, which torch.onnx reads: what has no annotation is a tensor.
    """
    formal, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    letters = {name: "I" if role is Role.INDICES else "T" for name, role in specified.roles.items()}
    types = {"T": ["tensor(float)"], "I": ["tensor(int64)"]}
    schema = onnx.defs.OpSchema(
        specified.name,
        DOMAIN_NAME,
        DOMAIN_VERSION,
        inputs=[formal(name, letter) for name, letter in letters.items()],
        outputs=[formal("output", "T")],
        type_constraints=[(letter, types[letter], "") for letter in sorted({*letters.values()})],
        attributes=[
            *(
                attribute(name, getattr(onnx.defs.OpSchema.AttrType, kind.onnx))
                for name, kind in specified.attributes.items()
            ),
            *(attribute(name, onnx.defs.OpSchema.AttrType.STRING) for name in PLUGIN_ATTRIBUTES),
        ],
    )
    operator = onnxscript.values.Op(DOMAIN, specified.name, schema)

    names = (*specified.inputs, *specified.attributes)

    def add_node(*arguments: Any, **named: Any) -> _Value:
        values = {**dict(zip(names, arguments, strict=False)), **named}
        attributes = {name: _attribute(kind, values[name]) for name, kind in specified.attributes.items()}
        tensors = [values[name] for name in specified.inputs]
        return operator(*tensors, **attributes, **PLUGIN_ATTRIBUTES)  # type: ignore[no-any-return]  # untyped library

    annotations = {name: _annotation(kind) for name, kind in specified.attributes.items()}
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    add_node.__signature__ = inspect.Signature([inspect.Parameter(name, either) for name in names])  # type: ignore[attr-defined]  # see inspect.signature
    add_node.__annotations__ = annotations
    return add_node


def _annotation(kind: Kind) -> Any:
    element: Any = int if kind.element is bool else kind.element
    return Sequence[element] if kind.is_list else element


def _attribute(kind: Kind, value: Any) -> Any:
    """As onnxscript takes it."""
    if kind.is_list:
        return [kind.element(each) for each in value]
    return int(value) if kind.element is bool else value


def _set_opset(model: ir.Model, opset_version: int) -> None:
    """Opsets 17 to 19 mean the same for every node here but one: ReduceMean takes its axes as an input from 18 on."""
    model.ir_version = IR_VERSION
    model.opset_imports.clear()
    model.opset_imports.update({"": opset_version, DOMAIN_NAME: DOMAIN_VERSION})
    if opset_version >= 18:
        return
    for node in model.graph:
        if node.op_type == "ReduceMean":
            axes = node.inputs[1]
            assert axes is not None
            constant = ir.convenience.get_const_tensor(axes)
            assert constant is not None
            node.attributes["axes"] = ir.AttrInt64s("axes", constant.numpy().tolist())
            node.attributes.pop("noop_with_empty_axes", None)  # of opset 18 too
            node.resize_inputs(1)


def _name_after_modules(model: ir.Model) -> None:
    """`stages.2.attns.1/MatMul`, with a counter where a module has several."""
    counts: dict[str, int] = {}
    if not any(_SCOPES in node.metadata_props for node in model.graph):
        raise ExportError(
            f"torch {torch.__version__} no longer says which module made a node, so nodes cannot be named after "
            f"modules. Use a torch that dat-deploy was tested with: pip install torch==2.13.0"
        )
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
        module = scopes[-2] if len(scopes) > 1 else ""
        name = f"{module}/{node.op_type}" if module else node.op_type
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        node.metadata_props.clear()  # torch's stack traces hold paths of this machine


def _name_sides(graph_model: ir.Model, network: Network) -> None:
    """`height` and `width` where torch writes `32*height_32`, and `height/4` for `8*s87`."""
    graph = graph_model.graph
    entries: list[tuple[ir.Value, tuple[int, ...], int]] = [(graph.inputs[0], (2, 3), 1)]
    for value, output in zip(graph.outputs, network.outputs(), strict=True):
        entries += [(value, tuple(axis + 1 for axis in output.sides), output.stride)] if output.sides else []
    for value, axes, stride in entries:
        assert value.shape is not None
        dims = list(value.shape)
        for axis, side in zip(axes, ("height", "width"), strict=True):
            dims[axis] = ir.SymbolicDim(f"{side}/{stride}" if stride > 1 else side)
        value.shape = ir.Shape(dims)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns of its own internals and of absent torchvision; nothing in it is for the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
