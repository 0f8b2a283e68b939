"""A replica answers as `classify` does, in batches that its engine takes."""

import asyncio
import dataclasses
import io
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dat_deploy.classify import classify
from dat_deploy.engine.passport import Profile
from dat_deploy.errors import EngineRunError, PassportError
from dat_deploy.runners import open_runner
from dat_deploy.serving.own.replica import Replica, Reply, ServedModel
from dat_deploy.serving.own.server import _served_model
from dat_deploy.serving.own.settings import ServeSettings

PICTURE = Path(__file__).parents[2] / "dat_deploy" / "data" / "ankle_boot.png"


def replica(path: Path, **settings: object) -> tuple[Replica, ServedModel]:
    _, model = _served_model(ServeSettings.model_validate({"engine": str(path)} | settings))
    return Replica(model, threads=1, wait_s=0.02), model


def infer(one: Replica, images: np.ndarray) -> Reply:
    tensor = {"name": "image", "shape": images.shape, "datatype": "FP32", "data": images.ravel().tolist()}
    return asyncio.run(one.infer(json.dumps({"inputs": [tensor]}).encode(), None, 30))


def logits(reply: Reply) -> np.ndarray:
    assert reply.status == 200, reply.body
    output = json.loads(reply.body)["outputs"][0]
    return np.array(output["data"], np.float32).reshape(output["shape"])


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(7, 3, 64, 64)).astype(np.float32)


def test_answers_are_those_of_the_engine(demo_onnx, images):
    one, _ = replica(demo_onnx)
    with open_runner(str(demo_onnx)) as runner:
        np.testing.assert_allclose(logits(infer(one, images)), runner(images), atol=1e-5)


def test_requests_that_wait_together_go_into_one_call_and_each_gets_its_own_answer(demo_onnx, images):
    one, _ = replica(demo_onnx)

    async def together() -> list[Reply]:
        bodies = []
        for image in images:
            tensor = {"name": "image", "shape": [1, 3, 64, 64], "datatype": "FP32", "data": image.ravel().tolist()}
            bodies.append(json.dumps({"inputs": [tensor]}).encode())
        return await asyncio.gather(*(one.infer(body, None, 30) for body in bodies))

    replies = asyncio.run(together())
    calls = [call.images for reply in replies for call in reply.calls]
    assert sum(calls) == 7
    assert max(calls) > 1
    with open_runner(str(demo_onnx)) as runner:
        expected = runner(images)
    for reply, row in zip(replies, expected, strict=True):
        np.testing.assert_allclose(logits(reply)[0], row, atol=1e-5)


def test_a_fixed_batch_is_filled_up_and_the_filling_is_not_answered(demo_batch_3_onnx, images):
    one, model = replica(demo_batch_3_onnx, max_batch=16)
    assert model.most_images == 3
    assert model.image.shape == (-1, 3, 64, 64)
    reply = infer(one, images[:2])
    assert [(call.images, call.padding) for call in reply.calls] == [(2, 1)]
    with open_runner(str(demo_batch_3_onnx)) as runner:
        np.testing.assert_allclose(logits(reply), runner(images[:3])[:2], atol=1e-5)
    assert infer(one, images[:4]).status == 400


def test_a_smaller_limit_than_the_engines_holds(demo_batch_3_onnx, demo_onnx, images):
    for path in (demo_batch_3_onnx, demo_onnx):
        one, model = replica(path, max_batch=2)
        assert model.most_images == 2
        assert infer(one, images[:2]).status == 200
        assert infer(one, images[:3]).status == 400


@pytest.mark.parametrize(
    ("profiles", "images", "batch"),
    [
        ((), 5, 5),
        ("1,8,32", 1, 1),
        ("1,8,32", 2, 8),
        ("1,8,32", 9, 32),
        ("1,8,32", 40, 32),
        ("2-8", 1, 2),
        ("2-8", 5, 5),
    ],
)
def test_next_call_is_the_least_batch_that_holds_all(demo_onnx, profiles, images, batch):
    with open_runner(str(demo_onnx)) as runner:
        about = dataclasses.replace(
            runner.description, profiles=tuple(Profile.parse(text) for text in profiles.split(",")) if profiles else ()
        )
    assert about.next_batch(images) == batch


def test_classes_and_points_of_an_image_are_those_of_the_library(points_onnx):
    one, _ = replica(points_onnx)
    reply = asyncio.run(one.classify(PICTURE.read_bytes(), 3, points=True, seconds=30))
    found = json.loads(reply.body)
    expected = classify([PICTURE], str(points_onnx), top=3).predictions[0]
    assert [row["name"] for row in found["predictions"]] == [row.name for row in expected]
    np.testing.assert_allclose(
        [row["probability"] for row in found["predictions"]], [row.probability for row in expected], atol=1e-6
    )
    assert found["image"] == {"width": 28, "height": 28}
    assert {(row["stage"], row["block"]) for row in found["sampled_points"]} == {(1, 1), (2, 1), (2, 3), (3, 0)}
    points = np.array(found["sampled_points"][0]["points"])
    assert points.shape == (1, 16, 2)
    assert (np.abs(points) < 200).all()
    np.testing.assert_allclose(np.sum(found["sampled_points"][0]["attention"], axis=-1), 1, atol=1e-3)


def test_points_of_a_file_without_them_are_refused(demo_onnx):
    one, _ = replica(demo_onnx)
    reply = asyncio.run(one.classify(PICTURE.read_bytes(), 3, points=True, seconds=30))
    assert reply.status == 400
    sentence = "demo gives no sampled points. Export it with `sampling_locations=True` for them."
    assert json.loads(reply.body) == {"error": sentence}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "image 'in the body' is empty; accepted are BMP, GIF, JPEG, PNG, PPM, TIFF and WEBP files."),
        (
            b"no image",
            "image 'in the body' is no image that can be read: it starts with b'no image'; accepted are BMP, GIF, "
            "JPEG, PNG, PPM, TIFF and WEBP files. Convert it to PNG or JPEG, or copy it again.",
        ),
    ],
)
def test_what_is_no_image_is_refused(demo_onnx, body, sentence):
    one, _ = replica(demo_onnx)
    reply = asyncio.run(one.classify(body, 1, points=False, seconds=30))
    assert (reply.status, json.loads(reply.body)["error"]) == (400, sentence)


def test_an_image_of_too_many_pixels_is_refused(demo_onnx):
    one, _ = replica(demo_onnx, max_pixels=700)
    reply = asyncio.run(one.classify(PICTURE.read_bytes(), 1, points=False, seconds=30))
    assert reply.status == 400
    assert "has 784 pixels; accepted are at most 700" in json.loads(reply.body)["error"]


def test_a_picture_of_endless_scans_is_refused_at_once(demo_onnx):
    one, _ = replica(demo_onnx)
    out = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(out, "JPEG", progressive=True)
    scan = bytes.fromhex("ffda 0008 01 01 00 01 01 00")  # of nothing: a pass over all pixels each
    started = time.process_time()
    bomb = out.getvalue()[:-2] + 20_000 * scan + b"\xff\xd9"
    reply = asyncio.run(one.classify(bomb, 1, points=False, seconds=30))
    assert reply.status == 400
    assert "scans; accepted are at most 100" in json.loads(reply.body)["error"]
    assert time.process_time() - started < 5
    assert asyncio.run(one.classify(out.getvalue(), 1, points=False, seconds=30)).status == 200


@pytest.mark.parametrize("item", [b"[]", b"{}", b'""'])
def test_json_of_millions_of_objects_is_refused_before_they_are_made(demo_onnx, item):
    one, _ = replica(demo_onnx)
    body = b'{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1], "data": [' + b",".join([item] * 5_000_000)
    started = time.process_time()
    reply = asyncio.run(one.infer(body + b"]}]}", None, 30))
    sentence = "the request's JSON has more than 200000 brackets and quotes; send flat 'data'."
    assert (reply.status, json.loads(reply.body)) == (400, {"error": sentence})
    assert time.process_time() - started < 1


def test_a_call_that_never_ends_is_seen(demo_onnx, images, monkeypatch):
    one, model = replica(demo_onnx)
    stuck = Replica(model, threads=1, wait_s=0, stuck_s=0.2)
    go = threading.Event()

    def wait(_: np.ndarray) -> None:
        go.wait(20)
        raise EngineRunError("let go")

    monkeypatch.setattr(stuck._runner, "outputs", wait)
    asking = threading.Thread(target=infer, args=(stuck, images[:1]))
    asking.start()
    time.sleep(0.6)
    with pytest.raises(RuntimeError, match=r"a thread has worked on one thing for 0\.2 s"):
        stuck.check_health()
    go.set()
    asking.join()
    one.check_health()


def test_a_file_that_was_exchanged_is_refused(demo_onnx, demo_batch_3_onnx, tmp_path):
    path = tmp_path / "demo.onnx"
    path.write_bytes(demo_onnx.read_bytes())
    _, model = replica(path)
    path.write_bytes(demo_batch_3_onnx.read_bytes())
    with pytest.raises(PassportError, match="is not the file that the server was started with; start the server again"):
        Replica(model, threads=1, wait_s=0)


def test_a_dynamic_file_takes_sizes_that_its_network_takes(any_size_onnx):
    one, model = replica(any_size_onnx, max_batch=1)
    assert model.image.shape == (-1, 3, -1, -1)
    assert logits(infer(one, np.zeros((1, 3, 64, 96), np.float32))).shape == (1, 1000)
    reply = infer(one, np.zeros((1, 3, 65, 96), np.float32))
    assert reply.status == 400
    assert "65x96" in json.loads(reply.body)["error"]
    reply = infer(one, np.zeros((1, 3, 1024, 1088), np.float32))
    assert json.loads(reply.body)["error"] == (
        "input 'image' has 1 images of 1024x1088; all of a request may have 1075200 pixels. Send smaller ones, or "
        "fewer at once."
    )


def test_an_engine_that_fails_is_reported_and_replaced(demo_onnx, images, monkeypatch):
    one, _ = replica(demo_onnx)
    one.check_health()

    def fail(_: np.ndarray) -> None:
        raise EngineRunError("a CUDA error")

    monkeypatch.setattr(one._runner, "outputs", fail)
    reply = infer(one, images[:1])
    assert reply.status == 503
    assert json.loads(reply.body) == {"error": "the engine failed and is started anew; try again."}
    with pytest.raises(RuntimeError, match="a CUDA error"):
        one.check_health()
