"""How far from PyTorch's the points lie that an engine samples, for each deformable block."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from dat_deploy.export.records import operator_records
from dat_deploy.export.subgraph import model_up_to
from dat_deploy.networks.family import Network, family_of
from dat_deploy.networks.sampling import SampledBlock
from dat_deploy.progress import Progress
from dat_deploy.runners import Runner
from dat_deploy.runners.base import Images

__all__ = ["BlockDrift", "Locations", "block_drift", "engine_locations", "network_locations"]

Locations = NDArray[np.float32]  # B, G, Hk, Wk, 2, last axis (y, x)


@dataclass(frozen=True)
class BlockDrift:
    """Distances between the two sides' sampling locations in pixels of the block's feature map.

    Attributes:
        block: `stages.2.attns.1`.
        allowed: what `judged` may be: the largest, but for the share `left_out` of the points; basis: what it was
            derived from.
    """

    block: str
    points: int
    median: float
    p99: float
    largest: float
    allowed: float
    basis: str = ""
    left_out: float = 0.0
    judged: float = math.nan

    @property
    def share(self) -> float:
        """`judged` as a share of what is allowed; infinite where it is NaN."""
        if self.judged == 0:
            return 0.0
        return self.judged / self.allowed if self.allowed and not math.isnan(self.judged) else math.inf


def network_locations(
    network: Network, model: torch.nn.Module, images: Images, dtype: torch.dtype = torch.float32
) -> dict[str, Locations]:
    """What the blocks of a network in PyTorch sample, by their names."""
    with torch.inference_mode():
        sampled = family_of(network).sampling_locations(model, torch.from_numpy(images).to(dtype))
    return {block: locations.float().numpy() for block, locations in sampled.items()}


def engine_locations(
    runner: Runner,
    model: ir.Model | None,
    images: Images,
    blocks: Sequence[SampledBlock],
    progress: Progress,
) -> dict[str, Locations] | None:
    """What the blocks of an engine sample; None if it cannot be had.

    An engine that gives its locations is asked for them; an ONNX file is cut at one block's locations after another.

    Args:
        model: the file of an engine that is one.
    """
    if {block.locations for block in blocks} <= set(runner.description.outputs):
        outputs = runner.outputs(images)
        return {block.name: outputs[block.locations] for block in blocks}
    if model is None:
        return None
    tensors = {
        record.name.partition("/")[0]: record.locations[0]
        for record in reversed(operator_records(model.metadata_props))  # of a module, the first
        if record.locations
    }
    if set(tensors) != {block.name for block in blocks}:
        return None
    locations = {}
    for block in blocks:
        progress(block.name)
        locations[block.name] = runner.open_graph(model_up_to(model, tensors[block.name]))({"image": images})
    return locations


def block_drift(
    block: SampledBlock,
    locations: Locations,
    expected: Locations,
    allowed: float,
    basis: str = "",
    left_out: float = 0.0,
) -> BlockDrift:
    """One row; NaN counts as infinitely far."""
    distances = np.nan_to_num(block.distances_px(locations, expected), nan=np.inf)
    if not np.isfinite(distances).all():
        return BlockDrift(block.name, distances.size, math.nan, math.nan, math.nan, allowed, basis, left_out)
    median, p99 = np.quantile(distances, [0.5, 0.99])
    judged = np.quantile(distances, 1 - left_out, method="higher")
    return BlockDrift(
        block.name, distances.size, float(median), float(p99), float(distances.max()), allowed, basis, left_out,
        float(judged),
    )  # fmt: skip
