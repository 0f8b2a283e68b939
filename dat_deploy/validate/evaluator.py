"""An exported file by ONNX's own rules: its reference evaluator rounds after each step, as the file says."""

import warnings

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from dat_deploy.runners import EngineDescription, Outputs
from dat_deploy.runners.base import in_batches

__all__ = ["answers_by_the_rules", "gigamacs"]


def gigamacs(network: torch.nn.Module, image: NDArray[np.float32]) -> float:
    """Multiply-adds of a network's products for one image [3, H, W], in 1e9."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.from_numpy(image[None].copy()))
    return float(counter.get_total_flops()) / 2e9


def answers_by_the_rules(model: ir.Model, about: EngineDescription, images: NDArray[np.float32]) -> Outputs:
    """What onnx's reference evaluator makes of a file."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(ir.to_proto(model))
    names = [str(output.name) for output in model.graph.outputs]

    def run(feeds: dict[str, NDArray[np.float32]]) -> Outputs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of overflows, which the answer shows
            return dict(zip(names, evaluator.run(names, feeds), strict=True))

    return in_batches(about, {"image": images}, run, about.batch or about.least_batch)
