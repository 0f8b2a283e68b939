"""DAT, DAT+ and DAT++ in plain PyTorch, channels last from the patch projection to the head.

A stage is a list of blocks `x += attention(norm(x)); x += mlp(norm(x))`; the letter of a block picks its attention.
Everything between the operators is LayerNorm, Linear and Conv, so an exported graph has no Transposes of its own
beyond those around the convolutions. Source: arXiv 2201.00520, §3, and arXiv 2309.01430, §3; names follow the official
state dict (`stages.2.attns.1`), which `checkpoint.py` maps onto these.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_deploy.networks.dat.variants import PATCH_SIZE, StageConfig, Variant
from dat_deploy.networks.operators import FUSED, REFERENCE, Operators
from dat_deploy.networks.sampling import reference_axis

__all__ = ["DAT", "SampledPoints", "half_network", "reference_points"]


class SampledPoints(NamedTuple):
    """What a deformable block looked at.

    Attributes:
        locations: [B, G, Hk, Wk, 2] float32, last axis (y, x).
        attention: [B, G, Hk, Wk], the share of its queries' attention that each point receives, over the queries and
            the heads of the group; 1 in sum over a group's points. None unless the network was asked for it.
    """

    locations: Tensor
    attention: Tensor | None


def reference_points(height: int, width: int, *, half_pixel: bool, device: torch.device | None = None) -> Tensor:
    """[Hk, Wk, 2] float32, last axis (y, x): `reference_axis` along both."""
    y, x = (reference_axis(torch.arange(size, device=device), size, half_pixel=half_pixel) for size in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)` where there is something to do; torch.export records, checks and traces those that do nothing."""
    return x if x.dtype == dtype else x.to(dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the type of its weights, which `half_network` leaves in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return _in_dtype(super().forward(_in_dtype(x, self.weight.dtype)), x.dtype)


class DepthwiseConv(nn.Conv2d):
    """Depthwise 3×3 convolution of [B, H, W, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    def __init__(self, channels: int, ratio: int, *, depthwise: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, channels * ratio)
        self.depthwise = DepthwiseConv(channels * ratio) if depthwise else None
        self.act = nn.GELU()
        self.linear2 = nn.Linear(channels * ratio, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear1(x)
        if self.depthwise is not None:
            x = x + self.depthwise(x)
        return self.linear2(self.act(x))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class WindowAttention(nn.Module):
    """Self-attention inside windows (block letter L), or inside shifted windows (S) if `shift_size` is not 0."""

    def __init__(self, stage: StageConfig, shift_size: int, operators: Operators) -> None:
        super().__init__()
        self.num_heads = stage.heads
        self.window_size = stage.window_size
        self.shift_size = shift_size
        self.operators = operators
        self.proj_qkv = nn.Linear(stage.channels, 3 * stage.channels)
        self.proj_out = nn.Linear(stage.channels, stage.channels)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * stage.window_size - 1) ** 2, stage.heads))

    def forward(self, x: Tensor) -> Tensor:
        x = self.operators.window_attention(
            self.proj_qkv(x), self.relative_position_bias_table, self.num_heads, self.window_size, self.shift_size
        )
        return self.proj_out(x)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class NeighborhoodAttention(nn.Module):
    """Self-attention of every pixel to the square of pixels around it (block letter N)."""

    def __init__(self, stage: StageConfig, operators: Operators) -> None:
        super().__init__()
        self.num_heads = stage.heads
        self.kernel_size = stage.neighborhood_size
        self.operators = operators
        self.proj_qkv = nn.Linear(stage.channels, 3 * stage.channels)
        self.proj_out = nn.Linear(stage.channels, stage.channels)
        side = 2 * stage.neighborhood_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(stage.heads, side, side))

    def forward(self, x: Tensor) -> Tensor:
        x = self.operators.neighborhood_attention(
            self.proj_qkv(x),
            self.proj_qkv.bias,
            self.relative_position_bias_table,
            self.num_heads,
            self.kernel_size,
            1,
        )
        return self.proj_out(x)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class OffsetNetwork(nn.Module):
    """Offsets of the sampled points from the query features of one offset group (arXiv 2201.00520, figure 2b)."""

    def __init__(self, channels: int, stage: StageConfig) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels,
            channels,
            stage.offset_kernel_size,
            stage.offset_stride,
            padding=stage.offset_padding,
            groups=channels,
        )
        self.norm = LayerNorm(channels)
        self.act = nn.GELU()
        self.pointwise = nn.Linear(channels, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B·G, C/G, H, W] -> [B·G, Hk, Wk, 2], last axis (y, x)."""
        x = _in_dtype(self.depthwise(x).permute(0, 2, 3, 1), self.norm.weight.dtype)
        return self.pointwise(self.act(self.norm(x)))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class DeformableAttention(nn.Module):
    """Attention of every pixel to keys and values sampled at learned locations (block letter D)."""

    def __init__(self, variant: Variant, stage_index: int, operators: Operators, *, with_attention: bool) -> None:
        super().__init__()
        stage = variant.stages[stage_index]
        self.with_attention = with_attention
        self.num_heads = stage.heads
        self.offset_groups = stage.offset_groups
        self.offset_range_factor = stage.offset_range_factor
        self.half_pixel = variant.half_pixel_queries
        self.operators = operators
        channels = stage.channels
        self.conv_offset = OffsetNetwork(channels // stage.offset_groups, stage)
        self.proj_q = nn.Linear(channels, channels)
        self.proj_k = nn.Linear(channels, channels)
        self.proj_v = nn.Linear(channels, channels)
        self.proj_out = nn.Linear(channels, channels)
        table_height, table_width = variant.bias_table(stage_index)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(stage.heads, table_height, table_width))

    def sampling_locations(self, query: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, G, Hk, Wk, 2] float32, last axis (y, x). Those of DAT may leave [-1, 1]."""
        batch, height, width, channels = query.shape
        groups = self.offset_groups
        group_query = query.permute(0, 3, 1, 2).reshape(batch * groups, channels // groups, height, width)
        offsets = _in_dtype(self.conv_offset(group_query), torch.float32)  # B·G, Hk, Wk, 2
        _, sampled_height, sampled_width, _ = offsets.shape
        reference = reference_points(sampled_height, sampled_width, half_pixel=self.half_pixel, device=offsets.device)
        if self.offset_range_factor < 0:
            locations = (offsets + reference).clamp(-1, 1)
        else:
            steps = [side if self.half_pixel else side - 1 for side in (sampled_height, sampled_width)]
            # Filled on the device: a copy from the host cannot be in a CUDA graph.
            reach = torch.stack([offsets.new_full((), self.offset_range_factor / step) for step in steps])
            locations = offsets.tanh() * reach + reference
        return locations.reshape(batch, groups, sampled_height, sampled_width, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, locations: Tensor) -> Tensor:
        out: Tensor = self.operators.deformable_attention(
            query, key, value, locations, self.relative_position_bias_table, self.num_heads, self.half_pixel
        )
        return out

    def attention_received(self, query: Tensor, key: Tensor, locations: Tensor) -> Tensor:
        """[B, G, Hk, Wk], see `SampledPoints`.

        The operator returns no probabilities, but where the values are unit vectors its output is them: D keys a call,
        since a head has D channels. So they are those of the engine that runs, whatever its operator is.
        """
        batch, _, sampled_height, sampled_width, _ = locations.shape
        keys, head_dim = key.shape[1], key.shape[2] // self.num_heads
        units = torch.eye(keys, dtype=key.dtype, device=key.device)
        units = F.pad(units, (0, -keys % head_dim))  # Ns, a multiple of D
        received = []
        for first in range(0, units.shape[1], head_dim):
            value = units[:, first : first + head_dim].repeat(1, self.num_heads).expand(batch, -1, -1)  # B, Ns, C
            probabilities = self.attend(query, key, value, locations).mean(dim=(1, 2))  # B, C
            received.append(probabilities.reshape(batch, self.num_heads, head_dim))
        by_head = torch.cat(received, dim=-1)[..., :keys]  # B, M, Ns
        return by_head.reshape(batch, self.offset_groups, -1, sampled_height, sampled_width).mean(dim=2)

    def forward(self, x: Tensor) -> tuple[Tensor, SampledPoints]:
        query = self.proj_q(x)
        locations = self.sampling_locations(query)
        sampled = self.operators.deformable_sample(x, locations)  # B, Ns, C
        key = self.proj_k(sampled)
        out = self.attend(query, key, self.proj_v(sampled), locations)
        attention = self.attention_received(query, key, locations) if self.with_attention else None
        return self.proj_out(out), SampledPoints(locations, attention)


class Stage(nn.Module):
    def __init__(self, variant: Variant, stage_index: int, operators: Operators, *, with_attention: bool) -> None:
        super().__init__()
        stage = variant.stages[stage_index]
        depth, channels = len(stage.blocks), stage.channels
        self.local_perception_units = nn.ModuleList(
            DepthwiseConv(channels) for _ in range(depth) if stage.local_perception
        )
        self.layer_norms = nn.ModuleList(LayerNorm(channels) for _ in range(2 * depth))
        self.attns = nn.ModuleList(
            _attention(letter, variant, stage_index, operators, with_attention=with_attention)
            for letter in stage.blocks
        )
        self.mlps = nn.ModuleList(Mlp(channels, variant.mlp_ratio, depthwise=stage.depthwise_mlp) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[int, SampledPoints]]:
        """[B, H, W, C] -> the same, and what each deformable block sampled, by its index."""
        sampled: dict[int, SampledPoints] = {}
        for i, (attention, mlp) in enumerate(zip(self.attns, self.mlps, strict=True)):
            if self.local_perception_units:
                x = x + self.local_perception_units[i](x)
            out = attention(self.layer_norms[2 * i](x))
            if isinstance(attention, DeformableAttention):
                out, sampled[i] = out
            x = x + out
            x = x + mlp(self.layer_norms[2 * i + 1](x))
        return x, sampled


def _attention(
    letter: str, variant: Variant, stage_index: int, operators: Operators, *, with_attention: bool
) -> nn.Module:
    stage = variant.stages[stage_index]
    match letter:
        case "L":
            return WindowAttention(stage, 0, operators)
        case "S":
            return WindowAttention(stage, stage.shift_size, operators)
        case "D":
            return DeformableAttention(variant, stage_index, operators, with_attention=with_attention)
        case "N":
            return NeighborhoodAttention(stage, operators)
    raise AssertionError(f"block letter {letter!r} has no attention")


class PatchProjection(nn.Module):
    """Convolution that does not overlap, then LayerNorm; [B, C, H, W] in, [B, H/p, W/p, C'] out."""

    def __init__(self, in_channels: int, out_channels: int, patch_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, patch_size, patch_size)
        self.norm = LayerNorm(out_channels)

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.norm(self.conv(images_nchw).permute(0, 2, 3, 1))  # type: ignore[no-any-return]  # untyped call


class OverlappingStem(nn.Module):
    """Two 3×3 convolutions of stride 2, each with a LayerNorm, GELU between; [B, C, H, W] in, [B, H/4, W/4, C'] out."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels // 2, 3, 2, 1)
        self.norm = LayerNorm(out_channels // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(out_channels // 2, out_channels, 3, 2, 1)
        self.norm2 = LayerNorm(out_channels)

    def forward(self, images_nchw: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(images_nchw).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # type: ignore[no-any-return]  # untyped call


class OverlappingDownsample(nn.Module):
    """3×3 convolution of stride 2, then LayerNorm; channels last."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False)
        self.norm = LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # type: ignore[no-any-return]  # untyped call


class Downsample(nn.Module):
    """2×2 convolution of stride 2 as a product: the four pixels side by side, then Linear, then LayerNorm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * in_channels, out_channels, bias=False)
        self.norm = LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
        return self.norm(self.linear(x.reshape(batch, height // 2, width // 2, 4 * channels)))  # type: ignore[no-any-return]  # untyped call


class DAT(nn.Module):
    """Vision Transformer with Deformable Attention.

    Args:
        variant: the configuration; `variant.with_image_size` gives one for another image size.
        fused: call the torch operators `torch.ops.dat_deploy.*`, one node each under torch.export, instead of the
            reference code.
        sampled_points: return what the deformable blocks sampled, too.
    """

    def __init__(self, variant: Variant, *, fused: bool = False, sampled_points: bool = False) -> None:
        super().__init__()
        self.variant = variant
        self.fused = fused
        self.sampled_points = sampled_points
        operators = FUSED if fused else REFERENCE
        widths = [stage.channels for stage in variant.stages]
        overlapping = variant.overlapping_patches
        self.patch_proj = OverlappingStem(3, widths[0]) if overlapping else PatchProjection(3, widths[0], PATCH_SIZE)
        self.stages = nn.ModuleList(
            Stage(variant, i, operators, with_attention=sampled_points) for i in range(len(variant.stages))
        )
        downsample = OverlappingDownsample if overlapping else Downsample
        self.down_projs = nn.ModuleList(downsample(a, b) for a, b in itertools.pairwise(widths))
        if variant.features:
            self.norms = nn.ModuleDict({str(i): LayerNorm(widths[i]) for i in variant.features})
        else:
            self.cls_norm = LayerNorm(widths[-1])
            self.cls_head = nn.Linear(widths[-1], variant.classes)

    def forward_features(self, image: Tensor) -> tuple[list[Tensor], dict[str, SampledPoints]]:
        """Everything between the image and the head.

        Args:
            image: [B, 3, H, W], normalised.

        Returns:
            The output of each stage, [B, H, W, C], and what each deformable block sampled, by its module name:
            `stages.2.attns.1`.
        """
        x = self.patch_proj(_in_dtype(image, self.patch_proj.conv.weight.dtype))
        outputs: list[Tensor] = []
        sampled: dict[str, SampledPoints] = {}
        for i, stage in enumerate(self.stages):
            if i:
                x = self.down_projs[i - 1](x)
            x, in_stage = stage(x)
            outputs.append(x)
            sampled |= {f"stages.{i}.attns.{j}": points for j, points in in_stage.items()}
        return outputs, sampled

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[B, 3, H, W] -> logits [B, classes], in the type of the image, whatever that of the weights.

        A backbone gives a tuple of the maps [B, C, H, W] of `variant.features` instead. With `sampled_points` it is a
        tuple, too: the locations of all deformable blocks and then their attention follow (see `SampledPoints`).
        """
        outputs, sampled = self.forward_features(image)
        if self.variant.features:
            results = [self.norms[str(i)](outputs[i]).permute(0, 3, 1, 2) for i in self.variant.features]
        else:
            results = [self.cls_head(self.cls_norm(outputs[-1]).mean(dim=(1, 2)))]
        results = [_in_dtype(result, image.dtype) for result in results]
        if self.sampled_points:
            results += [points.locations for points in sampled.values()]
            results += [points.attention.to(image.dtype) for points in sampled.values() if points.attention is not None]
        return tuple(results) if self.variant.features or self.sampled_points else results[0]


def half_network(model: DAT, dtype: torch.dtype) -> DAT:
    """The network in float16 or bfloat16, with float32 where half precision would change what it looks at.

    In float32 stay LayerNorm, the tables of relative position bias, and the offset network behind its convolution, so
    that no rounded coordinate ever moves a point. Images and results are float32 as before.

    Args:
        model: in float32; it is left as it is, and shares what stays float32.
        dtype: of the other weights, which are those of Linear and Conv.
    """
    float32 = {
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules()
        for parameter, _ in module.named_parameters(recurse=False)
        if isinstance(module, LayerNorm) or parameter == "relative_position_bias_table" or name.endswith(".pointwise")
    }
    weights = {name: weight if name in float32 else weight.to(dtype) for name, weight in model.state_dict().items()}
    with torch.device("meta"):
        half = DAT(model.variant, fused=model.fused, sampled_points=model.sampled_points)
    half.load_state_dict(weights, assign=True)
    return half.eval().requires_grad_(False)
