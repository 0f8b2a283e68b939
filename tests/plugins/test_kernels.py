"""Each kernel in Triton's interpreter, on a CPU, against the float64 reference.

`make test` runs these in a pytest of their own, because Triton reads TRITON_INTERPRET when it is imported. The
tolerance is derived: a kernel's error against float64 may be twice that of the reference in the same type, plus one
part in a million for the order of summation. A kernel that reads beside its tensors fails.

The interpreter's time is per program and block of keys, whatever their size. So there are as few images, heads and
tiles as tell them apart, and of three parameters each pair meets, not each triple.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from dat_deploy import plugins
from dat_deploy.benchmark import tune_network
from dat_deploy.benchmark.tune import tune
from dat_deploy.networks.dat.checkpoint import load_model
from dat_deploy.networks.dat.model import REFERENCE
from dat_deploy.networks.dat.variants import VARIANTS, StageConfig
from dat_deploy.plugins import dispatch
from dat_deploy.plugins.dispatch import Job, recorded_jobs
from dat_deploy.plugins.launch import Configuration, Problem
from dat_deploy.plugins.neighborhood_attention.reference import neighborhood_index

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, see `make test`"),
]

Inputs = dict[str, Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["network", "pixels", "half pixels", "border", "outside"]
MAPS = [(1, 1), (1, 5), (3, 9), (7, 7), (8, 13), (17, 9)]
MODES = {1: "DAT", 0: "DAT++"}  # by half_pixel_queries


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as integers and multiplies them as such; a GPU widens them, so this does."""
    create_dot = InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


READABLE: list[tuple[int, int]] = []  # addresses of the tensors that a kernel was given


@pytest.fixture(autouse=True)
def _reads_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose values are thrown away: on a GPU they may be faults."""
    READABLE.clear()
    create_masked_load = InterpreterBuilder.create_masked_load

    def checked(self, pointers, mask, *rest):
        addresses = pointers.data.astype(np.int64)[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        inside = np.zeros(addresses.shape, bool)
        for first, end in READABLE:
            inside |= (addresses >= first) & (addresses < end)
        assert inside.all() or not READABLE, "a read beside the tensors"
        return create_masked_load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked)


def between_nans(tensor: Tensor) -> Tensor:
    """The same tensor, as a part of a buffer that is NaN before and after it; kernels may read it, not the NaNs."""
    buffer = torch.full((tensor.numel() + 8192,), float("nan"), dtype=tensor.dtype)
    inside = buffer[4096:-4096].view(tensor.shape)
    READABLE.append((inside.data_ptr(), inside.data_ptr() + inside.numel() * inside.element_size()))
    return inside.copy_(tensor)


def problem_of(operator: str, inputs: Inputs, attributes: dict[str, int]) -> Problem:
    kernel = import_module(f"dat_deploy.plugins.{operator}.kernel")
    shapes = [tensor.shape for tensor in inputs.values()]
    element_bytes = [
        x.element_size()
        for x in (next(iter(inputs.values())), inputs.get("relative_position_bias_table"))
        if x is not None
    ]
    match operator:
        case "deformable_sample":
            return kernel.problem(*shapes, *element_bytes)
        case "deformable_attention":
            query, key, _, points, table = shapes
            return kernel.problem(query, key, points, table, *attributes.values(), *element_bytes)
        case _:
            return kernel.problem(shapes[0], *attributes.values(), *element_bytes)


def interpret(
    operator: str, inputs: Inputs, problem: Problem, configuration: Configuration, shape: torch.Size
) -> Tensor:
    launch = import_module(f"dat_deploy.plugins.{operator}.kernel").launch(problem, configuration)
    output = between_nans(torch.full(shape, float("nan"), dtype=next(iter(inputs.values())).dtype))
    launch.kernel[launch.grid](
        *(between_nans(inputs[name]) for name in launch.inputs),
        *launch.scalars.values(),
        output,
        **launch.constants,
    )
    storage = torch.empty(0, dtype=output.dtype).set_(output.untyped_storage())
    assert storage[:4096].isnan().all()
    assert storage[-4096:].isnan().all()
    return output


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each program that computed its tiles again, by the general form."""
    from dat_deploy.plugins.deformable_attention import shared_table_form

    programs: list[int] = []
    tiles_again = shared_table_form._tiles_again

    def recorded(*arguments):
        programs.append(len(programs))
        return tiles_again(*arguments)

    monkeypatch.setattr(shared_table_form, "_tiles_again", recorded)
    return programs


def has_shared_table(configuration: Configuration) -> bool:
    return "COLUMN_TILES" in dict(configuration.tiles)


def assert_kernel_is_exact(
    operator: str,
    inputs: Inputs,
    attributes: dict[str, int],
    *,
    every: bool = False,
    of: Callable[[Configuration], bool] = lambda _: True,
) -> None:
    """In the first configuration of this kind, or in every one."""
    reference: Callable[..., Tensor] = getattr(REFERENCE, operator)
    exact = reference(**{name: value.double() for name, value in inputs.items()}, **attributes)
    eager = reference(**inputs, **attributes)
    allowed = 2 * (eager - exact).abs().max().item() + 1e-6 * (1 + exact.abs().max().item())
    if of is has_shared_table:  # biases are blended in half precision: half a unit in the last place of the output
        allowed += 2**-11 * exact.abs().max().item()
    if eager.dtype == torch.bfloat16:
        allowed += 2**-8 * exact.abs().max().item()  # the interpreter rounds to bfloat16 by cutting off
    problem = problem_of(operator, inputs, attributes)
    configurations = list(filter(of, import_module(f"dat_deploy.plugins.{operator}.kernel").configurations(problem)))
    assert configurations
    for configuration in configurations if every else configurations[:1]:
        got = interpret(operator, inputs, problem, configuration, exact.shape)
        assert (got - exact).abs().max().item() <= allowed, configuration


@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_deformable_sample(kind, size, locations):
    inputs = {"value": torch.randn(3, *size, 24), "sampling_locations": locations(kind, (3, 2, 4, 5), size)}
    assert_kernel_is_exact("deformable_sample", inputs, {})


@pytest.mark.parametrize(
    ("channels", "groups", "dtype"),
    [(16, 1, torch.float32), (16, 1, torch.bfloat16), (96, 3, torch.float16), (384, 2, torch.float16)],
    ids=str,
)
def test_deformable_sample_in_every_configuration(channels, groups, dtype, locations):
    points = locations("network", (2, groups, 7, 7), (14, 14))
    inputs = {"value": torch.randn(2, 14, 14, channels).to(dtype), "sampling_locations": points}
    assert_kernel_is_exact("deformable_sample", inputs, {}, every=True)


def attention_inputs(
    locations: Callable[..., Tensor],
    size: tuple[int, int],
    *,
    kind: str = "network",
    batch: int = 2,
    sampled: tuple[int, int] = (3, 2),
    heads: int = 4,
    groups: int = 2,
    head_dim: int = 16,
    table: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    keys = sampled[0] * sampled[1]
    table = table or (2 * size[0] - 1, 2 * size[1] - 1)
    return {
        "query": torch.randn(batch, *size, heads * head_dim).to(dtype),
        "key": torch.randn(batch, keys, heads * head_dim).to(dtype),
        "value": torch.randn(batch, keys, heads * head_dim).to(dtype),
        "sampling_locations": locations(kind, (batch, groups, *sampled), size),
        "relative_position_bias_table": torch.randn(heads, *table).to(dtype),
    }


@pytest.mark.parametrize(
    ("kind", "size", "half_pixel_queries"),
    [
        pytest.param(kind, size, (i + j) % 2, id=f"{kind}-{size}-{MODES[(i + j) % 2]}")
        for i, kind in enumerate(KINDS)
        for j, size in enumerate(MAPS)
    ],
)
def test_deformable_attention(kind, size, half_pixel_queries, locations):
    """Two images, and two heads a group, where a network puts the points; elsewhere one image and a head a group."""
    batch, heads = (2, 4) if kind == "network" else (1, 2)
    inputs = attention_inputs(locations, size, kind=kind, batch=batch, heads=heads)
    attributes = {"num_heads": heads, "half_pixel_queries": half_pixel_queries}
    assert_kernel_is_exact("deformable_attention", inputs, attributes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half_pixel_queries", [1, 0], ids=["DAT", "DAT++"])
def test_deformable_attention_in_every_configuration(half_pixel_queries, dtype, locations):
    inputs = attention_inputs(locations, (9, 17), batch=1, sampled=(5, 13), heads=1, groups=1, dtype=dtype)
    assert_kernel_is_exact(
        "deformable_attention",
        inputs,
        {"num_heads": 1, "half_pixel_queries": half_pixel_queries},
        every=dtype == torch.float16,
        of=lambda configuration: not has_shared_table(configuration),
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and infinity, which send a tile the other way
@pytest.mark.parametrize("half_pixel_queries", [1, 0], ids=["DAT", "DAT++"])
@pytest.mark.parametrize(
    ("size", "sampled", "kind", "dtype"),
    [
        ((9, 10), (4, 5), "network", torch.float16),  # rows of tiles that overlap, a last block that is not full
        ((3, 6), (2, 8), "pixels", torch.float16),
        ((8, 8), (4, 4), "half pixels", torch.float16),
        ((8, 8), (4, 4), "border", torch.float16),
        ((8, 8), (4, 4), "outside", torch.float16),
        ((8, 8), (4, 5), "network", torch.bfloat16),
        ((5, 7), (4, 4), "pixels", torch.bfloat16),
    ],
    ids=str,
)
def test_deformable_attention_with_its_table_in_shared_memory(
    size, sampled, kind, dtype, half_pixel_queries, locations, again
):
    head_dim = 64 if size == (5, 7) else 16
    inputs = attention_inputs(
        locations, size, kind=kind, sampled=sampled, heads=1, groups=1, head_dim=head_dim, dtype=dtype
    )
    inputs = {name: value[:1] if "table" not in name else value.float() for name, value in inputs.items()}
    attributes = {"num_heads": 1, "half_pixel_queries": half_pixel_queries}
    assert_kernel_is_exact(
        "deformable_attention",
        inputs,
        attributes,
        every=dtype == torch.float16 and kind == "network",
        of=has_shared_table,
    )
    assert bool(again) == (kind == "outside")


@pytest.mark.parametrize("half_pixel_queries", [1, 0], ids=["DAT", "DAT++"])
@pytest.mark.parametrize("num_warps", [1, 2])
def test_deformable_attention_with_its_table_in_shared_memory_by_programs_beside_each_other(
    num_warps, half_pixel_queries, locations, again
):
    """And keys that all score far below 0, as what only fills a block of them must not."""
    inputs = attention_inputs(locations, (9, 18), batch=1, sampled=(4, 5), heads=1, groups=1, dtype=torch.float16)
    inputs["relative_position_bias_table"] = inputs["relative_position_bias_table"].float()
    inputs["query"][..., 0], inputs["key"][..., 0] = 8, -12
    attributes = {"num_heads": 1, "half_pixel_queries": half_pixel_queries}
    problem = problem_of("deformable_attention", inputs, attributes)
    warp_rows = (("ROWS_A_LANE", 4), ("LANE_ROWS", 2), ("WARP_ROWS", 1), ("COLUMN_TILES", 1))  # 8 by 8 a warp
    configuration = Configuration(warp_rows, num_warps, 3)
    reference = REFERENCE.deformable_attention
    exact = reference(**{name: value.double() for name, value in inputs.items()}, **attributes)
    eager = reference(**inputs, **attributes)
    allowed = 2 * (eager - exact).abs().max().item() + 2**-11 * exact.abs().max().item()
    got = interpret("deformable_attention", inputs, problem, configuration, exact.shape)
    assert (got - exact).abs().max().item() <= allowed
    assert not again


HARD = {  # name of the input, by what it is multiplied
    "large scores": ("query", 1000.0),
    "a table of 50": ("relative_position_bias_table", 50.0),
    "a table of 1e3": ("relative_position_bias_table", 1e3),
    "a table beyond half precision": ("relative_position_bias_table", 1e4),
    "one enormous key": ("key", torch.ones(16, 1).index_fill(0, torch.tensor(7), 300.0)),
    "keys that are all alike": ("key", torch.zeros(16, 1)),
    "points outside on two sides": ("sampling_locations", torch.tensor([1.9, 1.2])),
}
HELD = ("large scores", "one enormous key", "keys that are all alike")  # by a shift guessed from all of the keys


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and infinity, which send a tile the other way
@pytest.mark.parametrize(
    ("what", "half_pixel_queries"),
    [
        pytest.param(what, mode, id=f"{what}-{MODES[mode]}")
        for i, what in enumerate(HARD)
        for mode in ((1, 0) if what == "points outside on two sides" else (i % 2,))
    ],
)
def test_what_the_guessed_shift_does_not_hold_is_computed_again(what, half_pixel_queries, locations, again):
    name, factor = HARD[what]
    inputs = attention_inputs(locations, (8, 8), sampled=(4, 4), heads=1, groups=1, dtype=torch.float16)
    inputs = {key: value[:1] if "table" not in key else value.float() for key, value in inputs.items()}
    inputs[name] = (inputs[name] * factor).to(inputs[name].dtype)
    attributes = {"num_heads": 1, "half_pixel_queries": half_pixel_queries}
    assert_kernel_is_exact("deformable_attention", inputs, attributes, of=has_shared_table)
    assert bool(again) == (what not in HELD)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_key_that_no_guess_met_is_computed_again_in_bfloat16(locations, again):
    """Its weight is finite there, and so is the sum; what it multiplies is not."""
    inputs = attention_inputs(locations, (8, 8), sampled=(5, 8), heads=1, groups=1, dtype=torch.bfloat16)
    inputs = {key: value[:1] if "table" not in key else value.float() * 0 for key, value in inputs.items()}
    inputs["query"], inputs["key"] = torch.zeros_like(inputs["query"]), torch.zeros_like(inputs["key"])
    inputs["query"][..., 0], inputs["key"][0, 39, 0] = 16, 83 / 4
    inputs["value"] = torch.full_like(inputs["value"], 3).index_fill(1, torch.tensor(39), 50)
    attributes = {"num_heads": 1, "half_pixel_queries": 1}
    assert_kernel_is_exact("deformable_attention", inputs, attributes, of=has_shared_table)
    assert again


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and infinity, which send a tile the other way
def test_a_location_that_is_no_number_spoils_as_much_with_the_table_in_shared_memory(locations):
    inputs = attention_inputs(locations, (8, 8), sampled=(4, 4), heads=2, groups=2, dtype=torch.float16)
    for axis in (0, 1):
        inputs["sampling_locations"][1, 1, 0, axis, axis] = float("nan")
    problem = problem_of("deformable_attention", inputs, {"num_heads": 2, "half_pixel_queries": 1})
    kernel = import_module("dat_deploy.plugins.deformable_attention.kernel")
    configuration = next(filter(has_shared_table, kernel.configurations(problem)))
    got = interpret("deformable_attention", inputs, problem, configuration, inputs["query"].shape)
    spoilt = got.isnan().reshape(2, 64, 2, 16)
    assert spoilt.all(dim=1).all(dim=-1).tolist() == spoilt.any(dim=1).any(dim=-1).tolist()
    assert spoilt.any(dim=1).any(dim=-1).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64])
def test_deformable_attention_of_head_dim(head_dim, locations):
    inputs = attention_inputs(locations, (7, 7), sampled=(7, 7), heads=2, head_dim=head_dim, dtype=torch.float16)
    assert_kernel_is_exact("deformable_attention", inputs, {"num_heads": 2, "half_pixel_queries": 1})


TABLES = [(1, 1), (1, 9), (2, 30), (13, 13), (111, 111), (17, 19)]  # of a map of 9 × 10: 17 × 19


@pytest.mark.parametrize("half_pixel_queries", [1, 0], ids=["DAT", "DAT++"])
@pytest.mark.parametrize("table", TABLES, ids=str)
def test_deformable_attention_with_a_table_of_another_size(table, half_pixel_queries, locations):
    """As DAT++ has at image sizes that it was not trained for: rows of queries between rows of the table, or beyond."""
    for kind in ("network", "outside"):
        inputs = attention_inputs(locations, (9, 10), kind=kind, batch=1, heads=2, table=table)
        assert_kernel_is_exact(
            "deformable_attention",
            inputs,
            {"num_heads": 2, "half_pixel_queries": half_pixel_queries},
            every=True,
        )


@pytest.mark.parametrize("half_pixel_queries", [True, False], ids=["DAT", "DAT++"])
def test_rows_of_the_table_are_shared_by_rows_of_queries(half_pixel_queries, locations):
    """The cheap form is what a network at its own size runs, and what has just been tested for it."""
    kernel = import_module("dat_deploy.plugins.deformable_attention.kernel")
    taps = {}
    for table in ((27, 27), (55, 55), (13, 13)):
        inputs = attention_inputs(locations, (14, 14), table=table)
        attributes = {"num_heads": 4, "half_pixel_queries": half_pixel_queries}
        problem = problem_of("deformable_attention", inputs, attributes)
        for configuration in kernel.configurations(problem):
            taps.setdefault(table, set()).add(kernel.launch(problem, configuration).constants["ROW_TAPS"])
    assert taps == {(27, 27): {3 if half_pixel_queries else 2}, (55, 55): {0}, (13, 13): {0}}


def test_a_location_that_is_no_number_spoils_its_own_image_and_group_only(locations):
    inputs = attention_inputs(locations, (5, 6))
    inputs["sampling_locations"][1, 1, 0, 0, 1] = float("nan")
    inputs["sampling_locations"][0, 0, 0, 0, 0] = float("inf")  # far outside: no bias
    problem = problem_of("deformable_attention", inputs, {"num_heads": 4, "half_pixel_queries": 1})
    kernel = import_module("dat_deploy.plugins.deformable_attention.kernel")
    (configuration, *_) = kernel.configurations(problem)
    got = interpret("deformable_attention", inputs, problem, configuration, inputs["query"].shape)
    spoilt = got.isnan().reshape(2, 30, 2, 32).any(dim=1).any(dim=-1)
    assert spoilt.tolist() == [[False, False], [False, True]]

    value = torch.randn(2, 5, 6, 32)
    sample_inputs = {"value": value, "sampling_locations": inputs["sampling_locations"]}
    problem = problem_of("deformable_sample", sample_inputs, {})
    kernel = import_module("dat_deploy.plugins.deformable_sample.kernel")
    got = interpret("deformable_sample", sample_inputs, problem, kernel.configurations(problem)[0], (2, 6, 32))
    assert got.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[1, 0]]
    assert (got[0, 0, :16] == 0).all()


EDGES = [(4, 8, (7, 15), 1.0, 0), (9, 17, (17, 33), 1 + 2 / 9, 1), (1, 2, (27, 3), 1.5, 0), (2, 3, (3, 5), -2.0, 1)]


@pytest.mark.parametrize(("height", "width", "table", "y", "half_pixel_queries"), EDGES)
def test_keys_that_only_fill_a_block_read_no_table(height, width, table, y, half_pixel_queries, locations):
    """There is one head: what is read beside its table is beside the tensor."""
    inputs = attention_inputs(
        locations, (height, width), batch=1, sampled=(1, 3), heads=1, groups=1, table=table, dtype=torch.float16
    )
    inputs["sampling_locations"][..., 0] = y
    attributes = {"num_heads": 1, "half_pixel_queries": half_pixel_queries}
    assert_kernel_is_exact(
        "deformable_attention",
        inputs,
        attributes,
        every=True,
        of=lambda configuration: height < 9 or not has_shared_table(configuration),  # the interpreter takes minutes
    )


@pytest.mark.parametrize("head_dim", range(8, 65))
def test_a_block_without_a_neighbor_weighs_nothing_on_a_gpu(head_dim):
    """There `scores * scale - largest` is rounded once; the interpreter rounds twice and would not show it."""
    kernel = import_module("dat_deploy.plugins.neighborhood_attention.kernel")
    masked, none_yet = np.float32(kernel.NO_NEIGHBOR.value), np.float32(kernel.NO_SCORE_YET.value)
    scale = np.float32(1.4426950408889634 / head_dim**0.5)
    largest = max(none_yet, masked * scale)
    assert np.exp2(np.float32(np.float64(masked) * np.float64(scale) - np.float64(largest))) == 0


WINDOWS = [  # the last with the number of images and of heads
    (7, 7, 7, 0, 2, 2),
    (7, 7, 7, 4, 2, 2),
    (14, 21, 7, 4, 1, 2),
    (12, 24, 12, 6, 1, 2),
    (4, 2, 2, 1, 2, 2),
    (2, 5, 1, 0, 2, 1),  # 20 windows, of which a program takes up to 16
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width", "window_size", "shift_size", "batch", "heads"), WINDOWS)
def test_window_attention(height, width, window_size, shift_size, batch, heads, dtype):
    inputs = {
        "qkv": torch.randn(batch, height, width, 3 * heads * 16).to(dtype),
        "relative_position_bias_table": torch.randn((2 * window_size - 1) ** 2, heads).to(dtype),
    }
    attributes = {"num_heads": heads, "window_size": window_size, "shift_size": shift_size}
    assert_kernel_is_exact("window_attention", inputs, attributes, every=dtype == torch.float16)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64])
def test_window_attention_of_head_dim(head_dim):
    inputs = {
        "qkv": torch.randn(1, 14, 14, 3 * 3 * head_dim).half(),
        "relative_position_bias_table": torch.randn(169, 3).half(),
    }
    assert_kernel_is_exact("window_attention", inputs, {"num_heads": 3, "window_size": 7, "shift_size": 4})


def neighborhood_inputs(
    height: int, width: int, kernel_size: int, head_dim: int = 16, heads: int = 2, batch: int = 2
) -> Inputs:
    side = 2 * kernel_size - 1
    return {
        "qkv": torch.randn(batch, height, width, 3 * heads * head_dim),
        "padding_qkv": torch.randn(3 * heads * head_dim),
        "relative_position_bias_table": torch.randn(heads, side, side),
    }


@pytest.mark.parametrize(
    ("size", "kernel_size", "dilation"),
    [
        (size, kernel_size, (1, 3)[(i + j) % 2])
        for i, size in enumerate([(1, 1), (3, 9), (8, 13), (20, 17)])
        for j, kernel_size in enumerate((3, 7, 13))
    ],
    ids=str,
)
def test_neighborhood_attention(size, kernel_size, dilation):
    inputs = neighborhood_inputs(*size, kernel_size, heads=1, batch=1)
    attributes = {"num_heads": 1, "kernel_size": kernel_size, "dilation": dilation}
    assert_kernel_is_exact("neighborhood_attention", inputs, attributes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "dilation", "heads"), [((5, 19), 1, 2), ((17, 10), 2, 1)], ids=str)
def test_neighborhood_attention_in_every_configuration(size, dilation, heads, dtype):
    inputs = {name: value.to(dtype) for name, value in neighborhood_inputs(*size, 7, heads=heads, batch=1).items()}
    attributes = {"num_heads": heads, "kernel_size": 7, "dilation": dilation}
    assert_kernel_is_exact("neighborhood_attention", inputs, attributes, every=dtype == torch.float16)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64])
def test_neighborhood_attention_of_head_dim(head_dim):
    inputs = {name: value.half() for name, value in neighborhood_inputs(8, 9, 7, head_dim).items()}
    assert_kernel_is_exact("neighborhood_attention", inputs, {"num_heads": 2, "kernel_size": 7, "dilation": 1})


def has_neighbors_in_registers(configuration: Configuration) -> bool:
    return "WARP_TILES" in dict(configuration.tiles)


@pytest.mark.parametrize(
    ("size", "batch", "heads", "head_dim", "dtype"),
    [
        ((7, 7), 2, 3, 16, torch.bfloat16),  # one window; 12 tiles, of which a program takes 4
        ((8, 8), 9, 1, 16, torch.float16),  # a program takes up to 8 images
        ((8, 8), 1, 1, 32, torch.bfloat16),
        ((9, 16), 2, 1, 32, torch.float16),  # the last row of tiles is half of another
        ((11, 23), 1, 1, 16, torch.float16),  # tiles that overlap on both axes
        ((20, 14), 1, 1, 32, torch.float16),  # tiles of 7 columns, and some in the middle of the map
        ((7, 40), 1, 1, 16, torch.float16),
        ((24, 8), 3, 1, 16, torch.float16),  # groups of tiles between those at the borders: 4 and 1 of them
        ((23, 9), 1, 1, 16, torch.float16),
    ],
    ids=str,
)
def test_neighborhood_attention_in_registers(size, batch, heads, head_dim, dtype):
    inputs = {
        name: value.float() if "table" in name else value.to(dtype)
        for name, value in neighborhood_inputs(*size, 7, head_dim, heads, batch).items()
    }
    assert_kernel_is_exact(
        "neighborhood_attention",
        inputs,
        {"num_heads": heads, "kernel_size": 7, "dilation": 1},
        every=size in ((8, 8), (9, 16), (24, 8)) and dtype == torch.float16,
        of=has_neighbors_in_registers,
    )


@pytest.mark.parametrize("what", ["large scores", "a table of 1e3", "keys that are all alike"])
def test_neighborhood_attention_in_registers_holds_what_is_hard(what):
    inputs = {name: value.half() for name, value in neighborhood_inputs(8, 9, 7, heads=1, batch=1).items()}
    inputs["relative_position_bias_table"] = inputs["relative_position_bias_table"].float()
    match what:
        case "large scores":
            inputs["qkv"][..., :16] *= 1000
        case "a table of 1e3":
            inputs["relative_position_bias_table"] *= 1e3
        case _:
            inputs["qkv"][..., 16:32] = 0
    attributes = {"num_heads": 1, "kernel_size": 7, "dilation": 1}
    assert_kernel_is_exact("neighborhood_attention", inputs, attributes, of=has_neighbors_in_registers)


@pytest.mark.parametrize("width", [*range(7, 34), 56])
def test_the_keys_of_a_tile_hold_the_neighbors_of_its_queries(width):
    kernel = import_module("dat_deploy.plugins.neighborhood_attention.kernel")
    index, _ = neighborhood_index(width, 7, 1)
    columns, keys = kernel._register_columns(width, 7)
    assert keys in (8, 10, 12, 14)
    for own in range(0, width, columns):
        first = min(own, width - columns)
        origin = max(min(int(index[first, 0]), width - keys), 0)
        last = min(first + columns, width) - 1
        assert origin <= int(index[first, 0])
        assert int(index[last, -1]) < origin + keys


def test_a_table_may_be_float32_beside_half_precision(locations):
    inputs = attention_inputs(locations, (7, 7), dtype=torch.float16)
    inputs["relative_position_bias_table"] = torch.randn(4, 13, 13)
    assert_kernel_is_exact("deformable_attention", inputs, {"num_heads": 4, "half_pixel_queries": 0})
    inputs = {name: value.half() for name, value in neighborhood_inputs(4, 9, 7).items()}
    inputs["padding_qkv"], inputs["relative_position_bias_table"] = torch.randn(96), torch.randn(2, 13, 13)
    assert_kernel_is_exact("neighborhood_attention", inputs, {"num_heads": 2, "kernel_size": 7, "dilation": 1})


@pytest.fixture
def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch operators launch their kernels, here in the interpreter, whatever the device of their tensors."""
    monkeypatch.setattr(dispatch, "kernel_computes", lambda _: True)
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)


@pytest.mark.usefixtures("kernels_on_a_cpu")
def test_a_network_of_kernels_computes_what_the_reference_network_does(mini_pp):
    mini = replace(
        VARIANTS["tiny"],
        name="mini",
        image_size=(64, 128),
        stages=(
            StageConfig(32, "LS", 1, 2),
            StageConfig(32, "L", 2, 2),
            StageConfig(64, "D", 4, 2, 0, 2, 5, 1, 2.0),
            StageConfig(64, "LD", 4, 2, 0, 2, 3, 1, 2.0),
        ),
    )
    for variant, operators in (
        (mini, {"window_attention": 4, "deformable_sample": 2, "deformable_attention": 2}),
        (
            mini_pp.with_image_size(64, 96),
            {"neighborhood_attention": 3, "deformable_sample": 3, "deformable_attention": 3},
        ),
    ):
        image = torch.randn(1, 3, *variant.image_size)
        expected = load_model(variant)(image)
        with recorded_jobs() as jobs:
            got = load_model(variant, fused=True)(image)
        assert Counter(job.operator for job in jobs) == operators
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("kernels_on_a_cpu")
def test_operators_take_what_is_not_contiguous_or_not_aligned(locations):
    value = torch.randn(2, 24, 5, 7)
    points = locations("network", (2, 2, 3, 4), (5, 7))
    got = plugins.deformable_sample(value.permute(0, 2, 3, 1), points.double())
    expected = REFERENCE.deformable_sample(value.permute(0, 2, 3, 1).contiguous(), points)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert plugins.deformable_sample(torch.empty(0, 5, 7, 24), points[:0]).shape == (0, 12, 24)


@pytest.mark.usefixtures("kernels_on_a_cpu")
def test_tune_keeps_the_fastest_configuration_and_the_operators_then_take_it(monkeypatch, tmp_path, mini_pp):
    """All but the clock: the third candidate is said to be the fastest. One that is wrong is left out."""
    monkeypatch.setenv("DAT_DEPLOY_CONFIGURATIONS", str(tmp_path / "kept.json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(tune_network, "DEVICE", "cpu")
    monkeypatch.setattr(
        tune_network, "measured", lambda candidates, run: {c: abs(i - 2) + 1.0 for i, c in enumerate(candidates)}
    )
    run = Job.run

    def spoilt(job: Job, configuration: Configuration, *rest: object) -> None:
        run(job, configuration, *rest)
        if job.operator == "deformable_sample" and configuration == job.kernel.configurations(job.problem)[1]:
            job.output[..., -1] += 1

    monkeypatch.setattr(Job, "run", spoilt)
    tuning = tune(mini_pp.with_image_size(64, 64), batches=[1], precision="fp16")
    for row in tuning.launches:
        every = import_module(f"dat_deploy.plugins.{row.operator}.kernel").configurations(row.problem)
        assert row.wrong == ((every[1],) if row.operator == "deformable_sample" else ())
    tables = {row.problem.get("table_bytes") for row in tuning.launches}
    assert tables == {4, None}  # in float32, as `half_network` has them
    assert {row.problem["element_bytes"] for row in tuning.launches} == {2}
    assert {row.operator for row in tuning.launches} == {
        "deformable_sample",
        "deformable_attention",
        "neighborhood_attention",
    }
    sample = next(row for row in tuning.launches if row.operator == "deformable_sample")
    kernel = import_module("dat_deploy.plugins.deformable_sample.kernel")
    assert sample.configuration == kernel.configurations(sample.problem)[3]  # the third that is right
    assert (sample.microseconds, sample.default_microseconds) == (1.0, 3.0)

    launched = []
    monkeypatch.setattr(Job, "run", lambda job, configuration, _: launched.append((job.operator, configuration)))
    value = torch.randn(1, sample.problem["height"], sample.problem["width"], sample.problem["channels"]).half()
    points = sample.problem["points"]
    plugins.deformable_sample(value, torch.zeros(1, sample.problem["offset_groups"], 1, points, 2))
    assert launched == [("deformable_sample", sample.configuration)]
