"""Every configuration of every kernel, compiled for every architecture, without a GPU."""

import functools
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context

import pytest
import torch

from dat_deploy.errors import UnsupportedError
from dat_deploy.plugins import ptx as ahead_of_time
from dat_deploy.plugins.launch import Configuration, Problem
from dat_deploy.plugins.ptx import ARCHITECTURES, CompiledLaunch, compile_launch, newest_ptx_version

SHARED_MEMORY_LIMIT = 48 * 1024  # what a TensorRT plugin may use
SPILLS_OUTSIDE_LOOPS = 24  # bytes: kernels that fill all registers, by Triton 3.9; less by 3.6
SPILLS_UNDER_A_LIMIT = 128  # bytes: of configurations that limit registers, and were faster so

LIKE_80 = (86, 89, 120)

WINDOWS = {"batch": 64, "height": 56, "width": 56, "heads": 3, "head_dim": 32}
ATTENTION = {"batch": 64, "height": 14, "width": 14, "keys": 196, "heads": 12, "head_dim": 32, "offset_groups": 3}
PROBLEMS: dict[str, tuple[str, Problem]] = {
    "DAT": ("deformable_attention", {**ATTENTION, "table_height": 27, "table_width": 27, "half_pixel": 1}),
    "DAT++": ("deformable_attention", {**ATTENTION, "table_height": 27, "table_width": 27, "half_pixel": 0}),
    "DAT++ at another size": (
        "deformable_attention",
        {**ATTENTION, "height": 50, "width": 84, "keys": 1050, "table_height": 27, "table_width": 27, "half_pixel": 0},
    ),
    "sample": (
        "deformable_sample",
        {"batch": 64, "height": 14, "width": 14, "points": 196, "channels": 384, "offset_groups": 3},
    ),
    "window 7": ("window_attention", {**WINDOWS, "window_size": 7, "shift_size": 4}),
    "window 12": ("window_attention", {**WINDOWS, "height": 96, "width": 96, "window_size": 12, "shift_size": 6}),
    "neighborhood": ("neighborhood_attention", {**WINDOWS, "kernel_size": 7, "dilation": 1}),
}


def configurations(name: str, element_bytes: int = 2, **changes: int) -> list[Configuration]:
    operator, problem = PROBLEMS[name]
    kernel = import_module(f"dat_deploy.plugins.{operator}.kernel")
    return list(kernel.configurations({**problem, "element_bytes": element_bytes, **changes}))


def compiled(
    name: str,
    configuration: Configuration,
    architecture: int,
    *,
    dtype: torch.dtype = torch.float16,
    ptx_version: int | None = None,
    **changes: int,
) -> CompiledLaunch:
    operator, problem = PROBLEMS[name]
    kernel = import_module(f"dat_deploy.plugins.{operator}.kernel")
    problem = {**problem, "element_bytes": dtype.itemsize, **changes}
    launch = kernel.launch(problem, configuration)
    dtypes = dict.fromkeys((*launch.inputs, "output"), dtype) | {"sampling_locations": torch.float32}
    return compile_launch(launch, dtypes, architecture, ptx_version=ptx_version)


def spills(configuration: Configuration) -> int:
    """How many bytes it may spill."""
    return SPILLS_OUTSIDE_LOOPS if configuration.max_registers is None else SPILLS_UNDER_A_LIMIT


def shared_memory(made: CompiledLaunch) -> int:
    return made.shared_memory_bytes + made.static_shared_memory_bytes


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as executor:
        yield executor


@pytest.mark.compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_compiles_within_what_tensorrt_allows(architecture, pool):
    """48 KiB of shared memory and, which `compile_launch` holds, no scratch memory and no hidden parameter.

    86, 89 and 120 multiply as 80 does and take as much memory, so of DAT, which takes seconds each, they have the first
    and the last alone: one of each kernel.
    """
    jobs: dict[tuple[str, Configuration], Future[CompiledLaunch]] = {}
    for name in PROBLEMS if architecture == 90 else ("DAT", "sample", "window 7", "neighborhood"):
        every = configurations(name)
        for configuration in (every[0], every[-1]) if name == "DAT" and architecture in LIKE_80 else every:
            jobs[name, configuration] = pool.submit(compiled, name, configuration, architecture)
    results = {job: future.result() for job, future in jobs.items()}
    assert len(results) >= 15
    assert not {job: shared_memory(c) for job, c in results.items() if shared_memory(c) > SHARED_MEMORY_LIMIT}
    if architecture == 90:
        assert not {job: c.spilled_bytes for job, c in results.items() if c.spilled_bytes > spills(job[1])}


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_other_types_spill_no_registers_on_sm_90(name, dtype):
    default, *others = configurations(name, dtype.itemsize)
    for configuration in (default, *(others if dtype == torch.float32 else [])):
        result = compiled(name, configuration, 90, dtype=dtype)
        assert result.spilled_bytes <= spills(configuration), configuration
        assert shared_memory(result) <= SHARED_MEMORY_LIMIT, configuration


@pytest.mark.compiler
@pytest.mark.parametrize("head_dim", [16, 24, 64])
@pytest.mark.parametrize("name", ["DAT", "DAT++", "window 7", "window 12", "neighborhood"])
def test_other_head_dims_spill_no_registers_on_sm_90(name, head_dim):
    default = configurations(name, head_dim=head_dim)[0]
    result = compiled(name, default, 90, head_dim=head_dim)
    assert result.spilled_bytes <= spills(default)
    assert shared_memory(result) <= SHARED_MEMORY_LIMIT


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["DAT", "sample", "window 7", "neighborhood"])
def test_ptx_takes_the_arguments_and_nothing_else(name):
    operator, problem = PROBLEMS[name]
    kernel = import_module(f"dat_deploy.plugins.{operator}.kernel")
    configuration = configurations(name)[0]
    launch = kernel.launch({**problem, "element_bytes": 2}, configuration)
    result = compiled(name, configuration, 80, ptx_version=85)
    assert result.name == launch.kernel.__name__
    entry = re.search(rf"\.entry {result.name}\((.*?)\)", result.ptx, re.DOTALL)
    assert entry is not None
    kinds = re.findall(r"\.param \.(u\d+)", entry[1])
    assert kinds == ["u64"] * len(launch.inputs) + ["u32"] * len(launch.scalars) + ["u64"]
    assert ".version 8.5" in result.ptx
    assert f".reqntid {launch.block[0]}" in result.ptx
    reads = re.search(r"ld\.global(\.\w+)*\.v4\.b32|cp\.async\.\w+\.shared\.global .*, 0x10,", result.ptx)
    assert reads, "tensors are read 16 bytes at a time"


@pytest.mark.compiler
def test_half_precision_products_run_on_tensor_cores():
    assert "wgmma.mma_async" in compiled("window 7", configurations("window 7")[0], 90).ptx
    assert "mma.sync" in compiled("window 7", configurations("window 7")[0], 80).ptx
    assert "wgmma.mma_async" in compiled("neighborhood", configurations("neighborhood")[-1], 90).ptx
    for architecture in (90, 80):
        made = compiled("neighborhood", configurations("neighborhood")[0], architecture)
        assert "mma.sync" in made.ptx
        assert "bar.sync" not in made.ptx  # each thread reads what it multiplies
        assert shared_memory(made) == 0
    assert "wgmma.mma_async" in compiled("DAT", configurations("DAT")[-1], 90).ptx
    for architecture in (80, 90):
        assert "mma.sync" in compiled("DAT", configurations("DAT")[0], architecture).ptx


@pytest.mark.compiler
def test_a_limit_of_registers_is_kept():
    limited = next(each for each in configurations("DAT") if each.max_registers is not None)
    assert compiled("DAT", limited, 90).registers == limited.max_registers


@pytest.mark.compiler
def test_the_table_in_shared_memory_is_counted():
    default = configurations("DAT")[0]
    assert (dict(default.tiles), default.num_warps) == (
        {"ROWS_A_LANE": 4, "LANE_ROWS": 2, "WARP_ROWS": 2, "COLUMN_TILES": 1},  # 16 by 8 queries
        2,
    )
    assert compiled("DAT", default, 90).static_shared_memory_bytes == 10 * 1024  # 35 rows of 28, 208 keys, of 8 bytes


@pytest.mark.compiler
def test_shared_memory_is_read_after_all_warps_have_written_it(pool):
    tiles = [each for each in configurations("DAT") if "COLUMN_TILES" in dict(each.tiles)]
    assert len(tiles) == 5
    for each, made in zip(tiles, pool.map(functools.partial(compiled, "DAT", architecture=90), tiles), strict=True):
        assert made.ptx.count(".shared .align 1024") == 1  # a second one would not be what was written
        writes, waits, reads, barriers = (
            [match.start() for match in re.finditer(instruction, made.ptx)]
            for instruction in (
                r"@p st\.shared\.v[24]\.b32",
                "bar.warp.sync 0x",
                r"ld\.shared\.v2\.b32 {",
                r"bar\.sync|barrier\.sync",
            )
        )
        assert len(waits) == 1
        assert max(writes) < waits[0] < min(reads)
        assert each.num_warps == 1 or any(max(writes) < barrier < waits[0] for barrier in barriers)


@pytest.mark.compiler
@pytest.mark.parametrize(("head_dim", "keys"), [(32, 49), (32, 576), (64, 49)])
def test_the_largest_map_whose_table_is_taken_fits_what_tensorrt_gives(head_dim, keys, pool):
    sizes = {"head_dim": head_dim, "keys": keys}

    def of(side: int) -> dict[str, int]:
        return (
            sizes
            | dict.fromkeys(("height", "width"), side)
            | dict.fromkeys(("table_height", "table_width"), 2 * side - 1)
        )

    largest: dict[tuple[tuple[str, int], ...], tuple[Configuration, dict[str, int]]] = {}
    for side in range(2, 64):
        for each in configurations("DAT", **of(side)):
            shape = (*(size for size in each.tiles if size[0] != "COLUMN_TILES"), ("warps", each.num_warps))
            if "COLUMN_TILES" in dict(each.tiles):
                largest[shape] = each, of(side)
    assert len(largest) == (5 if head_dim == 32 else 1)
    jobs = [pool.submit(compiled, "DAT", each, 90, **changes) for each, changes in largest.values()]
    assert max(shared_memory(job.result()) for job in jobs) <= SHARED_MEMORY_LIMIT


def test_a_kernel_that_needs_scratch_memory_is_refused(monkeypatch):
    class Compiled:
        class metadata:  # noqa: N801  # as Triton names it
            name = "some_kernel"
            global_scratch_size = 128
            profile_scratch_size = 0

    monkeypatch.setattr(ahead_of_time.triton, "compile", lambda *_, **__: Compiled)
    with pytest.raises(UnsupportedError) as error:
        compiled("sample", configurations("sample")[0], 90)
    assert str(error.value) == (
        "some_kernel for sm_90 needs 128 bytes of global_scratch; only kernels that need none can be launched by hand. "
        "Use another configuration."
    )


def test_ptx_is_no_newer_than_the_driver_and_the_assembler_take() -> None:
    found = {version: newest_ptx_version(90, version) for version in (12000, 12050, 12060, 12080, 12090, 13000)}
    assert found == {12000: 80, 12050: 85, 12060: 85, 12080: 87, 12090: 88, 13000: 90}
    assert newest_ptx_version(90, 99000) < 200  # what Triton's own assembler knows
