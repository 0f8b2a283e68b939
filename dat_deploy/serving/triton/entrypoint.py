"""What the server image runs: an engine for the GPU at hand, validated, and then tritonserver in place of this process.

    python -m dat_deploy.serving.triton.entrypoint [OPTION OF TRITONSERVER ...]

Settings are environment variables, see `ContainerSettings`. Exit codes are those of `dat-deploy`: 2 says that the
answer is wrong, 3 that this machine cannot do it; tritonserver has not started then.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from dat_deploy.engine.build import build
from dat_deploy.engine.passport import Passport, Profile, open_engine, read_passport, sha256
from dat_deploy.engine.tensorrt.library import import_tensorrt, version
from dat_deploy.environment import nvidia_smi, tool_version
from dat_deploy.errors import CheckpointError, DatDeployError, ExportError, OutputError, UnsupportedError
from dat_deploy.metadata import FileMetadata, read_metadata
from dat_deploy.progress import Progress
from dat_deploy.serving.engine_file import check_model_name
from dat_deploy.serving.triton.repository import package
from dat_deploy.serving.triton.tritonserver import HARDENED, tritonserver_command
from dat_deploy.validate import ValidationReport, validate

__all__ = ["ContainerSettings", "Requirements", "Steps", "check_arguments", "main", "prepare"]

# Each of these loads something else than what was validated, or takes the above back.
REFUSED = (
    *HARDENED,
    *("model-repository", "model-store", "load-model", "repository-poll-secs", "strict-model-config"),
    *("allow-client-shm", "model-config-name"),
    *("backend-directory", "backend-config", "repoagent-directory", "cache-directory"),
)
DEVICES = ("gpu", "cpu")
VALIDATE = ("auto", "skip")
_NO_WEIGHTS_OF_THE_USER = ("seeded random weights", "the weights that ship with dat-deploy")


@dataclass(frozen=True)
class ContainerSettings:
    """What the user set, each by an environment variable.

    Attributes:
        model: DAT_DEPLOY_MODEL, the exported ONNX file.
        checkpoint: DAT_DEPLOY_CHECKPOINT, what it was exported from; needed to validate weights of the user's.
        name: DAT_DEPLOY_NAME, under which the model is served; None for the variant's.
        profiles: DAT_DEPLOY_BATCH, as `--batch` of `dat-deploy build`.
        device: DAT_DEPLOY_DEVICE, `gpu`, or `cpu` to serve the ONNX file itself on ONNX Runtime.
        validate: DAT_DEPLOY_VALIDATE is `auto`: whatever has no verdict is validated. With `skip` nothing is.
        cache: DAT_DEPLOY_CACHE, a folder that outlives the container, for engines and their passports.
        repository: DAT_DEPLOY_REPOSITORY, a folder of this container alone, written anew at each start.
        arguments: further options of tritonserver.
    """

    model: Path = Path("/model/model.onnx")
    checkpoint: Path | None = None
    name: str | None = None
    profiles: tuple[Profile, ...] = (Profile(1, 8, 32),)
    device: str = "gpu"
    validate: bool = True
    cache: Path = Path("/var/cache/dat-deploy")
    repository: Path = Path("/var/lib/dat-deploy/models")
    arguments: tuple[str, ...] = ()

    @classmethod
    def read(cls, environment: Mapping[str, str], arguments: Sequence[str]) -> "ContainerSettings":
        """Those of this environment; an empty variable is one that is not set.

        Raises:
            DatDeployError: if one has a value that it does not take, a file is missing, or an option is refused.
        """
        variables = {name: value for name, value in environment.items() if name.startswith("DAT_DEPLOY_") and value}

        def choice(name: str, values: tuple[str, ...]) -> str:
            value = variables.get(name, values[0])
            if value not in values:
                raise DatDeployError(f"{name} got '{value}'; it takes {' or '.join(values)}.")
            return value

        checkpoint, name = variables.get("DAT_DEPLOY_CHECKPOINT"), variables.get("DAT_DEPLOY_NAME")
        if name is not None:
            check_model_name(name, "DAT_DEPLOY_NAME")
        settings = cls(
            model=Path(variables.get("DAT_DEPLOY_MODEL", cls.model)),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            name=name,
            profiles=tuple(dict.fromkeys(map(Profile.parse, variables.get("DAT_DEPLOY_BATCH", "1-8-32").split(",")))),
            device=choice("DAT_DEPLOY_DEVICE", DEVICES),
            validate=choice("DAT_DEPLOY_VALIDATE", VALIDATE) == "auto",
            cache=Path(variables.get("DAT_DEPLOY_CACHE", cls.cache)),
            repository=Path(variables.get("DAT_DEPLOY_REPOSITORY", cls.repository)),
            arguments=tuple(arguments[1:] if arguments[:1] == ["--"] else arguments),
        )
        if not settings.model.is_file():
            raise ExportError(
                f"DAT_DEPLOY_MODEL: there is no file {settings.model}; mount the folder of an exported file, such as "
                f"--volume ./exported:/model:ro, and name the file if it is not /model/model.onnx."
            )
        if settings.checkpoint is not None and not settings.checkpoint.is_file():
            raise CheckpointError(
                f"DAT_DEPLOY_CHECKPOINT: there is no file {settings.checkpoint}; mount its folder, too."
            )
        check_arguments(settings.arguments)
        return settings


@dataclass(frozen=True)
class Requirements:
    """What a cached engine must be to be served here.

    Attributes:
        tensorrt_version: of the bindings, `11.3.0.99`; architecture: 90 for sm_90.
        source_sha256: of the ONNX file; tool_version: of dat-deploy, whose kernels are in the engine.
    """

    tensorrt_version: str
    architecture: int
    source_sha256: str
    profiles: tuple[Profile, ...]
    tool_version: str

    def differences(self, passport: Passport) -> list[str]:
        """Why an engine with this passport has to be built anew; empty if it can be served."""
        facts = (
            ("backend", passport.backend, "tensorrt"),
            ("TensorRT", passport.backend_version, self.tensorrt_version),
            ("GPU", " ".join(passport.architectures), f"sm_{self.architecture}"),
            ("SHA-256 of the ONNX file", (passport.source_sha256 or "none")[:12], self.source_sha256[:12]),
            ("batch", ",".join(map(str, passport.profiles)), ",".join(map(str, self.profiles))),
            ("dat-deploy", passport.versions.get("dat-deploy", "unknown"), self.tool_version),
        )
        reasons = [f"{what} is {actual}, wanted {required}" for what, actual, required in facts if actual != required]
        if passport.plugin_form == "IPluginV3":
            reasons.append("its plugins need Python, which tritonserver has not")
        if passport.verdict is not None and not passport.verdict.passed and _usual(passport):
            reasons.append(f"its validation failed: {passport.verdict.sentence}")
        return reasons


def _usual(passport: Passport) -> bool:
    """Whether the engine was held to the usual limits, not to some that a user gave by hand."""
    verdict = passport.verdict
    return verdict is not None and verdict.tolerance is None and not verdict.gates


def reasons_to_build(engine: Path, requirements: Requirements) -> list[str]:
    """Why the cached engine cannot be served; empty if it can. Nothing is deserialised."""
    if not engine.is_file():
        return ["there is none yet"]
    try:
        passport, _ = open_engine(engine)
    except DatDeployError as error:
        return [str(error)]
    return requirements.differences(passport)


def architecture_of(capabilities: Sequence[str]) -> int:
    """The compute capability, times ten, that all visible GPUs have.

    Args:
        capabilities: what nvidia-smi says of each, such as `9.0`.

    Raises:
        UnsupportedError: if there is no GPU, or several of different kinds: one engine could not run on all of them.
    """
    if not capabilities:
        raise UnsupportedError(
            "no NVIDIA GPU is visible in this container (nvidia-smi lists none); start it with --gpus all, or with "
            "--env DAT_DEPLOY_DEVICE=cpu to serve the ONNX file on ONNX Runtime."
        )
    kinds = sorted({capability.strip() for capability in capabilities})
    if len(kinds) > 1:
        raise UnsupportedError(
            f"the GPUs in this container have compute capabilities {', '.join(kinds)}, and an engine is for one; give "
            f"it GPUs of one kind, such as --gpus device=0."
        )
    try:
        return int(kinds[0].replace(".", ""))
    except ValueError:
        raise UnsupportedError(
            f"nvidia-smi gives '{kinds[0]}' for the compute capability, not a number such as 9.0; update the driver."
        ) from None


def check_one_tensorrt(trt: ModuleType, library: tuple[int, ...]) -> None:
    """Raises UnsupportedError if the bindings are for another TensorRT than the library that will serve the engine."""
    if version(trt) != library:
        raise UnsupportedError(
            f"TensorRT's Python bindings are of {trt.__version__}, and the library that tritonserver loads is "
            f"{'.'.join(map(str, library))}; build the image with --build-arg TENSORRT_VERSION of its base image."
        )


def library_version(trt: ModuleType) -> tuple[int, ...]:
    """Of the libnvinfer that this image has, which the bindings and tritonserver share.

    Raises:
        UnsupportedError: if there is none under the name that goes with the bindings.
    """
    name = f"libnvinfer.so.{version(trt)[0]}"
    try:
        number = int(ctypes.CDLL(name).getInferLibVersion())
    except (OSError, AttributeError) as error:
        raise UnsupportedError(f"{name} cannot be loaded ({error}); run this in the server image.") from error
    return number // 10000, number // 100 % 100, number % 100


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises DatDeployError if options of the user's would load something else, or take the hardening back."""
    for word in arguments:
        option = word[2:].split("=")[0] if word.startswith("--") else None
        # tritonserver also takes the beginning of an option's name for the option, and the last one counts
        name = next((name for name in REFUSED if option is not None and name.startswith(option)), None)
        if name is not None:
            raise DatDeployError(
                f"option '{word}' is not passed on to tritonserver: --{name} is set here, so that what is served is "
                f"what was validated; leave it out, or run tritonserver yourself with --entrypoint tritonserver."
            )


def log(event: str, level: str = "info", **fields: object) -> None:
    """One line: `dat-deploy level=info event=build engine=/var/cache/... because="there is none yet"`."""
    words = [f"{name}={_word(str(value))}" for name, value in {"level": level, "event": event, **fields}.items()]
    print("dat-deploy", *words, file=sys.stderr, flush=True)


def _word(text: str) -> str:
    bare = text and text.isprintable() and not any(character in text for character in ' "=\\')
    return text if bare else json.dumps(text, ensure_ascii=False)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among all containers on this volume, by a lock that ends with the process that holds it.

    Raises:
        OutputError: if the file cannot be written, or the volume has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; mount a volume there that user {os.getuid()} may write."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("wait", lock=path, because="another container builds or validates this engine")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(
                f"cannot lock {path}: {error.strerror}; mount a volume that has locks, such as a local one."
            ) from error
        yield


def _package(engine: Path, output: Path, *, name: str, batches: Sequence[int], device: str) -> object:
    return package([engine], output, name=name, batches=batches, device=device, force=True)


def _become(command: list[str]) -> NoReturn:
    os.execvp(command[0], command)  # noqa: S606  # no shell; signals to this process reach tritonserver


@dataclass(frozen=True)
class Steps:
    """What needs a GPU, tritonserver or minutes; tests put others in their place."""

    find_program: Callable[[str], str | None] = shutil.which
    capabilities: Callable[[], list[str]] = lambda: nvidia_smi("compute_cap")
    tensorrt: Callable[[], ModuleType] = lambda: import_tensorrt("tensorrt")
    library: Callable[[ModuleType], tuple[int, ...]] = library_version
    build: Callable[..., object] = build
    validate: Callable[..., ValidationReport] = validate
    package: Callable[..., object] = field(default=_package)


def prepare(settings: ContainerSettings, steps: Steps) -> list[str]:
    """Write the model repository, of something that was validated.

    Returns:
        The words to become tritonserver with.

    Raises:
        UnsupportedError: if this container has no tritonserver, or no GPU that it could use.
        VerificationError: if the engine, or on the CPU the file, does not answer as PyTorch does.
        DatDeployError: whatever else building, validating and packaging raise.
    """
    command = [*tritonserver_command(settings.repository), *settings.arguments]
    if steps.find_program(command[0]) is None:
        raise UnsupportedError(
            "tritonserver is not on the PATH; run this in the server image: docker build --target server ."
        )
    metadata = read_metadata(settings.model)
    if settings.device == "cpu":
        _validate(f"onnxruntime:{settings.model}", None, metadata, settings, steps)
        _write_repository(settings.model, metadata, settings, steps)
        return command
    architecture = architecture_of(steps.capabilities())
    trt = steps.tensorrt()
    check_one_tensorrt(trt, steps.library(trt))
    source_sha256 = sha256(settings.model.read_bytes())
    requirements = Requirements(trt.__version__, architecture, source_sha256, settings.profiles, tool_version())
    name = settings.name or metadata.variant
    engine = settings.cache / f"{name}-{source_sha256[:12]}-sm_{architecture}.engine"
    with locked(engine.with_name(engine.name + ".lock")):
        reasons = reasons_to_build(engine, requirements)
        if reasons:
            if settings.validate:
                _check_checkpoint(metadata, settings)
            log("build", engine=engine, because="; ".join(reasons))
            batches = [str(profile) for profile in settings.profiles]
            steps.build(settings.model, engine, batches=batches, force=True, progress=_progress("build"))
        else:
            log("reuse", engine=engine)
        _validate(f"tensorrt:{engine}", read_passport(engine), metadata, settings, steps)
        _write_repository(engine, metadata, settings, steps)
    return command


def _check_checkpoint(metadata: FileMetadata, settings: ContainerSettings) -> None:
    """Raises CheckpointError, before minutes of building, if validation lacks the weights to compare with."""
    if settings.checkpoint is None and not metadata.weights_source.startswith(_NO_WEIGHTS_OF_THE_USER):
        raise CheckpointError(
            f"{settings.model} has the weights of '{metadata.weights_source}', and validation compares with PyTorch; "
            f"mount that file and name it in DAT_DEPLOY_CHECKPOINT, or serve unvalidated with DAT_DEPLOY_VALIDATE=skip."
        )


def _validate(
    engine: str, passport: Passport | None, metadata: FileMetadata, settings: ContainerSettings, steps: Steps
) -> None:
    """Unless the passport says that it was done, or the user that it is not to be.

    Raises:
        VerificationError: if it fails.
    """
    if passport is not None and passport.verdict is not None and passport.verdict.passed and _usual(passport):
        log("validated", engine=engine, date=passport.verdict.date, verdict=passport.verdict.sentence)
        return
    if not settings.validate:
        log("not-validated", level="warning", engine=engine, because="DAT_DEPLOY_VALIDATE=skip")
        return
    _check_checkpoint(metadata, settings)
    log("validate", engine=engine)
    report = steps.validate(engine, checkpoint=settings.checkpoint, progress=_progress("validate"))
    for note in report.notes:
        log("note", level="warning", text=note)
    report.raise_if_failed()
    log("validated", engine=engine, date=report.date, verdict=report.verdict)


def _write_repository(engine: Path, metadata: FileMetadata, settings: ContainerSettings, steps: Steps) -> None:
    name = settings.name or metadata.variant
    sizes = {size for profile in settings.profiles for size in (profile.best, profile.most)}
    batches = sorted(sizes) if metadata.batch is None else [metadata.batch]
    others = {path.name for path in settings.repository.glob("*")} - {name}
    if others:
        raise OutputError(
            f"{settings.repository} holds {', '.join(sorted(others))}, which were not validated here; give "
            f"DAT_DEPLOY_REPOSITORY a folder of its own."
        )
    log("package", model=name, repository=settings.repository)
    steps.package(engine, settings.repository, name=name, batches=batches, device=settings.device)


def _progress(event: str) -> Progress:
    return lambda what: log(event, step=what)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """As the first process of a container this one would ignore the signal otherwise."""
    log("stop", signal=signal.Signals(number).name)
    raise SystemExit(128 + number)


def main(
    arguments: Sequence[str] | None = None,
    steps: Steps | None = None,
    become: Callable[[list[str]], int] = _become,
) -> int:
    """The exit code, where tritonserver could not be started."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__, ContainerSettings.__doc__, sep="\n")
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        command = prepare(ContainerSettings.read(os.environ, arguments), steps or Steps())
    except DatDeployError as error:
        log("refused", level="error", message=error, exit_code=error.exit_code)
        return error.exit_code
    log("serve", command=" ".join(command))
    return become(command)


if __name__ == "__main__":
    sys.exit(main())
