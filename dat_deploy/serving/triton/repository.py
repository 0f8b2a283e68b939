"""Engines and exported files -> a model repository of Triton Inference Server, whole or not at all."""

import contextlib
import dataclasses
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from dat_deploy.engine.passport import passport_path
from dat_deploy.errors import (
    DatDeployError,
    EngineBuildError,
    ExportError,
    OutputError,
    UnsupportedError,
)
from dat_deploy.files import atomic_output, check_output
from dat_deploy.metadata import FileMetadata
from dat_deploy.serving.engine_file import EngineFile, check_model_name, read_engine_file
from dat_deploy.serving.tensors import TensorSpec, input_spec, output_specs
from dat_deploy.serving.triton.model_config import (
    LABELS,
    PIXELS,
    Batches,
    ModelSettings,
    batches_of_engine,
    batches_of_file,
    config_text,
    ensemble_config,
    network_config,
    preprocess_config,
)
from dat_deploy.serving.triton.preprocessing_graph import preprocessing_graph
from dat_deploy.serving.triton.tritonserver import TRITON_TAG, docker_command, inference_service

__all__ = ["PackageReport", "PackagedModel", "package"]

_KEPT = ".gitkeep"  # a folder without files is lost in git and in object stores, and Triton needs the version's
_OURS = b'"dat_deploy.variant"'  # a parameter in every config.pbtxt that is written here


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A model of the repository.

    Attributes:
        max_batch: Triton forms batches up to this; 0 if the batch is fixed, and then it is in the shapes.
    """

    name: str
    max_batch: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclasses.dataclass(frozen=True)
class PackageReport:
    """What `package` wrote.

    Attributes:
        path: of the repository; files: of these models in it, relative to it, sorted.
        server: the words of the command that serves it.
        notes: what the user must know.
    """

    path: Path
    models: tuple[PackagedModel, ...]
    files: tuple[str, ...]
    server: tuple[str, ...]
    notes: tuple[str, ...]


def package(
    engines: Sequence[Path],
    output: Path = Path("model_repository"),
    *,
    name: str | None = None,
    batches: Sequence[int] = (8, 32),
    images: bool = False,
    device: str = "gpu",
    instances: int = 1,
    queue_delay_us: int = 500,
    queue_size: int = 256,
    queue_timeout_us: int = 1_000_000,
    kserve: Path | None = None,
    storage_uri: str | None = None,
    triton_tag: str = TRITON_TAG,
    force: bool = False,
) -> PackageReport:
    """Write the model repository of a network, or add the network to one that there is.

    Args:
        engines: an exported file, or TensorRT engines of one network for several architectures, with their passports.
        output: the repository; each model is a folder in it.
        name: of the model; by default the variant's.
        batches: to prefer, of an exported file with a dynamic batch; an engine's profiles say it of themselves.
        images: also write the models `NAME_preprocess` and `NAME_images`, which take RGB pictures as they are.
        device, instances, queue_delay_us, queue_size, queue_timeout_us: see `ModelSettings`.
        kserve: a file for the YAML of an InferenceService, with the `storage_uri` that the repository will be at.
        triton_tag: of tritonserver's image.
        force: replace models of these names that this function wrote.

    Raises:
        EngineBuildError: if Triton cannot serve what an engine is, or the engines are not of one network.
        ExportError, PassportError: if a file is missing, damaged or has no metadata.
        VerificationError: if an engine failed its validation, or pictures are preprocessed otherwise here.
        OutputError: if a model of that name is there already, or the disk refuses it.
        UnsupportedError: if tritonclient is not installed.
        DatDeployError: for a name or an option that is not accepted.
    """
    settings = ModelSettings(
        device=device,
        instances=instances,
        queue_delay_us=queue_delay_us,
        queue_size=queue_size,
        queue_timeout_us=queue_timeout_us,
    )
    if (kserve is None) != (storage_uri is None):
        raise DatDeployError(
            "`kserve` and `storage_uri` go together: the file to write, and where the repository will be, such as "
            "s3://bucket/model_repository."
        )
    if kserve is not None and storage_uri is not None:
        if "://" not in storage_uri:
            raise DatDeployError(
                f"`storage_uri` got '{storage_uri}'; it takes where KServe finds the repository, such as "
                f"s3://bucket/model_repository or pvc://volume/model_repository."
            )
        check_output(kserve, force=force)
    sources = _open_all(engines, settings)
    first = sources[0]
    model = first.metadata.variant if name is None else name
    check_model_name(model)
    names = [model, f"{model}_preprocess", f"{model}_images"][: 3 if images else 1]
    with _translated(output):
        _check_folders(output, names, force=force)
    accepted = _batches(first, batches)
    metadata = dataclasses.replace(first.metadata, batch=accepted.fixed)
    files = _network_files(model, sources, metadata, accepted, settings)
    models = [PackagedModel(model, accepted.most, (input_spec(metadata),), output_specs(metadata, first.outputs))]
    if images:
        files |= _image_files(names, first, metadata, accepted, settings)
        pixels = dataclasses.replace(PIXELS, shape=(accepted.fixed or -1, *PIXELS.shape[1:]))
        prepared = TensorSpec("image", "FP32", (accepted.fixed or -1, 3, *metadata.preprocessing.image_size))
        models.append(PackagedModel(names[1], accepted.most, (pixels,), (prepared,)))
        models.append(PackagedModel(names[2], accepted.most, (pixels,), models[0].outputs))
    _write(output, names, files)
    if kserve is not None and storage_uri is not None:
        service = inference_service(model, storage_uri, device=device, tag=triton_tag)
        with atomic_output(kserve, force=force) as temporary:
            temporary.write_text(service, encoding="utf-8")
    return PackageReport(
        output,
        tuple(models),
        tuple(sorted(files)),
        docker_command(output, device=device, tag=triton_tag),
        tuple(_notes(sources, accepted, output, names)),
    )


def _open_all(paths: Sequence[Path], settings: ModelSettings) -> list[EngineFile]:
    """The engines, of which each is fit to be served and all are of one network."""
    if not paths:
        raise EngineBuildError("no engine to package; give one, such as `engines=['tiny.onnx']`.")
    engines = [_open(Path(path), settings) for path in paths]
    first = engines[0]
    if len(engines) > 1 and any(engine.passport is None for engine in engines):
        raise EngineBuildError(
            f"{len(engines)} files were given, and an ONNX file runs on every GPU by itself; several make one model "
            f"only if they are TensorRT engines for different GPUs. Package each under its own `name`."
        )
    for engine in engines[1:]:
        differences = [what for what in _ALIKE if _ALIKE[what](engine) != _ALIKE[what](first)]
        if differences:
            raise EngineBuildError(
                f"{engine.path} and {first.path} differ in {', '.join(differences)}; the engines of one model "
                f"differ in their architecture alone. Build them from one file alike, or package each under its own "
                f"`name`."
            )
    _capabilities(engines)
    return engines


_ALIKE: Mapping[str, Callable[[EngineFile], object]] = {
    "network": lambda engine: engine.metadata.network,
    "weights": lambda engine: engine.metadata.weights_sha256,
    "preprocessing": lambda engine: engine.metadata.preprocessing,
    "class names": lambda engine: engine.metadata.class_names,
    "precision": lambda engine: engine.metadata.precision,
    "outputs": lambda engine: engine.outputs,
    "batch": lambda engine: (engine.metadata.batch, engine.passport and engine.passport.profiles),
    "TensorRT version": lambda engine: engine.passport and engine.passport.backend_version,
}


def _open(path: Path, settings: ModelSettings) -> EngineFile:
    """Raises EngineBuildError, ExportError or UnsupportedError for what Triton does not serve."""
    if path.suffix == ".pt2":
        raise EngineBuildError(
            f"{path} is an AOTInductor package, which Triton has no backend for. Serve it with: "
            f"`serve(engine={str(path)!r})`"
        )
    if path.suffix not in (".onnx", ".engine", ".plan") or (":" in str(path) and not path.exists()):
        raise EngineBuildError(f"`engines` got '{path}'; Triton serves FILE.onnx and TensorRT's FILE.engine.")
    engine = read_engine_file(path)
    passport, metadata = engine.passport, engine.metadata
    if passport is None:
        if metadata.lowering == "plugin":
            raise ExportError(
                f"{path} has lowering 'plugin': its operators have no body, which Triton's ONNX Runtime cannot run. "
                f"Change it with: `relower(source={str(path)!r}, lowering='function')`"
            )
        if metadata.precision == "bf16" and settings.device == "cpu":
            raise UnsupportedError(
                f"{path} computes in bf16, for which ONNX Runtime has no kernels on a CPU. Export it with "
                f"`precision='fp32'`, or serve it with `device='gpu'`."
            )
        return engine
    source = passport.source or "FILE.onnx"
    if passport.backend != "tensorrt":
        raise EngineBuildError(
            f"{path} is an engine of {passport.backend}, which Triton has no backend for. Build one of TensorRT: "
            f"`build({source!r}, backend='tensorrt')`"
        )
    if passport.plugin_form == "IPluginV3":
        raise EngineBuildError(
            f"{path} has its plugins in Python, which tritonserver does not load. Build it with: "
            f"`build({source!r}, plugin_form='ahead-of-time')`, or with `lowering='gather'`"
        )
    if settings.device == "cpu":
        raise EngineBuildError(f"{path} is a TensorRT engine and runs on GPUs alone. Package an ONNX file for a CPU.")
    return engine


def _capabilities(engines: Sequence[EngineFile]) -> dict[str, str]:
    """The file's name for each compute capability; empty for one engine alone.

    Raises:
        EngineBuildError: if two engines are for the same architecture, or one says none.
    """
    files: dict[str, str] = {}
    owners: dict[str, Path] = {}
    for engine in engines if len(engines) > 1 else ():
        assert engine.passport is not None
        if not engine.passport.architectures:
            raise EngineBuildError(f"{engine.path} names no architecture; package it alone, without other engines.")
        for architecture in engine.passport.architectures:
            if architecture in owners:
                raise EngineBuildError(
                    f"{engine.path} and {owners[architecture]} are both for {architecture}; give one engine for each "
                    f"architecture."
                )
            owners[architecture] = engine.path
            number = int(architecture.removeprefix("sm_"))
            files[f"{number // 10}.{number % 10}"] = _file_name(engine, alone=False)
    return files


def _file_name(engine: EngineFile, *, alone: bool) -> str:
    """As Triton looks for it: `model.onnx`, `model.plan`, or `model.sm_90.plan` where there are several."""
    if engine.passport is None:
        return "model.onnx"
    return "model.plan" if alone else f"model.{'.'.join(engine.passport.architectures)}.plan"


def _batches(engine: EngineFile, preferred: Sequence[int]) -> Batches:
    if engine.passport is None:
        return batches_of_file(engine.metadata, preferred)
    source = engine.passport.source or "FILE.onnx"
    return batches_of_engine(engine.metadata, engine.passport.profiles, engine.path, source)


def _network_files(
    name: str, engines: Sequence[EngineFile], metadata: FileMetadata, batches: Batches, settings: ModelSettings
) -> dict[str, bytes]:
    """The network's own model: content by path in the repository."""
    first = engines[0]
    profiles = 0 if first.passport is None else len(first.passport.profiles)
    config = network_config(
        name, metadata, first.outputs, batches, settings, profiles=profiles, files=_capabilities(engines)
    )
    files = {f"{name}/config.pbtxt": config_text(config).encode(), **_labels(name, metadata, first.outputs)}
    for engine in engines:
        path = f"{name}/1/{_file_name(engine, alone=len(engines) == 1)}"
        files[path] = engine.content
        if engine.passport is not None:
            files[str(passport_path(Path(path)))] = engine.passport.to_bytes()
    return files


def _image_files(
    names: Sequence[str], engine: EngineFile, metadata: FileMetadata, batches: Batches, settings: ModelSettings
) -> dict[str, bytes]:
    """The models `NAME_preprocess` and `NAME_images`: content by path in the repository."""
    network, preprocess, ensemble = names
    first = preprocess_config(preprocess, metadata, batches, settings)
    both = ensemble_config(ensemble, (preprocess, network), metadata, engine.outputs, batches)
    return {
        f"{preprocess}/config.pbtxt": config_text(first).encode(),
        f"{preprocess}/1/model.onnx": preprocessing_graph(metadata.preprocessing).SerializeToString(),
        f"{ensemble}/config.pbtxt": config_text(both).encode(),
        f"{ensemble}/1/{_KEPT}": b"",
        **_labels(ensemble, metadata, engine.outputs),
    }


def _labels(name: str, metadata: FileMetadata, outputs: Sequence[str]) -> dict[str, bytes]:
    """A class's name a line; none of a backbone."""
    if "logits" not in outputs or not metadata.class_names:
        return {}
    return {f"{name}/{LABELS}": "".join(f"{' '.join(label.split())}\n" for label in metadata.class_names).encode()}


def _notes(engines: Sequence[EngineFile], batches: Batches, output: Path, names: Sequence[str]) -> Iterator[str]:
    for engine in engines:
        if engine.note is not None:
            yield engine.note
    passport = engines[0].passport
    if passport is not None:
        yield f"the engine needs TensorRT {passport.backend_version} in the server; see the release notes of its image"
    if batches.fixed is not None:
        yield (
            f"the batch is fixed at {batches.fixed}, so Triton gathers no requests and limits no queue; with a dynamic "
            f"batch it does both"
        )
    earlier = f"{names[0]}_images"
    if earlier not in names and (output / earlier).exists():
        yield f"{earlier} is of an earlier run and was left as it was; write it anew with `images=True, force=True`"


def _check_folders(output: Path, names: Sequence[str], *, force: bool) -> None:
    """Raises OutputError, before long work, unless these models can be written."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; `output` takes a folder, such as model_repository.")
    if not output.parent.is_dir():
        parent = output.parent
        raise OutputError(f"folder {parent} does not exist; make it first: mkdir -p {shlex.quote(str(parent))}")
    for folder in (output / name for name in names):
        if not (folder.exists() or folder.is_symlink()):
            continue
        if not force:
            raise OutputError(f"{folder} exists; pass `force=True` to replace it, or choose another `name`.")
        config = folder / "config.pbtxt"
        if folder.is_symlink() or not config.is_file() or _OURS not in config.read_bytes():
            raise OutputError(
                f"{folder} exists and was not written by `package()`, so `force=True` does not replace it. "
                f"Remove it yourself, or choose another `name`."
            )


def _write(output: Path, names: Sequence[str], files: Mapping[str, bytes]) -> None:
    """Each model beside the repository first, where no server looks, and then all moved in; none if one fails."""
    with _translated(output):
        output = output.resolve()  # of `.` the name is empty
        new, old = (output.with_name(f".{output.name}.{secrets.token_hex(4)}.{part}") for part in ("part", "old"))
        try:
            for path, content in files.items():
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                (new / path).write_bytes(content)
            old.mkdir()
            if not output.exists():
                new.rename(output)
                return
            with contextlib.ExitStack() as undo:
                for name in names:
                    if (output / name).exists():
                        (output / name).rename(old / name)
                        undo.callback((old / name).rename, output / name)
                    (new / name).rename(output / name)
                    undo.callback((output / name).rename, new / name)
                undo.pop_all()
        finally:
            for folder in (new, old):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _translated(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}; choose another folder.") from error
