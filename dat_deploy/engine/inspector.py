"""What is in an exported file or an engine: its passport, and the layers that its backend can list."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx

from dat_deploy.engine.backend import EngineLayer
from dat_deploy.engine.build import find_backend
from dat_deploy.engine.passport import Passport, open_engine, sha256
from dat_deploy.engine.tensorrt.layers import count_types, fused_attention
from dat_deploy.errors import EngineBuildError, UnsupportedError
from dat_deploy.export.census import PrecisionCensus, precision_census
from dat_deploy.export.records import operator_records
from dat_deploy.metadata import DOMAIN_NAME, FileMetadata, read_onnx

__all__ = ["EngineLayer", "GraphTensor", "Inspection", "OnnxFile", "count_types", "fused_attention", "inspect"]


@dataclass(frozen=True)
class GraphTensor:
    """An input or output of an ONNX graph; an axis that is free has a name instead of a number."""

    name: str
    type: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxFile:
    """What an exported file holds, counted and read from the file and not from its metadata.

    Attributes:
        sha256, size_bytes: of the file.
        written_by: the tool and its version.
        nodes: how many the graph has; operators: how many of them are which operator of this package.
        operator_form: `nodes with bodies`, `nodes without bodies`, or `inlined`, which the metadata lists.
        census: what the nodes compute in.
    """

    sha256: str
    size_bytes: int
    written_by: str
    ir_version: int
    opset_version: int
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    nodes: int
    operators: dict[str, int]
    operator_form: str
    census: PrecisionCensus


@dataclass(frozen=True)
class Inspection:
    """What a file says of itself.

    Attributes:
        passport: of an engine; None of an ONNX file; file: the reverse.
        layers: by type, in the ONNX graph or the parsed network.
        engine_layers: of the built engine; empty where they cannot be seen, and `unseen` says why.
    """

    path: Path
    metadata: FileMetadata
    passport: Passport | None
    file: OnnxFile | None
    layers: dict[str, int]
    engine_layers: tuple[EngineLayer, ...]
    unseen: str | None


def inspect(path: Path) -> Inspection:
    """Look at an exported file or an engine; of an engine the passport is checked first.

    Raises:
        PassportError: if an engine is not what its passport says.
        ExportError: if an ONNX file was not exported by dat-deploy.
    """
    if path.suffix == ".onnx":
        metadata, file = _exported_file(path)
        counts = {precision: file.census.count(precision) for precision in file.census.nodes}
        return Inspection(path, metadata, None, file, counts | {"cast": file.census.casts}, (), None)
    passport, content = open_engine(path)
    unseen = None
    layers: tuple[EngineLayer, ...] = ()
    try:
        layers = tuple(find_backend(passport.backend).layers(path, passport, content))
    except (EngineBuildError, UnsupportedError) as error:  # no such backend here, or not on this machine
        unseen = str(error)
    return Inspection(path, passport.metadata, passport, None, passport.layers, layers, unseen)


def _exported_file(path: Path) -> tuple[FileMetadata, OnnxFile]:
    content, model = read_onnx(path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    metadata = FileMetadata.from_properties(properties, path)
    operators = [node.op_type for node in model.graph.node if node.domain == DOMAIN_NAME]
    form = ("nodes with bodies" if model.functions else "nodes without bodies") if operators else "inlined"
    operators = operators or [record.operator for record in operator_records(properties)]
    return metadata, OnnxFile(
        sha256=sha256(content),
        size_bytes=len(content),
        written_by=f"{model.producer_name} {model.producer_version}".strip(),
        ir_version=model.ir_version,
        opset_version=next(entry.version for entry in model.opset_import if not entry.domain),
        inputs=tuple(map(_graph_tensor, model.graph.input)),
        outputs=tuple(map(_graph_tensor, model.graph.output)),
        nodes=len(model.graph.node),
        operators=dict(Counter(operators)),
        operator_form=form,
        census=precision_census(model),
    )


def _graph_tensor(value: onnx.ValueInfoProto) -> GraphTensor:
    kind = value.type.tensor_type
    shape = tuple(axis.dim_param or axis.dim_value for axis in kind.shape.dim)
    return GraphTensor(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape)
