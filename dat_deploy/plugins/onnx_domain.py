"""The ONNX domain of the operators.

Notes for whoever writes a body, each learned by trying (ONNX Runtime 1.31, OpenVINO 2026.4, TensorRT-RTX 1.7.1):

- One body per operator name. The `overload` field would let each stage have its own, but OpenVINO does not convert it
  and TensorRT's parser keys functions by name alone: two overloads silently become one.
- A body reads sizes from its inputs, and the runtimes fold what follows from them. ONNX Runtime folds `Shape` only
  when every dimension is known, which a dynamic batch prevents. So bodies take the shape of the first image,
  `Gather(x, 0)`: its shape is known, the folding works, and the Gather itself is dropped as unused.
- Scale the queries, not the scores: MatMul, Div, Add, Softmax, MatMul, Transpose is a pattern that OpenVINO fuses into
  something wrong for some numbers of heads and keys (off by up to 0.9 in the logits of `plus`), and says nothing.
- Attributes cannot steer control flow, so a body must hold for each of their values by arithmetic alone.
"""

import onnx_ir as ir
import onnxscript

from dat_deploy.metadata import DOMAIN_NAME

__all__ = ["DOMAIN", "DOMAIN_NAME", "DOMAIN_VERSION", "operator_nodes"]

DOMAIN_VERSION = 1
DOMAIN = onnxscript.values.Opset(DOMAIN_NAME, DOMAIN_VERSION)


def operator_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of domain dat_deploy, in graph order."""
    return [node for node in model.graph if node.domain == DOMAIN_NAME]
