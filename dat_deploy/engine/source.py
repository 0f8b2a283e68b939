"""The exported file that a TensorRT engine is built from, and whether it can be built as asked; loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from dat_deploy.engine.passport import Profile, sha256
from dat_deploy.errors import EngineBuildError, ShapeError
from dat_deploy.metadata import DOMAIN_NAME, FileMetadata, read_onnx

__all__ = ["EngineSource", "check_plugin_form", "read_source"]


@dataclass(frozen=True)
class EngineSource:
    """An exported file as it is to be built.

    Attributes:
        sha256: of the bytes that `model` was parsed from.
        image_size: (height, width) in pixels of the engine; lowering: of the engine, or `auto`.
    """

    path: Path
    sha256: str
    model: onnx.ModelProto
    metadata: FileMetadata
    image_size: tuple[int, int]
    lowering: str


def read_source(
    path: Path, *, profiles: Sequence[Profile], image_size: tuple[int, int] | None, lowering: str
) -> EngineSource:
    """Read it; the arguments are those of `build`.

    Raises:
        ExportError: as `read_onnx` and `FileMetadata.from_properties`.
        ShapeError: if it does not take the image size, or a batch of the profiles.
        EngineBuildError: if its operators are inlined in another lowering.
    """
    content, model = read_onnx(path)
    metadata = FileMetadata.from_properties({entry.key: entry.value for entry in model.metadata_props}, path)
    size = _image_size(metadata, image_size, path)
    _check_batch(metadata, profiles, path)
    if not any(node.domain == DOMAIN_NAME for node in model.graph.node):
        if lowering not in ("auto", metadata.lowering):
            raise EngineBuildError(
                f"{path} has its operators inlined (lowering '{metadata.lowering}'), so it cannot be built as "
                f"'{lowering}'. Export it with "
                f'`lowering="function"`, or leave `lowering` out.'
            )
        lowering = metadata.lowering
    return EngineSource(path, sha256(content), model, metadata, size, lowering)


def check_plugin_form(plugin_form: str, lowering: str) -> None:
    """Raises EngineBuildError for a form of plugins where the engine has none."""
    if plugin_form != "auto" and lowering != "plugin":
        raise EngineBuildError(
            f'`plugin_form="{plugin_form}"` is for `lowering="plugin"`, and this is {lowering}; leave `plugin_form` '
            f'out, or build a file of lowering function or plugin with `lowering="plugin"`.'
        )


def _image_size(metadata: FileMetadata, image_size: tuple[int, int] | None, source: Path) -> tuple[int, int]:
    if image_size is None or image_size == metadata.image_size:
        return metadata.image_size
    if not metadata.dynamic_image_size:
        raise ShapeError(
            f"{source} is made for images of {metadata.image_size[0]}x{metadata.image_size[1]}, not "
            f"{image_size[0]}x{image_size[1]}. Export it again with `image_size={image_size}`."
        )
    return metadata.network.with_image_size(*image_size).image_size


def _check_batch(metadata: FileMetadata, profiles: Sequence[Profile], source: Path) -> None:
    fixed = metadata.batch
    if fixed is not None and profiles != (Profile(fixed, fixed, fixed),):
        listing = ",".join(map(str, profiles))
        raise ShapeError(
            f"{source} has the fixed batch {fixed} and cannot be built for batch {listing}. "
            f"Build it with `batches=[{fixed}]`, or export it again with `batch=None`."
        )
