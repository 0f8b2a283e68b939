"""A row of the table of runtimes: what it opens, and why it cannot run here."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from dat_deploy.engine.passport import check_backend, open_engine, read_passport
from dat_deploy.errors import UnsupportedError
from dat_deploy.metadata import FileMetadata, load_onnx, read_metadata
from dat_deploy.networks.family import family_of, find_network
from dat_deploy.runners.base import EngineOutline, Runner, no_plugin_here

__all__ = ["Runtime"]


@dataclass(frozen=True)
class Runtime:
    """A row of the table of runtimes.

    Attributes:
        target: what stands behind the colon of `RUNTIME:TARGET`: `VARIANT`, a network in PyTorch; `FILE.onnx`, an
            exported file; `FILE` of another ending, which has to be opened to know anything of it.
        package: that it needs; extra: of dat-deploy that installs it, or empty.
        meaning: in a few words, for people.
        open: (path, name, *, image_size, threads) -> Runner of a file, where `name` is the engine as the user named it;
            (variant, name, *, checkpoint, image_size, features, threads, sampled_points) -> Runner of a VARIANT.
        own_reasons: why it cannot run here although its package is installed; empty if it can.
        opens: the ending of files that it opens where no runtime is named, such as `.onnx`.
        has_passport: its files are engines of `build`, for the backend `name`. What is wrong with one is wrong
            everywhere and told first; `open` itself says why it cannot run here.
        check_installed: raises UnsupportedError in words of its own where the package is missing.
        any_size: of VARIANT: takes images of any size that the network takes.
        device: `cpu` or `cuda`; of a passport's engine, the passport knows.
    """

    name: str
    target: str
    package: str
    extra: str
    meaning: str
    open: Callable[..., Runner]
    own_reasons: Callable[[], list[str]] = list
    opens: str = ""
    has_passport: bool = False
    check_installed: Callable[[], None] | None = None
    any_size: bool = True
    device: str = "cpu"

    @property
    def takes_variant(self) -> bool:
        """Whether its target is a network in PyTorch, which takes a checkpoint and features, and no file."""
        return self.target == "VARIANT"

    @property
    def takes_exported(self) -> bool:
        """Whether its target is an ONNX file of `export`."""
        return self.target == "FILE.onnx"

    def reasons(self) -> list[str]:
        """Why it cannot run here; empty if it can."""
        return self._missing() or self.own_reasons()

    def _missing(self) -> list[str]:
        try:
            is_installed = importlib.util.find_spec(self.package) is not None
        except (ImportError, ValueError):  # of a package in a package that is missing
            is_installed = False
        if not is_installed:
            source = f"dat-deploy[{self.extra}]" if self.extra else self.package
            return [f"package {self.package} is not installed: pip install '{source}'"]
        return []

    def require(self, reasons: Sequence[str]) -> None:
        """Raises UnsupportedError for `reasons`, if there are any."""
        if reasons:
            raise UnsupportedError(f"{self.name} cannot run here: {'; '.join(reasons)}")

    def require_installed(self) -> None:
        """Raises UnsupportedError if its package is not installed; nothing is loaded."""
        if self.check_installed is not None:
            self.check_installed()
        self.require(self._missing())

    def metadata(self, target: str) -> FileMetadata | None:
        """What the target's file says of itself, read alone; None if it is no file of this package."""
        if self.has_passport:
            return read_passport(Path(target)).metadata
        return read_metadata(Path(target)) if self.takes_exported else None

    def outline(
        self, target: str, name: str, *, image_size: tuple[int, int] | None, features: Sequence[int] | None
    ) -> EngineOutline:
        """What can be known before the runtime is loaded; refuses what is wrong with the target.

        Raises:
            DatDeployError: as `open`, but for what the runtime itself says.
        """
        path = Path(target)
        if self.takes_variant:
            network = find_network(target, image_size=image_size, features=features)
            return EngineOutline(
                name=name,
                network=network,
                outputs=None,
                preprocessing=network.preprocessing,
                dynamic_image_size=network.takes_any_size and self.any_size,
                family=family_of(network).name,
            )
        if self.has_passport:
            passport, _ = open_engine(path)
            check_backend(path, passport, self.name)
            metadata, outputs, profiles = passport.metadata, passport.outputs, passport.profiles
        elif self.takes_exported:
            model = load_onnx(path)
            metadata = FileMetadata.from_properties({entry.key: entry.value for entry in model.metadata_props}, path)
            if metadata.lowering == "plugin":
                raise no_plugin_here(name)
            outputs, profiles = tuple(value.name for value in model.graph.output), ()
        else:
            self.require(self.reasons())
            with self.open(path, name, image_size=image_size, threads=None) as runner:
                about = runner.description
            return EngineOutline(**{field.name: getattr(about, field.name) for field in fields(EngineOutline)})
        return EngineOutline(
            name=name,
            network=metadata.network,
            outputs=outputs,
            preprocessing=metadata.preprocessing,
            batch=metadata.batch,
            dynamic_image_size=metadata.dynamic_image_size,
            profiles=profiles,
            path=path,
            file_kind="engine" if self.has_passport else "exported",
            file_precision=metadata.precision,
            family=metadata.family,
        )
