"""Vision transformers with deformable attention, from checkpoint to inference.

Importing this loads neither torch nor a runtime. `dat_deploy.api` has a function for each command of the command line.
"""

from dat_deploy.errors import (
    CheckpointError,
    DatDeployError,
    EngineBuildError,
    EngineRunError,
    ExportError,
    ImageError,
    OutputError,
    PassportError,
    RecordError,
    ShapeError,
    UnsupportedError,
    VariantError,
    VerificationError,
)
from dat_deploy.networks.dat.variants import VARIANTS, Variant, get_variant

__all__ = [
    "VARIANTS",
    "CheckpointError",
    "DatDeployError",
    "EngineBuildError",
    "EngineRunError",
    "ExportError",
    "ImageError",
    "OutputError",
    "PassportError",
    "RecordError",
    "ShapeError",
    "UnsupportedError",
    "Variant",
    "VariantError",
    "VerificationError",
    "get_variant",
]
