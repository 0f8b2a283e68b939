"""The Open Inference Protocol (v2) over HTTP: request bodies to arrays, arrays to response bodies.

Both forms of a tensor: numbers in the JSON, or bytes behind it (Triton's binary tensor data extension); and Triton's
classification extension, the best classes of `logits` as text. No server and no engine here.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pydantic
from numpy.typing import NDArray

from dat_deploy.serving.tensors import TensorSpec

__all__ = [
    "HEADER_LENGTH",
    "InferRequest",
    "OutputRequest",
    "RequestError",
    "error_body",
    "infer_response",
    "parse_infer",
]

HEADER_LENGTH = "inference-header-content-length"
"""The HTTP header that says how many bytes of a body are JSON; the tensors' own bytes follow."""

_AXES = 8  # that a shape may have; the tensors here have four
_MARKS = 200_000  # 16 nested images of 800 rows have 40,000; each becomes an object, and a body could have millions
_INTEGER_LIMIT = 2**31


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: the HTTP status: 4xx if the request has to change, 503 if it may be tried again as it is.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class OutputRequest:
    """An output that a request asks for: its values, in JSON or as bytes, or its `classes` best classes if not 0."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """A request that fits the model: `images_nchw` [B, 3, H, W] float32 and finite, and the outputs to answer with."""

    id: str
    images_nchw: NDArray[np.float32]
    outputs: tuple[OutputRequest, ...]


class _Strict(pydantic.BaseModel):
    """Nothing is converted: `"1"` is no number. Unknown keys are parameters of extensions, and ignored."""

    model_config = pydantic.ConfigDict(strict=True)


_Size = Annotated[int, pydantic.Field(ge=0, lt=_INTEGER_LIMIT)]


class _Input(_Strict):
    name: str
    shape: Annotated[list[_Size], pydantic.Field(max_length=_AXES)]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class _Output(_Strict):
    name: str
    parameters: dict[str, Any] = {}


class _Body(_Strict):
    id: str = ""
    parameters: dict[str, Any] = {}
    inputs: Annotated[list[_Input], pydantic.Field(max_length=16)]
    outputs: Annotated[list[_Output], pydantic.Field(max_length=256)] = []


def parse_infer(
    body: bytes, header_length: str | None, image: TensorSpec, outputs: Sequence[TensorSpec], *, most: int
) -> InferRequest:
    """The request in a body.

    Args:
        header_length: the value of the header HEADER_LENGTH; None without one, when all of the body is JSON.
        image: the model's only input; -1 for each axis that is free.
        outputs: that the model gives.
        most: images in one request.

    Raises:
        RequestError: 400, for whatever does not fit.
    """
    json_part, rest = _split(body, header_length)
    if json_part.count(b"[") + json_part.count(b"{") + json_part.count(b'"') > _MARKS:
        raise RequestError(400, f"the request's JSON has more than {_MARKS} brackets and quotes; send flat 'data'.")
    try:
        parsed = _Body.model_validate_json(json_part)
    except pydantic.ValidationError as error:
        raise RequestError(400, f"the request is not one of the protocol: {_first(error)}") from None
    if len(parsed.inputs) != 1 or parsed.inputs[0].name != image.name:
        names = ", ".join(repr(tensor.name[:50]) for tensor in parsed.inputs) or "none"
        raise RequestError(400, f"the inputs are {names}; the model takes one input, '{image.name}'.")
    images = _values(parsed.inputs[0], rest, image, most)
    if not np.isfinite(images).all():
        raise RequestError(400, f"input '{image.name}' holds NaN or infinity; it takes finite numbers.")
    return InferRequest(parsed.id, images, _output_requests(parsed, outputs))


def infer_response(
    model: str, version: str, request: InferRequest, values: Mapping[str, NDArray[np.float32]], names: Sequence[str]
) -> tuple[bytes, dict[str, str]]:
    """The body of an answer and its HTTP headers.

    Args:
        values: by the names of the outputs, each with the batch as its first axis.
        names: of the classes, for the classification extension.

    Raises:
        RequestError: 400 if a value is not finite; the images were far outside of what the network knows.
    """
    entries: list[dict[str, Any]] = []
    binaries: list[bytes] = []
    for output in request.outputs:
        tensor = values[output.name]
        if not np.isfinite(tensor).all():
            raise RequestError(
                400,
                f"output '{output.name}' holds NaN or infinity for these images; their values are far outside those "
                f"of normalised images. Preprocess them as the model's configuration says.",
            )
        entry: dict[str, Any] = {"name": output.name, "datatype": "FP32", "shape": list(tensor.shape)}
        texts: list[str] | None = None
        if output.classes:
            texts = _best(tensor, output.classes, names)
            entry |= {"datatype": "BYTES", "shape": [len(tensor), len(texts) // len(tensor)]}
        if output.binary:
            raw = np.ascontiguousarray(tensor, "<f4").tobytes() if texts is None else _length_prefixed(texts)
            entry["parameters"] = {"binary_data_size": len(raw)}
            binaries.append(raw)
        else:
            entry["data"] = tensor.ravel().tolist() if texts is None else texts
        entries.append(entry)
    answer: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id:
        answer["id"] = request.id
    content = json.dumps(answer | {"outputs": entries}).encode()
    if not binaries:
        return content, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(content))}
    return b"".join([content, *binaries]), headers


def error_body(message: str) -> bytes:
    """An error in the protocol's form."""
    return json.dumps({"error": message}).encode()


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """(JSON, what follows it)."""
    if header_length is None:
        return body, b""
    length = (
        int(header_length) if header_length.isascii() and header_length.isdigit() and len(header_length) < 12 else 0
    )
    if not 0 < length <= len(body):
        raise RequestError(
            400,
            f"header Inference-Header-Content-Length is {header_length[:20]!r}; it takes the number of bytes of JSON, "
            f"from 1 to the {len(body)} of the body.",
        )
    return body[:length], body[length:]


def _values(tensor: _Input, rest: bytes, image: TensorSpec, most: int) -> NDArray[np.float32]:
    """[B, 3, H, W]."""
    shape, place = tensor.shape, f"input '{image.name}'"
    if tensor.datatype != image.datatype:
        raise RequestError(400, f"{place} has datatype {tensor.datatype[:20]!r}; it takes {image.datatype}.")
    fits = len(shape) == len(image.shape) and all(
        want in (-1, got) and got > 0 for want, got in zip(image.shape, shape, strict=True)
    )
    if not fits:
        raise RequestError(
            400, f"{place} has shape {shape}; it takes {list(image.shape)}, -1 being any number from 1 on."
        )
    if shape[0] > most:
        raise RequestError(400, f"{place} has {shape[0]} images; it takes {most} in a request. Send several requests.")
    if "shared_memory_region" in tensor.parameters:
        raise RequestError(400, f"{place} is in shared memory, which this server does not read; send its values.")
    count, size = math.prod(shape), tensor.parameters.get("binary_data_size")
    if size is not None:
        if tensor.data is not None:
            raise RequestError(400, f"{place} has both 'data' and 'binary_data_size'; give one of them.")
        if type(size) is not int or size != 4 * count or size != len(rest):
            raise RequestError(
                400,
                f"{place} has binary_data_size {size!r:.20}; shape {shape} is {4 * count} bytes of FP32, and "
                f"{len(rest)} follow the JSON.",
            )
        return np.frombuffer(rest, "<f4").reshape(shape)
    if rest:
        raise RequestError(400, f"{len(rest)} bytes follow the JSON, and no input has 'binary_data_size'.")
    if tensor.data is None:
        raise RequestError(400, f"{place} has no 'data'; give its values there, or as bytes behind the JSON.")
    return _numbers(tensor.data, place, count, shape)


def _numbers(data: list[Any], place: str, count: int, shape: list[int]) -> NDArray[np.float32]:
    try:
        values = np.array(data)  # flat, or nested as the shape says
    except ValueError:  # lists of different lengths
        values = np.array(None)
    if values.dtype.kind not in "iuf" or values.size != count or (values.ndim > 1 and list(values.shape) != shape):
        got = f"{values.size} numbers" if values.dtype.kind in "iuf" else "something else than numbers, or uneven lists"
        raise RequestError(
            400, f"{place} has {got} in 'data'; shape {shape} is {count} numbers, flat or nested as the shape."
        )
    with np.errstate(over="ignore"):  # infinity is refused with the rest
        return values.astype(np.float32).reshape(shape)


def _output_requests(parsed: _Body, outputs: Sequence[TensorSpec]) -> tuple[OutputRequest, ...]:
    specs = {output.name: output for output in outputs}
    binary = _flag(parsed.parameters, "binary_data_output", default=False)
    if not parsed.outputs:
        return tuple(OutputRequest(name, binary) for name in specs)
    requests: dict[str, OutputRequest] = {}
    for output in parsed.outputs:
        if output.name not in specs:
            raise RequestError(400, f"there is no output {output.name[:50]!r}; the model gives {', '.join(specs)}.")
        if output.name in requests:
            raise RequestError(400, f"output '{output.name}' is asked for twice; ask once.")
        if "shared_memory_region" in output.parameters:
            raise RequestError(400, f"output '{output.name}' is to go to shared memory, which this server does not do.")
        classes = output.parameters.get("classification", 0)
        if type(classes) is not int or not 0 <= classes < _INTEGER_LIMIT or (classes and output.name != "logits"):
            raise RequestError(
                400,
                f"output '{output.name}' has classification {classes!r:.20}; it takes a number of classes, of output "
                f"'logits' alone.",
            )
        requests[output.name] = OutputRequest(
            output.name, _flag(output.parameters, "binary_data", default=binary), classes
        )
    return tuple(requests.values())


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise RequestError(400, f"parameter '{name}' is {value!r:.20}; it takes true or false.")
    return value


def _best(logits: NDArray[np.float32], classes: int, names: Sequence[str]) -> list[str]:
    """`value:index:label` of the best classes of each image, best first, as Triton writes them."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :classes]
    return [f"{row[i]:f}:{i}:{names[i]}" for row, best in zip(logits, order, strict=True) for i in best]


def _length_prefixed(texts: Sequence[str]) -> bytes:
    """BYTES as bytes: each text behind its length in four."""
    encoded = [text.encode() for text in texts]
    return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)


def _first(error: pydantic.ValidationError) -> str:
    """The first of what pydantic found, without what was sent."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:50] for part in first["loc"])
    return f"{where}: {first['msg']}."[:300] if where else f"{first['msg']}."[:300]
