"""What a wrong `deformable_attention` gives."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dat_deploy.plugins.deformable_attention.reference import (
    attention_with_bias,
    deformable_attention,
    interpolated_bias,
)

__all__ = ["PARTS", "mistakes"]

FAR_AWAY = 8.0  # a sampling location from which no displacement reaches a bias table


def _far_away(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "sampling_locations": torch.full_like(inputs["sampling_locations"], FAR_AWAY)}


PARTS = {"bias": _far_away}


def mistakes(inputs: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """See `Operator.mistakes`."""

    def changed(**tensors: Tensor) -> Tensor:
        arguments: dict[str, Any] = {**inputs, **tensors, **attributes}
        return deformable_attention(**arguments)

    locations, table, query = (inputs[name] for name in ("sampling_locations", "relative_position_bias_table", "query"))
    yield "x and y of the locations were swapped", changed(sampling_locations=locations.flip(-1))
    yield "the bias table were zero", changed(relative_position_bias_table=torch.zeros_like(table))
    yield "the bias table were transposed", changed(relative_position_bias_table=table.transpose(1, 2))
    _, height, width, _ = query.shape
    half_pixel = bool(attributes["half_pixel_queries"])
    for label, flag, aligned in (
        ("its table were read with align_corners=False", half_pixel, False),
        (f"half_pixel_queries were {int(not half_pixel)}", not half_pixel, True),
    ):
        bias = interpolated_bias(table, locations, height, width, flag, align_corners=aligned)
        yield label, attention_with_bias(query, inputs["key"], inputs["value"], bias, attributes["num_heads"])
