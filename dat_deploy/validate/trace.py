"""One photograph followed through both sides: the error behind each block, and where the deformable blocks look."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dat_deploy.export.boundaries import block_boundaries
from dat_deploy.export.subgraph import model_up_to
from dat_deploy.networks.family import Network, family_of
from dat_deploy.runners.base import graph_in_batches
from dat_deploy.validate.comparison import Comparison
from dat_deploy.validate.drift import Locations
from dat_deploy.validate.hooks import captured

__all__ = ["BlockError", "Trace", "trace_blocks"]


@dataclass(frozen=True)
class BlockError:
    """Behind one block.

    Attributes:
        error: the largest difference between the two sides; rounded: that of eager PyTorch in the engine's precision,
            None in float32; both as shares of `scale`, PyTorch's largest value.
    """

    block: str
    error: float
    rounded: float | None
    scale: float


@dataclass(frozen=True)
class Trace:
    """What a page shows of the first photographs.

    Attributes:
        network: at the image size of the photographs.
        images: [B, 3, H, W], normalised.
        locations, engine_locations: by block, [B, G, Hk, Wk, 2]; the engine's is None if it does not tell.
        errors: in the order of the network; none if the engine cannot be cut.
    """

    network: Network
    images: NDArray[np.float32]
    locations: dict[str, Locations]
    engine_locations: dict[str, Locations] | None
    errors: tuple[BlockError, ...]


def trace_blocks(comparison: Comparison) -> Trace:
    """Run the engine up to each block in turn; one tensor at a time, as `bisect` does."""
    network = comparison.about.network
    errors = tuple(_errors(comparison))
    return Trace(network, comparison.drift_images, comparison.locations, comparison.engine_locations, errors)


def _errors(comparison: Comparison) -> list[BlockError]:
    model = comparison.graph
    names = {} if model is None else block_boundaries(dict(model.metadata_props))
    if model is None or not names:
        return []
    image = comparison.photos[:1]
    network = comparison.about.network
    ends = {block.name: block.steps[-1] for block in family_of(network).blocks(network)}
    sources = [(step.module, step.side) for step in ends.values()]
    exact = captured(comparison.reference.model, sources, image)
    rounded = None
    if comparison.lowered is not None:
        lowered, takes = comparison.lowered
        rounded = captured(lowered, sources, image, takes)
    rows = []
    for block, step in ends.items():
        comparison.progress(f"trace: {block}")
        expected = exact[step.module, step.side]
        graph = comparison.runner.open_graph(model_up_to(model, names[step.ends]))
        values = graph_in_batches(comparison.about, graph, {"image": image})
        scale = float(np.abs(expected).max()) or 1.0
        error = float(np.abs(values.reshape(expected.shape) - expected).max()) / scale
        own = None
        if rounded is not None:
            own = float(np.abs(rounded[step.module, step.side] - expected).max()) / scale
        rows.append(BlockError(block, error, own, scale))
    return rows
