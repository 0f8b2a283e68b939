"""What `neighborhood_attention` means: every pixel attends to the K × K pixels around it."""

import torch
from torch import Tensor

from dat_deploy.errors import ShapeError

__all__ = ["neighborhood_attention", "neighborhood_index", "require_table"]


def neighborhood_index(
    length: int, kernel_size: int, dilation: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The neighbors of every pixel along one axis of at least K · dilation pixels.

    A window that would leave the map is shifted inwards, so every pixel has K neighbors. With a dilation, pixels whose
    index has the same remainder form a map of their own.

    Returns:
        index: [length, K] int64, of the neighbors; bias_index: [length, K] int64, `neighbor - pixel + K - 1` in steps
        of the dilation, from 0 to 2K - 2.
    """
    pixel = torch.arange(length, device=device)
    remainder, position = pixel % dilation, pixel // dilation
    positions = (length - remainder + dilation - 1) // dilation  # with that remainder
    first = torch.minimum((position - kernel_size // 2).clamp(min=0), positions - kernel_size)
    neighbor = first[:, None] + torch.arange(kernel_size, device=device)
    return neighbor * dilation + remainder[:, None], neighbor - position[:, None] + kernel_size - 1


def require_table(relative_position_bias_table: Tensor, num_heads: int, kernel_size: int) -> None:
    """Raises ShapeError if K is even, or the table has another size than [M, 2K-1, 2K-1]."""
    side = 2 * kernel_size - 1
    if kernel_size % 2 == 0 or tuple(relative_position_bias_table.shape) != (num_heads, side, side):
        raise ShapeError(
            f"neighborhood_attention got kernel_size {kernel_size} and a bias table of shape "
            f"{list(relative_position_bias_table.shape)}; it takes an odd K and a table "
            f"[{num_heads}, 2K - 1, 2K - 1]. Take both from one block of a checkpoint."
        )


def neighborhood_attention(
    qkv: Tensor,
    padding_qkv: Tensor,
    relative_position_bias_table: Tensor,
    num_heads: int,
    kernel_size: int,
    dilation: int,
) -> Tensor:
    """`softmax(q · k / sqrt(D) + bias) v` over the K × K neighbors of each pixel (arXiv 2204.07143, §3.1).

    Row by row of the window: the products of a row of queries with one row of keys hold those with its neighbors, so
    nothing larger than [B, M, H, W, W] or the scores themselves, [B, M, H, W, K²], is ever made. Arguments and result
    are those of `torch_op.neighborhood_attention`; a short side is continued right and bottom.

    Raises:
        ShapeError: if K is even, or the table has another size.
    """
    require_table(relative_position_bias_table, num_heads, kernel_size)
    batch, height, width, channels3 = qkv.shape
    head_dim = channels3 // (3 * num_heads)
    padded_height, padded_width = max(height, kernel_size * dilation), max(width, kernel_size * dilation)
    if (padded_height, padded_width) != (height, width):
        canvas = padding_qkv.to(qkv.dtype).repeat(batch, padded_height, padded_width, 1)
        canvas[:, :height, :width] = qkv
        qkv = canvas
    heads = qkv.reshape(batch, padded_height, padded_width, 3, num_heads, head_dim)
    q, k, v = heads.permute(3, 0, 4, 1, 2, 5).contiguous().unbind(0)  # B, M, H, W, D
    q = q[:, :, :height, :width] * head_dim**-0.5
    rows, bias_rows = (table[:height] for table in neighborhood_index(padded_height, kernel_size, dilation, qkv.device))
    columns, bias_columns = (
        table[:width] for table in neighborhood_index(padded_width, kernel_size, dilation, qkv.device)
    )
    every_row = columns.expand(batch, num_heads, height, width, kernel_size)
    scores = torch.stack(
        [(q @ k[:, :, row].transpose(-2, -1)).gather(-1, every_row) for row in rows.unbind(1)], dim=-2
    )  # B, M, H, W, K, K
    bias = relative_position_bias_table.to(qkv.dtype)[:, bias_rows[:, None, :, None], bias_columns[None, :, None, :]]
    probabilities = (scores + bias).flatten(-2).softmax(dim=-1).reshape(scores.shape)
    out = torch.zeros_like(q)
    for row, weights in zip(rows.unbind(1), probabilities.unbind(-2), strict=True):
        spread = weights.new_zeros(batch, num_heads, height, width, padded_width).scatter(-1, every_row, weights)
        out = out + spread @ v[:, :, row]
    return out.permute(0, 2, 3, 1, 4).reshape(batch, height, width, num_heads * head_dim)
