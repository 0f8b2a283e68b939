"""`torch.ops.dat_deploy.deformable_attention`: the kernel on CUDA, else the reference; one node for torch.export."""

from torch import Tensor

from dat_deploy.plugins.deformable_attention.specification import SPECIFICATION
from dat_deploy.plugins.dispatch import compute, require, require_inputs, torch_operator

__all__ = ["deformable_attention"]


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sampling_locations: Tensor,
    relative_position_bias_table: Tensor,
    num_heads: int,
    half_pixel_queries: bool,
) -> None:
    name, table = SPECIFICATION.name, relative_position_bias_table
    require_inputs(SPECIFICATION, query, key, value, sampling_locations, table)
    batch, _, _, channels = query.shape
    require(
        num_heads > 0 and channels % num_heads == 0,
        name,
        f"{channels} channels and {num_heads} heads",
        "heads that divide the channels",
    )
    groups, sampled_height, sampled_width = sampling_locations.shape[1:4]
    keys = sampled_height * sampled_width
    require(
        groups > 0 and num_heads % groups == 0,
        name,
        f"{num_heads} heads and {groups} groups of locations",
        "groups that divide the heads",
    )
    require(
        tuple(key.shape) == tuple(value.shape) == (batch, keys, channels) and keys > 0,
        name,
        f"key of shape {list(key.shape)} and value of shape {list(value.shape)} for {keys} locations",
        f"one key and one value a location, [{batch}, Ns, {channels}]",
    )
    require(
        table.ndim == 3 and table.shape[0] == num_heads and table.numel() > 0,
        name,
        f"relative_position_bias_table of shape {list(table.shape)}",
        f"one table a head, [{num_heads}, Th, Tw]",
    )


@torch_operator(SPECIFICATION, _check)
def deformable_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sampling_locations: Tensor,
    relative_position_bias_table: Tensor,
    num_heads: int,
    half_pixel_queries: bool,
) -> Tensor:
    """Attention of every pixel of a map to keys that were read at points between the pixels.

    `softmax(q · k / sqrt(D) + bias) v`, where the bias of a query and a key depends on how far apart they are on the
    map: it is the bilinear read, `align_corners=True` and zeros outside, of the head's table at
    `(position of the query - location of the key) / 2`. Keys and values are usually projections of what
    `deformable_sample` read at the same locations. On CUDA neither scores nor bias reach memory: what is read and
    written is the arguments and the result. It has no gradient. Source: arXiv 2201.00520, §3.2.

    Args:
        query: [B, H, W, C], heads side by side in the channels.
        key, value: [B, Ns, C].
        sampling_locations: [B, G, Hk, Wk, 2] float32 with Hk·Wk = Ns, where the keys are, last axis (y, x), -1 and +1
            at the centres of the first and last pixel; head m reads group m // (M / G).
        relative_position_bias_table: [M, Th, Tw], one table a head, in the type of `query` or float32. Its middle is
            the bias at no distance; with Th = 2H - 1 its rows are as far apart as pixels.
        num_heads: M; the head dim D is C / M.
        half_pixel_queries: which position a pixel i of H has: `(i + 0.5) / H · 2 - 1` (True, DAT) or
            `i / (H - 1) · 2 - 1` (False, DAT+ and DAT++).

    Returns:
        [B, H, W, C] in the type of `query`.

    Raises:
        ShapeError: if shapes, types or devices do not fit each other.
    """
    return compute(
        SPECIFICATION,
        (query, key, value, sampling_locations, relative_position_bias_table),
        (num_heads, half_pixel_queries),
    )
