"""The tensors between the parts of a network, by their names in a file.

`bisect` compares an engine with PyTorch at them. An exported file lists their names in its metadata; the tensors around
its operators are in the list of operators (`operator_records`), because lowering may rename those.
"""

import json
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from dat_deploy.networks.family import Block

__all__ = ["block_boundaries", "record_boundaries"]

_PROPERTY = "dat_deploy.boundaries"  # of a file


def record_boundaries(model: ir.Model, blocks: Sequence[Block]) -> None:
    """Write the names of the tensors into the metadata of a graph whose nodes are named after modules.

    They stay right: a result is called like its node, and no later pass removes or renames these nodes.
    """
    steps = [step for block in blocks for step in block.steps if step.ends]
    ends = {step.ends for step in steps}
    values: dict[str, ir.Value] = {}
    for node in model.graph:
        module = str(node.name).rpartition("/")[0]
        if module in ends and node.outputs[0].dtype in (None, ir.DataType.FLOAT):
            values[module] = node.outputs[0]  # the last one is the module's own result
    names: dict[str, str] = {}
    for step in steps:
        value = values[step.ends]
        if step.is_residual:
            (reader,) = (node for node, _ in value.uses() if node.op_type == "Add")
            value = reader.outputs[0]
        names[step.ends] = str(value.name)
    model.metadata_props[_PROPERTY] = json.dumps(names)


def block_boundaries(properties: Mapping[str, str]) -> dict[str, str]:
    """`Step.ends` -> name of the tensor, as a file's metadata lists them; none if it has no such list."""
    names: dict[str, str] = json.loads(properties.get(_PROPERTY, "{}"))
    return names
