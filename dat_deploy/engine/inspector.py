"""What is in an exported file or an engine: its passport, and what TensorRT's own inspector says."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir

from dat_deploy.engine.passport import Passport, open_engine
from dat_deploy.engine.tensorrt_library import Log, import_tensorrt
from dat_deploy.engine.tensorrt_session import check_fits
from dat_deploy.errors import EngineRunError, UnsupportedError
from dat_deploy.export.precision import precision_census
from dat_deploy.metadata import FileMetadata, read_metadata
from dat_deploy.plugins import trt_plugin

__all__ = [
    "EngineLayer",
    "Inspection",
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
class Inspection:
    """What a file says of itself.

    Attributes:
        passport: of an engine; None of an ONNX file.
        layers: by type, in the ONNX graph or the parsed network.
        engine_layers: of the built engine; empty where they cannot be seen, and `unseen` says why.
    """

    path: Path
    metadata: FileMetadata
    passport: Passport | None
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
        metadata = read_metadata(path)
        census = precision_census(ir.load(path))
        counts = {precision: census.count(precision) for precision in census.nodes}
        return Inspection(path, metadata, None, counts | {"cast": census.casts}, (), None)
    passport, content = open_engine(path)
    unseen = None
    layers: tuple[EngineLayer, ...] = ()
    if passport.backend == "aotinductor":
        unseen = "an AOTInductor package is compiled code, whose layers are not listed"
    else:
        try:
            trt = import_tensorrt(passport.backend)
            check_fits(passport, trt, str(path))
        except UnsupportedError as error:
            unseen = str(error)
        else:
            if passport.plugin_form == "IPluginV3":
                trt_plugin.register_plugins(trt)
            layers = tuple(layers_of(trt, deserialized(trt, content)))
    return Inspection(path, passport.metadata, passport, passport.layers, layers, unseen)


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
