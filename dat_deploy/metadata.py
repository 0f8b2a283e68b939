"""What an exported file says about itself, in ONNX metadata_props."""

import dataclasses
import json
import typing
from pathlib import Path

import onnx

from dat_deploy.environment import tool_version
from dat_deploy.errors import DatDeployError, ExportError
from dat_deploy.files import open_input
from dat_deploy.images.preprocess import Preprocessing, golden_sha256
from dat_deploy.networks.family import Network, Weights, family_called, family_of
from dat_deploy.typed_json import plain, typed

__all__ = ["DOMAIN_NAME", "Calibration", "FileMetadata", "load_onnx", "read_metadata", "read_onnx"]

DOMAIN_NAME = "dat_deploy"  # of the operators in a graph; see `plugins.onnx_domain`

_PREFIX = "dat_deploy."


@dataclasses.dataclass(frozen=True)
class Calibration:
    """On what the ranges of an int8 file were measured.

    Attributes:
        folder: its name alone; images: how many of its images were read.
        sha256: of the sorted names, within the folder, and the bytes of those images.
        method: how a range came from what was seen: `percentile`, `minmax` or `entropy`.
        library: that measured them, and its `library_version`.
    """

    folder: str
    images: int
    sha256: str
    method: str
    library: str
    library_version: str


@dataclasses.dataclass(frozen=True)
class FileMetadata:
    """Carried by every exported file; each field is one property, `dat_deploy.FIELD`, in JSON.

    Attributes:
        network: what the file computes, a released variant or a configuration of the user's.
        batch: the fixed batch, or None if it is dynamic.
        dynamic_image_size: the file takes images of any size that the network takes, not `network.image_size` alone.
        precision: of the matrix products: `fp32`, `fp16`, `bf16` or `int8`; what stays in float32 beside them is in the
            graph.
        fp32_added: modules that were kept in float32 on request; fp32_removed: in which nothing was.
        weights_sha256: of the weights' names, types, shapes and bytes, whatever file they came from.
        weights_source: the checkpoint's file name, or the seed of random weights.
        version: of dat-deploy.
        golden_sha256: see `images.preprocess.golden_sha256`, of `preprocessing` where the file was exported; empty in
            files of before there was one.
        calibration: of an int8 file.
        family: of `network`, by its name.
    """

    network: Network
    batch: int | None
    dynamic_image_size: bool
    lowering: str
    precision: str
    opset_version: int
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    weights_sha256: str
    weights_source: str
    version: str
    fp32_added: tuple[str, ...] = ()
    fp32_removed: tuple[str, ...] = ()
    golden_sha256: str = dataclasses.field(default="", metadata={"optional": True})
    calibration: Calibration | None = dataclasses.field(default=None, metadata={"optional": True})
    family: str = dataclasses.field(default="dat", metadata={"optional": True})

    @property
    def variant(self) -> str:
        return self.network.name

    @property
    def image_size(self) -> tuple[int, int]:
        return self.network.image_size

    @classmethod
    def of(cls, network: Network, weights: Weights, **own: typing.Any) -> "FileMetadata":
        """Of a file that is made here and now: `own` are the fields that neither the network nor its weights say."""
        return cls(
            network=network,
            preprocessing=network.preprocessing,
            class_names=network.answer.class_names,
            weights_sha256=weights.sha256,
            weights_source=weights.source,
            version=tool_version(),
            golden_sha256=golden_sha256(network.preprocessing),
            family=family_of(network).name,
            **own,
        )

    @classmethod
    def field_types(cls, values: dict[str, typing.Any]) -> dict[str, typing.Any]:
        """For `typed`: a network is what its family says."""
        return {"network": family_called(str(values.get("family", "dat"))).network_type}

    def to_properties(self) -> dict[str, str]:
        return {_PREFIX + name: json.dumps(value) for name, value in plain(self).items()}

    @classmethod
    def from_properties(cls, properties: dict[str, str], path: Path) -> "FileMetadata":
        """Raises ExportError if `properties` are not those of a file that this tool exported."""
        names = [field.name for field in dataclasses.fields(cls)]
        fields = {name: properties[_PREFIX + name] for name in names if _PREFIX + name in properties}
        if not fields:
            raise ExportError(
                f"{path} was not exported by dat-deploy: it has no dat_deploy.* metadata. "
                f'Export it with: `export(variant=variant, output="{path.name}")`'
            )
        try:
            return typing.cast(FileMetadata, typed(cls, {n: json.loads(v) for n, v in fields.items()}, "metadata"))
        except (ValueError, OverflowError, RecursionError, DatDeployError) as error:  # any JSON at all
            raise ExportError(
                f"the dat_deploy.* metadata of {path} cannot be read ({error}); it was made by another version or "
                f"edited. Export the file again."
            ) from error


def read_metadata(path: Path) -> FileMetadata:
    """The metadata of an ONNX file.

    Raises:
        ExportError: if `path` is missing, is not an ONNX file, or was not exported by dat-deploy.
    """
    return FileMetadata.from_properties({p.key: p.value for p in load_onnx(path).metadata_props}, path)


def load_onnx(path: Path) -> onnx.ModelProto:
    """Raises ExportError if `path` is missing, cannot be read or is not an ONNX file."""
    return read_onnx(path)[1]


def read_onnx(path: Path) -> tuple[bytes, onnx.ModelProto]:
    """The file's bytes, and what was parsed from those; raises ExportError as `load_onnx`."""
    if not path.exists():
        raise ExportError(f'there is no file {path}. Export one with: `export(variant="tiny", output="{path.name}")`')
    with open_input(path, ExportError, "ONNX file") as file:
        content = file.read()
    try:
        return content, onnx.load_from_string(content)
    except Exception as error:  # protobuf's own exception types differ between its releases
        raise ExportError(f"{path} is not an ONNX file, or it is truncated. Export it again.") from error
