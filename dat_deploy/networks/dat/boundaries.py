"""The tensors between the parts of a network, as `networks.family.Block` says."""

from collections.abc import Iterator

from dat_deploy.networks.dat.variants import Variant
from dat_deploy.networks.family import Block, Step

__all__ = ["network_blocks"]

# The parameters of a block's module that are inputs of its operators, by those.
_TABLE = ("relative_position_bias_table", "relative_position_bias_table")
_WEIGHTS = {
    "deformable_sample": (),
    "deformable_attention": (_TABLE,),
    "window_attention": (_TABLE,),
    "neighborhood_attention": (("padding_qkv", "proj_qkv.bias"), _TABLE),
}
OPERATORS = {"L": "window_attention", "S": "window_attention", "N": "neighborhood_attention"}


def network_blocks(variant: Variant) -> list[Block]:
    """Everything from the image to the logits or feature maps, in order; a norm of a backbone follows its stage."""
    blocks = [_modules("patch_proj", ["conv", "norm", *(["act", "conv2", "norm2"] * variant.overlapping_patches)])]
    for index in range(max(variant.features, default=len(variant.stages) - 1) + 1):  # what is behind is left out
        if index:
            convolution = "conv" if variant.overlapping_patches else "linear"
            blocks.append(_modules(f"down_projs.{index - 1}", [convolution, "norm"]))
        blocks += _stage(variant, index)
        if index in variant.features:
            blocks.append(_module(f"norms.{index}", f"feature_map_{index}", is_branch=True))
    return blocks if variant.features else [*blocks, _module("cls_norm"), _module("cls_head", "logits")]


def _modules(name: str, parts: list[str]) -> Block:
    return Block(name, tuple(Step(part, f"{name}.{part}", ends=f"{name}.{part}") for part in parts))


def _module(name: str, *outputs: str, is_branch: bool = False) -> Block:
    return Block(name, (Step(name, name, ends=name, outputs=outputs),), is_branch)


def _operator(name: str, reader: str, *outputs: str, **inputs: str) -> Step:
    return Step(
        name, reader, "input", operator=name, inputs=tuple(inputs.items()), weights=_WEIGHTS[name], outputs=outputs
    )


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
                Step("conv_offset", attention, "locations", outputs=(f"sampling_locations_{index}_{i}",)),
                _operator("deformable_sample", f"{attention}.proj_k", value=norms[0], sampling_locations="conv_offset"),
                projected["proj_k"],
                projected["proj_v"],
                _operator(
                    "deformable_attention",
                    proj_out,
                    f"attention_{index}_{i}",
                    query="proj_q",
                    key="proj_k",
                    value="proj_v",
                    sampling_locations="conv_offset",
                ),
            )
        else:
            inner = (projected["proj_qkv"], _operator(OPERATORS[letter], proj_out, qkv="proj_qkv"))
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
