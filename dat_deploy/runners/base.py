"""The small interface behind which every runtime stands."""

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dat_deploy.engine.passport import Profile
from dat_deploy.errors import DatDeployError, EngineBuildError, ShapeError, UnsupportedError
from dat_deploy.images.preprocess import Preprocessing
from dat_deploy.metadata import FileMetadata, load_onnx
from dat_deploy.networks.family import Network

__all__ = [
    "EngineDescription",
    "EngineOutline",
    "Graph",
    "Images",
    "Outputs",
    "Runner",
    "describe",
    "graph_in_batches",
    "in_batches",
    "no_plugin_here",
]

MOST_IMAGES = 8  # in one call of an engine that takes any batch

Images = NDArray[np.float32]
Outputs = dict[str, NDArray[np.float32]]
Graph = Callable[[Mapping[str, NDArray[np.float32]]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class EngineOutline:
    """What is known of an engine before its runtime is loaded.

    Attributes:
        name: a label; as the user named it where nothing else is said: `tiny.onnx`, `pytorch:tiny`.
        network: what it computes; family: that the network is of.
        outputs: the names of what it gives, in order; None, before it is opened, of PyTorch, which gives what it is
            asked for.
        batch: the fixed batch, or None if several go: any, or those of `profiles` if there are any.
        dynamic_image_size: it takes images of any size that the network takes, not `network.image_size` alone.
        profiles: the batches that an engine was built for.
        path: the file, as named; None where there is none.
        file_kind: `exported`, an ONNX file of `export`; `engine`, with a passport beside it; None of any other.
        file_precision: of the file, see `FileMetadata`; None where there is none.
    """

    name: str
    network: Network
    outputs: tuple[str, ...] | None
    preprocessing: Preprocessing
    batch: int | None = None
    dynamic_image_size: bool = False
    profiles: tuple[Profile, ...] = ()
    path: Path | None = None
    file_kind: str | None = None
    file_precision: str | None = None
    family: str = "dat"

    @property
    def variant(self) -> str:
        return self.network.name

    @property
    def image_size(self) -> tuple[int, int]:
        return self.network.image_size

    @property
    def batches_taken(self) -> str:
        """In words, for messages."""
        if self.profiles:
            return "batch " + " or ".join(map(str, self.profiles))
        return "any batch" if self.batch is None else str(self.batch)

    @property
    def least_batch(self) -> int:
        return min((profile.least for profile in self.profiles), default=self.batch or 1)

    def takes_batch(self, batch: int) -> bool:
        if self.profiles:
            return any(profile.least <= batch <= profile.most for profile in self.profiles)
        return self.batch in (None, batch)

    def next_batch(self, images: int) -> int:
        """Of the next call with so many images left: the least batch that holds all, or else the largest."""
        if self.profiles:
            holding = [max(profile.least, images) for profile in self.profiles if images <= profile.most]
            return min(holding) if holding else max(profile.most for profile in self.profiles)
        return self.batch or images

    def network_at(self, height: int, width: int) -> Network:
        """Its network for images of that size.

        Raises:
            ShapeError: if it does not take that size.
        """
        if (height, width) == self.image_size:
            return self.network
        if not self.dynamic_image_size:
            raise ShapeError(
                f"{self.name} is made for images of {self.image_size[0]}x{self.image_size[1]}, not {height}x{width}. "
                f"Export it again with `image_size={height, width}`."
            )
        return self.network.with_image_size(height, width)


@dataclass(frozen=True, kw_only=True)
class EngineDescription(EngineOutline):
    """What is being run; every benchmark row and validation report carries it.

    Attributes:
        runtime: `pytorch`, `onnxruntime`, ... and its `runtime_version`.
        device: `cpu` or `cuda`.
        precision: that the runtime computes matrix products in: `fp32`, `fp16`, `bf16`, `int8`.
        rounds_locations: the runtime lowers the precision by itself, of coordinates too, whatever the file says.
        lowering: of the ONNX file, or None.
        threads: that one call computes with.
        weights_sha256: which weights (see `FileMetadata`).
    """

    outputs: tuple[str, ...]
    runtime: str
    runtime_version: str
    device: str = "cpu"
    precision: str = "fp32"
    rounds_locations: bool = False
    lowering: str | None = None
    threads: int = 1
    weights_sha256: str
    weights_source: str

    @classmethod
    def of_file(
        cls,
        path: Path,
        *,
        runtime: str,
        runtime_version: str,
        name: str | None = None,
        image_size: tuple[int, int] | None = None,
        device: str = "cpu",
        precision: str | None = None,
        rounds_locations: bool = False,
        threads: int = 1,
    ) -> "EngineDescription":
        """An exported ONNX file's description of itself, for a `Runner` of your own that runs it.

        Args:
            name: by default the path.
            image_size: (height, width) in pixels that it is for, where the file has a choice.
            precision: by default the file's.

        Raises:
            ExportError: as `load_onnx`, and if this package did not export the file.
            ShapeError: if the file does not take the image size.
        """
        model = load_onnx(path)
        metadata = FileMetadata.from_properties({p.key: p.value for p in model.metadata_props}, path)
        return describe(
            metadata,
            name or str(path),
            image_size,
            path=path,
            outputs=[output.name for output in model.graph.output],
            runtime=runtime,
            runtime_version=runtime_version,
            device=device,
            precision=precision or metadata.precision,
            rounds_locations=rounds_locations,
            threads=threads,
        )

    @property
    def answer_precision(self) -> str:
        """In which the answer was rounded: a runtime may compute in float32 with the weights of a file in float16."""
        of_file = self.file_precision or self.precision
        return of_file if self.precision == "fp32" or of_file == "int8" else self.precision

    @property
    def judged_in(self) -> str | None:
        """What it computes in, where that is not what its file is in, for which it cannot vouch then."""
        return None if self.file_precision in (None, "fp32", self.precision) else self.precision

    def at_image_size(self, height: int, width: int) -> "EngineDescription":
        """The same engine as it is with images of another size; raises ShapeError as `network_at`."""
        network = self.network_at(height, width)
        if network == self.network:
            return self
        return replace(self, network=network, preprocessing=network.preprocessing)


class Runner(abc.ABC):
    """An opened engine: images in, logits or feature maps out. A context manager; closing it frees the engine."""

    description: EngineDescription

    def __call__(self, images_nchw: Images) -> NDArray[np.float32]:
        """Logits [B, classes] float32 of normalised images [B, 3, H, W] float32.

        Raises:
            ShapeError: if the engine does not take that shape, or the images are not floating-point numbers.
            DatDeployError: if the engine is a backbone.
        """
        self._check_has_logits()
        return self.outputs(images_nchw)["logits"]

    def logits(self, images_nchw: Images) -> NDArray[np.float32]:
        """As a call, for any number of images, see `in_batches`."""
        self._check_has_logits()
        return self.in_batches(images_nchw)["logits"]

    def _check_has_logits(self) -> None:
        if "logits" not in self.description.outputs:
            raise DatDeployError(
                f"{self.description.name} is a backbone: it gives {', '.join(self.description.outputs)} and no logits. "
                f"Use outputs(images) for its maps, or export it again without `features` to classify."
            )

    def outputs(self, images_nchw: Images) -> Outputs:
        """Everything that the engine gives for normalised images [B, 3, H, W] float32, by name.

        Raises:
            ShapeError: if the engine does not take that shape, or the images are not floating-point numbers.
        """
        if not np.issubdtype(images_nchw.dtype, np.floating):
            raise ShapeError(
                f"{self.description.name}: input 'image' has type {images_nchw.dtype}; it takes normalised float32. "
                f"Use dat_deploy.images.preprocess."
            )
        shape, fixed = images_nchw.shape, not self.description.dynamic_image_size
        if (
            len(shape) != 4
            or shape[0] == 0
            or shape[1] != 3
            or not self.description.takes_batch(shape[0])
            or (fixed and shape[2:] != self.description.image_size)
        ):
            sides = "{}, {}".format(*self.description.image_size) if fixed else "height, width"
            again, batch = ("Build", "batches") if self.description.profiles else ("Export", "batch")
            raise ShapeError(
                f"{self.description.name}: input 'image' has shape {list(shape)}; it takes "
                f"[{self.description.batches_taken}, 3, {sides}]. {again} again with `{batch}` or `image_size` for "
                f"another."
            )
        self.description.at_image_size(*shape[2:])
        return self._run(np.ascontiguousarray(images_nchw, dtype=np.float32))

    @abc.abstractmethod
    def _run(self, images_nchw: Images) -> Outputs: ...

    def in_batches(self, images_nchw: Images, batch: int | None = None) -> Outputs:
        """As `outputs`, for any number of images [N, 3, H, W], see `in_batches`."""
        return in_batches(self.description, {"image": images_nchw}, lambda feeds: self.outputs(feeds["image"]), batch)

    @property
    def takes_graphs(self) -> bool:
        """Whether there is an `open_graph`."""
        return type(self).open_graph is not Runner.open_graph

    def open_graph(self, onnx_model: bytes) -> Graph:
        """Another, small ONNX graph on the same runtime, device and precision: inputs by name -> first output.

        Raises:
            UnsupportedError: if this runtime does not take ONNX graphs.
        """
        raise UnsupportedError(f"{self.description.runtime} does not run ONNX graphs.")

    @abc.abstractmethod
    def close(self) -> None:
        """Free the engine; running it afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def in_batches(
    about: EngineOutline,
    feeds: Mapping[str, NDArray[Any]],
    run: Callable[[dict[str, NDArray[Any]]], Mapping[str, NDArray[Any]]],
    batch: int | None = None,
) -> dict[str, NDArray[Any]]:
    """What `run` gives for N images, called with batches that the engine takes.

    They are as large as it takes; of an engine that takes any, MOST_IMAGES at most, and all alike, as some compile anew
    for each size. A batch that is not full is filled up with the first images again; of an image that is in several
    slots, the last answer counts.

    Args:
        feeds: by name, [N, ...] each, with any N from one on.
        batch: instead of the largest.

    Returns:
        by name, [N, ...] each.
    """
    count = len(next(iter(feeds.values())))
    if count == 0:  # `run` says what is wrong with it
        return dict(run(dict(feeds)))
    if batch is None and not about.profiles:
        batch = about.batch or min(count, MOST_IMAGES)
    results: dict[str, NDArray[Any]] = {}
    first = 0
    while first < count:
        size = batch or about.next_batch(count - first)
        slots = np.arange(first, first + size) % count
        for name, values in run({key: value[slots] for key, value in feeds.items()}).items():
            results.setdefault(name, np.empty((count, *values.shape[1:]), values.dtype))[slots] = values
        first += size
    return results


def graph_in_batches(about: EngineOutline, graph: Graph, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """What a part of an engine's file gives for N images, see `in_batches`."""
    return in_batches(about, feeds, lambda batch: {"": graph(batch)})[""]


def describe(
    metadata: FileMetadata,
    name: str,
    image_size: tuple[int, int] | None,
    *,
    outputs: Iterable[str],
    runtime: str,
    runtime_version: str,
    device: str,
    precision: str,
    threads: int,
    rounds_locations: bool = False,
    profiles: tuple[Profile, ...] = (),
    path: Path | None = None,
    file_kind: str = "exported",
) -> EngineDescription:
    """A file's description of itself, with what its runtime adds, for images of `image_size` if given."""
    about = EngineDescription(
        name=name,
        runtime=runtime,
        runtime_version=runtime_version,
        device=device,
        precision=precision,
        network=metadata.network,
        outputs=tuple(outputs),
        batch=metadata.batch,
        dynamic_image_size=metadata.dynamic_image_size,
        lowering=metadata.lowering,
        threads=threads,
        weights_sha256=metadata.weights_sha256,
        weights_source=metadata.weights_source,
        preprocessing=metadata.preprocessing,
        profiles=profiles,
        rounds_locations=rounds_locations,
        path=path,
        file_kind=None if path is None else file_kind,
        file_precision=None if path is None else metadata.precision,
        family=metadata.family,
    )
    return about if image_size is None else about.at_image_size(*image_size)


def no_plugin_here(name: str) -> EngineBuildError:
    """Why a runtime without the plugins cannot open a file of lowering `plugin`."""
    return EngineBuildError(
        f"{name} has lowering 'plugin': its operators have no body, so only TensorRT with the plugins runs it. "
        'Export it with `lowering="function"`.'
    )
