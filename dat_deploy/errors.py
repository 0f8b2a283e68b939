"""The exception tree. Every expected failure is one of these; anything else is a bug and keeps its traceback.

    DatDeployError                exit code 1: the user can mend it
    ├── CheckpointError           not a checkpoint, truncated, unsafe, or of another variant
    ├── VariantError              no such variant
    ├── ShapeError                an image or batch size that does not fit
    ├── ImageError                an image that cannot be decoded, or is too large to decode
    ├── ExportError               the ONNX file cannot be made as asked
    ├── EngineBuildError          an engine cannot be built or opened as asked
    ├── EngineRunError            an opened engine failed on its input
    ├── PassportError             an engine that is not what its passport says
    ├── OutputError               a file cannot be written
    ├── RecordError               benchmark records that cannot be compared
    ├── ServingError              a server or a repository that cannot be made as asked
    ├── VerificationError         exit code 2: the answer is wrong
    └── UnsupportedError          exit code 3: this environment cannot do it

A message says which object, what it got, what it accepts, and the next step, in one line.
"""

__all__ = [
    "CheckpointError",
    "DatDeployError",
    "EngineBuildError",
    "EngineRunError",
    "ExportError",
    "ImageError",
    "OutputError",
    "PassportError",
    "RecordError",
    "ServingError",
    "ShapeError",
    "UnsupportedError",
    "VariantError",
    "VerificationError",
]


class DatDeployError(Exception):
    """An expected failure; its message is one sentence that the user can act on."""

    exit_code = 1


class CheckpointError(DatDeployError):
    """A checkpoint file that cannot be used."""


class VariantError(DatDeployError):
    """A network that there is not: an unknown name, a configuration that is refused, stages that it lacks."""


class ShapeError(DatDeployError):
    """An image, batch or tensor size that does not fit."""


class ImageError(DatDeployError):
    """An image that cannot be read."""


class ExportError(DatDeployError):
    """An ONNX file that cannot be made as asked."""


class EngineBuildError(DatDeployError):
    """An engine that cannot be built as asked."""


class EngineRunError(DatDeployError):
    """An opened engine that fails on its input."""


class PassportError(DatDeployError):
    """An engine that is not what its passport says, or a passport that cannot be trusted."""


class OutputError(DatDeployError):
    """A file that cannot be written."""


class RecordError(DatDeployError):
    """Benchmark records whose settings differ, so that a ratio of them would mean nothing."""


class ServingError(DatDeployError):
    """A server, or a server's repository, that cannot be made as asked; a server that does not answer as it should."""


class VerificationError(DatDeployError):
    """A comparison that failed: two sides that should agree do not."""

    exit_code = 2


class UnsupportedError(DatDeployError):
    """Something that this environment lacks: a package, a device, a driver."""

    exit_code = 3
