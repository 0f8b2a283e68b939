"""Requests that no client means, one for each seed: `case(seed)`; and what a server may answer to them.

As a program, against a server that runs: python tests/serving/fuzz.py --port 8000 --requests 10000
"""

import argparse
import collections
import dataclasses
import io
import json
import random
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

ALLOWED = {200, 400, 404, 405, 408, 413, 415, 429, 503}
LONGEST_S = 5.0
MODEL = "demo"
SIDE = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """Bytes for a connection.

    Attributes:
        refused: whether anything but a refusal (4xx) would be wrong; None where chance decides.
        half_close: whether the client says that it sends no more.
    """

    kind: str
    content: bytes
    refused: bool | None = None
    half_close: bool = False


def http(
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    *,
    method: str = "POST",
    length: int | str | None = None,
) -> bytes:
    fields = {
        "Host": "localhost",
        "Connection": "close",
        "Content-Length": str(len(body) if length is None else length),
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in (fields | (headers or {})).items())]
    return "\r\n".join(lines).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + body


INFER = f"/v2/models/{MODEL}/infer"


def tensor(**changes: object) -> dict[str, object]:
    values = [0.25] * (3 * SIDE * SIDE)
    return {"name": "image", "shape": [1, 3, SIDE, SIDE], "datatype": "FP32", "data": values} | changes


def infer(content: object, path: str = INFER) -> bytes:
    return http(path, json.dumps(content).encode())


def binary(content: dict[str, object], raw: bytes, length: int | str | None = None) -> bytes:
    text = json.dumps(content).encode()
    headers = {"Inference-Header-Content-Length": str(len(text) if length is None else length)}
    return http(INFER, text + raw, headers)


def odd(rng: random.Random) -> object:
    """A value where another kind of value is expected."""
    return rng.choice(
        [
            None,
            True,
            -1,
            0,
            2**31,
            2**64,
            -(2**70),
            1.5,
            1e308,
            "",
            "image",
            "\x00",
            "�",
            "é" * 500,
            [],
            {},
            [[]],
            [None],
            {"a": {"b": []}},
            [1, "2"],
            ["x"] * 20,
            "FP16",
            "A" * 5000,
        ]
    )


def json_truncated(rng: random.Random) -> Case:
    text = json.dumps({"inputs": [tensor()]}).encode()
    return Case("truncated JSON", http(INFER, text[: rng.randrange(len(text) - 1)]), refused=True)


def json_flipped(rng: random.Random) -> Case:
    text = bytearray(
        json.dumps({"id": "a", "inputs": [tensor(data=[1, 2, 3])], "outputs": [{"name": "logits"}]}).encode()
    )
    for _ in range(rng.randint(1, 8)):
        text[rng.randrange(len(text))] = rng.randrange(256)
    return Case("flipped JSON", http(INFER, bytes(text)), refused=True)  # three numbers are too few in any case


def json_garbage(rng: random.Random) -> Case:
    text = rng.choice(
        [
            b"",
            b"null",
            b"[]",
            b"{}",
            b"0",
            b'""',
            b"{'a': 1}",
            b"\xff\xfe{\x00}\x00",
            b"NaN",
            b"{" * 50,
            rng.randbytes(300),
            b'{"inputs": ' + b"9" * 5000 + b"}",
            b'{"inputs": [], "inputs": []}',
            b'{"inputs": {}}',
            b'{"inputs": [[]]}',
        ]
    )
    return Case("garbage", http(INFER, text), refused=True)


def json_deep(rng: random.Random) -> Case:
    depth = rng.choice([10, 100, 1000, 100_000])
    opened, closed = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    inner = opened * depth + b"1" + closed * rng.choice([0, depth])
    before = rng.choice([b'{"inputs": ', b'{"parameters": ', b'{"inputs": [{"name": "image", "data": ', b""])
    return Case("deep nesting", http(INFER, before + inner), refused=True)


def json_many(rng: random.Random) -> Case:
    count = rng.choice([1000, 100_000, 1_000_000])
    item = rng.choice([b"[]", b"0", b"{}", b'""', b"1e5", b"null"])
    text = b'{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 3, 64, 64], "data": [' + b",".join(
        [item] * count
    )
    return Case("many values", http(INFER, text + b"]}]}"), refused=True)


def wrong_field(rng: random.Random) -> Case:
    """One field of a right request replaced; `id` and unknown parameters may be anything of their kind."""
    request: dict[str, object] = {"inputs": [tensor()], "outputs": [{"name": "logits"}]}
    where = rng.choice(
        ["name", "shape", "datatype", "data", "inputs", "outputs", "output name", "classification", "binary_data"]
    )
    value = odd(rng)
    if where in ("name", "shape", "datatype", "data"):
        request["inputs"] = [tensor(**{where: value})]
    elif where == "output name":
        request["outputs"] = [{"name": value}]
    elif where in ("classification", "binary_data"):
        request["outputs"] = [{"name": "logits", "parameters": {where: value}}]
    else:
        request[where] = value
    harmless = (where, value) in [("name", "image"), ("classification", 0), ("outputs", []), ("binary_data", True)]
    return Case(f"wrong {where}", infer(request), refused=None if harmless else True)


def wrong_shape(rng: random.Random) -> Case:
    shape = [rng.choice([0, 1, 2, 3, 17, 64, 65, 4096, 2**31 - 1, 2**40]) for _ in range(rng.randint(0, 9))]
    right = shape == [1, 3, SIDE, SIDE]
    return Case("wrong shape", infer({"inputs": [tensor(shape=shape)]}), refused=not right)


def nested_data(rng: random.Random) -> Case:
    values = np.full((1, 3, SIDE, SIDE), 0.5).tolist()
    place = values[0][rng.randrange(3)][rng.randrange(SIDE)]
    place[rng.randrange(SIDE)] = rng.choice(["x", None, [], [1.0], {}, True])
    return Case("uneven data", infer({"inputs": [tensor(data=values)]}), refused=None)


def not_finite(rng: random.Random) -> Case:
    text = json.dumps({"inputs": [tensor()]}).replace(
        "0.25", rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "3e39"]), 1
    )
    return Case("not finite", http(INFER, text.encode()), refused=True)


def binary_lies(rng: random.Random) -> Case:
    size = 4 * 3 * SIDE * SIDE
    told = rng.choice([0, 1, 4, size - 4, size + 4, -size, 2**31, 2**63, 2**70, "x", None, size * 1.0, [size]])
    sent = rng.choice([0, 3, size // 2, size, size + 1])
    content = {"inputs": [{"name": "image", "shape": [1, 3, SIDE, SIDE], "datatype": "FP32"}]}
    content["inputs"][0]["parameters"] = {"binary_data_size": told}  # type: ignore[index]
    return Case("binary size lies", binary(content, bytes(sent)), refused=True)


def header_length_lies(rng: random.Random) -> Case:
    size = 4 * 3 * SIDE * SIDE
    content = {"inputs": [tensor(parameters={"binary_data_size": size})]}
    del content["inputs"][0]["data"]  # type: ignore[attr-defined]
    length = rng.choice(["", "0", "-1", "1", "7", "99999999", "1e3", "0x10", "٣", "1" * 5000, " 5 5", "NaN"])
    return Case("header length lies", binary(content, bytes(size), length=length), refused=True)


def binary_values(rng: random.Random) -> Case:
    """Any bytes as numbers: most hold a NaN; if not, huge ones."""
    size = 4 * 3 * SIDE * SIDE
    content = {"inputs": [{"name": "image", "shape": [1, 3, SIDE, SIDE], "datatype": "FP32"}]}
    content["inputs"][0]["parameters"] = {"binary_data_size": size}  # type: ignore[index]
    return Case("random numbers", binary(content, rng.randbytes(size)))


def huge_headers(rng: random.Random) -> Case:
    kind = rng.choice(["long", "many", "path", "name", "query"])
    size = rng.choice([100, 10_000, 60_000, 70_000, 300_000])
    if kind == "long":
        content = http("/v2", method="GET", headers={"X-Long": "a" * size})
    elif kind == "many":
        content = http("/v2", method="GET", headers={f"X-{i}": "b" for i in range(size // 10)})
    elif kind == "name":
        content = http("/v2", method="GET", headers={"X" * size: "c"})
    elif kind == "query":
        content = http("/v1/classify?" + "top=5&" * (size // 6), PICTURE)
    else:
        content = http("/v2/models/" + "d" * size, method="GET")
    return Case("huge header", content)


def bad_http(rng: random.Random) -> Case:
    content = rng.choice(
        [
            rng.randbytes(rng.randint(1, 400)) + b"\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /\r\n\r\n",
            b"\r\n" * 40,
            b"GET /v2 HTTP/1.1\r\n\r\n",  # no host
            b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /v2/models/%ff%00%zz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            b"GET /v2/models/\xc3\xa9 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
            b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
            b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\nabc",
            b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n0\r\n\r\n",
            b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
            b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\nab",
            b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            b"GET /v2 HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n",
            b"GET /v2 HTTP/1.1\r\nHost: a\r\n X: folded\r\n\r\n",
            b"GET /v2 HTTP/1.1\r\nHost: a\r\nX\x00Y: 1\r\n\r\n",
        ]
    )
    return Case("bad HTTP", content, half_close=True)


def odd_address(rng: random.Random) -> Case:
    path = rng.choice(
        [
            "/v2/models/none/infer",
            "/v2/models//infer",
            f"/v2/models/{MODEL}/versions/2/infer",
            "/v2/../../etc/passwd",
            "//",
            "/%2e%2e",
            "/v1/classify/",
            "/v2/models/" + "%41" * 50,
            "/metrics/x",
            "/v2/health",
            "/v2/models/demo/versions/1/infer/x",
            "*",
            "/;",
        ]
    )
    method = rng.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "BREW"])
    return Case("odd address", http(path, method=method))


def length_lies(rng: random.Random) -> Case:
    told = rng.choice([len(PICTURE) + 1, len(PICTURE) * 3, 10**9, 40_000_000, len(PICTURE) // 2])
    short = told < len(PICTURE)  # the rest is then read as another request
    return Case("length lies", http("/v1/classify", PICTURE, length=told), refused=True, half_close=not short)


def encoded_body(rng: random.Random) -> Case:
    encoding = rng.choice(["gzip", "deflate", "br", "gzip, gzip", "x" * 300])
    return Case(
        "encoded body", http("/v1/classify", zlib.compress(bytes(10**7)), {"Content-Encoding": encoding}), refused=True
    )


def query(rng: random.Random) -> Case:
    name, value = (
        rng.choice(["top", "points"]),
        rng.choice(["-1", "0", "x", "", "1e3", "99999999999", "5.0", "%00", "٣", "true", " 5"]),
    )
    right = (name, value) == ("points", "0")
    return Case(
        "query",
        http(f"/v1/classify?{name}={value}".replace(" ", "%20").replace("٣", "%D9%A3"), PICTURE),
        refused=not right,
    )


def picture_of(fmt: str, size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(out, fmt)
    return out.getvalue()


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PICTURES = {fmt: picture_of(fmt) for fmt in FORMATS}
PICTURE = PICTURES["PNG"]


def image_truncated(rng: random.Random) -> Case:
    fmt = rng.choice(FORMATS)
    content = PICTURES[fmt]
    return Case(f"truncated {fmt}", http("/v1/classify", content[: rng.randrange(len(content))]))


def image_flipped(rng: random.Random) -> Case:
    fmt = rng.choice(FORMATS)
    content = bytearray(PICTURES[fmt])
    for _ in range(rng.randint(1, 20)):
        content[rng.randrange(min(len(content), rng.choice([60, 400, 10**6])))] = rng.randrange(256)
    return Case(f"flipped {fmt}", http("/v1/classify", bytes(content)))


def image_garbage(rng: random.Random) -> Case:
    start = rng.choice([content[: rng.choice([2, 4, 8, 16, 32])] for content in PICTURES.values()])
    return Case("image of noise", http("/v1/classify", start + rng.randbytes(rng.randint(0, 3000))))


def image_of_scans(rng: random.Random) -> Case:
    """A progressive picture of endless empty passes."""
    out = io.BytesIO()
    side = rng.choice([100, 2000, 4992])
    Image.new("L", (side, side)).save(out, "JPEG", progressive=True)
    scan = bytes.fromhex("ffda 0008 01 01 00 01 01 00")
    count = rng.choice([200, 5000, 50_000])
    return Case("endless scans", http("/v1/classify", out.getvalue()[:-2] + count * scan + b"\xff\xd9"), refused=True)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(rng: random.Random) -> Case:
    """Small files that say they are large."""
    side = rng.choice([6000, 20_000, 65_500])
    signature = b"\x89PNG\r\n\x1a\n"
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, rng.choice([1, 8]), 0, 0, 0, 0))
    rows = png_chunk(b"IDAT", zlib.compress(bytes(2_000_000), 9)) + png_chunk(b"IEND", b"")
    kind = rng.choice(["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG", "text"])
    if kind == "PNG":
        content = signature + head + rows
    elif kind == "text":  # a comment that unpacks to 50 MB
        small = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
        packed = png_chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(50_000_000), 9))
        content = signature + small + packed + png_chunk(b"IDAT", zlib.compress(bytes(9 * 8))) + png_chunk(b"IEND", b"")
        return Case("bomb text", http("/v1/classify", content))
    elif kind == "GIF":
        content = b"GIF89a" + struct.pack("<HH", side, side) + PICTURES["GIF"][10:]
    elif kind == "BMP":
        content = PICTURES["BMP"][:18] + struct.pack("<ii", side, side) + PICTURES["BMP"][26:]
    elif kind == "TIFF":
        content = PICTURES["TIFF"].replace(
            struct.pack("<HHI", 256, 4, 1) + struct.pack("<I", 40),
            struct.pack("<HHI", 256, 4, 1) + struct.pack("<I", side),
        )
        content = content.replace(struct.pack("<HHIHH", 256, 3, 1, 40, 0), struct.pack("<HHII", 256, 4, 1, side * 1000))
    elif kind == "WEBP":
        content = b"RIFF\x16\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x00\x00\x00\x00" + b"\xff\xff\xff" * 2
    elif kind == "PPM":
        content = f"P6 {side} {side} 255\n".encode() + bytes(3000)
    else:
        content = PICTURES["JPEG"].replace(struct.pack(">HH", 30, 40), struct.pack(">HH", side, side), 1)
    return Case(f"bomb {kind}", http("/v1/classify", content), refused=True)


def pipelined(rng: random.Random) -> Case:
    """Several requests at once, the last of them cut."""
    good = http("/v2/health/live", method="GET", headers={"Connection": "keep-alive"})
    return Case("pipelined", good * rng.randint(1, 30) + good[: rng.randrange(len(good))], half_close=True)


def valid(rng: random.Random) -> Case:
    """Right requests among the others."""
    return Case("valid", rng.choice([http("/v1/classify", PICTURE), infer({"inputs": [tensor()]})]), refused=False)


KINDS: tuple[Callable[[random.Random], Case], ...] = (
    *(
        json_truncated,
        json_flipped,
        json_garbage,
        json_deep,
        json_many,
        wrong_field,
        wrong_shape,
        nested_data,
        not_finite,
    ),
    *(
        binary_lies,
        header_length_lies,
        binary_values,
        huge_headers,
        bad_http,
        odd_address,
        length_lies,
        encoded_body,
        query,
    ),
    *(image_truncated, image_flipped, image_garbage, image_of_scans, bomb, pipelined, valid),
)


def case(seed: int) -> Case:
    rng = random.Random(seed)  # noqa: S311  # not for secrets
    return KINDS[seed % len(KINDS)](rng)


def send(port: int, content: bytes, *, half_close: bool = False) -> tuple[bytes, float]:
    """What comes back until the server closes the connection or is silent for too long, and the seconds it took."""
    started = time.monotonic()
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=LONGEST_S + 1) as connection:
        try:
            connection.sendall(content)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                received += part
                if _whole(received):
                    break
        except TimeoutError:
            return received, time.monotonic() - started
        except ConnectionError:  # closed before all was sent
            pass
    return received, time.monotonic() - started


def _whole(received: bytes) -> bool:
    head, blank, body = received.partition(b"\r\n\r\n")
    if not blank or b"content-length:" not in head.lower():
        return False
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    return len(body) >= length


def wrong_with(request: Case, received: bytes, seconds: float) -> str | None:
    """Why a server must not answer so; None if it may."""
    if seconds > LONGEST_S:
        return f"took {seconds:.1f} s"
    if not received:
        return (
            None if request.half_close or request.kind in ("huge header", "length lies") else "closed without an answer"
        )
    line = received.partition(b"\r\n")[0]
    parts = line.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
        return f"no status line: {line[:60]!r}"
    status, body = int(parts[1]), received.partition(b"\r\n\r\n")[2]
    if status not in ALLOWED:
        return f"status {status}: {body[:200]!r}"
    if b"Traceback" in body or b'.py", line' in body:
        return f"a trace: {body[:300]!r}"
    if request.refused is not None and (status == 200) == request.refused:
        return f"status {status}: {body[:200]!r}"
    if status != 200 and body:
        try:
            message = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError):
            return f"status {status} without an error in JSON: {body[:200]!r}"
        if not isinstance(message, str) or not message:
            return f"status {status} without a message"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    arguments = parser.parse_args()
    statuses: collections.Counter[str] = collections.Counter()
    wrong, slowest = 0, (0.0, 0)
    for seed in range(arguments.first, arguments.first + arguments.requests):
        request = case(seed)
        received, seconds = send(arguments.port, request.content, half_close=request.half_close)
        statuses[received[9:12].decode("latin-1") or "closed"] += 1
        slowest = max(slowest, (seconds, seed))
        problem = wrong_with(request, received, seconds)
        if problem:
            wrong += 1
            print(f"seed {seed} ({request.kind}): {problem}")
    print(f"{arguments.requests} requests, {wrong} answered wrongly; slowest {slowest[0]:.2f} s (seed {slowest[1]})")
    print(", ".join(f"{status}: {count}" for status, count in sorted(statuses.items())))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
