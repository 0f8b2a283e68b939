"""The operators that an exported graph holds as nodes of domain dat_deploy, and what is known of each."""

from types import ModuleType

import onnx_ir as ir

from dat_deploy.plugins.deformable_attention import onnx_function as deformable_attention
from dat_deploy.plugins.deformable_sample import onnx_function as deformable_sample
from dat_deploy.plugins.neighborhood_attention import onnx_function as neighborhood_attention
from dat_deploy.plugins.onnx_domain import DOMAIN_NAME
from dat_deploy.plugins.window_attention import onnx_function as window_attention

__all__ = ["MODULES", "operator_nodes", "parameters"]

MODULES: dict[str, ModuleType] = {
    "deformable_sample": deformable_sample,
    "deformable_attention": deformable_attention,
    "window_attention": window_attention,
    "neighborhood_attention": neighborhood_attention,
}


def operator_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of domain dat_deploy, in graph order."""
    return [node for node in model.graph if node.domain == DOMAIN_NAME]


def parameters(operator: str) -> list[str]:
    """The names of an operator's inputs, in order."""
    return list(MODULES[operator].BODIES["function"].to_function_proto().input)
