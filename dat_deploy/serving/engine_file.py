"""A file that is to be served: what it says of itself, and whether it may be."""

from dataclasses import dataclass
from pathlib import Path

from dat_deploy.engine.passport import Passport, Profile, open_engine, passport_path
from dat_deploy.errors import VerificationError
from dat_deploy.metadata import FileMetadata, load_onnx
from dat_deploy.preprocess import golden_sha256

__all__ = ["EngineFile", "read_engine_file"]


@dataclass(frozen=True)
class EngineFile:
    """An exported file, which has no passport, or an engine.

    Attributes:
        outputs: names of what it gives, in order.
    """

    path: Path
    metadata: FileMetadata
    outputs: tuple[str, ...]
    passport: Passport | None

    @property
    def profiles(self) -> tuple[Profile, ...]:
        return () if self.passport is None else self.passport.profiles

    @property
    def most_images(self) -> int | None:
        """In one call of it; None if there is no limit."""
        return max((profile.most for profile in self.profiles), default=self.metadata.batch)

    @property
    def note(self) -> str | None:
        """What a user must know before it is served."""
        if self.passport is not None and self.passport.verdict is None:
            return f"{self.path.name} was never validated; run: dat-deploy validate --engine {self.path}"
        return None


def read_engine_file(path: Path) -> EngineFile:
    """Nothing is deserialised.

    Raises:
        DatDeployError: if there is no such file, or it is not what its passport says.
        VerificationError: if its last validation failed, or images are preprocessed otherwise here than at its export.
    """
    if path.suffix == ".onnx":
        model = load_onnx(path)
        metadata = FileMetadata.from_properties({entry.key: entry.value for entry in model.metadata_props}, path)
        found = EngineFile(path, metadata, tuple(value.name for value in model.graph.output), None)
    else:
        passport, _ = open_engine(path)
        found = EngineFile(path, passport.metadata, passport.outputs, passport)
        verdict = passport.verdict
        if verdict is not None and not verdict.passed:
            raise VerificationError(
                f"{path} failed its validation of {verdict.date}, as {passport_path(path).name} says: "
                f"{verdict.sentence} Build it again with: {passport.rebuild_command}"
            )
    recorded = found.metadata.golden_sha256
    if recorded and recorded != golden_sha256(found.metadata.preprocessing):
        raise VerificationError(
            f"{path} was exported where the golden picture came out otherwise than it does here, so its images would "
            f"not be those it was validated on. Compare them with: dat-deploy preprocess --check --engine {path}"
        )
    return found
