"""What `window_attention` means: self-attention inside square windows, optionally shifted, with a relative bias."""

import torch
from torch import Tensor

__all__ = ["relative_position_index", "shifted_window_mask", "window_attention", "window_merge", "window_partition"]


def relative_position_index(window_size: int, device: torch.device | None = None) -> Tensor:
    """Row of the bias table for each pair of pixels of a window: [Ws², Ws²] int64."""
    side = torch.arange(window_size, device=device)
    offset = side[:, None] - side[None, :] + window_size - 1  # Ws, Ws
    index = offset[:, None, :, None] * (2 * window_size - 1) + offset[None, :, None, :]
    return index.reshape(window_size**2, window_size**2)


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """[B, H, W, C] -> [B, nW, Ws², C], windows and pixels row by row."""
    batch, height, width, channels = x.shape
    rows, columns = height // window_size, width // window_size
    x = x.reshape(batch, rows, window_size, columns, window_size, channels)
    return x.transpose(2, 3).reshape(batch, rows * columns, window_size**2, channels)


def window_merge(windows: Tensor, height: int, width: int, window_size: int) -> Tensor:
    """[B, nW, Ws², C] -> [B, H, W, C]: the inverse of `window_partition`."""
    batch, channels = windows.shape[0], windows.shape[-1]
    x = windows.reshape(batch, height // window_size, width // window_size, window_size, window_size, channels)
    return x.transpose(2, 3).reshape(batch, height, width, channels)


def shifted_window_mask(
    height: int, width: int, window_size: int, shift_size: int, device: torch.device | None = None
) -> Tensor:
    """-100 between pixels that only the cyclic shift has made neighbours, 0 elsewhere: [nW, Ws², Ws²] float32."""

    def regions(size: int) -> Tensor:
        index = torch.arange(size, device=device)
        return (index >= size - window_size).int() + (index >= size - shift_size).int()

    region = regions(height)[:, None] * 3 + regions(width)[None, :]  # H, W
    windows = window_partition(region[None, :, :, None], window_size)[0, :, :, 0]  # nW, Ws²
    return (windows[:, None, :] != windows[:, :, None]).float() * -100.0


def window_attention(
    qkv: Tensor, relative_position_bias_table: Tensor, num_heads: int, window_size: int, shift_size: int
) -> Tensor:
    """Attention inside each window of Ws × Ws pixels; with a shift, the map is rolled up and left by it and back after.

    Pixels that only the roll brought together are masked with -100. Arguments and result are those of
    `torch_op.window_attention`.
    """
    _, height, width, channels3 = qkv.shape
    head_dim = channels3 // (3 * num_heads)
    if shift_size:
        qkv = qkv.roll((-shift_size, -shift_size), dims=(1, 2))
    windows = window_partition(qkv, window_size)  # B, nW, Ws², 3C
    heads = windows.unflatten(-1, (3, num_heads, head_dim))  # type: ignore[no-untyped-call]  # torch gives it no types
    q, k, v = heads.permute(3, 0, 1, 4, 2, 5).unbind(0)  # B, nW, M, Ws², D
    index = relative_position_index(window_size, qkv.device)
    bias = relative_position_bias_table.to(qkv.dtype)[index].permute(2, 0, 1)  # M, Ws², Ws²
    if shift_size:
        mask = shifted_window_mask(height, width, window_size, shift_size, qkv.device)
        bias = bias + mask.to(qkv.dtype)[:, None]  # nW, M, Ws², Ws²
    scores = (q * head_dim**-0.5) @ k.transpose(-2, -1) + bias  # B, nW, M, Ws², Ws²
    out = (scores.softmax(dim=-1) @ v).transpose(2, 3).flatten(-2)  # B, nW, Ws², C
    out = window_merge(out, height, width, window_size)
    return out.roll((shift_size, shift_size), dims=(1, 2)) if shift_size else out
