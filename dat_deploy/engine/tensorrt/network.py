"""An exported file as TensorRT's network definition, and what that holds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import onnx

from dat_deploy.engine.tensorrt.library import Log
from dat_deploy.errors import EngineBuildError, VerificationError
from dat_deploy.metadata import DOMAIN_NAME
from dat_deploy.plugins.specification import PLUGIN_ATTRIBUTES
from dat_deploy.plugins.tensorrt.calls import last_error
from dat_deploy.precision import EXPORTED, PRECISIONS

__all__ = ["ParsedNetwork", "parsed_network", "without_plugins"]

_NAMES = {row.tensorrt: row.name for row in PRECISIONS.values()}
_CASTS = ("CAST", "QUANTIZE", "DEQUANTIZE")
_PRODUCTS = ("CONVOLUTION", "MATRIX_MULTIPLY")


@dataclass(frozen=True)
class ParsedNetwork:
    """A strongly typed network.

    Attributes:
        layers: how many layers compute in each type: `int8`, `fp32`, `fp16`, `bf16`; `integer` is shapes and indices,
            `cast` what changes the type. Constants do not count. What reads dequantized data and weights is `int8`.
        kinds: how many layers of each of TensorRT's types, such as GRID_SAMPLE or NORMALIZATION.
        plugins: how many layers each plugin has.
        owners: what must live as long as the network.
    """

    network: Any
    builder: Any
    layers: dict[str, int]
    kinds: dict[str, int]
    plugins: dict[str, int]
    owners: Sequence[Any]


def parsed_network(
    trt: ModuleType, model: onnx.ModelProto, log: Log, *, plugins: bool, ahead_of_time: bool = False
) -> ParsedNetwork:
    """Parse an exported file.

    Args:
        plugins: every operator is to become a plugin layer; they are registered. Else none is to.
        ahead_of_time: take the plugins whose kernels are baked into the engine, see `plugins.tensorrt.ahead_of_time`.

    Raises:
        EngineBuildError: if TensorRT does not take the file; its words are in the message.
        VerificationError: if the network is not what the file says.
    """
    last_error()  # of something earlier
    builder = trt.Builder(log.logger)
    flags = trt.NetworkDefinitionCreationFlag.__members__
    kind_words = ["STRONGLY_TYPED"] + ["PREFER_AOT_PYTHON_PLUGINS"] * ahead_of_time
    network = builder.create_network(sum(1 << int(flags[name]) for name in kind_words if name in flags))
    if network is None:
        raise EngineBuildError(
            f"TensorRT {trt.__version__} makes no network of the kind {' | '.join(kind_words)}; it said: {log.tail()}. "
            f'Build with `plugin_form="IPluginV3"`.'
        )
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse((model if plugins else without_plugins(model)).SerializeToString()):
        plugin = last_error()
        if plugin is not None:
            raise EngineBuildError(f"a plugin refused its node: {plugin}") from plugin
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)][:3] or [log.tail()]
        words = " | ".join(" ".join(text.split()) for text in dict.fromkeys(reasons))
        raise EngineBuildError(f'TensorRT cannot read the file: {words}. Export it again, or try `lowering="gather"`.')
    operators = {node.name: node.op_type for node in model.graph.node if node.domain == DOMAIN_NAME}
    layers: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    plugin_counts: Counter[str] = Counter()
    dequantized: dict[str, str] = {}  # tensor -> the precision that it had before
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = layer.type.name
        if kind == "CONSTANT":
            continue
        kinds[kind] += 1
        inputs = [tensor.name for j in range(layer.num_inputs) if (tensor := layer.get_input(j)) is not None][:2]
        is_quantized = bool(inputs) and dequantized.keys() >= set(inputs)
        if kind == "DEQUANTIZE":
            dequantized[layer.get_output(0).name] = _precision(layer.get_input(0))
        elif kind == "SHUFFLE" and is_quantized:
            dequantized[layer.get_output(0).name] = dequantized[inputs[0]]
        if kind in _CASTS:
            layers["cast"] += 1
        elif kind in _PRODUCTS and is_quantized:
            layers[dequantized[inputs[-1]]] += 1
        else:
            precision = _precision(layer.get_output(0))
            layers[precision if precision in EXPORTED else "integer"] += 1
        if kind.startswith("PLUGIN"):
            plugin_counts[operators.get(layer.name, layer.name)] += 1
    expected = Counter(operators.values()) if plugins else Counter()
    if plugin_counts != expected:
        raise VerificationError(
            f"TensorRT's network should have {_listed(expected)} as plugins, but has {_listed(plugin_counts)}. "
            f'Build with `lowering="gather"`, and report this.'
        )
    by_type = {name: layers[name] for name in (*reversed(PRECISIONS), "integer", "cast") if layers[name]}
    return ParsedNetwork(network, builder, by_type, dict(kinds), dict(plugin_counts), (parser, log))


def _precision(tensor: Any) -> str:
    return _NAMES.get(tensor.dtype.name, "integer")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def without_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes ask for no plugin, so that TensorRT takes their bodies even where plugins are registered."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.domain == DOMAIN_NAME:
            attributes = [attribute for attribute in node.attribute if attribute.name not in PLUGIN_ATTRIBUTES]
            del node.attribute[:]
            node.attribute.extend(attributes)
    return copy
