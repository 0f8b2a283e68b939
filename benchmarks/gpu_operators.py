"""The operators at the shapes of all variants, and which configuration of each kernel is the fastest there.

The work of an operator is counted alike for all implementations: FLOPs are the two matrix products of attention, and
bytes are each input read once and the output written once. Whichever of the two takes longer is the roofline.
"""

import contextlib
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_record import Found, Job, Record
from torch import Tensor

from dat_deploy.errors import ShapeError
from dat_deploy.model import FUSED, REFERENCE, reference_points
from dat_deploy.plugins import tuning
from dat_deploy.plugins.launch import Configuration, Launch, Problem
from dat_deploy.plugins.window_attention.reference import (
    relative_position_index,
    shifted_window_mask,
    window_merge,
    window_partition,
)
from dat_deploy.variants import RELEASED, VARIANTS, Variant

__all__ = ["Case", "cases", "ceilings_jobs", "jobs", "tune_jobs"]

SIZES = ((224, 224), (384, 384))
DETECTOR = ("pp-tiny", (800, 1344))
BATCHES = (1, 64)
BAR = ("base-384", "384x384 stage 3")  # the shape of the project's targets, batch 64
FIRST = ("tiny", "base", "base-384", "pp-tiny")  # variants whose shapes are measured first
IMPLEMENTATIONS = ("fused", "eager", "compile", "flex")
COMPILERS = ("compile", "flex")
SECONDS = {"fused": 2.0, "eager": 1.5, "compile": 12.0, "flex": 15.0}  # guesses, until one was measured
WEIGHTS = ("relative_position_bias_table", "padding_qkv")  # not one an image
WRONG = 0.03  # of the largest output: float16 is within 0.01, and a bias that is read wrongly is not
MOST_SETS, MOST_SET_BYTES = 32, 4 * 2**30
COMPILE_THREADS = 12
Inputs = dict[str, Tensor]
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One operator at one shape; the fields mean what they mean in `variants.StageConfig`.

    Attributes:
        sampled: (Hk, Wk); table: (Th, Tw). Those of other operators are 0.
    """

    operator: str
    batch: int
    height: int
    width: int
    channels: int
    heads: int
    sampled: tuple[int, int] = (0, 0)
    groups: int = 0
    table: tuple[int, int] = (0, 0)
    half_pixel: bool = False
    window_size: int = 0
    shift_size: int = 0
    kernel_size: int = 0

    @property
    def shape(self) -> str:
        """All that tells it from other cases of the operator, but for the batch."""
        parts = [f"{self.height}x{self.width}x{self.channels}"]
        if self.heads:
            parts.append(f"{self.heads} heads")
        if self.groups:
            parts.append(f"{self.sampled[0]}x{self.sampled[1]} points in {self.groups} groups")
        if self.table[0]:
            frame = "half pixel" if self.half_pixel else "corners"
            parts.append(f"table {self.table[0]}x{self.table[1]}, {frame}")
        if self.window_size:
            parts.append(f"windows of {self.window_size}" + (f" shifted by {self.shift_size}" * bool(self.shift_size)))
        if self.kernel_size:
            parts.append(f"neighbors {self.kernel_size}x{self.kernel_size}")
        return ", ".join(parts)

    @property
    def key(self) -> str:
        return f"{self.operator}/batch {self.batch}/{self.shape}"

    @property
    def output_shape(self) -> tuple[int, ...]:
        if self.operator == "deformable_sample":
            return self.batch, math.prod(self.sampled), self.channels
        return self.batch, self.height, self.width, self.channels

    @property
    def attributes(self) -> dict[str, int]:
        """What the operator takes beside tensors, in order."""
        if self.operator == "deformable_attention":
            return {"num_heads": self.heads, "half_pixel_queries": self.half_pixel}
        if self.operator == "window_attention":
            return {"num_heads": self.heads, "window_size": self.window_size, "shift_size": self.shift_size}
        if self.operator == "neighborhood_attention":
            return {"num_heads": self.heads, "kernel_size": self.kernel_size, "dilation": 1}
        return {}

    @property
    def flops(self) -> int:
        """Of q · k and of the weighted sum of values, two each multiply-add; of a sample, its four multiply-adds."""
        pixels, points = self.height * self.width, self.sampled[0] * self.sampled[1]
        if self.operator == "deformable_sample":
            return 8 * self.batch * points * self.channels
        keys = points or self.window_size**2 or self.kernel_size**2  # of each query
        return 4 * self.batch * pixels * keys * self.channels

    def bytes_moved(self, element_bytes: int = 2) -> int:
        """Each input once, the output once. Of a sampled map at most the four pixels around each point are read."""
        pixels, points = self.height * self.width, self.sampled[0] * self.sampled[1]
        locations = 8 * self.batch * self.groups * points  # y and x in float32
        if self.operator == "deformable_sample":
            return locations + element_bytes * self.batch * self.channels * (min(pixels, 4 * points) + points)
        if self.operator == "deformable_attention":
            table = element_bytes * self.heads * math.prod(self.table)
            return locations + table + element_bytes * self.batch * self.channels * 2 * (pixels + points)
        side = 2 * (self.window_size or self.kernel_size) - 1
        weights = element_bytes * (self.heads * side**2 + 3 * self.channels * bool(self.kernel_size))
        return weights + element_bytes * self.batch * pixels * 4 * self.channels

    def roofline_us(self, tflop_per_s: float, tb_per_s: float) -> float:
        return max(self.flops / tflop_per_s, self.bytes_moved() / tb_per_s) / 1e6


def cases() -> dict[Case, list[str]]:
    """Every shape once, with those whom it serves, such as `base-384 384x384 stage 3` (the papers count from 1)."""
    found: dict[Case, list[str]] = {}
    wanted = [(name, size, BATCHES) for name in RELEASED for size in SIZES] + [(*DETECTOR, (1,))]
    for name, size, batches in wanted:
        with contextlib.suppress(ShapeError):  # windows do not tile every size
            variant = VARIANTS[name].with_image_size(*size)
            for i in range(len(variant.stages)):
                for case in _of_stage(variant, i):
                    for batch in batches:
                        users = found.setdefault(replace(case, batch=batch), [])
                        users.append(f"{name} {size[0]}x{size[1]} stage {i + 1}")
    return found


def _of_stage(variant: Variant, index: int) -> Iterator[Case]:
    stage, (height, width) = variant.stages[index], variant.feature_map(index)
    attention = functools.partial(Case, batch=1, height=height, width=width, channels=stage.channels, heads=stage.heads)
    if "L" in stage.blocks:
        yield attention("window_attention", window_size=stage.window_size)
    if "S" in stage.blocks:
        yield attention("window_attention", window_size=stage.window_size, shift_size=stage.shift_size)
    if "N" in stage.blocks:
        yield attention("neighborhood_attention", kernel_size=stage.neighborhood_size)
    if "D" in stage.blocks:
        sampled, groups = stage.sampled_map(height, width), stage.offset_groups
        table, half_pixel = variant.bias_table(index), variant.half_pixel_queries
        yield attention("deformable_attention", sampled=sampled, groups=groups, table=table, half_pixel=half_pixel)
        yield attention("deformable_sample", heads=0, sampled=sampled, groups=groups)


def is_bar(case: Case, users: list[str]) -> bool:
    return case.operator == "deformable_attention" and case.batch == 64 and " ".join(BAR) in users


def make_inputs(case: Case, seed: int, device: torch.device, dtype: torch.dtype = torch.float16) -> Inputs:
    """Random tensors by the names of the operator's arguments, in their order; points lie where networks put them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    batch, height, width, channels = case.batch, case.height, case.width, case.channels
    if case.operator in ("window_attention", "neighborhood_attention"):
        side = 2 * (case.window_size or case.kernel_size) - 1
        inputs = {"qkv": normal(batch, height, width, 3 * channels)}
        if case.kernel_size:
            inputs["padding_qkv"] = normal(3 * channels, scale=0.1)
        shape = (case.heads, side, side) if case.kernel_size else (side**2, case.heads)
        return inputs | {"relative_position_bias_table": normal(*shape, scale=0.5)}
    points = reference_points(*case.sampled, half_pixel=case.half_pixel, device=device)
    offsets = normal(batch, case.groups, *case.sampled, 2, dtype=torch.float32)
    reach = torch.tensor(case.sampled, device=device)
    locations = points + offsets.tanh() * 2 / reach if case.half_pixel else (points + 0.1 * offsets).clamp(-1, 1)
    if case.operator == "deformable_sample":
        return {"value": normal(batch, height, width, channels), "sampling_locations": locations}
    keys = math.prod(case.sampled)
    return {
        "query": normal(batch, height, width, channels),
        "key": normal(batch, keys, channels),
        "value": normal(batch, keys, channels),
        "sampling_locations": locations,
        "relative_position_bias_table": normal(case.heads, *case.table, scale=0.5),
    }


# FlexAttention: what each operator adds to a score is a score_mod; what is static is made before the clock starts.


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, ..., C] -> [B, M, N, D]"""
    return x.reshape(x.shape[0], -1, num_heads, x.shape[-1] // num_heads).transpose(1, 2)


def flex_deformable_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sampling_locations: Tensor,
    relative_position_bias_table: Tensor,
    num_heads: int,
    half_pixel_queries: bool,
) -> Tensor:
    """The bias is read from the table where the score is made: four entries a score, zeros outside."""
    from torch.nn.attention.flex_attention import flex_attention

    batch, height, width, channels = query.shape
    groups = sampling_locations.shape[1]
    heads_a_group = num_heads // groups
    locations, table = sampling_locations.reshape(batch, groups, -1, 2), relative_position_bias_table
    _, table_height, table_width = table.shape

    def coordinate(index: Tensor, size: int, location: Tensor, table_size: int) -> Tensor:
        position = (index + 0.5) / size * 2 - 1 if half_pixel_queries else index / max(size - 1, 1) * 2 - 1
        return ((position - location) * 0.5 + 1) * 0.5 * (table_size - 1)

    def score_mod(score: Tensor, b: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        group = head // heads_a_group
        y = coordinate(query_index // width, height, locations[b, group, key_index, 0], table_height)
        x = coordinate(query_index % width, width, locations[b, group, key_index, 1], table_width)
        top, left = y.floor(), x.floor()

        def entry(row: Tensor, column: Tensor) -> Tensor:
            inside = (row >= 0) & (row < table_height) & (column >= 0) & (column < table_width)
            row, column = row.clamp(0, table_height - 1), column.clamp(0, table_width - 1)
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
            return torch.where(inside, weight * table[head, row.to(torch.int32), column.to(torch.int32)], 0.0)

        upper = entry(top, left) + entry(top, left + 1)
        return score + upper + entry(top + 1, left) + entry(top + 1, left + 1)

    out = flex_attention(_heads(query, num_heads), _heads(key, num_heads), _heads(value, num_heads), score_mod)
    return out.transpose(1, 2).reshape(batch, height, width, channels)


def flex_window_attention(
    qkv: Tensor, bias: Tensor, mask: Tensor | None, num_heads: int, window_size: int, shift_size: int
) -> Tensor:
    """Windows are the batch. bias: [M, Ws², Ws²]; mask: [nW, Ws², Ws²] or None."""
    from torch.nn.attention.flex_attention import flex_attention

    batch, height, width, channels3 = qkv.shape
    if shift_size:
        qkv = qkv.roll((-shift_size, -shift_size), dims=(1, 2))
    windows = window_partition(qkv, window_size)  # B, nW, Ws², 3C
    count = windows.shape[1]
    query, key, value = (_heads(part, num_heads) for part in windows.flatten(0, 1).chunk(3, dim=-1))

    def score_mod(score: Tensor, window: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        score = score + bias[head, query_index, key_index]
        return score if mask is None else score + mask[window % count, query_index, key_index]

    out = flex_attention(query, key, value, score_mod).transpose(1, 2)  # B·nW, Ws², M, D
    out = window_merge(out.reshape(batch, count, window_size**2, channels3 // 3), height, width, window_size)
    return out.roll((shift_size, shift_size), dims=(1, 2)) if shift_size else out


def flex_neighborhood_attention(
    qkv: Tensor, table: Tensor, block_mask: Any, num_heads: int, kernel_size: int
) -> Tensor:
    """The block mask leaves the neighbors; the map must not be smaller than their square."""
    from torch.nn.attention.flex_attention import flex_attention

    batch, height, width, channels3 = qkv.shape
    query, key, value = (_heads(part, num_heads) for part in qkv.chunk(3, dim=-1))

    def entry(query_position: Tensor, key_position: Tensor) -> Tensor:
        # What is no neighbor is masked, whatever it reads; it must only read inside of the table.
        return (key_position - query_position + kernel_size - 1).clamp(0, 2 * kernel_size - 2)

    def score_mod(score: Tensor, b: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        row = entry(query_index // width, key_index // width)
        return score + table[head, row, entry(query_index % width, key_index % width)]

    out = flex_attention(query, key, value, score_mod, block_mask=block_mask)
    return out.transpose(1, 2).reshape(batch, height, width, channels3 // 3)


def neighborhood_mask(height: int, width: int, kernel_size: int) -> Callable[..., Tensor]:
    """mask_mod of neighborhood attention without dilation."""

    def is_neighbor(query: Tensor, key: Tensor, size: int) -> Tensor:
        first = (query - kernel_size // 2).clamp(0, size - kernel_size)
        return (key >= first) & (key < first + kernel_size)

    def mask_mod(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = is_neighbor(query // width, key // width, height)
        return rows & is_neighbor(query % width, key % width, width)

    return mask_mod


def implementation(case: Case, name: str, compile_: Callable[..., Any]) -> Callable[[Inputs], Call]:
    """Takes inputs and gives the call to be timed; what does not depend on the images is made before.

    Raises:
        ValueError: if FlexAttention does not apply.
    """
    if name != "flex":
        operator = getattr(FUSED if name == "fused" else REFERENCE, case.operator)
        called = compile_(operator) if name == "compile" else operator
        return lambda inputs: functools.partial(called, **inputs, **case.attributes)
    if case.operator == "deformable_attention":
        deformable = compile_(flex_deformable_attention)
        return lambda inputs: functools.partial(deformable, **inputs, **case.attributes)
    if case.operator == "window_attention":
        window = compile_(flex_window_attention)
        return lambda inputs: functools.partial(window, inputs["qkv"], *_window_bias(case, inputs), **case.attributes)
    if case.operator == "neighborhood_attention":
        neighborhood = compile_(flex_neighborhood_attention)
        block_mask = functools.cache(functools.partial(_block_mask, case))
        return lambda inputs: functools.partial(
            neighborhood,
            inputs["qkv"],
            inputs["relative_position_bias_table"],
            block_mask(inputs["qkv"].device.type),
            case.heads,
            case.kernel_size,
        )
    raise ValueError(f"{case.operator} is no attention: FlexAttention does not apply")


def _window_bias(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    table, size = inputs["relative_position_bias_table"], case.window_size
    bias = table[relative_position_index(size, table.device)].permute(2, 0, 1).contiguous()  # M, Ws², Ws²
    if not case.shift_size:
        return bias, None
    return bias, shifted_window_mask(case.height, case.width, size, case.shift_size, table.device)


def _block_mask(case: Case, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    pixels = case.height * case.width
    mask = neighborhood_mask(case.height, case.width, case.kernel_size)
    return create_block_mask(mask, None, None, pixels, pixels, device=device)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def input_sets(case: Case, gpu: Any) -> int:
    """As many as it takes for the caches to hold none of them when its turn comes again, up to a limit."""
    moved = case.bytes_moved()
    return max(1, min(MOST_SETS, math.ceil(3 * gpu.l2_bytes / moved), MOST_SET_BYTES // moved))


def max_error(case: Case, inputs: Inputs, got: Tensor) -> tuple[float, float]:
    """(largest error, largest value) in the first and last image, against the reference in float64."""
    slots = [0] if case.batch == 1 else [0, case.batch - 1]
    exact_inputs = {name: (x if name in WEIGHTS else x[slots]).double() for name, x in inputs.items()}
    exact = getattr(REFERENCE, case.operator)(**exact_inputs, **case.attributes)
    return (got[slots].double() - exact).abs().max().item(), exact.abs().max().item()


def ceilings(gpu: Any, *, size: int = 8192, words: int = 2**29) -> Found:
    """What this GPU reaches: a large matrix product in float16, and a large copy, its reads and its writes counted."""
    a, b = (torch.randn(size, size, device=gpu.device).half() for _ in range(2))
    product = torch.empty_like(a)
    products = gpu.time_calls([lambda: torch.mm(a, b, out=product)])
    source, copy = torch.randn(words, device=gpu.device), torch.empty(words, device=gpu.device)
    copies = gpu.time_calls([lambda: copy.copy_(source)])
    numbers = {"tflop_per_s": 2 * size**3 / products.median / 1e6, "tb_per_s": 2 * 4 * words / copies.median / 1e6}
    if gpu.ceilings:
        numbers |= {"datasheet_tflop_per_s": gpu.ceilings[0], "datasheet_tb_per_s": gpu.ceilings[1]}
    return Found(numbers, (f"float16 product of {size}x{size}; copy of {4 * words / 2**30:.0f} GiB",))


def measure(
    case: Case, name: str, gpu: Any, record: Record, *, compile_: Callable[..., Any] = _compile, dtype=torch.float16
) -> Found:
    """One implementation at one shape: right or wrong, how long, and what of its roofline."""
    torch.compiler.reset()
    sets = [make_inputs(case, seed, gpu.device, dtype) for seed in range(input_sets(case, gpu))]
    bind = implementation(case, name, compile_)
    calls = [bind(inputs) for inputs in sets]
    error, largest = max_error(case, sets[0], calls[0]())
    gpu.release()
    for call in calls[1:]:
        call()
    times = gpu.time_calls(calls)
    moved = case.bytes_moved()
    numbers = {
        "median_us": times.median,
        "p90_us": times.p90,
        "samples": times.samples,
        "calls_a_sample": times.calls,
        "bytes": moved,
        "flops": case.flops,
        "tb_per_s": moved / times.median / 1e6,
        "tflop_per_s": case.flops / times.median / 1e6,
        "max_error": error,
        "largest_output": largest,
        "input_sets": len(sets),
    }
    measured = record.rows.get("ceilings")
    if gpu.ceilings:
        numbers["share_of_datasheet_roofline"] = case.roofline_us(*gpu.ceilings) / times.median
    if measured and not measured.error:
        ceilings = (measured.numbers["tflop_per_s"], measured.numbers["tb_per_s"])
        numbers["share_of_measured_roofline"] = case.roofline_us(*ceilings) / times.median
    notes = [times.how]
    if name == "fused":
        configuration, is_tuned = configuration_of(case, sets[0])
        notes.append(f"{describe(configuration)}, {'as tuned' if is_tuned else 'by rule: not tuned'}")
    if len(sets) * moved < 2 * gpu.l2_bytes:
        notes.append(f"all {len(sets)} sets of inputs fit in the L2 cache")
    wrong = not error <= WRONG * largest  # a NaN is wrong, too
    sentence = f"wrong: off by {error:.3g} where the largest output is {largest:.3g}" if wrong else None
    return Found(numbers, tuple(notes), sentence)


def problem(case: Case, inputs: Inputs) -> Problem:
    """As the torch operator makes it."""
    kernel = importlib.import_module(f"dat_deploy.plugins.{case.operator}.kernel")
    shapes = {
        "deformable_attention": ("query", "key", "sampling_locations", "relative_position_bias_table"),
        "deformable_sample": ("value", "sampling_locations"),
    }.get(case.operator, ("qkv",))
    first = next(iter(inputs.values()))
    attributes = case.attributes.values()
    return kernel.problem(*(inputs[name].shape for name in shapes), *attributes, first.element_size())


def configuration_of(case: Case, inputs: Inputs) -> tuple[Configuration, bool]:
    """What the torch operator launches, and whether it was measured on this GPU."""
    kernel, of_case = importlib.import_module(f"dat_deploy.plugins.{case.operator}.kernel"), problem(case, inputs)
    tuned = tuning.tuned_configuration(case.operator, of_case, next(iter(inputs.values())))
    return tuned or kernel.configurations(of_case)[0], tuned is not None


def start(launch: Launch, inputs: Inputs, output: Tensor, *, warmup: bool = False) -> None:
    """Launch a kernel as the torch operators do, or only compile it."""
    arguments = (*(inputs[name] for name in launch.inputs), *launch.scalars.values(), output)
    options = {**launch.constants, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if warmup:
        launch.kernel.warmup(*arguments, grid=launch.grid, **options)
    else:
        launch.kernel[launch.grid](*arguments, **options)


def compile_together(launches: list[Launch], inputs: Inputs, output: Tensor) -> None:
    """Compile side by side. It only saves time: what fails here is met again, and told of, when it is launched."""
    with contextlib.suppress(Exception):
        from triton import AsyncCompileMode

        with ThreadPoolExecutor(COMPILE_THREADS) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for launch in launches:
                start(launch, inputs, output, warmup=True)


def describe(configuration: Configuration) -> str:
    tiles = " ".join(f"{name}={size}" for name, size in configuration.tiles)
    return f"{tiles} warps={configuration.num_warps} stages={configuration.num_stages}"


def tune(case: Case, gpu: Any) -> Found:
    """Every configuration that works, and the fastest kept for the operators."""
    kernel = importlib.import_module(f"dat_deploy.plugins.{case.operator}.kernel")
    sets = [make_inputs(case, seed, gpu.device) for seed in range(min(8, input_sets(case, gpu)))]
    output = next(iter(sets[0].values())).new_empty(case.output_shape)
    of_case = problem(case, sets[0])
    candidates = kernel.configurations(of_case)
    launches = {candidate: kernel.launch(of_case, candidate) for candidate in candidates}
    compile_together(list(launches.values()), sets[0], output)
    turns = itertools.cycle(sets)
    each_us = tuning.measured(candidates, lambda candidate: start(launches[candidate], next(turns), output))
    best = min(each_us, key=lambda candidate: each_us[candidate])
    tuning.store(gpu.name, [(case.operator, of_case, best, each_us[best])])
    numbers = {f"us {describe(candidate)}": microseconds for candidate, microseconds in each_us.items()}
    numbers |= {"best_us": each_us[best], "configurations": len(candidates)}
    failed = tuple(f"{describe(c)} does not run here" for c in candidates if c not in each_us)
    return Found(numbers, (f"fastest: {describe(best)}", *failed))


def _rank(users: list[str]) -> int:
    """0 for the shapes that are measured first."""
    variants = {user.split()[0] for user in users}
    return min((FIRST.index(name) for name in variants & set(FIRST)), default=len(FIRST))


def _labels(case: Case, users: list[str]) -> dict[str, str]:
    labels = {"operator": case.operator, "shape": case.shape, "batch": str(case.batch), "for": "; ".join(users)}
    return labels | {"bar": "yes"} if is_bar(case, users) else labels


def jobs() -> list[Job]:
    """All implementations at the shape of the targets; then, batch 64 first, ours and eager before what is compiled."""

    def order(item: tuple[Case, list[str], str]) -> tuple[int, ...]:
        case, users, name = item
        tier = 2 * (_rank(users) == len(FIRST) or case.batch != 64) + (name in COMPILERS)
        return -is_bar(case, users), tier, _rank(users), IMPLEMENTATIONS.index(name)

    def job(case: Case, users: list[str], name: str) -> Job:
        labels = _labels(case, users) | {"implementation": name}
        return Job(
            f"operators/{case.key}/{name}",
            "operators",
            f"operators {name}",
            labels,
            SECONDS[name],
            lambda gpu, record, path: measure(case, name, gpu, record),
        )

    items = [
        (case, users, name)
        for case, users in cases().items()
        for name in IMPLEMENTATIONS
        if name != "flex" or case.operator != "deformable_sample"
    ]
    return [job(*item) for item in sorted(items, key=order)]


def ceilings_jobs() -> list[Job]:
    return [Job("ceilings", "ceilings", "ceilings", {}, 5.0, lambda gpu, record, path: ceilings(gpu))]


def tune_jobs() -> list[Job]:
    def job(case: Case, users: list[str]) -> Job:
        labels = _labels(case, users)
        return Job(f"tune/{case.key}", "tune", "tune", labels, 3.0, lambda gpu, record, path: tune(case, gpu))

    ordered = sorted(cases().items(), key=lambda item: (not is_bar(*item), _rank(item[1]), -item[0].batch))
    return [job(*item) for item in ordered]
