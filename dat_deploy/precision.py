"""What a network computes in: one row a precision, with all that is known of it.

A new one is a row here and, beside it, the rules that bring a graph to it: `export.precision` casts, `export.quantize`
quantizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import dtype as DType  # a row has a field `torch`

# torch and onnx are imported where their types are asked for, so that this module is light.

__all__ = ["EXPORTED", "FULL", "PRECISIONS", "Precision", "precision_in_words", "precision_of_dtype"]


@dataclass(frozen=True)
class Precision:
    """A row of the table of precisions.

    Attributes:
        name: in commands, files and reports; what TensorRT, Triton and others write differs:
        torch: of the type in torch, such as `float16`.
        onnx: in `onnx.TensorProto.DataType` and in `onnx_ir.DataType`.
        tensorrt: in `tensorrt.DataType`.
        gates: what an engine may lose in it, by the names of `validate.gates.Gates`.
        is_exported: a float32 graph is brought to it node by node, in `export`; else by `quantize`.
    """

    name: str
    torch: str
    onnx: str
    tensorrt: str
    gates: Mapping[str, float]
    is_exported: bool = True

    @property
    def is_half(self) -> bool:
        """Floating point of fewer bits than float32, with islands of float32 in a network."""
        return self.is_exported and self.torch != "float32"

    @property
    def dtype(self) -> "DType":
        import torch

        dtype: DType = getattr(torch, self.torch)
        return dtype

    @property
    def onnx_type(self) -> int:
        """The number of the type in `onnx.TensorProto.DataType` and in `onnx_ir.DataType`."""
        import onnx

        return int(onnx.TensorProto.DataType.Value(self.onnx))


def _gates(*, drop: float, disagreement: float, cosine_distance: float) -> dict[str, float]:
    return {"top1_drop": drop, "top5_drop": drop, "disagreement": disagreement, "cosine_distance": cosine_distance}


# Half precision rounds at 2^-11 (fp16) or 2^-8 (bf16) in every layer, so images between two classes flip either way: up
# to one in a hundred or fifty, while top-1 stays where it was. Eight bits lose accuracy; a point is what users of
# quantized vision transformers put up with. Measured on `demo`: README, Accuracy.
_ROWS = (
    Precision("fp32", "float32", "FLOAT", "FLOAT", _gates(drop=0.1, disagreement=0.1, cosine_distance=1e-6)),
    Precision("fp16", "float16", "FLOAT16", "HALF", _gates(drop=0.1, disagreement=1.0, cosine_distance=1e-4)),
    Precision("bf16", "bfloat16", "BFLOAT16", "BF16", _gates(drop=0.1, disagreement=2.0, cosine_distance=1e-2)),
    Precision(
        "int8", "int8", "INT8", "INT8", _gates(drop=1.0, disagreement=5.0, cosine_distance=0.2), is_exported=False
    ),
)
PRECISIONS = {row.name: row for row in _ROWS}
FULL = PRECISIONS["fp32"]  # that networks have before they are brought to a lower one, and are compared in
EXPORTED = tuple(row.name for row in PRECISIONS.values() if row.is_exported)


def precision_of_dtype(dtype: "DType") -> Precision:
    """The row of a type of torch; raises KeyError if none has it."""
    return {str(row.dtype): row for row in PRECISIONS.values()}[str(dtype)]


def precision_in_words(text: str) -> Precision | None:
    """The row whose name, of any library, is the longest that stands in a text: `BFloat16` is not `Float`."""
    words = text.lower()
    lengths = {
        len(name): row
        for row in PRECISIONS.values()
        for name in (row.name, row.torch, row.onnx.lower(), row.tensorrt.lower())
        if name in words
    }
    return lengths[max(lengths)] if lengths else None
