"""What this package does leaves the process as it was: threads, random numbers, settings, handlers."""

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dat_deploy.export import export, onnx_model
from dat_deploy.export.onnx_model import onnx_from_model
from dat_deploy.runners import open_runner
from dat_deploy.runners.torch_threads import torch_threads

IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, {folder!r})
import onnx, onnxruntime, openvino, torch._dynamo, torch._inductor, torch.onnx
from process_state import process_state
before = process_state()
import dat_deploy
for module in pkgutil.walk_packages(dat_deploy.__path__, "dat_deploy."):
    if module.name != "dat_deploy.serving.own.server":  # which needs Ray
        importlib.import_module(module.name)
after = process_state()
print([(name, before[name], after[name]) for name in before if before[name] != after[name]])
"""


@pytest.fixture
def changed(process_state: Callable[[], dict[str, str]]) -> Callable[[], list[str]]:
    """What is not as it was when the test began."""
    before = process_state()

    def compare() -> list[str]:
        after = process_state()
        return [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]

    return compare


def test_importing_every_module_changes_nothing():
    code = IMPORT_ALL.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603  # fixed
    assert done.stdout.strip() == "[]"


def test_an_export_changes_nothing(mini_dat, tmp_path, changed, monkeypatch):
    monkeypatch.setattr(onnx_model, "onnx_from_model", onnx_from_model)  # traced now, not once for all tests
    export(mini_dat, tmp_path / "mini.onnx")
    assert changed() == []


def test_an_export_that_fails_while_it_traces_changes_nothing(mini_dat, tmp_path, changed, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        assert not gc.isenabled()
        raise ValueError("no")

    monkeypatch.setattr(torch.onnx, "export", fail)
    monkeypatch.setattr(onnx_model, "onnx_from_model", onnx_from_model)
    with pytest.raises(ValueError, match="no"):
        export(mini_dat, tmp_path / "mini.onnx")
    assert changed() == []


@pytest.mark.parametrize("engine", ["pytorch:demo", "onnxruntime:{file}", "openvino:{file}"])
def test_opening_running_and_closing_a_runner_changes_nothing(engine, demo_onnx, changed):
    other = 1 if torch.get_num_threads() > 1 else 2
    with open_runner(engine.format(file=demo_onnx), threads=other) as runner:
        assert runner.description.threads == other
        assert changed() == []
        runner(np.zeros((1, 3, *runner.description.image_size), np.float32))
        assert changed() == []
    assert changed() == []


def test_a_call_computes_with_the_threads_of_its_description():
    with open_runner("pytorch:demo", threads=3) as runner:
        seen = []
        runner.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
        images = np.zeros((1, 3, *runner.description.image_size), np.float32)
        runner(images)
        thread = threading.Thread(target=runner, args=(images,))  # as a server calls it
        thread.start()
        thread.join()
    assert seen == [3, 3]


def test_threads_that_come_and_go_in_any_order_leave_the_count_that_was_there():
    """The second one has never been seen by torch, and begins with the count of the first."""
    before = torch.get_num_threads()
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = {}

    def first() -> None:
        with torch_threads(before + 1):
            first_is_in.set()
            second_is_in.wait()
        first_is_out.set()

    def second() -> None:
        first_is_in.wait()
        with torch_threads(before + 2):
            second_is_in.set()
            first_is_out.wait()
            seen["inside"] = torch.get_num_threads()
        seen["outside"] = torch.get_num_threads()

    def later() -> None:
        seen["later"] = torch.get_num_threads()

    together = [threading.Thread(target=work) for work in (first, second)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    thread = threading.Thread(target=later)
    thread.start()
    thread.join()
    assert seen == {"inside": before + 2, "outside": before, "later": before}
    assert torch.get_num_threads() == before


def test_a_thread_keeps_a_count_of_its_own_beside_a_call_in_another():
    is_in, is_done, seen = threading.Event(), threading.Event(), {}
    before = torch.get_num_threads()

    def other() -> None:
        torch.get_num_threads()  # at the first question torch gives a thread the count of the process
        torch.set_num_threads(before + 5)
        is_in.wait()
        with torch_threads(before + 1):
            seen["inside"] = torch.get_num_threads()
        seen["outside"] = torch.get_num_threads()
        is_done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with torch_threads(before + 2):
        is_in.set()
        is_done.wait()
    thread.join()
    assert seen == {"inside": before + 1, "outside": before + 5}
    assert torch.get_num_threads() == before


def test_a_call_within_a_call_gives_back_the_count_of_the_outer_one():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        with torch_threads(before + 2):
            assert torch.get_num_threads() == before + 2
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_without_a_number_torch_computes_with_its_own_count():
    with open_runner("pytorch:demo") as runner, torch_threads(torch.get_num_threads() + 1):
        seen = []
        runner.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
        runner(np.zeros((1, 3, *runner.description.image_size), np.float32))
        assert seen == [torch.get_num_threads()]


def test_the_count_is_given_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="no"), torch_threads(before + 1):
        raise ValueError("no")
    assert torch.get_num_threads() == before
