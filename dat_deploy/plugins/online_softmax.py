"""One step of attention over blocks of keys with a running softmax; the attention kernels share it."""

import triton
import triton.language as tl

__all__ = ["attend"]


@triton.jit
def attend(q, k, v, bias, largest, total, attended, HEAD_DIM: tl.constexpr):
    """Take a block of keys into the softmax (FlashAttention, arXiv 2205.14135, algorithm 1).

    Args:
        q: [M, D]; k, v: [N, D], in the type of the tensors; products are accumulated in float32.
        bias: [M, N] float32, `sqrt(HEAD_DIM)` times what is added to `q · k / sqrt(HEAD_DIM)`: it enters as the
            accumulator of q · k, so that it costs no operation of its own.
        largest: [M], of the scores so far, in base 2; total: [M], the sum of the weights; attended: [M, D], of the
            weighted values.

    Returns:
        The last three with the block taken in.
    """
    scale: tl.constexpr = 1.4426950408889634 / HEAD_DIM**0.5  # exp(x) is exp2(1.44 x), which is one instruction
    scores = tl.dot(q, tl.trans(k), acc=bias, input_precision="ieee")
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_largest[:, None])
    correction = tl.exp2(largest - new_largest)
    total = total * correction + tl.sum(weights, 1)
    attended = tl.dot(weights.to(v.dtype), v, acc=attended * correction[:, None], input_precision="ieee")
    return new_largest, total, attended
