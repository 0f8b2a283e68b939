"""The layers of a built engine, in what TensorRT's own inspector says of it."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from dat_deploy.engine.backend import EngineLayer
from dat_deploy.engine.tensorrt.library import Log
from dat_deploy.errors import EngineRunError
from dat_deploy.precision import precision_in_words

__all__ = ["count_types", "deserialized", "fused_attention", "layers_from_json", "layers_of"]

_OTHER_PROFILE = re.compile(r"\[profile [1-9]\d*\]$", re.IGNORECASE)
_ATTENTION = re.compile(r"f?mha|flash|attention", re.IGNORECASE)


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
    row = precision_in_words(words)  # of TensorRT 10.x: "Row major linear FP16 format"; 11.x: "Half"
    return "integer" if row is None else row.name


def count_types(layers: Sequence[EngineLayer]) -> dict[str, int]:
    """How many layers compute in each type."""
    return dict(Counter(layer.precision for layer in layers))


def fused_attention(layers: Sequence[EngineLayer]) -> int:
    """How many layers are attention in one kernel of TensorRT's own."""
    return sum(1 for layer in layers if not layer.is_plugin and _ATTENTION.search(layer.tactic))
