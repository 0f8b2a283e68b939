"""Networks as people have them: weights that are not well scaled, in which a wrong engine hides and a sound one errs.

Each changes the weights of DAT++ in place, by the names of the official checkpoints, and leaves a network that answers
different images differently.
"""

from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SCALED", "SCALED_IN_FP32", "Weights", "write_scaled"]

Weights = dict[str, "Tensor"]


def _of(weights: Weights, *ends: str) -> Iterator[str]:
    return (name for name in weights if name.endswith(ends))


def _as_trained(_: Weights) -> None:
    pass


def _large_logits(weights: Weights) -> None:
    for name in _of(weights, "cls_head.weight", "cls_head.bias"):
        weights[name] *= 300


def _small_logits(weights: Weights) -> None:
    for name in _of(weights, "cls_head.weight", "cls_head.bias"):
        weights[name] *= 1e-5


def _classes_off(weights: Weights) -> None:
    weights["cls_head.bias"][1::2] -= 1000


def _classes_far_off(weights: Weights) -> None:
    weights["cls_head.bias"][1::2] -= 1e4


def _class_biases(weights: Weights) -> None:
    bias = weights["cls_head.bias"]
    bias += 40 * bias.new_tensor(range(len(bias))) / max(1, len(bias) - 1) - 20


def _residual_mean(weights: Weights) -> None:
    weights["patch_proj.4.norm.bias"] += 1000


def _offsets_at_the_clamp(weights: Weights) -> None:
    for name in _of(weights, "conv_offset.3.weight"):
        weights[name] *= 1000


def _large_tables(weights: Weights) -> None:
    for name in _of(weights, "rpb", "rpe_table", "relative_position_bias_table"):
        weights[name] *= 50 / weights[name].abs().max()


def _large_activation(weights: Weights) -> None:
    """One hidden channel at 4.2e4, which counts for little."""
    mlp = max(name.rpartition(".linear1")[0] for name in _of(weights, "linear1.0.bias"))
    weights[f"{mlp}.linear1.0.bias"][5] = 2.2e4
    weights[f"{mlp}.dwc.weight"][5] = 0
    weights[f"{mlp}.dwc.bias"][5] = 2e4
    weights[f"{mlp}.linear2.0.weight"][:, 5] *= 1e-3


def _large_queries_and_keys(weights: Weights) -> None:
    for name in _of(weights, "proj_q.weight", "proj_q.bias", "proj_k.weight", "proj_k.bias"):
        weights[name] *= 100
    for name in _of(weights, "qkv.weight", "qkv.bias"):
        weights[name][: len(weights[name]) * 2 // 3] *= 100


SCALED: dict[str, Callable[[Weights], None]] = {
    "as trained": _as_trained,
    "logits × 300": _large_logits,
    "logits × 1e-5": _small_logits,
    "classes at -1000": _classes_off,
    "classes at -10000": _classes_far_off,
    "class biases -20 to 20": _class_biases,
    "residual mean of 1000": _residual_mean,
    "offsets at the clamp": _offsets_at_the_clamp,
    "tables of ±50": _large_tables,
    "an activation of 4.2e4": _large_activation,
    "queries and keys × 100": _large_queries_and_keys,
}

# A softmax of one: a near tie, which another order of sums decides, moves an answer of a sound engine in float32, too.
SCALED_IN_FP32 = tuple(name for name in SCALED if name not in ("as trained", "queries and keys × 100"))


def write_scaled(name: str, path: Path) -> None:
    """Write demo's weights, changed so, as a checkpoint."""
    from safetensors.torch import load_file, save_file

    weights = load_file(str(resources.files("dat_deploy") / "data/demo.safetensors"))
    SCALED[name](weights)
    save_file({key: weight.contiguous() for key, weight in weights.items()}, path)
