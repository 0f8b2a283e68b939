"""The small interface behind which every runtime stands."""

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dat_deploy.engine.passport import Profile
from dat_deploy.errors import DatDeployError, EngineBuildError, ShapeError, UnsupportedError
from dat_deploy.images.preprocess import Preprocessing
from dat_deploy.metadata import FileMetadata
from dat_deploy.networks.family import Network

__all__ = [
    "EngineDescription",
    "EngineOutline",
    "Graph",
    "Images",
    "Runner",
    "describe",
    "no_plugin_here",
]

Images = NDArray[np.float32]
Graph = Callable[[Mapping[str, NDArray[np.float32]]], NDArray[np.float32]]


class _Takes:
    """What an engine takes, by fields that `EngineOutline` and `EngineDescription` have."""

    name: str
    network: Network
    batch: int | None
    dynamic_image_size: bool
    profiles: tuple[Profile, ...]

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
                f"Export it again with --image-size {height}x{width}."
            )
        return self.network.with_image_size(height, width)


@dataclass(frozen=True)
class EngineOutline(_Takes):
    """What is known of an engine before its runtime is loaded; the fields are those of `EngineDescription`.

    Attributes:
        outputs: None of PyTorch, which gives what it is asked for.
    """

    name: str
    network: Network
    outputs: tuple[str, ...] | None
    batch: int | None
    dynamic_image_size: bool
    preprocessing: Preprocessing
    profiles: tuple[Profile, ...] = ()


@dataclass(frozen=True)
class EngineDescription(_Takes):
    """What is being run; every benchmark row and validation report carries it.

    Attributes:
        name: the engine as the user named it: `tiny.onnx`, `openvino:tiny.onnx`, `pytorch:tiny`.
        runtime: `pytorch`, `onnxruntime`, ... and its `runtime_version`.
        device: `cpu` or `cuda`.
        precision: of the matrix products: `fp32`, `fp16`, `bf16`, `int8`.
        network: what it computes; outputs: the names of what it gives, in order.
        batch: the fixed batch, or None if several go: any, or those of `profiles` if there are any.
        profiles: the batches that an engine was built for.
        dynamic_image_size: it takes images of any size that the network takes, not `network.image_size` alone.
        lowering: of the ONNX file, or None.
        threads: that one call computes with.
        weights_sha256: which weights (see `FileMetadata`).
    """

    name: str
    runtime: str
    runtime_version: str
    device: str
    precision: str
    network: Network
    outputs: tuple[str, ...]
    batch: int | None
    dynamic_image_size: bool
    lowering: str | None
    threads: int
    weights_sha256: str
    weights_source: str
    preprocessing: Preprocessing
    profiles: tuple[Profile, ...] = ()

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
        if "logits" not in self.description.outputs:
            raise DatDeployError(
                f"{self.description.name} is a backbone: it gives {', '.join(self.description.outputs)} and no logits. "
                f"Use outputs(images) for its maps, or export it again without --features to classify."
            )
        return self.outputs(images_nchw)["logits"]

    def outputs(self, images_nchw: Images) -> dict[str, NDArray[np.float32]]:
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
            again = "Build" if self.description.profiles else "Export"
            raise ShapeError(
                f"{self.description.name}: input 'image' has shape {list(shape)}; it takes "
                f"[{self.description.batches_taken}, 3, {sides}]. {again} again with --batch or --image-size for "
                f"another."
            )
        self.description.at_image_size(*shape[2:])
        return self._run(np.ascontiguousarray(images_nchw, dtype=np.float32))

    @abc.abstractmethod
    def _run(self, images_nchw: Images) -> dict[str, NDArray[np.float32]]: ...

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
    profiles: tuple[Profile, ...] = (),
) -> EngineDescription:
    """An exported file's description of itself, with what its runtime adds, for images of `image_size` if given."""
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
    )
    return about if image_size is None else about.at_image_size(*image_size)


def no_plugin_here(name: str) -> EngineBuildError:
    """Why a runtime without the plugins cannot open a file of lowering `plugin`."""
    return EngineBuildError(
        f"{name} has lowering 'plugin': its operators have no body, so only TensorRT with the plugins runs it. "
        f"Export it with --lowering function."
    )
