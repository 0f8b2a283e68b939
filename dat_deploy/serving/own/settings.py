"""What a server is told: by options, or by a YAML file with the same names."""

from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml

from dat_deploy.errors import ServingError
from dat_deploy.images.preprocess import MAX_IMAGE_PIXELS

__all__ = ["ServeSettings", "read_settings"]

_Positive = Annotated[int, pydantic.Field(ge=1)]


class ServeSettings(pydantic.BaseModel):
    """Everything that `serve` can be told; in a YAML file each is a key.

    Attributes:
        engine: `FILE.onnx`, `FILE.engine`, `FILE.pt2` or `RUNTIME:FILE`; on a cluster, a path that each node has.
        name: of the model, in addresses; by default that of its network.
        host, port: that are listened on; port 0 is any free one.
        address: of a Ray cluster to run the replicas on, such as `auto`; by default Ray is started on this machine.
        replicas: copies of the engine, at least; `max_replicas`: at most, when Ray adds and removes some by load.
        target_requests: that one replica works on at a time, on average, before another is added.
        gpus: of each replica, such as 0.5; by default 1 if the engine runs on CUDA.
        threads: of each replica's CPU; by default the cores divided by the replicas.
        force: take the place of a server of the same name on the cluster, such as one that was killed.
        max_batch: images in one call of the engine, and in one request; by default what the engine takes, or 16.
        max_wait_ms: how long a request waits for others to share a call with while the engine is free.
        max_body_mb: bytes of a request in 10^6; more is 413. max_pixels: of an image; more is 400.
        max_call_pixels: of all images in one call of an engine that takes any size; by default one of 800x1344.
        max_requests: that are read, waiting or worked on; one more is 429.
        timeout_s: from a request's last byte to its answer; later it is 503.
        read_timeout_s: for a request's header, and between two pieces of its body; later it is 408.
        min_body_kb_per_s: that a body arrives with, on average; slower is 408.
        closing_s: between SIGTERM and the closed port, in which the server is not ready and still takes requests.
        drain_s: how long requests may take to end after that.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    engine: str
    name: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, pydantic.Field(ge=0, le=65535)] = 8000
    address: str | None = None
    replicas: _Positive = 1
    max_replicas: _Positive | None = None
    target_requests: Annotated[float, pydantic.Field(gt=0)] = 8
    gpus: Annotated[float, pydantic.Field(ge=0)] | None = None
    threads: _Positive | None = None
    force: bool = False
    max_batch: _Positive | None = None
    max_wait_ms: Annotated[float, pydantic.Field(ge=0, le=1000)] = 2
    max_body_mb: Annotated[float, pydantic.Field(gt=0, le=1024)] = 32
    max_pixels: Annotated[int, pydantic.Field(ge=1, le=MAX_IMAGE_PIXELS)] = 25_000_000
    max_call_pixels: _Positive = 800 * 1344
    max_requests: _Positive = 128
    timeout_s: Annotated[float, pydantic.Field(gt=0)] = 10
    read_timeout_s: Annotated[float, pydantic.Field(gt=0)] = 4
    min_body_kb_per_s: Annotated[float, pydantic.Field(ge=0)] = 50
    closing_s: Annotated[float, pydantic.Field(ge=0)] = 1
    drain_s: Annotated[float, pydantic.Field(ge=0)] = 30

    @pydantic.model_validator(mode="after")
    def _check_replicas(self) -> "ServeSettings":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, below replicas, {self.replicas}")
        return self


def read_settings(config: Path | None, options: dict[str, Any]) -> ServeSettings:
    """The settings in a YAML file, and over them those of `options` that are not None.

    Raises:
        ServingError: if the file cannot be read, or a setting is unknown, missing or out of range.
    """
    content: Any = {}
    if config is not None:
        try:
            content = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise ServingError(f"cannot read {config}: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ServingError(f"{config} holds {content!r:.40}; it takes settings, such as 'engine: tiny.onnx'.")
    overrides = {name: value for name, value in options.items() if value is not None}
    if "engine" not in content | overrides:
        raise ServingError("there is no engine to serve; name one: `serve(engine='tiny.onnx')`")
    try:
        return ServeSettings.model_validate(content | overrides)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        source = f"`{where}`" if where in overrides or config is None else f"{config}: {where}"
        accepted = ", ".join(ServeSettings.model_fields)
        reason = (
            f"is no setting; those are {accepted}"
            if first["type"] == "extra_forbidden"
            else first["msg"].removeprefix("Value error, ")
        )
        raise ServingError(f"{source}: {reason}." if where else f"{reason}.") from None
