"""The released configurations of DAT as data: one row each, no torch.

Source: the official YAML files (LeapLabTHU/DAT) and the papers, CVPR 2022 (arXiv 2201.00520) and DAT++
(arXiv 2309.01430). Letters: B batch, C channels, H W feature map, Hk Wk sampled grid, Ns = Hk·Wk, G offset groups,
M heads, D head dim, Ws window side.
"""

import difflib
import math
from dataclasses import dataclass, replace

from dat_deploy.errors import ShapeError, VariantError

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "VARIANTS", "StageConfig", "Variant", "get_variant"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PATCH_SIZE = 4
TOTAL_STRIDE = 32  # the patch and three halvings


@dataclass(frozen=True)
class StageConfig:
    """One of the four stages; `blocks` has a letter a block: L window, S shifted window, D deformable."""

    channels: int
    blocks: str
    heads: int
    window_size: int
    offset_groups: int = 0  # 0: the stage has no deformable block
    offset_kernel_size: int = 0
    offset_range_factor: float = 0.0

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads

    @property
    def shift_size(self) -> int:
        return math.ceil(self.window_size / 2)


@dataclass(frozen=True)
class Variant:
    """A released network with its evaluation preprocessing.

    Attributes:
        image_size: (height, width) in pixels that the network is built for.
        trained_size: the side in pixels of the bias tables of an official checkpoint.
        resize_size: the square side in pixels that an image is resized to before the centre crop.
        parameters: trainable parameters; gmacs: 1e9 multiply-adds of matrix products and convolutions at
            `image_size`, batch 1. Both are held to the network by tests.
        published_top1: ImageNet-1K top-1 in percent as its authors report it; not measured here.
        runtimes_checked: where every lowering of this variant was compared with PyTorch.
    """

    name: str
    family: str
    image_size: tuple[int, int]
    trained_size: int
    resize_size: int
    stages: tuple[StageConfig, ...]
    parameters: int
    gmacs: float
    published_top1: float
    runtimes_checked: tuple[str, ...]
    classes: int = 1000
    mlp_ratio: int = 4

    def feature_map(self, stage: int) -> tuple[int, int]:
        """(H, W) of the tensors inside stage `stage` (0 to 3)."""
        stride = PATCH_SIZE * 2**stage
        return self.image_size[0] // stride, self.image_size[1] // stride

    @property
    def side_multiple(self) -> int:
        """Every side of an image must be a multiple of this, in pixels, for the windows to tile each feature map."""
        return math.lcm(
            *(
                PATCH_SIZE * 2**i * stage.window_size
                for i, stage in enumerate(self.stages)
                if "L" in stage.blocks or "S" in stage.blocks
            ),
            TOTAL_STRIDE,
        )

    def with_image_size(self, height: int, width: int) -> "Variant":
        """The same network for another image size; the resize before the crop grows in proportion.

        Raises:
            ShapeError: if the windows do not tile the feature maps; the message names the nearest sizes that work.
        """
        if (height, width) == self.image_size:
            return self
        step = self.side_multiple
        if height <= 0 or width <= 0 or height % step or width % step:
            nearest = " or ".join(
                f"{h}x{w}"
                for h, w in sorted({(_down(height, step), _down(width, step)), (_up(height, step), _up(width, step))})
            )
            raise ShapeError(
                f"image size {height}x{width} does not fit variant '{self.name}': its windows tile only sides that "
                f"are multiples of {step} px. Nearest that work: {nearest}."
            )
        resize = round(self.resize_size * max(height / self.image_size[0], width / self.image_size[1]))
        return replace(self, image_size=(height, width), resize_size=resize)


def _down(side: int, step: int) -> int:
    return max(step, side // step * step)


def _up(side: int, step: int) -> int:
    return max(step, math.ceil(side / step) * step)


def _dat(
    name: str,
    size: int,
    resize: int,
    window: int,
    channels: int,
    depth: int,
    parameters: int,
    gmacs: float,
    top1: float,
) -> Variant:
    """A row of the first paper: heads of 32 channels, groups of 128, deformable blocks in the last two stages."""
    specs = ("LS", "LS", "LD" * (depth // 2), "LD")
    stages = []
    for i, (blocks, kernel) in enumerate(zip(specs, (9, 7, 5, 3), strict=True)):
        width = channels * 2**i
        stage = StageConfig(channels=width, blocks=blocks, heads=width // 32, window_size=window)
        if "D" in blocks:
            stage = replace(stage, offset_groups=width // 128, offset_kernel_size=kernel, offset_range_factor=2.0)
        stages.append(stage)
    return Variant(
        name=name,
        family="DAT",
        image_size=(size, size),
        trained_size=size,
        resize_size=resize,
        stages=tuple(stages),
        parameters=parameters,
        gmacs=gmacs,
        published_top1=top1,
        runtimes_checked=("pytorch", "onnxruntime", "openvino"),
    )


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _dat("tiny", 224, 256, 7, 96, 6, 28_319_138, 4.563, 82.0),
        _dat("small", 224, 256, 7, 96, 18, 49_700_402, 8.959, 83.7),
        _dat("base", 224, 256, 7, 128, 18, 87_881_632, 15.721, 84.0),
        _dat("base-384", 384, 438, 12, 128, 18, 88_178_272, 49.450, 84.8),
    )
}


def get_variant(name: str) -> Variant:
    """The row called `name`.

    Raises:
        VariantError: if there is none; the message lists near matches.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise VariantError(f"no variant '{name}'. {hint}Variants: {', '.join(VARIANTS)}.")
