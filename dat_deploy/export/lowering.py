"""Lowerings: what the deformable operators become in the file.

    function     nodes of domain dat_deploy, each carrying its meaning as a function of standard operators
    plugin       the same nodes without bodies, for an engine that must not silently fall back
    gather       inlined; bilinear reads as Pad + Gather + multiply-add
    gridsample   inlined; two GridSample nodes a deformable block
    hat          inlined; bilinear reads as products with hat functions, no gather of data at all

`lower` works on any file whose operators are still nodes, with or without bodies.
"""

from collections.abc import Iterable

import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir
import onnxscript
import onnxscript.optimizer

from dat_deploy.errors import ExportError
from dat_deploy.plugins.deformable_attention import onnx_function as deformable_attention
from dat_deploy.plugins.deformable_sample import onnx_function as deformable_sample
from dat_deploy.plugins.onnx_domain import DOMAIN_NAME, DOMAIN_VERSION, PLUGIN_ATTRIBUTES
from dat_deploy.plugins.window_attention import onnx_function as window_attention

__all__ = ["LOWERINGS", "OPERATORS", "function_bodies", "lower", "operator_nodes"]

LOWERINGS = ("function", "plugin", "gather", "gridsample", "hat")

_MODULES = {
    "deformable_sample": deformable_sample,
    "deformable_attention": deformable_attention,
    "window_attention": window_attention,
}
OPERATORS = tuple(_MODULES)


def operator_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of domain dat_deploy, in graph order."""
    return [node for node in model.graph if node.domain == DOMAIN_NAME]


def function_bodies(lowering: str, opset_version: int) -> list[onnx.FunctionProto]:
    """One flat FunctionProto an operator, with every attribute that its nodes carry declared."""
    bodies = []
    for name, module in _MODULES.items():
        body = _flattened(module.BODIES[lowering], module.HELPERS)
        body.name = name
        body.attribute.extend(PLUGIN_ATTRIBUTES)
        for opset in body.opset_import:
            if opset.domain == "":
                opset.version = opset_version
        bodies.append(body)
    return bodies
