"""What is in an exported file or an engine: its passport, and what TensorRT's own inspector says."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from dat_deploy.engine.passport import Passport, open_engine, sha256
from dat_deploy.engine.tensorrt.library import Log, import_tensorrt
from dat_deploy.errors import EngineRunError, UnsupportedError
from dat_deploy.export.census import PrecisionCensus, precision_census
from dat_deploy.export.records import operator_records
from dat_deploy.metadata import DOMAIN_NAME, FileMetadata, read_onnx

# What loads torch is imported where an engine needs it; an ONNX file needs none.

__all__ = [
    "EngineLayer",
    "GraphTensor",
    "Inspection",
    "OnnxFile",
    "count_types",
    "deserialized",
    "fused_attention",
    "inspect",
    "layers_from_json",
    "layers_of",
]

_TYPES = (  # of TensorRT 10.x: "Row major linear FP16 format"; 11.x: "Half"
    ("int8", re.compile(r"int8", re.IGNORECASE)),
    ("bf16", re.compile(r"bf16|bfloat16", re.IGNORECASE)),
    ("fp16", re.compile(r"fp16|half", re.IGNORECASE)),
    ("fp32", re.compile(r"fp32|float", re.IGNORECASE)),
)
_OTHER_PROFILE = re.compile(r"\[profile [1-9]\d*\]$", re.IGNORECASE)
_ATTENTION = re.compile(r"f?mha|flash|attention", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLayer:
    """A layer of a built engine; TensorRT may have made it of many of the network's.

    Attributes:
        kind: TensorRT's type of layer; tactic: the kernel that it chose, if it says so.
        inputs, outputs: the format and type of each tensor, in TensorRT's words.
        precision: the type that its first output has: fp32, fp16, bf16, int8 or integer.
    """

    name: str
    kind: str
    tactic: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: str

    @property
    def is_plugin(self) -> bool:
        return "plugin" in self.kind.lower()


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
    if passport.backend == "aotinductor":
        unseen = "an AOTInductor package is compiled code, whose layers are not listed"
    else:
        try:
            trt = import_tensorrt(passport.backend)
            from dat_deploy.engine.tensorrt.session import check_fits

            check_fits(passport, trt, str(path))
        except UnsupportedError as error:
            unseen = str(error)
        else:
            if passport.plugin_form == "IPluginV3":
                from dat_deploy.plugins.tensorrt import registry

                registry.register_plugins(trt)
            layers = tuple(layers_of(trt, deserialized(trt, content)))
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


def deserialized(trt: ModuleType, content: bytes) -> Any:
    """Raises EngineRunError if TensorRT cannot open the engine."""
    log = Log(trt)
    engine = trt.Runtime(log.logger).deserialize_cuda_engine(content)
    if engine is None:
        raise EngineRunError(f"TensorRT cannot open the engine; it said: {log.tail()}. Build it again here.")
    return engine


def layers_of(trt: ModuleType, engine: Any) -> list[EngineLayer]:
    """The layers of a deserialised engine."""
    inspector = engine.create_engine_inspector()
    return layers_from_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def layers_from_json(text: str) -> list[EngineLayer]:
    """The layers in what the inspector gives; those that were built without their details have a name alone."""
    layers = []
    for entry in json.loads(text)["Layers"]:
        name = entry if isinstance(entry, str) else entry.get("Name", "")
        if _OTHER_PROFILE.search(name):
            continue  # the same layer as often as there are profiles
        if isinstance(entry, str):
            layers.append(EngineLayer(entry, "", "", (), (), "unknown"))
            continue
        inputs, outputs = (tuple(map(_format, entry.get(side, []))) for side in ("Inputs", "Outputs"))
        layers.append(
            EngineLayer(
                name=name,
                kind=(entry.get("PluginType") and "Plugin " + entry["PluginType"]) or entry.get("LayerType", ""),
                tactic=entry.get("TacticName", ""),
                inputs=inputs,
                outputs=outputs,
                precision=_precision(outputs[0]) if outputs else "integer",
            )
        )
    return layers


def _format(tensor: dict[str, Any]) -> str:
    words = [tensor.get("Format/Datatype"), tensor.get("Format"), tensor.get("Datatype")]
    return " ".join(str(word) for word in words if word)


def _precision(words: str) -> str:
    return next((name for name, pattern in _TYPES if pattern.search(words)), "integer")


def count_types(layers: Sequence[EngineLayer]) -> dict[str, int]:
    """How many layers compute in each type."""
    return dict(Counter(layer.precision for layer in layers))


def fused_attention(layers: Sequence[EngineLayer]) -> int:
    """How many layers are attention in one kernel of TensorRT's own."""
    return sum(1 for layer in layers if not layer.is_plugin and _ATTENTION.search(layer.tactic))
