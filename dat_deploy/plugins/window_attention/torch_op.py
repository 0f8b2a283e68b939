"""`torch.ops.dat_deploy.window_attention`: the kernel on CUDA, else the reference; one node for torch.export."""

from torch import Tensor

from dat_deploy.plugins.dispatch import compute, require, require_heads, require_inputs, require_shape, torch_operator
from dat_deploy.plugins.window_attention.specification import SPECIFICATION

__all__ = ["window_attention"]


def _check(
    qkv: Tensor, relative_position_bias_table: Tensor, num_heads: int, window_size: int, shift_size: int
) -> None:
    name, table = SPECIFICATION.name, relative_position_bias_table
    require_inputs(SPECIFICATION, qkv, table)
    require_heads(name, qkv, num_heads)
    _, height, width, _ = qkv.shape
    require(
        window_size > 0 and height % window_size == 0 and width % window_size == 0 and 0 <= shift_size < window_size,
        name,
        f"a map of {height}x{width}, window_size {window_size} and shift_size {shift_size}",
        "windows that tile the map, and a shift of less than a window",
    )
    shape = ((2 * window_size - 1) ** 2, num_heads)
    require_shape(name, "relative_position_bias_table", table, shape, "a row a distance")


@torch_operator(SPECIFICATION, _check)
def window_attention(
    qkv: Tensor, relative_position_bias_table: Tensor, num_heads: int, window_size: int, shift_size: int
) -> Tensor:
    """Self-attention inside square windows of a map, as in Swin transformers, from the projection to the merged map.

    The windows tile the map. With a shift they are moved down and right by it; what then leaves the map comes in again
    on the other side, and pixels that are neighbours only so do not see each other (-100 is added to their score).
    On CUDA no rolled or partitioned copy is made. It has no gradient. Source: arXiv 2103.14030, §3.2.

    Args:
        qkv: [B, H, W, 3C], query, key and value side by side, each with its heads side by side.
        relative_position_bias_table: [(2·Ws - 1)², M], a row for each distance in y and x, the y of a row slower, in
            the type of `qkv` or float32.
        num_heads: M; the head dim D is C / M.
        window_size: Ws, in pixels of the map; it divides H and W.
        shift_size: 0 to Ws - 1, in pixels of the map.

    Returns:
        [B, H, W, C] in the type of `qkv`.

    Raises:
        ShapeError: if shapes, types or devices do not fit each other.
    """
    return compute(SPECIFICATION, (qkv, relative_position_bias_table), (num_heads, window_size, shift_size))
