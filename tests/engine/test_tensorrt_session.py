"""What can be shown of running an engine without a GPU: with a TensorRT and a CUDA that compute nothing but count."""

import contextlib
import ctypes
import threading
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dat_deploy.engine.build import BuildReport
from dat_deploy.engine.passport import Profile
from dat_deploy.engine.tensorrt import session as tensorrt_session
from dat_deploy.engine.tensorrt.session import Session, check_fits, profile_of
from dat_deploy.errors import EngineRunError, ShapeError, UnsupportedError
from dat_deploy.runners import open_runner

PROFILES = (Profile(1, 1, 1), Profile(8, 8, 8), Profile(2, 4, 6))


class FakeContext:
    """Doubles the mean of each image into two logits, through the addresses that it was given."""

    def __init__(self, engine: "FakeEngine") -> None:
        self.engine, self.addresses, self.profile = engine, {}, None
        self.shape: tuple[int, ...] = ()

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return not self.engine.refuses_shapes

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shape[0], 2)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        assert not engine.busy, "two threads at once"
        engine.busy = True
        engine.executions.append((self.profile, self.shape[0]))
        size = int(np.prod(self.shape))
        images = _floats(self.addresses["image"], size).reshape(self.shape)
        logits = _floats(self.addresses["logits"], 2 * self.shape[0]).reshape(-1, 2)
        logits[:] = 2 * images.mean(axis=(1, 2, 3), keepdims=False)[:, None]
        engine.busy = False
        return not engine.fails


def _floats(address: int, size: int) -> Any:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (size,))


class FakeEngine:
    """Counts what is asked of it."""

    num_optimization_profiles = 3

    def __init__(self) -> None:
        self.executions: list[tuple[int | None, int]] = []
        self.contexts = 0
        self.busy = self.fails = self.refuses_shapes = False

    def create_execution_context(self) -> FakeContext:
        self.contexts += 1
        return FakeContext(self)


def fake_tensorrt(engine: FakeEngine | None) -> types.ModuleType:
    class Logger:
        Severity = types.SimpleNamespace(ERROR=1, WARNING=2)

    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda content: engine)
    known = types.SimpleNamespace(__members__={"NONE": 0, "SM75": 1, "SM89": 2, "SM120": 3})
    module = types.ModuleType("tensorrt")
    module.__dict__.update(ILogger=Logger, Runtime=lambda logger: runtime, ComputeCapability=known)
    module.__version__ = "1.7.1.116"  # type: ignore[attr-defined]  # as every package has it
    return module


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's streams without a device."""
    stream = types.SimpleNamespace(cuda_stream=7, synchronize=lambda: None, wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: None)


def open_session(engine: FakeEngine | None) -> Session:
    return Session(
        fake_tensorrt(engine),
        b"engine",
        name="x.engine",
        profiles=PROFILES,
        outputs=["logits"],
        image_size=(4, 6),
        device="cpu",
        cuda_graphs=False,
    )


@pytest.fixture
def engine(no_cuda: None) -> FakeEngine:
    return FakeEngine()


@pytest.mark.parametrize(("batch", "index"), [(1, 0), (8, 1), (2, 2), (5, 2)])
def test_the_profile_of_the_batch_runs_and_each_slot_has_its_own_answer(
    engine: FakeEngine, batch: int, index: int
) -> None:
    images = np.random.default_rng(0).standard_normal((batch, 3, 4, 6)).astype(np.float32)
    session = open_session(engine)
    for result in (session.run(images)["logits"], session.run_on_device(torch.from_numpy(images))["logits"].numpy()):
        np.testing.assert_allclose(result, np.repeat(2 * images.mean((1, 2, 3))[:, None], 2, 1), rtol=1e-5)
    assert set(engine.executions) == {(index, batch)}
    assert engine.contexts == 1


def test_a_batch_without_a_profile_is_refused_with_what_to_build(engine: FakeEngine) -> None:
    with pytest.raises(ShapeError) as caught:
        open_session(engine).run(np.zeros((7, 3, 4, 6), np.float32))
    assert str(caught.value) == (
        "x.engine has no profile for batch 7; it takes 1, 8, 2-4-6. Split or fill up the batch, or build it again "
        "with `batches=['1', '8', '2-4-6', '7']`."
    )


def test_of_two_profiles_the_one_made_for_the_batch_is_taken() -> None:
    profiles = (Profile(1, 8, 8), Profile(1, 2, 4))
    assert [profile_of(profiles, batch, "x") for batch in (1, 2, 4, 5, 8)] == [1, 1, 1, 0, 0]


def test_threads_take_turns_and_get_their_own_answers(engine: FakeEngine) -> None:
    session = open_session(engine)
    wrong: list[int] = []

    def work(number: int) -> None:
        images = np.full((1 + number % 2 * 7, 3, 4, 6), number, np.float32)
        for _ in range(50):
            if not (session.run(images)["logits"] == 2 * number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(engine.executions) == 300 + 2  # each of two batches was tried once before


@pytest.mark.parametrize("shape", [(1, 1, 4, 6), (1, 3, 1, 1), (1, 3, 6, 4), (3, 4, 6)])
def test_tensors_that_would_be_broadcast_are_refused(engine: FakeEngine, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"it takes \[batch, 3, 4, 6\] on a CUDA device"):
        open_session(engine).run_on_device(torch.zeros(shape))
    assert not engine.executions


def test_results_stay_when_the_buffers_are_used_again(engine: FakeEngine) -> None:
    session = open_session(engine)
    first = session.run(np.ones((1, 3, 4, 6), np.float32))["logits"]
    session.run(np.zeros((1, 3, 4, 6), np.float32))
    assert (first == 2).all()


def test_few_batches_of_a_range_keep_their_buffers(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_session, "MOST_BATCHES", 3)
    session = open_session(engine)
    for batch in (2, 3, 4, 5, 2):
        session.run(np.zeros((batch, 3, 4, 6), np.float32))
    assert engine.contexts == 5  # batch 2 went when 5 came


def test_what_fails_says_so(engine: FakeEngine) -> None:
    with pytest.raises(EngineRunError, match=r"TensorRT cannot open x\.engine; it said: nothing\. Build it again here"):
        open_session(None)
    session = open_session(engine)
    engine.fails = True
    with pytest.raises(EngineRunError, match=r"x\.engine failed; TensorRT said: nothing"):
        session.run(np.zeros((1, 3, 4, 6), np.float32))
    engine.refuses_shapes = True
    with pytest.raises(EngineRunError, match=r"x\.engine does not take its profile 1 at batch 8: nothing"):
        session.run(np.zeros((8, 3, 4, 6), np.float32))
    session.close()
    with pytest.raises(EngineRunError, match=r"x\.engine is closed"):
        session.run(np.zeros((1, 3, 4, 6), np.float32))


def test_an_engine_of_another_version_is_refused(built: BuildReport) -> None:
    passport = replace(built.passport, backend_version="1.6.0.1")
    with pytest.raises(UnsupportedError) as caught:
        check_fits(passport, fake_tensorrt(None), "x.engine")
    assert str(caught.value) == (
        "x.engine was built with tensorrt-rtx 1.6.0.1, and 1.7.1.116 is installed; engines run on the version that "
        f"built them. Build it again here: {built.passport.rebuild_command}"
    )


def test_an_engine_of_another_gpu_is_refused(built: BuildReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_session, "gpu_architecture", lambda: 89)
    passport = replace(built.passport, architectures=("sm_80", "sm_86"))
    with pytest.raises(UnsupportedError) as caught:
        check_fits(passport, fake_tensorrt(None), "x.engine")
    assert str(caught.value) == (
        "x.engine was built for sm_80, sm_86, and the GPU here is sm_89. Build it again here: "
        f"{built.passport.rebuild_command}"
    )


def test_tensorrt_rtx_is_refused_on_a_gpu_that_it_does_not_know(
    built: BuildReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_session, "gpu_architecture", lambda: 90)
    with pytest.raises(UnsupportedError) as caught:
        check_fits(built.passport, fake_tensorrt(None), "x.engine")
    assert str(caught.value) == (
        "TensorRT-RTX 1.7.1.116 does not run on sm_90; it knows sm_75, sm_89, sm_120 and later. "
        'Build with `backend="tensorrt"` or `"aotinductor"`.'
    )
    monkeypatch.setattr(tensorrt_session, "gpu_architecture", lambda: 121)
    check_fits(built.passport, fake_tensorrt(None), "x.engine")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_an_engine_is_refused(built: BuildReport) -> None:
    with pytest.raises(UnsupportedError) as caught:
        open_runner(str(built.path))
    assert str(caught.value) == (
        f"{built.path} needs an NVIDIA GPU, and torch {torch.__version__} sees none here. Run it where one is."
    )


def test_an_engine_is_not_opened_as_what_it_is_not(built: BuildReport) -> None:
    with pytest.raises(UnsupportedError, match=r"was built with backend tensorrt-rtx, not tensorrt\. Open it as"):
        open_runner(f"tensorrt:{Path(built.path)}")
