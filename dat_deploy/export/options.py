"""What an export can be told, by name, and its refusals; loads neither torch nor a graph library."""

from collections.abc import Sequence

import onnx

from dat_deploy.errors import ExportError

__all__ = [
    "ELEMENT_TYPES",
    "LOWERINGS",
    "OPSET_VERSIONS",
    "PRECISIONS",
    "already_inlined",
    "check_lowering",
    "check_opset",
    "check_precision",
]

LOWERINGS = ("function", "plugin", "gather", "gridsample", "hat")
OPSET_VERSIONS = (17, 18, 19)
ELEMENT_TYPES: dict[str, int] = {
    "fp32": onnx.TensorProto.FLOAT,
    "fp16": onnx.TensorProto.FLOAT16,
    "bf16": onnx.TensorProto.BFLOAT16,
}
PRECISIONS = tuple(ELEMENT_TYPES)


def check_opset(opset_version: int) -> None:
    """Raises ExportError unless `opset_version` is one of OPSET_VERSIONS."""
    if opset_version not in OPSET_VERSIONS:
        raise ExportError(
            f"opset {opset_version} is not supported; it takes 17, 18 or 19. From opset 20 on, TensorRT up to 11.1 "
            f"reads GridSample's 'linear' as nearest (NVIDIA/TensorRT#4646). Use --opset 18."
        )


def check_lowering(lowering: str) -> None:
    """Raises ExportError unless `lowering` is one of LOWERINGS."""
    if lowering not in LOWERINGS:
        raise ExportError(f"no lowering '{lowering}'. Lowerings: {', '.join(LOWERINGS)}.")


def check_precision(precision: str, fp32: Sequence[str] = (), no_fp32: Sequence[str] = ()) -> None:
    """Raises ExportError unless there is such a precision, and it has float32 islands to add to or take from."""
    if precision == "int8":
        raise ExportError(
            "--precision int8 needs images to measure ranges on. Export in fp32, then: "
            "dat-deploy quantize FILE.onnx --data FOLDER"
        )
    if precision not in PRECISIONS:
        raise ExportError(f"no precision '{precision}'. Precisions: {', '.join(PRECISIONS)}.")
    if precision == "fp32" and (fp32 or no_fp32):
        raise ExportError(
            "--fp32 and --no-fp32 change what stays in float32 in a lower precision; with --precision fp32 everything "
            "does. Leave them out, or add --precision fp16."
        )


def already_inlined() -> ExportError:
    """Why a file without nodes of its operators cannot be lowered again."""
    return ExportError(
        "the operators of this file are already inlined, so its lowering cannot change. "
        "Export it again with --lowering, or start from a file of lowering 'function' or 'plugin'."
    )
