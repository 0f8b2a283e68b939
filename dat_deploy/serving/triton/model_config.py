"""Triton's description of a model, `config.pbtxt`, written with the protobuf that tritonclient has.

Every field is one of triton-inference-server/common's model_config.proto; what each does is in the server's
docs/user_guide/model_configuration.md, batcher.md and ensemble_models.md.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dat_deploy.engine.passport import Profile
from dat_deploy.errors import EngineBuildError, ShapeError, UnsupportedError
from dat_deploy.metadata import FileMetadata
from dat_deploy.serving.tensors import TensorSpec, input_spec, output_specs

__all__ = [
    "LABELS",
    "PIXELS",
    "Batches",
    "ModelSettings",
    "batches_of_engine",
    "batches_of_file",
    "config_text",
    "ensemble_config",
    "network_config",
    "preprocess_config",
]

LABELS = "labels.txt"
PIXELS = TensorSpec("pixels", "UINT8", (-1, -1, -1, 3))  # RGB, of any size
_PROPERTIES = ("preprocessing", "golden_sha256", "precision", "weights_sha256")  # of the file's, for clients to read
_Config = Any  # inference.ModelConfig; protobuf's generated classes have no types


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches that Triton may form.

    Attributes:
        fixed: the one batch that the model takes; then Triton forms none.
        most: else it forms any from 1 to this.
        preferred: sizes that it sends at once where it can, in rising order.
    """

    fixed: int | None
    most: int = 0
    preferred: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How the server runs a model.

    Attributes:
        device: `gpu` or `cpu`.
        instances: copies of the network, on each GPU or on the CPU.
        queue_delay_us: how long a request may wait for others to make up a batch.
        queue_size: requests that wait at most; more are refused at once.
        queue_timeout_us: how long one waits at most before it is refused.
    """

    device: str = "gpu"
    instances: int = 1
    queue_delay_us: int = 500
    queue_size: int = 256
    queue_timeout_us: int = 1_000_000

    def __post_init__(self) -> None:
        """Raises UnsupportedError for another device, ShapeError for a count below 1 or a negative delay."""
        if self.device not in ("gpu", "cpu"):
            raise UnsupportedError(f"no device '{self.device}'; a model is served on gpu or cpu.")
        for name, value, least in (
            ("instances", self.instances, 1),
            ("queue_delay_us", self.queue_delay_us, 0),
            ("queue_size", self.queue_size, 1),
            ("queue_timeout_us", self.queue_timeout_us, 1),
        ):
            if not least <= value < 2**31:
                raise ShapeError(f"`{name}` got {value}; it takes a number from {least} to {2**31 - 1}.")


def batches_of_engine(metadata: FileMetadata, profiles: Sequence[Profile], path: Path, source: str) -> Batches:
    """What an engine's profiles allow; Triton prefers what they are best at.

    A single profile of one batch above 1 is a fixed batch, as is a file that was exported with one.

    Raises:
        EngineBuildError: if the profiles leave out a batch between 1 and the largest; Triton forms any.
    """
    most = max(profile.most for profile in profiles)
    if metadata.batch is not None or (len(profiles) == 1 and most == profiles[0].least > 1):
        return Batches(fixed=most)
    reached = 0
    for profile in sorted(profiles, key=lambda profile: profile.least):
        if profile.least > reached + 1:
            better = min((p.best for p in profiles if p.best > 1), default=most)
            raise EngineBuildError(
                f"{path} takes batch {' or '.join(map(str, profiles))}, and Triton forms any batch up to {most}, such "
                f"as {reached + 1}. Build it for a range: `build({source!r}, batches=['{Profile(1, better, most)}'])`"
            )
        reached = max(reached, profile.most)
    best = {profile.best for profile in profiles}
    return Batches(None, most, tuple(sorted(best - {1} or best)))  # 1 preferred to others would be sent one by one


def batches_of_file(metadata: FileMetadata, preferred: Sequence[int]) -> Batches:
    """An exported file takes its one batch, or any; then Triton forms up to the largest of `preferred`.

    Raises:
        ShapeError: if `preferred` is empty or holds what is no batch.
    """
    if metadata.batch is not None:
        return Batches(fixed=metadata.batch)
    if not preferred or not all(1 <= batch < 2**31 for batch in preferred):
        text = ",".join(map(str, preferred))
        raise ShapeError(f"`batches` got '{text}'; it takes the batches to prefer, such as 8,32, each from 1 on.")
    return Batches(None, max(preferred), tuple(sorted(set(preferred))))


def network_config(
    name: str,
    metadata: FileMetadata,
    outputs: Sequence[str],
    batches: Batches,
    settings: ModelSettings,
    *,
    profiles: int = 0,
    files: Mapping[str, str] | None = None,
) -> _Config:
    """The network itself: on TensorRT if it has `profiles`, on ONNX Runtime otherwise.

    Args:
        profiles: how many optimization profiles the engine has.
        files: the name of the engine for each compute capability, such as 9.0, where there are several engines.
    """
    config = _config(name, metadata, (input_spec(metadata),), output_specs(metadata, outputs), batches)
    config.backend = "tensorrt" if profiles else "onnxruntime"
    for capability, file in (files or {}).items():
        config.cc_model_filenames[capability] = file
    _queue(config, settings)
    if batches.fixed is None:
        config.dynamic_batching.preferred_batch_size.extend(batches.preferred)
        config.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay_us
    kind = "KIND_GPU" if settings.device == "gpu" else "KIND_CPU"
    config.instance_group.add(count=settings.instances, kind=kind, profile=map(str, range(profiles)))
    # A request that comes alone, and what batches are made up to; a fixed batch counts as none.
    sizes = (0,) if batches.fixed is not None else sorted({1, *batches.preferred})
    if profiles:
        config.optimization.cuda.graphs = True
        config.optimization.cuda.output_copy_stream = True
        for size in sizes:
            config.optimization.cuda.graph_spec.add(batch_size=size)
    lead = () if batches.fixed is None else (batches.fixed,)
    for size in sizes:
        warmup = config.model_warmup.add(name=f"batch {size or batches.fixed}", batch_size=size or 1)
        image = warmup.inputs["image"]
        image.data_type = config.input[0].data_type
        image.dims.extend((*lead, 3, *metadata.image_size))
        image.zero_data = True  # Triton's random data are random bytes, of which some are NaN
    return config


def preprocess_config(name: str, metadata: FileMetadata, batches: Batches, settings: ModelSettings) -> _Config:
    """The first step of an ensemble, on the CPU: `pixels` to `image`.

    Pictures of several requests are not gathered: each is enlarged to float64, which would only fill the memory.
    """
    image = TensorSpec("image", "FP32", (-1, 3, *metadata.preprocessing.image_size))
    config = _config(name, metadata, (PIXELS,), (image,), batches)
    config.backend = "onnxruntime"
    _queue(config, settings)
    if batches.fixed is None:
        config.dynamic_batching.preferred_batch_size.append(1)
    config.instance_group.add(count=settings.instances, kind="KIND_CPU")
    config.parameters["intra_op_thread_count"].string_value = "1"  # a core a picture; more pictures, more instances
    return config


def ensemble_config(
    name: str, steps: tuple[str, str], metadata: FileMetadata, outputs: Sequence[str], batches: Batches
) -> _Config:
    """Both steps as one model, from `pixels` to what the network gives; `steps` are their names."""
    config = _config(name, metadata, (PIXELS,), output_specs(metadata, outputs), batches)
    config.platform = "ensemble"
    preprocess, network = steps
    first = config.ensemble_scheduling.step.add(model_name=preprocess, model_version=-1)
    first.input_map["pixels"] = "pixels"
    first.output_map["image"] = "image"
    second = config.ensemble_scheduling.step.add(model_name=network, model_version=-1)
    second.input_map["image"] = "image"
    for output in outputs:
        second.output_map[output] = output
    return config


def config_text(config: _Config) -> str:
    """The content of `config.pbtxt`."""
    from google.protobuf import text_format  # comes with tritonclient

    text: str = text_format.MessageToString(config, as_utf8=True, use_short_repeated_primitives=True)
    return text


def _config(
    name: str,
    metadata: FileMetadata,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    batches: Batches,
) -> _Config:
    """What every model has: its tensors, without the batch unless that is fixed, and what clients may want to know."""
    config = _protobuf().ModelConfig(name=name, max_batch_size=batches.most)
    config.version_policy.latest.num_versions = 1
    lead = () if batches.fixed is None else (batches.fixed,)
    for specs, tensors in ((inputs, config.input), (outputs, config.output)):
        for spec in specs:
            tensors.add(name=spec.name, data_type=f"TYPE_{spec.datatype}", dims=(*lead, *spec.shape[1:]))
    for tensor in config.output:
        if tensor.name == "logits" and metadata.class_names:
            tensor.label_filename = LABELS
    properties = metadata.to_properties()
    config.parameters["dat_deploy.variant"].string_value = metadata.variant
    for key in (f"dat_deploy.{field}" for field in _PROPERTIES):
        if key in properties:
            value = json.loads(properties[key])
            config.parameters[key].string_value = value if isinstance(value, str) else properties[key]
    return config


def _queue(config: _Config, settings: ModelSettings) -> None:
    """Under overload, requests are refused rather than queued for ever; without batching Triton has no such limit."""
    if config.max_batch_size:
        policy = config.dynamic_batching.default_queue_policy
        policy.timeout_action = _protobuf().ModelQueuePolicy.REJECT
        policy.default_timeout_microseconds = settings.queue_timeout_us
        policy.max_queue_size = settings.queue_size


def _protobuf() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise UnsupportedError(
            "tritonclient is not installed, with whose protobuf Triton's config.pbtxt is written. Install it with: "
            "pip install 'dat-deploy[package]'"
        ) from error
    return model_config_pb2
