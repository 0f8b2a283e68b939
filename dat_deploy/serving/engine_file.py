"""A file that is to be served: what it says of itself, whether it may be, and under which name."""

import re
from dataclasses import dataclass
from pathlib import Path

from dat_deploy.engine.passport import Passport, Profile, open_engine
from dat_deploy.errors import ServingError, VerificationError
from dat_deploy.images.preprocess import golden_sha256
from dat_deploy.metadata import FileMetadata, read_onnx

__all__ = ["EngineFile", "check_model_name", "read_engine_file"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True)
class EngineFile:
    """An exported file, which has no passport, or an engine.

    Attributes:
        content: its bytes, which are what its passport says; outputs: names of what it gives, in order.
    """

    path: Path
    content: bytes
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
            return f"{self.path} was never validated: `validate(engine={str(self.path)!r})`"
        return None


def read_engine_file(path: Path) -> EngineFile:
    """Nothing is deserialised.

    Raises:
        DatDeployError: if there is no such file, or it is not what its passport says.
        VerificationError: if its last validation failed, or images are preprocessed otherwise here than at its export.
    """
    if path.suffix == ".onnx":
        content, model = read_onnx(path)
        metadata = FileMetadata.from_properties({entry.key: entry.value for entry in model.metadata_props}, path)
        engine = EngineFile(path, content, metadata, tuple(value.name for value in model.graph.output), None)
    else:
        passport, content = open_engine(path)
        engine = EngineFile(path, content, passport.metadata, passport.outputs, passport)
        verdict = passport.verdict
        if verdict is not None and not verdict.passed:
            raise VerificationError(
                f"{path} failed its last validation, of {verdict.date}: {verdict.sentence} Look into it with: "
                f"`validate(engine={str(path)!r})`"
            )
    golden = engine.metadata.golden_sha256
    if golden and golden != golden_sha256(engine.metadata.preprocessing):
        raise VerificationError(
            f"{path}: the golden picture comes out otherwise here than at export, so images would be preprocessed "
            f"otherwise. See what differs with: `check_preprocessing(engine={str(path)!r})`"
        )
    return engine


def check_model_name(name: str, setting: str = "`name`") -> None:
    """Raises ServingError if `name` cannot be a model's in addresses; `setting` is what gives it."""
    if not _NAME.fullmatch(name):
        raise ServingError(
            f"'{name}' cannot be a model's name; it takes up to 63 letters, digits, '_', '.' and '-', and begins with "
            f"a letter or digit, for URLs have it. Give another with {setting}."
        )
