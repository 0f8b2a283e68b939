"""The released configurations of DAT, DAT+ and DAT++ as data, one row each, and `demo`, whose weights ship; no torch.

Source: the official YAML files (LeapLabTHU/DAT) and the papers, CVPR 2022 (arXiv 2201.00520) and DAT++
(arXiv 2309.01430). Letters: B batch, C channels, H W feature map, Hk Wk sampled grid, Ns = Hk·Wk, G offset groups,
M heads, D head dim, Ws window side, K neighborhood side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dat_deploy.errors import ShapeError, VariantError
from dat_deploy.networks.family import Answer, Network, Output, no_network

if TYPE_CHECKING:
    from dat_deploy.images.preprocess import Preprocessing
    from dat_deploy.networks.sampling import SampledBlock

__all__ = ["RELEASED", "VARIANTS", "StageConfig", "Variant", "get_variant", "stride"]

PATCH_SIZE = 4
TOTAL_STRIDE = 32  # the patch and three halvings
FAMILIES = ("DAT", "DAT+", "DAT++")
LARGEST = 2**16  # of any size
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip


def stride(stage: int) -> int:
    """Pixels of the image a side of one pixel of the stage's feature map."""
    return PATCH_SIZE << stage


@dataclass(frozen=True)
class StageConfig:
    """One of the four stages.

    Attributes:
        blocks: a letter a block: L window, S shifted window, D deformable, N neighborhood.
        window_size: of L and S; neighborhood_size: of N; the `offset_` fields: of D.
        offset_range_factor: how far a point may leave its reference, in steps of the sampled grid; negative: offsets
            are not squashed, and their sum with the reference is clamped to [-1, 1].
        local_perception: a depthwise 3×3 convolution is added to the features before each block.
        depthwise_mlp: a depthwise 3×3 convolution is added to the hidden features of each MLP.
    """

    channels: int
    blocks: str
    heads: int
    window_size: int = 0
    neighborhood_size: int = 0
    offset_groups: int = 0
    offset_kernel_size: int = 0
    offset_stride: int = 1
    offset_range_factor: float = 0.0
    local_perception: bool = False
    depthwise_mlp: bool = False

    def __post_init__(self) -> None:
        """Raises VariantError for what no stage can be; a stranger's file may say anything."""
        sizes = (self.channels, self.heads, self.offset_stride)
        kernels = (self.window_size, self.neighborhood_size, self.offset_groups, self.offset_kernel_size)
        possible = (
            set(self.blocks) <= set("LSDN") and 1 <= len(self.blocks) <= 1000 and all(1 <= n <= LARGEST for n in sizes)
        )
        possible = possible and all(0 <= n <= LARGEST for n in kernels) and self.channels % self.heads == 0
        if possible and ("L" in self.blocks or "S" in self.blocks):
            possible = self.window_size >= 1
        if possible and "N" in self.blocks:
            possible = self.neighborhood_size % 2 == 1
        if possible and "D" in self.blocks:
            possible = self.offset_groups >= 1 and self.heads % self.offset_groups == 0 and self.offset_kernel_size >= 1
        if not possible:
            raise VariantError(
                f"a stage cannot be {self!r:.300}; blocks are of L, S, D, N, heads divide channels, groups divide "
                f"heads, and what its blocks need is set, up to {LARGEST}."
            )

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads

    @property
    def shift_size(self) -> int:
        return math.ceil(self.window_size / 2)

    @property
    def offset_padding(self) -> int:
        return 0 if self.offset_kernel_size == self.offset_stride else self.offset_kernel_size // 2

    def sampled_map(self, height: int, width: int) -> tuple[int, int]:
        """(Hk, Wk) of the points that a deformable block samples on a feature map of that size."""
        reach = 2 * self.offset_padding - self.offset_kernel_size
        return (height + reach) // self.offset_stride + 1, (width + reach) // self.offset_stride + 1


@dataclass(frozen=True)
class Variant(Network):
    """A network with its evaluation preprocessing.

    Attributes:
        family: `DAT`, `DAT+` or `DAT++`. DAT counts coordinates from pixel centres and resizes its bias tables with
            the image; the later two count otherwise and read tables of one size at any image size.
        image_size: (height, width) in pixels that the network is built for.
        trained_size: the side in pixels of the image that an official checkpoint's bias tables are for.
        resize_size: the square side in pixels that an image is resized to before the centre crop.
        parameters: trainable parameters; gmacs: 1e9 multiply-adds of matrix products and convolutions at
            `image_size`, batch 1. Both are held to the network by tests; None for a configuration of your own.
        published_top1: ImageNet-1K top-1 in percent as its authors report it; not measured here. None if they do not.
        runtimes_checked: where every lowering of this variant was compared with PyTorch.
        overlapping_patches: the stem and the steps between stages are 3×3 convolutions, not projections of patches.
        features: stages whose output maps the network returns instead of logits, as a backbone.
        class_names: in the order of the logits; empty for ImageNet's 1000 and where they are not known.
    """

    name: str
    family: str
    image_size: tuple[int, int]
    trained_size: int
    resize_size: int
    stages: tuple[StageConfig, ...]
    parameters: int | None = None
    gmacs: float | None = None
    published_top1: float | None = None
    runtimes_checked: tuple[str, ...] = ()
    classes: int = 1000
    mlp_ratio: int = 4
    overlapping_patches: bool = False
    features: tuple[int, ...] = ()
    class_names: tuple[str, ...] = field(default=(), metadata={"optional": True})  # later than the first files

    def __post_init__(self) -> None:
        """Raises VariantError for what no network can be."""
        sizes = (*self.image_size, self.trained_size, self.resize_size, self.classes, self.mlp_ratio)
        stages = list(range(len(self.stages)))
        if (
            self.family not in FAMILIES
            or len(stages) != 4
            or not all(1 <= size <= LARGEST for size in sizes)
            or list(self.features) != [i for i in stages if i in self.features]
            or len(self.class_names) not in (0, self.classes)
        ):
            raise VariantError(
                f"a network cannot be {self!r:.300}; its family is one of {', '.join(FAMILIES)}, it has four stages, "
                f"its features are some of them in order, its class names are as many as its classes, and its sizes "
                f"are from 1 to {LARGEST}."
            )

    @property
    def is_released(self) -> bool:
        row = VARIANTS.get(self.name)
        return row is not None and (row.family, row.stages, row.classes) == (self.family, self.stages, self.classes)

    @property
    def answer(self) -> Answer:
        """With its own class names; where it has none, ImageNet's for 1000 classes, "class N" for other counts."""
        if self.features:
            return Answer("maps")
        if self.class_names or self.classes != 1000:
            return Answer("classes", self.class_names or tuple(f"class {index}" for index in range(self.classes)))
        from dat_deploy.images.labels import imagenet_class_names

        return Answer("classes", imagenet_class_names())

    @property
    def preprocessing(self) -> "Preprocessing":
        """Upstream's evaluation, whose published configurations are all square.

        A rectangular image size keeps the cropped share of each side: the long side is resized to `resize_size` and the
        short side in proportion (224x448 is cropped out of 256x512).
        """
        from dat_deploy.images.preprocess import Preprocessing

        scale = self.resize_size / max(self.image_size)
        height, width = (round(side * scale) for side in self.image_size)
        return Preprocessing(image_size=self.image_size, resize_size=(height, width))

    def outputs(self, *, sampled_points: bool = False) -> tuple[Output, ...]:
        """`logits` [B, classes], or `feature_map_i` [B, C, H, W] of stage i; with `sampled_points`, of block j of stage
        i `sampling_locations_i_j` [B, G, Hk, Wk, 2] and `attention_i_j` [B, G, Hk, Wk].
        """
        outputs = [
            Output(f"feature_map_{i}", (self.stages[i].channels, *self.feature_map(i)), (1, 2), stride(i))
            for i in self.features
        ] or [Output("logits", (self.classes,))]
        if sampled_points:
            blocks = self.sampled_blocks
            outputs += [
                Output(block.locations, (block.groups, *block.sampled_map, 2), (1, 2), channel_axis=3)
                for block in blocks
            ]
            outputs += [Output(block.attention, (block.groups, *block.sampled_map), (1, 2)) for block in blocks]
        return tuple(outputs)

    @property
    def half_pixel_queries(self) -> bool:
        """See `plugins.deformable_attention`."""
        return self.family == "DAT"

    @property
    def has_windows(self) -> bool:
        return any(letter in stage.blocks for stage in self.stages for letter in "LS")

    @property
    def takes_any_size(self) -> bool:
        """Whether the same network, tables and all, takes images of any size in multiples of `side_multiple`."""
        return self.family != "DAT" and not self.has_windows

    def check_any_size(self) -> None:
        if not self.takes_any_size:
            raise ShapeError(
                f"variant '{self.name}' cannot have a dynamic image size: its windows and bias tables are made for "
                f"one. Export it once for each with `image_size=(height, width)`."
            )

    @property
    def sampled_blocks(self) -> list["SampledBlock"]:
        from dat_deploy.networks.sampling import SampledBlock

        return [
            SampledBlock(
                name=f"stages.{i}.attns.{j}",
                stage=i,
                block=j,
                channels=stage.channels,
                groups=stage.offset_groups,
                feature_map=self.feature_map(i),
                sampled_map=stage.sampled_map(*self.feature_map(i)),
                image_size=self.image_size,
                half_pixel=self.half_pixel_queries,
                is_clamped=stage.offset_range_factor < 0,
            )
            for i, stage in enumerate(self.stages)
            for j, letter in enumerate(stage.blocks)
            if letter == "D"
        ]

    def feature_map(self, stage: int) -> tuple[int, int]:
        """(H, W) of the tensors inside stage `stage` (0 to 3)."""
        return self.image_size[0] // stride(stage), self.image_size[1] // stride(stage)

    def bias_table(self, stage: int) -> tuple[int, int]:
        """(Th, Tw) of the bias tables of the deformable blocks in stage `stage`."""
        if self.family == "DAT":
            height, width = self.feature_map(stage)
        else:
            height = width = self.trained_size // stride(stage)
        return 2 * height - 1, 2 * width - 1

    @property
    def side_multiple(self) -> int:
        """Every side of an image must be a multiple of this, in pixels, for the windows to tile each feature map."""
        return math.lcm(
            *(
                stride(i) * stage.window_size
                for i, stage in enumerate(self.stages)
                if "L" in stage.blocks or "S" in stage.blocks
            ),
            TOTAL_STRIDE,
        )

    @property
    def min_side(self) -> int:
        """The shortest side of an image, in pixels.

        DAT+ and DAT++ divide by the sides of their maps and sampled grids less one, so none of them may be 1.
        """
        least = 1 if self.family == "DAT" else 2
        side = self.side_multiple
        while True:
            maps = [side // stride(i) for i in range(len(self.stages))]
            sampled = [
                stage.sampled_map(size, size)[0]
                for stage, size in zip(self.stages, maps, strict=True)
                if "D" in stage.blocks
            ]
            if min(maps + sampled) >= least:
                return side
            side += self.side_multiple

    def with_image_size(self, height: int, width: int) -> "Variant":
        """The same network for another image size; the resize before the crop grows in proportion.

        Raises:
            ShapeError: if the windows do not tile the feature maps, or a map would be a single pixel wide; the message
                names the nearest sizes that work.
        """
        if (height, width) == self.image_size:
            return self
        step = self.side_multiple
        if not all(side >= self.min_side and side % step == 0 for side in (height, width)):
            nearest = " or ".join(
                f"{h}x{w}"
                for h, w in sorted({(self._down(height), self._down(width)), (self._up(height), self._up(width))})
            )
            reason = (
                f"its windows tile only sides that are multiples of {step} px"
                if self.has_windows
                else f"its sides are multiples of {step} px, from {self.min_side} px on"
            )
            raise ShapeError(
                f"image size {height}x{width} does not fit variant '{self.name}': {reason}. "
                f"Nearest that work: {nearest}."
            )
        resize = round(self.resize_size * max(height, width) / max(self.image_size))
        return replace(self, image_size=(height, width), resize_size=resize)

    def _down(self, side: int) -> int:
        return max(self.min_side, side // self.side_multiple * self.side_multiple)

    def _up(self, side: int) -> int:
        return max(self.min_side, math.ceil(side / self.side_multiple) * self.side_multiple)

    def as_backbone(self, features: Sequence[int]) -> "Variant":
        """The same network without its head: it returns the output maps of these stages, each after a LayerNorm.

        Raises:
            VariantError: if `features` does not name stages, each once and in order.
        """
        if not features or list(features) != sorted(set(features) & set(range(len(self.stages)))):
            raise VariantError(
                f"features {','.join(map(str, features))} are not stages of '{self.name}'; "
                f"they are some of 0,1,2,3, in this order, each once."
            )
        return replace(self, features=tuple(features))

    def small(self) -> "Variant":
        stages = tuple(replace(stage, blocks="".join(dict.fromkeys(stage.blocks))) for stage in self.stages)
        return replace(self, name=f"{self.name}-blocks", stages=stages, features=(0, 1, 2, 3))


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
        offsets = (width // 128, kernel, 1, 2.0) if "D" in blocks else (0, 0, 1, 0.0)
        stages.append(StageConfig(width, blocks, width // 32, window, 0, *offsets))
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


def _dat_pp(
    name: str,
    channels: int,
    groups: tuple[int, int, int, int],
    parameters: int,
    gmacs: float,
    top1: float | None,
    *,
    size: int = 224,
    resize: int = 256,
    convolutions: bool = True,
) -> Variant:
    """A row of the second paper: neighborhood and deformable blocks in turn; DAT+ lacks the added convolutions."""
    specs = ("ND", "NDND", "ND" * 9, "DD")
    stages = tuple(
        StageConfig(
            channels=channels * 2**i,
            blocks=blocks,
            heads=channels * 2**i // 32,
            neighborhood_size=7,
            offset_groups=groups[i],
            offset_kernel_size=(9, 7, 5, 3)[i],
            offset_stride=(8, 4, 2, 1)[i],
            offset_range_factor=-1.0,
            local_perception=convolutions,
            depthwise_mlp=convolutions,
        )
        for i, blocks in enumerate(specs)
    )
    return Variant(
        name=name,
        family="DAT++" if convolutions else "DAT+",
        image_size=(size, size),
        trained_size=224,
        resize_size=resize,
        stages=stages,
        parameters=parameters,
        gmacs=gmacs,
        published_top1=top1,
        runtimes_checked=("pytorch", "onnxruntime", "openvino"),
        overlapping_patches=convolutions,
    )


def _demo() -> Variant:
    """Fashion-MNIST's ten classes by a network of every kind of block, small enough to ship with its weights.

    Its images of 28×28 are enlarged to 64×64; `training/train_demo.py` made the weights.
    """
    shared: dict[str, Any] = {"neighborhood_size": 7, "local_perception": True, "depthwise_mlp": True}
    deformable: dict[str, Any] = {"offset_range_factor": -1.0, "offset_kernel_size": 3, "offset_stride": 1}
    return Variant(
        name="demo",
        family="DAT++",
        image_size=(64, 64),
        trained_size=64,
        resize_size=64,
        stages=(
            StageConfig(16, "LS", 1, window_size=8, **shared),
            StageConfig(32, "ND", 2, offset_groups=1, **{**deformable, "offset_stride": 2}, **shared),
            StageConfig(64, "NDND", 4, offset_groups=2, **deformable, **shared),
            StageConfig(128, "D", 8, offset_groups=4, **deformable, **shared),
        ),
        parameters=407_352,
        gmacs=0.008,
        runtimes_checked=("pytorch", "onnxruntime", "openvino"),
        classes=10,
        mlp_ratio=2,
        overlapping_patches=True,
        class_names=FASHION_CLASSES,
    )


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _dat("tiny", 224, 256, 7, 96, 6, 28_319_138, 4.563, 82.0),
        _dat("small", 224, 256, 7, 96, 18, 49_700_402, 8.959, 83.7),
        _dat("base", 224, 256, 7, 128, 18, 87_881_632, 15.721, 84.0),
        _dat("base-384", 384, 438, 12, 128, 18, 88_178_272, 49.450, 84.8),
        _dat_pp("plus", 64, (1, 2, 4, 8), 22_772_796, 4.025, None, convolutions=False),
        _dat_pp("pp-tiny", 64, (1, 2, 4, 8), 23_962_876, 4.259, 83.9),
        _dat_pp("pp-small", 96, (1, 2, 3, 6), 53_127_366, 9.382, 84.6),
        _dat_pp("pp-base", 128, (2, 4, 8, 16), 93_690_640, 16.502, 84.9),
        _dat_pp("pp-base-384", 128, (2, 4, 8, 16), 93_690_640, 49.502, 85.9, size=384, resize=384),
        _demo(),
    )
}
RELEASED = tuple(name for name in VARIANTS if name != "demo")  # by the authors of the papers


def get_variant(name: str) -> Variant:
    """The row called `name`.

    Raises:
        VariantError: if there is none; the message lists near matches.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    raise no_network(name, VARIANTS)
