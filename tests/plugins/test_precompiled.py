"""Kernels from a folder: one is compiled, and launched through a driver that is none."""

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dat_deploy import plugins
from dat_deploy.errors import EngineRunError, UnsupportedError
from dat_deploy.plugins import dispatch, precompiled
from dat_deploy.plugins.deformable_sample import kernel
from dat_deploy.plugins.precompiled import Driver, Entry, Precompiled, key, precompile, write_index

SHAPES = ((2, 14, 14, 64), (2, 2, 7, 7, 2))
DTYPES = {"value": torch.float16, "sampling_locations": torch.float32, "output": torch.float16}


class FakeCuda:
    """libcuda as far as it is called: remembers what it was told, and fails where it is asked to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, []

    def __getattr__(self, name):
        def call(*arguments):
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"no kernel image is available"
            else:
                self.calls.append((name, arguments))
            return 209 if name == self.fails else 0

        return call


@pytest.fixture
def launch():
    problem = kernel.problem(*SHAPES, 2)
    return kernel.launch(problem, kernel.configurations(problem)[0])


@pytest.fixture
def tensors():
    return {"value": torch.randn(SHAPES[0]).half(), "sampling_locations": torch.zeros(SHAPES[1])}


@pytest.fixture
def opened(tmp_path, monkeypatch, launch):
    """A folder with two kernels whose code is made up, over a driver that is none, on stream 77."""
    entry = Entry("deformable_sample_kernel", 60_000, 40, 0, 4, "a launch")
    names = [key(launch, DTYPES, ()), key(launch, DTYPES, ("value", "sampling_locations"))]
    for name in names:
        (tmp_path / f"{name}.cubin").write_bytes(b"\x7fELF")
    write_index(tmp_path, 90, dict.fromkeys(names, entry), triton="3.6.0")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    return Precompiled(tmp_path, 90, Driver(FakeCuda()))


def test_a_launch_passes_grid_block_memory_stream_and_arguments_in_their_order(opened, launch, tensors):
    output = torch.empty(2, 49, 64, dtype=torch.float16)
    for _ in range(2):
        assert opened.launch(launch, tensors, output)
    calls = opened.driver.library.calls
    names = ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel", "cuLaunchKernel"]
    assert [name for name, _ in calls] == names  # it is loaded once
    assert calls[0][1][1].value == b"\x7fELF"
    assert calls[1][1][2].value == b"deformable_sample_kernel"
    assert [each.value for each in calls[2][1][1:]] == [8, 60_000]
    sent = calls[3][1]
    assert [size.value for size in sent[1:8]] == [*launch.grid, *launch.block, 60_000]
    assert (sent[8].value, sent[10].value) == (77, None)
    kinds = [ctypes.c_uint64] * 2 + [ctypes.c_int32] * 3 + [ctypes.c_uint64]
    held = precompiled.arguments(launch, tensors, output)
    values = [kind.from_buffer(argument).value for kind, argument in zip(kinds, held, strict=True)]
    pointers = [tensors[name].data_ptr() for name in launch.inputs]
    assert values == [*pointers, 14, 14, 49, output.data_ptr()]
    by_kernel = [parameter.name for parameter in launch.kernel.params if parameter.name not in launch.constants]
    assert by_kernel == [*launch.inputs, *launch.scalars, "output"]
    assert (opened.launched, opened.missed) == (2, set())


def test_operators_launch_what_is_here_and_leave_the_rest_to_triton(opened, tensors, monkeypatch):
    monkeypatch.setattr(dispatch, "kernel_computes", lambda _: True)
    compiled = []
    monkeypatch.setattr(
        dispatch.torch.library, "wrap_triton", lambda kernel: {(2 * 2 * 2, 1, 1): lambda *a, **k: compiled.append(k)}
    )
    with opened.launching():
        plugins.deformable_sample(**tensors)
        assert (opened.launched, compiled) == (1, [])
        moved = torch.empty(tensors["value"].numel() + 1, dtype=torch.float16)[1:].view(SHAPES[0])
        assert moved.data_ptr() % 16
        plugins.deformable_sample(moved, tensors["sampling_locations"])  # its code expects aligned addresses
    assert (opened.launched, len(compiled), opened.missed) == (1, 1, {"deformable_sample_kernel"})
    plugins.deformable_sample(**tensors)
    assert (opened.launched, len(compiled)) == (1, 2)


def test_a_key_tells_types_sizes_and_alignment_apart(launch):
    other = kernel.launch(kernel.problem((2, 14, 14, 32), SHAPES[1], 2), kernel.configurations({})[0])
    keys = {key(launch, DTYPES, ()), key(launch, DTYPES, ("value",)), key(other, DTYPES, ())}
    keys |= {key(launch, DTYPES | {"value": torch.bfloat16}, ())}
    assert len(keys) == 4


@pytest.mark.compiler
def test_a_kernel_is_compiled_into_a_folder_and_launched_from_there(tmp_path, launch, tensors, monkeypatch):
    entries = precompile([(launch, DTYPES, ()), (launch, DTYPES, ("value",))], tmp_path, 90)
    write_index(tmp_path, 90, entries, triton="3.6.0")
    assert {path.name for path in tmp_path.iterdir()} == {"index.json", *(f"{name}.cubin" for name in entries)}
    aligned, unaligned = entries.values()
    assert 0 < aligned.registers <= 255
    assert aligned.spilled_bytes == 0
    assert aligned.launch.endswith("float16")
    assert unaligned.launch.endswith("float16, unaligned")
    for name, entry in entries.items():
        code = (tmp_path / f"{name}.cubin").read_bytes()
        assert (code[:4], len(code)) == (b"\x7fELF", entry.code_bytes)
        assert entry.name.encode() in code
    opened = Precompiled(tmp_path, 90, Driver(FakeCuda()))
    assert opened.entries == entries
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    assert opened.launch(launch, tensors, torch.empty(2, 49, 64, dtype=torch.float16))
    (_, (_, code)), (_, (_, _, name)), (last, _) = opened.driver.library.calls  # no more shared memory is asked for
    assert (code.value[:4], name.value.decode(), last) == (b"\x7fELF", aligned.name, "cuLaunchKernel")


def test_another_gpu_other_kernels_and_a_drivers_refusal_are_told(opened, launch, tensors):
    with pytest.raises(UnsupportedError, match="holds code for sm_90, and this GPU is of sm_80; compile for that one"):
        Precompiled(opened.folder, 80, Driver(FakeCuda()))
    refusing = Precompiled(opened.folder, 90, Driver(FakeCuda("cuModuleLoadData")))
    with pytest.raises(EngineRunError) as raised:
        refusing.launch(launch, tensors, torch.empty(2, 49, 64, dtype=torch.float16))
    assert str(raised.value) == "the CUDA driver's cuModuleLoadData failed: 209, no kernel image is available."
    index = Path(opened.folder, "index.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"kernels": "others"}))
    with pytest.raises(UnsupportedError, match="was compiled from other kernels than these; compile them again"):
        Precompiled(opened.folder, 90, Driver(FakeCuda()))
    for damaged in ("{", "{}", "[]"):
        index.write_text(damaged)
        with pytest.raises(UnsupportedError, match=r"is damaged \(.*\); compile it again"):
            Precompiled(opened.folder, 90, Driver(FakeCuda()))
