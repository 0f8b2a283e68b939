"""One of our operators by itself: inputs that bring out its faults, what PyTorch gives for them, and usual mistakes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray

from dat_deploy.export.records import OperatorRecord
from dat_deploy.networks.dat.model import DAT, REFERENCE
from dat_deploy.plugins.deformable_attention.reference import attention_with_bias, interpolated_bias
from dat_deploy.validate.stress import stress_locations

__all__ = ["mistakes", "operator_output", "stress_inputs"]

Array = NDArray[Any]


def stress_inputs(record: OperatorRecord, network: DAT, kind: str, batch: int) -> dict[str, torch.Tensor]:
    """Standard normal, but for the locations, see `stress_locations`."""
    stage = int(record.name.split(".")[1])
    config = network.variant.stages[stage]
    height, width = network.variant.feature_map(stage)
    sampled_map = config.sampled_map(height, width)
    feature_map = (batch, height, width, config.channels)
    sampled = (batch, math.prod(sampled_map), config.channels)
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name in record.inputs:
        if name != "sampling_locations":
            is_map = name == "query" or record.operator == "deformable_sample"
            inputs[name] = torch.randn(feature_map if is_map else sampled, generator=generator)
    locations = (batch, config.offset_groups, *sampled_map, 2)
    inputs["sampling_locations"] = stress_locations(kind, locations, (height, width), seed=0)
    return inputs


def _parameters(module: torch.nn.Module, record: OperatorRecord) -> dict[str, torch.Tensor]:
    """Of the operator, those that are weights."""
    found = {}
    if record.operator != "deformable_sample":
        found["relative_position_bias_table"] = module.get_parameter("relative_position_bias_table").data
    if record.operator == "neighborhood_attention":
        found["padding_qkv"] = module.get_parameter("proj_qkv.bias").data
    return found


@torch.inference_mode()
def operator_output(
    module: torch.nn.Module,
    record: OperatorRecord,
    inputs: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float64,
    of_locations: torch.dtype | None = None,
) -> Array:
    """One of our operators in eager PyTorch, in `dtype` but for the locations, with the weights of its module.

    Args:
        inputs: what its record names, without weights; of_locations: by default `dtype`.
    """
    values = {
        name: value.to(of_locations or dtype if name == "sampling_locations" else dtype)
        for name, value in {**_parameters(module, record), **inputs}.items()
    }
    output = getattr(REFERENCE, record.operator)(**values, **record.attributes)
    return output.double().numpy()  # type: ignore[no-any-return]  # found by name


def mistakes(
    module: torch.nn.Module, record: OperatorRecord, inputs: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, Array]]:
    """What an operator would give if it were wrong in one of the ways that exports and runtimes often are."""
    attributes = record.attributes
    weights = _parameters(module, record)

    def changed(**values: torch.Tensor) -> Array:
        return operator_output(module, record, {**inputs, **values})

    if "sampling_locations" in inputs:
        locations = inputs["sampling_locations"].double()
        yield "x and y of the locations were swapped", changed(sampling_locations=locations.flip(-1))
    if record.operator == "deformable_sample":
        sides = torch.tensor(inputs["value"].shape[1:3]).double()
        moved = ((locations + 1) * sides - 1) / (sides - 1).clamp(min=1) - 1
        yield "it read with align_corners=False", changed(sampling_locations=moved)
        index = ((locations + 1) / 2 * (sides - 1)).round()
        yield "it read the nearest pixel", changed(sampling_locations=index / (sides - 1).clamp(min=1) * 2 - 1)
        yield "it read the border outside the map", changed(sampling_locations=locations.clamp(-1, 1))
    if record.operator == "window_attention" and attributes["shift_size"]:
        unshifted = replace(record, attributes={**attributes, "shift_size": 0})
        yield "its windows were not shifted", operator_output(module, unshifted, inputs)
    table = weights.get("relative_position_bias_table")
    if table is None:
        return
    yield "the bias table were zero", changed(relative_position_bias_table=torch.zeros_like(table))
    if record.operator == "window_attention":
        side = 2 * attributes["window_size"] - 1
        transposed = table.reshape(side, side, -1).transpose(0, 1).reshape(table.shape)
    else:
        transposed = table.transpose(1, 2)
    yield "the bias table were transposed", changed(relative_position_bias_table=transposed)
    if record.operator == "deformable_attention":
        query, half_pixel = inputs["query"].double(), bool(attributes["half_pixel_queries"])
        keys = (query, inputs["key"].double(), inputs["value"].double())
        for label, flag, aligned in (
            ("its table were read with align_corners=False", half_pixel, False),
            (f"half_pixel_queries were {int(not half_pixel)}", not half_pixel, True),
        ):
            bias = interpolated_bias(table, locations, query.shape[1], query.shape[2], flag, align_corners=aligned)
            yield label, attention_with_bias(*keys, bias, attributes["num_heads"]).numpy()
