"""What `export` takes, by name, and its refusals; loads neither torch nor a graph library."""

from collections.abc import Sequence

from dat_deploy.errors import ExportError
from dat_deploy.precision import EXPORTED, FULL, PRECISIONS

__all__ = [
    "LOWERINGS",
    "OPSET_VERSIONS",
    "already_inlined",
    "check_lowering",
    "check_opset",
    "check_precision",
]

LOWERINGS = ("function", "plugin", "gather", "gridsample", "hat")
OPSET_VERSIONS = (17, 18, 19)


def check_opset(opset_version: int) -> None:
    """Raises ExportError unless `opset_version` is one of OPSET_VERSIONS."""
    if opset_version not in OPSET_VERSIONS:
        raise ExportError(
            f"opset {opset_version} is not supported; it takes 17, 18 or 19. From opset 20 on, TensorRT up to 11.1 "
            f"reads GridSample's 'linear' as nearest (NVIDIA/TensorRT#4646). Use `opset_version=18`."
        )


def check_lowering(lowering: str) -> None:
    """Raises ExportError unless `lowering` is one of LOWERINGS."""
    if lowering not in LOWERINGS:
        raise ExportError(f"no lowering '{lowering}'. Lowerings: {', '.join(LOWERINGS)}.")


def check_precision(precision: str, fp32: Sequence[str] = (), no_fp32: Sequence[str] = ()) -> None:
    """Raises ExportError unless there is such a precision, and it has float32 islands to add to or take from."""
    if precision in PRECISIONS and precision not in EXPORTED:
        raise ExportError(
            f'`precision="{precision}"` needs images to measure ranges on. Export in {FULL.name}, then: '
            f'`quantize("FILE.onnx", data="FOLDER")`'
        )
    if precision not in EXPORTED:
        raise ExportError(f"no precision '{precision}'. Precisions: {', '.join(EXPORTED)}.")
    if precision == FULL.name and (fp32 or no_fp32):
        raise ExportError(
            f'`fp32` and `no_fp32` change what stays in float32 in a lower precision; with `precision="{precision}"` '
            f'everything does. Leave them out, or add `precision="fp16"`.'
        )


def already_inlined() -> ExportError:
    """Why a file without nodes of its operators cannot be lowered again."""
    return ExportError(
        "the operators of this file are already inlined, so its lowering cannot change. "
        "Export it again with `lowering`, or start from a file of lowering 'function' or 'plugin'."
    )
