"""What a network computes in: one row a precision, with the names that each library has for its type."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# torch is imported where its type is asked for, so that this module is light.

__all__ = ["PRECISIONS", "Precision", "precision_of_dtype"]


@dataclass(frozen=True)
class Precision:
    """A row of the table of precisions.

    Attributes:
        name: in commands, files and reports; what TensorRT, Triton and others write differs:
        torch: of the type in torch, such as `float16`.
        onnx: in `onnx.TensorProto.DataType` and in `onnx_ir.DataType`.
        tensorrt: in `tensorrt.DataType`.
        is_exported: a float32 graph is brought to it node by node, in `export`; else by `quantize`.
    """

    name: str
    torch: str
    onnx: str
    tensorrt: str
    is_exported: bool = True

    @property
    def is_half(self) -> bool:
        """Floating point of fewer bits than float32, with islands of float32 in a network."""
        return self.is_exported and self.torch != "float32"

    @property
    def dtype(self) -> "torch.dtype":
        import torch

        found: torch.dtype = getattr(torch, self.torch)
        return found


PRECISIONS = {
    row.name: row
    for row in (
        Precision("fp32", "float32", "FLOAT", "FLOAT"),
        Precision("fp16", "float16", "FLOAT16", "HALF"),
        Precision("bf16", "bfloat16", "BFLOAT16", "BF16"),
        Precision("int8", "int8", "INT8", "INT8", is_exported=False),
    )
}


def precision_of_dtype(dtype: "torch.dtype") -> Precision:
    """The row of a type of torch; raises KeyError if none has it."""
    return {str(row.dtype): row for row in PRECISIONS.values()}[str(dtype)]
