"""`torch.ops.dat_deploy.neighborhood_attention`: the kernel on CUDA, else the reference; one node for torch.export."""

from torch import Tensor

from dat_deploy.plugins.dispatch import compute, require, require_heads, require_inputs, require_shape, torch_operator
from dat_deploy.plugins.neighborhood_attention.reference import require_table
from dat_deploy.plugins.neighborhood_attention.specification import SPECIFICATION

__all__ = ["neighborhood_attention"]


def _check(
    qkv: Tensor,
    padding_qkv: Tensor,
    relative_position_bias_table: Tensor,
    num_heads: int,
    kernel_size: int,
    dilation: int,
) -> None:
    name, table = SPECIFICATION.name, relative_position_bias_table
    require_inputs(SPECIFICATION, qkv, padding_qkv, table)
    require_heads(name, qkv, num_heads)
    require(
        kernel_size > 0 and dilation > 0, name, f"kernel_size {kernel_size}, dilation {dilation}", "at least 1 each"
    )
    require_shape(name, "padding_qkv", padding_qkv, (qkv.shape[-1],), "a value a channel of qkv")
    require_table(table, num_heads, kernel_size)


@torch_operator(SPECIFICATION, _check)
def neighborhood_attention(
    qkv: Tensor,
    padding_qkv: Tensor,
    relative_position_bias_table: Tensor,
    num_heads: int,
    kernel_size: int,
    dilation: int,
) -> Tensor:
    """Self-attention of every pixel of a map to the K × K pixels around it, with a bias for each distance.

    At the border the square is moved inwards, so every pixel sees K² of them, itself included. This is NATTEN's `na2d`
    with the relative position bias that its later versions dropped and DAT++ needs. On CUDA neither scores nor bias
    reach memory. It has no gradient. Source: arXiv 2204.07143, §3.1; dilation: arXiv 2209.15001.

    Args:
        qkv: [B, H, W, 3C], query, key and value side by side, each with its heads side by side.
        padding_qkv: [3C], what a pixel of zeros projects to, in the type of `qkv` or float32: the bias of the
            projection. A side shorter than K · dilation is continued with such pixels, which are keys like any other.
        relative_position_bias_table: [M, 2K-1, 2K-1], by (neighbor - pixel + K - 1), y first, in the type of `qkv` or
            float32.
        num_heads: M; the head dim D is C / M.
        kernel_size: K, odd.
        dilation: the step between neighbors, in pixels.

    Returns:
        [B, H, W, C] in the type of `qkv`.

    Raises:
        ShapeError: if shapes, types or devices do not fit each other.
    """
    return compute(SPECIFICATION, (qkv, padding_qkv, relative_position_bias_table), (num_heads, kernel_size, dilation))
