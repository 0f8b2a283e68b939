"""What the toolkit asks of a network, and where it finds the families that answer. No torch, no NumPy.

A family is a folder or file here with a `FAMILY`, named in FAMILIES; or another package's, by an entry point of group
`dat_deploy.families` that names its `FAMILY`. Nothing outside of a family's own files knows it.
"""

import abc
import difflib
import functools
import hashlib
import importlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from dat_deploy.errors import ExportError, ShapeError, UnsupportedError, VariantError

if TYPE_CHECKING:
    import torch

    from dat_deploy.images.preprocess import Preprocessing
    from dat_deploy.networks.sampling import SampledBlock

__all__ = [
    "FAMILIES",
    "Answer",
    "Block",
    "Family",
    "Network",
    "Output",
    "Step",
    "Weights",
    "family_called",
    "family_of",
    "find_network",
    "network_names",
    "no_network",
]

FAMILIES = ("dat_deploy.networks.dat",)  # asked in this order
ENTRY_POINTS = "dat_deploy.families"


@dataclass(frozen=True)
class Answer:
    """What a network's outputs mean.

    Attributes:
        kind: `classes`: `logits` [B, classes]; `maps`: feature maps [B, C, H, W]; `detections`; or just `tensors`.
        class_names: in the order of the logits, one for each; none where it does not classify.
    """

    kind: Literal["classes", "maps", "detections", "tensors"]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """One tensor that a network gives, float32.

    Attributes:
        shape: without the batch, for images of the network's size.
        sides: the axes of `shape` that follow the image's height and width, if any do.
        stride: of a map, pixels of the image a side of one of its pixels.
        channel_axis: of `shape`, along which every element is a quantity of its own: a class, a channel, y or x.
    """

    name: str
    shape: tuple[int, ...]
    sides: tuple[int, ...] = ()
    stride: int = 1
    channel_axis: int = 0


class Network(abc.ABC):
    """A network as data: subclasses are frozen dataclasses, whose fields an exported file carries in JSON.

    Its input is `image` [B, 3, H, W], normalised.

    Attributes:
        name: what commands call it.
        family: its lineage as people write it, `DAT++`; see `family_of` for what answers for it.
        image_size: (height, width) in pixels that it is built for.
        features: stages whose maps it gives instead of its answer, as a backbone.
        parameters, gmacs, published_top1, runtimes_checked: of a released one; what is not known is None or empty.
        takes_any_size: the same network, tables and all, takes images of any size in multiples of `side_multiple`, from
            `min_side` on.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    name: str
    family: str
    image_size: tuple[int, int]
    features: tuple[int, ...] = ()
    parameters: int | None = None
    gmacs: float | None = None
    published_top1: float | None = None
    runtimes_checked: tuple[str, ...] = ()

    @property
    @abc.abstractmethod
    def answer(self) -> Answer: ...

    @property
    @abc.abstractmethod
    def preprocessing(self) -> "Preprocessing": ...

    @abc.abstractmethod
    def outputs(self, *, sampled_points: bool = False) -> tuple[Output, ...]:
        """In order; with `sampled_points`, the locations of all `sampled_blocks` and then their attention follow."""

    @property
    def sampled_blocks(self) -> Sequence["SampledBlock"]:
        return ()

    @property
    def takes_any_size(self) -> bool:
        return False

    @property
    def side_multiple(self) -> int:
        return 1

    @property
    def min_side(self) -> int:
        return self.side_multiple

    def check_any_size(self) -> None:
        """Raises ShapeError unless it takes images of any size."""
        if not self.takes_any_size:
            raise ShapeError(f"network '{self.name}' takes images of one size; export it once for each.")

    def with_image_size(self, height: int, width: int) -> Self:
        """The same network for another image size; raises ShapeError if it takes none such."""
        if (height, width) != self.image_size:
            raise ShapeError(
                f"network '{self.name}' takes images of {self.image_size[0]}x{self.image_size[1]} alone, not "
                f"{height}x{width}."
            )
        return self

    def as_backbone(self, features: Sequence[int]) -> Self:
        """The same network that gives the maps of these stages; raises VariantError if it cannot."""
        raise VariantError(f"network '{self.name}' is no backbone: it gives no feature maps.")

    @property
    def is_released(self) -> bool:
        """Whether its family knows it by its name, its image size and features aside."""
        return family_of(self).find(self.name) is not None

    def small(self) -> "Network":
        """One block of each kind at this network's sizes, as a backbone, to try the operators; by default itself."""
        return self

    def adapted(self, image_size: tuple[int, int] | None, features: Sequence[int] | None) -> Self:
        """For that image size, as that backbone, where they are not None; raises as these do."""
        network = self if image_size is None else self.with_image_size(*image_size)
        return network if features is None else network.as_backbone(features)

    def output_names(self, *, sampled_points: bool = False) -> tuple[str, ...]:
        return tuple(output.name for output in self.outputs(sampled_points=sampled_points))

    def output(self, name: str) -> Output:
        """Raises ExportError if it has none of that name, on request or not."""
        for output in self.outputs(sampled_points=True):
            if output.name == name:
                return output
        blocks = ", ".join(f"{block.locations} and {block.attention}" for block in self.sampled_blocks)
        raise ExportError(
            f"'{name}' is no output of {self.name}; its outputs are {', '.join(self.output_names())}"
            f"{f', and on request {blocks}' if blocks else ''}. Export it again."
        )


@dataclass(frozen=True)
class Weights:
    """The parameters of one network.

    Attributes:
        state_dict: float32, with the names and shapes of the family's module.
        source: the checkpoint's file name, or "seeded random weights (seed 0)".
        notes: what the user must be told, one sentence each.
    """

    state_dict: "dict[str, torch.Tensor]"
    source: str
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def sha256(self) -> str:
        """Of the names, types, shapes and bytes in sorted order, so it does not depend on the kind of file."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict.items()):
            shape = "x".join(map(str, tensor.shape))
            digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {shape}\n".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Step:
    """One part of a block, up to one tensor.

    Attributes:
        name: as in the model, `linear1` or `layer_norms.2`, or that of one of our operators.
        module: in PyTorch the tensor is this module's `side`: its `input`, its `output`, or its sampling `locations`.
        ends: the module that makes the tensor; where `is_residual`, the sum that it goes into does. Empty for what the
            list of operators names: an operator's output, and the locations that one reads.
        operator: whose result the tensor is, if it is one of ours.
        inputs: of the operator, by name: the step of the same block whose tensor each is.
        weights: the other inputs of the operator, by name: the parameter of the block's module that each is.
        outputs: of the network that show what this step gives and nothing that comes behind it.
    """

    name: str
    module: str
    side: str = "output"
    ends: str = ""
    is_residual: bool = False
    operator: str = ""
    inputs: tuple[tuple[str, str], ...] = ()
    weights: tuple[tuple[str, str], ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """What `bisect` names first, as in the model: `stages.2.attns.1`; its steps in order, the last ends it.

    Attributes:
        is_branch: no later block follows from it.
    """

    name: str
    steps: tuple[Step, ...]
    is_branch: bool = False


class Family(abc.ABC):
    """Networks that one piece of code builds.

    Attributes:
        name: by which exported files name it.
        network_type: the dataclass that its networks are.
        names: of networks to list where another is not found.
    """

    name: str
    network_type: type[Network]
    names: tuple[str, ...]

    @abc.abstractmethod
    def find(self, name: str) -> Network | None:
        """The network of that name, or in that file, or None if it is not this family's."""

    @abc.abstractmethod
    def weights(self, network: Any, checkpoint: Path | None = None) -> Weights:
        """Of the checkpoint; without one, those that ship, or seeded random ones. Raises CheckpointError."""

    @abc.abstractmethod
    def module(
        self, network: Any, weights: Weights, *, fused: bool = False, sampled_points: bool = False
    ) -> "torch.nn.Module":
        """In eval mode, without gradients; it shares the tensors. It takes `image` and gives `network.outputs(...)`:
        one tensor, or a tuple of several.

        Args:
            fused: call the torch operators `torch.ops.dat_deploy.*`, one node each under torch.export, instead of the
                reference code; a part that calls operators holds them as `operators`, see `networks.operators`.
        """

    def blocks(self, network: Any) -> Sequence[Block]:
        """Everything from the image to the outputs, in order, where `bisect` may cut; none if it may not."""
        return ()

    def sampling_locations(self, module: "torch.nn.Module", images: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """What each of the network's `sampled_blocks` reads, by its name."""
        return {}

    def rounded(self, module: "torch.nn.Module", dtype: "torch.dtype") -> "torch.nn.Module":
        """The same in float16 or bfloat16, as exported files of that precision are; images and outputs stay float32.

        Raises:
            UnsupportedError: if the family has none.
        """
        raise UnsupportedError(f"networks of family '{self.name}' have no half precision in PyTorch.")

    def quantized(self, module: "torch.nn.Module", images: "torch.Tensor") -> "torch.nn.Module | None":
        """The same as int8 files are, with ranges seen on `images`, see `networks.quantized`; None if it has none."""
        return None


def families() -> Iterator[Family]:
    """Those of this package, then those of others; of which one that cannot be had is left out, with a warning."""
    yield from _own_families()
    from importlib.metadata import entry_points  # slow to import

    names = {family.name for family in _own_families()}
    for entry_point in entry_points(group=ENTRY_POINTS):
        try:
            family = entry_point.load()
            reason = "" if isinstance(family, Family) else f"is no Family but {type(family).__name__}"
            reason = reason or (f"has the name '{family.name}' of another" if family.name in names else "")
        except Exception as error:  # whatever somebody else's module raises
            reason = f"cannot be loaded: {' '.join(str(error).split())}"
        if reason:
            warnings.warn(f"family of networks {entry_point.value} {reason}; it is left out.", stacklevel=2)
            continue
        names.add(family.name)
        yield family


def _own_families() -> Iterator[Family]:
    for module in FAMILIES:
        yield importlib.import_module(module).FAMILY


def network_names(*, own: bool = False) -> list[str]:
    """Of all families, to list; with `own`, of this package's alone, for which nothing else is loaded."""
    return [name for family in (_own_families() if own else families()) for name in family.names]


def family_called(name: str) -> Family:
    """Raises ValueError if there is none."""
    for family in families():
        if family.name == name:
            return family
    raise ValueError(f"there is no family of networks '{name}' here, only {', '.join(f.name for f in families())}")


def family_of(network: Network) -> Family:
    """Raises VariantError if no family has networks of that type."""
    for family in families():
        if isinstance(network, family.network_type):
            return family
    raise VariantError(
        f"no family has networks of type {type(network).__name__}, as '{network.name}' is; a package names its family "
        f"by an entry point of the group {ENTRY_POINTS}."
    )


def find_network(
    name: str | Network, *, image_size: tuple[int, int] | None = None, features: Sequence[int] | None = None
) -> Network:
    """The network that `name` means.

    Args:
        name: what a family calls one, a file that describes one (`dat.yaml`), or the network itself.
        image_size: (height, width) in pixels, if not the network's own.
        features: stages whose maps it is to give, see `Network.as_backbone`.

    Raises:
        ShapeError: if the image size does not fit the network.
        VariantError: if there is no such network, the file is refused, or it is no such backbone.
    """
    if isinstance(name, Network):
        return name.adapted(image_size, features)
    refusal = None
    for family in families():
        try:
            network = family.find(name)
        except VariantError as error:  # of a file, which may be another family's
            refusal = refusal or error
            continue
        if network is not None:
            return network.adapted(image_size, features)
    raise refusal or no_network(name, network_names())


def no_network(name: str, names: Iterable[str]) -> VariantError:
    """There is none of that name; these there are."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return VariantError(f"no variant '{name}'. {hint}Variants: {', '.join(names)}.")
