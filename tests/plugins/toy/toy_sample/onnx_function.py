"""`toy_sample` as an ONNX function of standard operators."""

from collections.abc import Sequence

import onnxscript
from onnxscript import FLOAT
from onnxscript import opset18 as op

from dat_deploy.plugins.onnx_domain import DOMAIN

__all__ = ["BODIES", "HELPERS"]


@onnxscript.script(DOMAIN, default_opset=op)
def toy_sample(
    value: FLOAT["B", "H", "W", "C"],  # noqa: F821  # letters of dimensions, as onnxscript writes them
    sampling_locations: FLOAT["B", "H", "W", 2],  # noqa: F821
    scale_table: FLOAT["C"],  # noqa: F821
    slope: float,
    steps: Sequence[float],
) -> FLOAT["B", "H", "W", "C"]:  # noqa: F821
    step = op.Constant(value_floats=steps)
    moved = op.ReduceSum(sampling_locations * step, op.Constant(value_ints=[-1]))
    return value * (moved + op.Constant(value_float=slope)) * scale_table


BODIES = dict.fromkeys(("function", "gather", "gridsample", "hat"), toy_sample)
HELPERS = ()
