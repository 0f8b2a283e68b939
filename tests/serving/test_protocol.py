"""The Open Inference Protocol: what fits is read whole, what does not is refused in one sentence."""

import json

import numpy as np
import pytest

from dat_deploy.serving.own.protocol import InferRequest, OutputRequest, RequestError, infer_response, parse_infer
from dat_deploy.serving.tensors import TensorSpec

IMAGE = TensorSpec("image", "FP32", (-1, 3, 2, 2))
LOGITS = TensorSpec("logits", "FP32", (-1, 4))
MAPS = TensorSpec("maps", "FP32", (-1, 1, 2))


def parse(request: object, raw: bytes = b"", *, length: str | None = None, most: int = 4) -> InferRequest:
    text = json.dumps(request).encode()
    header = str(len(text)) if raw and length is None else length
    return parse_infer(text + raw, header, IMAGE, (LOGITS, MAPS), most=most)


def image(**changes: object) -> dict[str, object]:
    return {"name": "image", "shape": [1, 3, 2, 2], "datatype": "FP32", "data": list(range(12))} | changes


def refusal(*arguments: object, **named: object) -> str:
    with pytest.raises(RequestError) as caught:
        parse(*arguments, **named)  # type: ignore[arg-type]
    assert caught.value.status == 400
    return str(caught.value)


def test_flat_and_nested_numbers_are_the_same_images():
    flat = parse({"inputs": [image()]}).images_nchw
    nested = parse({"inputs": [image(data=np.arange(12).reshape(1, 3, 2, 2).tolist())]}).images_nchw
    np.testing.assert_array_equal(flat, np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2))
    np.testing.assert_array_equal(nested, flat)


def test_bytes_behind_the_json_are_the_images():
    values = np.linspace(-1, 1, 24, dtype="<f4")
    tensor = image(shape=[2, 3, 2, 2], parameters={"binary_data_size": 96})
    del tensor["data"]
    found = parse({"inputs": [tensor]}, values.tobytes()).images_nchw
    np.testing.assert_array_equal(found.ravel(), values)


def test_all_outputs_are_given_where_none_is_asked_for():
    assert parse({"inputs": [image()]}).outputs == (OutputRequest("logits", False), OutputRequest("maps", False))
    binary = parse({"inputs": [image()], "parameters": {"binary_data_output": True}})
    assert binary.outputs == (OutputRequest("logits", True), OutputRequest("maps", True))


def test_outputs_are_given_as_each_is_asked_for():
    outputs = [
        {"name": "maps", "parameters": {"binary_data": True}},
        {"name": "logits", "parameters": {"classification": 2}},
    ]
    found = parse({"id": "7", "inputs": [image()], "outputs": outputs})
    assert found.outputs == (OutputRequest("maps", True), OutputRequest("logits", False, 2))
    assert found.id == "7"


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({}, "the request is not one of the protocol: inputs: Field required."),
        ({"inputs": []}, "the inputs are none; the model takes one input, 'image'."),
        ({"inputs": [image(name="x")]}, "the inputs are 'x'; the model takes one input, 'image'."),
        ({"inputs": [image(), image()]}, "the inputs are 'image', 'image'; the model takes one input, 'image'."),
        ({"inputs": [image(datatype="FP16")]}, "input 'image' has datatype 'FP16'; it takes FP32."),
        (
            {"inputs": [image(shape=[1, 3, 2])]},
            "input 'image' has shape [1, 3, 2]; it takes [-1, 3, 2, 2], -1 being any number from 1 on.",
        ),
        (
            {"inputs": [image(shape=[0, 3, 2, 2])]},
            "input 'image' has shape [0, 3, 2, 2]; it takes [-1, 3, 2, 2], -1 being any number from 1 on.",
        ),
        (
            {"inputs": [image(shape=[5, 3, 2, 2])]},
            "input 'image' has 5 images; it takes 4 in a request. Send several requests.",
        ),
        (
            {"inputs": [image(shape=["1", 3, 2, 2])]},
            "the request is not one of the protocol: inputs.0.shape.0: Input should be a valid integer.",
        ),
        (
            {"inputs": [image(data=[1.0] * 11)]},
            "input 'image' has 11 numbers in 'data'; shape [1, 3, 2, 2] is 12 numbers, flat or nested as the shape.",
        ),
        (
            {"inputs": [image(data=["1"] * 12)]},
            "input 'image' has something else than numbers, or uneven lists in 'data'; shape [1, 3, 2, 2] is 12 "
            "numbers, flat or nested as the shape.",
        ),
        (
            {"inputs": [image(data=[True] * 12)]},
            "input 'image' has something else than numbers, or uneven lists in 'data'; shape [1, 3, 2, 2] is 12 "
            "numbers, flat or nested as the shape.",
        ),
        ({"inputs": [image(data=[1e39] * 12)]}, "input 'image' holds NaN or infinity; it takes finite numbers."),
        (
            {"inputs": [image(data=None)]},
            "input 'image' has no 'data'; give its values there, or as bytes behind the JSON.",
        ),
        (
            {"inputs": [image(parameters={"shared_memory_region": "r"})]},
            "input 'image' is in shared memory, which this server does not read; send its values.",
        ),
        (
            {"inputs": [image(parameters={"binary_data_size": 48})]},
            "input 'image' has both 'data' and 'binary_data_size'; give one of them.",
        ),
        (
            {"inputs": [image()], "outputs": [{"name": "x"}]},
            "there is no output 'x'; the model gives logits, maps.",
        ),
        (
            {"inputs": [image()], "outputs": [{"name": "maps"}, {"name": "maps"}]},
            "output 'maps' is asked for twice; ask once.",
        ),
        (
            {"inputs": [image()], "outputs": [{"name": "maps", "parameters": {"classification": 1}}]},
            "output 'maps' has classification 1; it takes a number of classes, of output 'logits' alone.",
        ),
        (
            {"inputs": [image()], "outputs": [{"name": "maps", "parameters": {"binary_data": 1}}]},
            "parameter 'binary_data' is 1; it takes true or false.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(request_, sentence):
    assert refusal(request_) == sentence


@pytest.mark.parametrize("size", [0, 44, 52, -48, 2**70, "48", 48.0, None])
def test_a_size_that_lies_is_refused(size):
    tensor = image(parameters={"binary_data_size": size})
    del tensor["data"]
    assert "input 'image'" in refusal({"inputs": [tensor]}, bytes(44)) or size is None


@pytest.mark.parametrize("length", ["", "0", "-1", "1e3", "٣", "99999", "9" * 5000])
def test_a_header_length_that_lies_is_refused(length):
    text = refusal({"inputs": [image()]}, b"", length=length)
    assert text.startswith(f"header Inference-Header-Content-Length is {length[:20]!r}; it takes the number of bytes")


def test_bytes_that_no_input_asks_for_are_refused():
    assert refusal({"inputs": [image()]}, b"1234") == "4 bytes follow the JSON, and no input has 'binary_data_size'."


@pytest.mark.parametrize("text", [b"", b"[1", b"[" * 10**5, b"\xff", b'{"inputs": ' + b"9" * 10**4 + b"}"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(RequestError, match=r"^the request is not one of the protocol: "):
        parse_infer(text, None, IMAGE, (LOGITS,), most=1)


def answer(outputs: tuple[OutputRequest, ...], **values: np.ndarray) -> tuple[bytes, dict[str, str]]:
    request = InferRequest("a", np.zeros((1, 3, 2, 2), np.float32), outputs)
    return infer_response("demo", "1", request, values, ["cat", "dog: small", "é", "x"])


def test_json_answer_holds_the_exact_numbers():
    logits = np.array([[0.1, -2.5, 3e-8, 7]], np.float32)
    body, headers = answer((OutputRequest("logits", False),), logits=logits)
    found = json.loads(body)
    assert (found["model_name"], found["model_version"], found["id"]) == ("demo", "1", "a")
    output = found["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("FP32", [1, 4])
    np.testing.assert_array_equal(np.array(output["data"], np.float32), logits[0])
    assert headers == {"content-type": "application/json"}


def test_binary_answer_says_where_its_bytes_begin():
    logits, maps = np.ones((1, 4), np.float32), np.arange(2, dtype=np.float32).reshape(1, 1, 2)
    body, headers = answer((OutputRequest("maps", True), OutputRequest("logits", True)), logits=logits, maps=maps)
    length = int(headers["inference-header-content-length"])
    sizes = [output["parameters"]["binary_data_size"] for output in json.loads(body[:length])["outputs"]]
    assert sizes == [8, 16]
    assert body[length:] == maps.tobytes() + logits.tobytes()


def test_classification_names_the_best_classes():
    body, _ = answer((OutputRequest("logits", False, 9),), logits=np.array([[1, 3, 2, -1.5]], np.float32))
    output = json.loads(body)["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 4])
    assert output["data"] == ["3.000000:1:dog: small", "2.000000:2:é", "1.000000:0:cat", "-1.500000:3:x"]


def test_an_answer_that_is_not_finite_is_refused():
    with pytest.raises(RequestError, match="output 'logits' holds NaN or infinity for these images"):
        answer((OutputRequest("logits", True),), logits=np.array([[1, np.nan, 1, 1]], np.float32))
