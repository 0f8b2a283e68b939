"""The tensors between the parts of a network: which there are, what they are in PyTorch, and their names in a file.

`bisect` compares an engine with PyTorch at them. An exported file lists their names in its metadata; the tensors around
its operators are in the list of operators (`operator_records`), because lowering may rename those.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor, nn

from dat_deploy.networks.dat.variants import Variant
from dat_deploy.plugins.operator import specification

__all__ = [
    "Block",
    "Step",
    "block_boundaries",
    "network_blocks",
    "operator_sizes",
    "operator_sources",
    "operator_weights",
    "record_boundaries",
]

_PROPERTY = "dat_deploy.boundaries"  # of a file
# The steps that make the inputs of the operators, and the parameters that are their weights.
_SOURCES = {
    "qkv": "proj_qkv",
    "query": "proj_q",
    "key": "proj_k",
    "value": "proj_v",
    "sampling_locations": "conv_offset",
}
_WEIGHTS = {"relative_position_bias_table": "relative_position_bias_table", "padding_qkv": "proj_qkv.bias"}
OPERATORS = {"L": "window_attention", "S": "window_attention", "N": "neighborhood_attention"}


@dataclass(frozen=True)
class Step:
    """One part of a block, up to one tensor.

    Attributes:
        name: as in the model, `linear1` or `layer_norms.2`, or that of one of our operators.
        module: in PyTorch the tensor is this module's `side`: its `input`, its `output`, or its sampling `locations`.
        ends: the module that makes the tensor; where `is_residual`, the sum that it goes into does. Empty for what the
            list of operators names.
    """

    name: str
    module: str
    side: str = "output"
    ends: str = ""
    is_residual: bool = False
    is_operator: bool = False


@dataclass(frozen=True)
class Block:
    """What `bisect` names first, as in the model: `stages.2.attns.1`; its steps in order, the last ends it."""

    name: str
    steps: tuple[Step, ...]

    @property
    def is_deformable(self) -> bool:
        return any(step.name == "deformable_attention" for step in self.steps)


def network_blocks(variant: Variant) -> list[Block]:
    """Everything from the image to the logits or feature maps, in order; a norm of a backbone follows its stage."""
    blocks = [_modules("patch_proj", ["conv", "norm", *(["act", "conv2", "norm2"] * variant.overlapping_patches)])]
    for index in range(max(variant.features, default=len(variant.stages) - 1) + 1):  # what is behind is left out
        if index:
            convolution = "conv" if variant.overlapping_patches else "linear"
            blocks.append(_modules(f"down_projs.{index - 1}", [convolution, "norm"]))
        blocks += _stage(variant, index)
        if index in variant.features:
            blocks.append(_module(f"norms.{index}"))
    return blocks if variant.features else [*blocks, _module("cls_norm"), _module("cls_head")]


def _modules(name: str, parts: list[str]) -> Block:
    return Block(name, tuple(Step(part, f"{name}.{part}", ends=f"{name}.{part}") for part in parts))


def _module(name: str) -> Block:
    return Block(name, (Step(name, name, ends=name),))


def _stage(variant: Variant, index: int) -> Iterator[Block]:
    stage, path = variant.stages[index], f"stages.{index}"
    for i, letter in enumerate(stage.blocks):
        norms = [f"layer_norms.{2 * i}", f"layer_norms.{2 * i + 1}"]
        unit = f"{path}.local_perception_units.{i}"
        if stage.local_perception:
            yield Block(unit, (Step(unit, f"{path}.{norms[0]}", "input", unit, is_residual=True),))

        attention = f"{path}.attns.{i}"
        proj_out = f"{attention}.proj_out"
        normalized = Step(norms[0], f"{path}.{norms[0]}", ends=f"{path}.{norms[0]}")
        projected = {
            part: Step(part, f"{attention}.{part}", ends=f"{attention}.{part}")
            for part in ("proj_qkv", "proj_q", "proj_k", "proj_v")
        }
        summed = Step("proj_out", f"{path}.{norms[1]}", "input", proj_out, is_residual=True)
        inner: tuple[Step, ...]
        if letter == "D":
            inner = (
                projected["proj_q"],
                Step("conv_offset", attention, "locations"),
                Step("deformable_sample", f"{attention}.proj_k", "input", is_operator=True),
                projected["proj_k"],
                projected["proj_v"],
                Step("deformable_attention", proj_out, "input", is_operator=True),
            )
        else:
            inner = (projected["proj_qkv"], Step(OPERATORS[letter], proj_out, "input", is_operator=True))
        yield Block(attention, (normalized, *inner, summed))

        mlp = f"{path}.mlps.{i}"
        following = f"local_perception_units.{i + 1}" if stage.local_perception else f"layer_norms.{2 * i + 2}"
        after = (f"{path}.{following}", "input") if i + 1 < len(stage.blocks) else (path, "output")
        steps = [Step(norms[1], f"{path}.{norms[1]}", ends=f"{path}.{norms[1]}")]
        steps.append(Step("linear1", f"{mlp}.linear1", ends=f"{mlp}.linear1"))
        if stage.depthwise_mlp:
            steps.append(Step("depthwise", f"{mlp}.act", "input", f"{mlp}.depthwise", is_residual=True))
        steps.append(Step("act", f"{mlp}.act", ends=f"{mlp}.act"))
        steps.append(Step("linear2", *after, ends=f"{mlp}.linear2", is_residual=True))
        yield Block(mlp, tuple(steps))


def operator_sources(block: Block, operator: str) -> dict[str, Step]:
    """Input of an operator -> the step that ends in it."""
    steps = {step.name: step for step in block.steps}
    sources = _SOURCES | ({"value": block.steps[0].name} if operator == "deformable_sample" else {})
    return {name: steps[source] for name, source in sources.items() if source in steps}


def operator_weights(attention: nn.Module, operator: str) -> dict[str, Tensor]:
    """Input of an operator -> the parameter of the module that calls it."""
    names = [name for name in specification(operator).inputs if name in _WEIGHTS]
    return {name: attention.get_parameter(_WEIGHTS[name]).data for name in names}


def operator_sizes(variant: Variant, module: str, batch: int) -> dict[str, int]:
    """By the letters of the operators' specifications, for those of a deformable block."""
    index = int(module.split(".")[1])
    stage, (height, width) = variant.stages[index], variant.feature_map(index)
    rows, columns = stage.sampled_map(height, width)
    sampled = {"G": stage.offset_groups, "Hk": rows, "Wk": columns, "Ns": rows * columns}
    return {"B": batch, "H": height, "W": width, "C": stage.channels, "M": stage.heads} | sampled


def record_boundaries(model: ir.Model, variant: Variant) -> None:
    """Write the names of the tensors into the metadata of a graph whose nodes are named after modules.

    They stay right: a result is called like its node, and no later pass removes or renames these nodes.
    """
    steps = [step for block in network_blocks(variant) for step in block.steps if step.ends]
    wanted = {step.ends for step in steps}
    made: dict[str, ir.Value] = {}
    for node in model.graph:
        module = str(node.name).rpartition("/")[0]
        if module in wanted and node.outputs[0].dtype in (None, ir.DataType.FLOAT):
            made[module] = node.outputs[0]  # the last one is the module's own result
    names: dict[str, str] = {}
    for step in steps:
        value = made[step.ends]
        if step.is_residual:
            (reader,) = (node for node, _ in value.uses() if node.op_type == "Add")
            value = reader.outputs[0]
        names[step.ends] = str(value.name)
    model.metadata_props[_PROPERTY] = json.dumps(names)


def block_boundaries(properties: dict[str, str]) -> dict[str, str]:
    """`Step.ends` -> name of the tensor, as a file's metadata lists them; none if it has no such list."""
    names: dict[str, str] = json.loads(properties.get(_PROPERTY, "{}"))
    return names
