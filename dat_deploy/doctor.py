"""What a bug report needs: versions, hardware, and what can run here."""

from dataclasses import dataclass

from dat_deploy.engine.tensorrt.lowering_choice import LoweringVerdict, stored_verdicts
from dat_deploy.environment import Hardware, commit, hardware, installed_version, versions
from dat_deploy.runners import runtimes

__all__ = ["Diagnosis", "doctor"]

PACKAGES = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "pillow",
    "triton",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found.

    Attributes:
        packages: by name, their versions; None for what is not installed.
        runtimes: by name, why they cannot run; nothing if they can.
        lowerings: what `build` with `lowering="auto"` found, by TensorRT, GPU architecture and driver, then by network.
    """

    hardware: Hardware
    versions: dict[str, str]
    packages: dict[str, str | None]
    runtimes: dict[str, list[str]]
    lowerings: dict[str, dict[str, tuple[LoweringVerdict, ...]]]
    commit: str | None


def doctor() -> Diagnosis:
    """Look at this environment; nothing is changed."""
    packages = {name: installed_version(name) for name in PACKAGES}
    reasons = {name: runtime.reasons() for name, runtime in runtimes().items()}
    return Diagnosis(hardware(), versions(), packages, reasons, stored_verdicts(), commit())
