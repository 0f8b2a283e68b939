"""What `deformable_attention` means: attention to sampled keys with a bias read from a table between the pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_with_bias", "deformable_attention", "interpolated_bias", "query_grid"]


def query_grid(height: int, width: int, *, half_pixel: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Coordinates of the queries in the frame of the sampling locations.

    Args:
        half_pixel: True for DAT, `(i + 0.5) / H · 2 - 1`; False for DAT+ and DAT++, `i / (H - 1) · 2 - 1`.

    Returns:
        [H, W, 2], last axis (y, x).
    """

    def axis(size: int) -> Tensor:
        index = torch.arange(size, dtype=dtype, device=device)
        if half_pixel:
            return (index + 0.5) / size * 2 - 1
        return index / max(size - 1, 1) * 2 - 1

    return torch.stack(torch.meshgrid(axis(height), axis(width), indexing="ij"), dim=-1)


def interpolated_bias(
    table: Tensor,
    sampling_locations: Tensor,
    height: int,
    width: int,
    half_pixel: bool,
    *,
    align_corners: bool = True,
) -> Tensor:
    """The relative position bias of every query to every sampled key.

    `bias[m, n]` is the bilinear read, align_corners=True and zeros outside, of the head's table at
    `(query_grid[m] - location[n]) / 2`.

    Args:
        table: [M, Th, Tw]. sampling_locations: [B, G, Hk, Wk, 2], (y, x).
        align_corners: False is what a runtime may mistake it for; `bisect` asks.

    Returns:
        [B, M, H·W, Ns], in the type of `sampling_locations`.
    """
    heads = table.shape[0]
    batch, groups = sampling_locations.shape[:2]
    keys = sampling_locations.shape[2] * sampling_locations.shape[3]
    locations = sampling_locations.reshape(batch * groups, 1, keys, 2)
    grid = query_grid(height, width, half_pixel=half_pixel, dtype=locations.dtype, device=locations.device)
    displacement = (grid.reshape(1, height * width, 1, 2) - locations) * 0.5  # B·G, H·W, Ns, 2
    tables = table.to(locations.dtype).reshape(1, groups, heads // groups, *table.shape[1:])
    bias = F.grid_sample(
        tables.expand(batch, -1, -1, -1, -1).flatten(0, 1),
        displacement.flip(-1),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=align_corners,
    )  # B·G, M/G, H·W, Ns
    return bias.reshape(batch, heads, height * width, keys)


def deformable_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sampling_locations: Tensor,
    relative_position_bias_table: Tensor,
    num_heads: int,
    half_pixel_queries: bool,
) -> Tensor:
    """`softmax(q · k / sqrt(D) + bias) v`, every query against the keys that its image sampled.

    Arguments and result are those of `torch_op.deformable_attention`; the frame of the queries is `query_grid`.
    """
    _, height, width, _ = query.shape
    bias = interpolated_bias(relative_position_bias_table, sampling_locations, height, width, half_pixel_queries)
    return attention_with_bias(query, key, value, bias, num_heads)


def attention_with_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """`softmax(q · k / sqrt(D) + bias) v` for a bias [B, M, H·W, Ns]; the rest as in `deformable_attention`."""
    batch, height, width, channels = query.shape
    head_dim = channels // num_heads
    q = query.reshape(batch, height * width, num_heads, head_dim).transpose(1, 2)  # B, M, H·W, D
    k = key.reshape(batch, key.shape[1], num_heads, head_dim).transpose(1, 2)  # B, M, Ns, D
    v = value.reshape(batch, value.shape[1], num_heads, head_dim).transpose(1, 2)
    scores = (q * head_dim**-0.5) @ k.transpose(-2, -1) + bias.to(query.dtype)  # B, M, H·W, Ns
    out: Tensor = scores.softmax(dim=-1) @ v
    return out.transpose(1, 2).reshape(batch, height, width, channels)
