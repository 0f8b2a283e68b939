"""Operators on the GPU: whether each is right, in every way that it can be launched, and how fast beside its peers.

"Right" is derived: the error against float64 may be twice that of eager PyTorch in the same type, and `slack` of the
largest output.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import Case
from gpu_record import Found
from torch import Tensor

from dat_deploy.networks.dat.model import FUSED, REFERENCE, reference_points
from dat_deploy.plugins import tuning
from dat_deploy.plugins.deformable_attention.reference import interpolated_bias
from dat_deploy.plugins.dispatch import Job, recorded_jobs
from dat_deploy.plugins.launch import Configuration
from dat_deploy.plugins.operator import specification
from dat_deploy.plugins.window_attention.reference import (
    relative_position_index,
    shifted_window_mask,
    window_merge,
    window_partition,
)
from dat_deploy.precision import PRECISIONS

__all__ = ["ceilings", "check", "dtypes_of", "make_inputs", "measure", "slack", "tuned_share"]

SHARED = ("relative_position_bias_table", "padding_qkv")  # by all images
Inputs = dict[str, Tensor]
Call = Callable[[], Tensor]


def slack(dtype: torch.dtype) -> float:
    """Half a unit in the last place, for results are rounded; float32's exponentials are approximate to 2 units."""
    return max(1e-6, torch.finfo(dtype).eps / 2)


def dtypes_of(case: Case, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of the inputs and of "output", as the networks that ship have them."""
    roles = specification(case.operator).roles
    return {name: torch.float32 if role.stays_float32 else dtype for name, role in roles.items()} | {"output": dtype}


def make_inputs(
    case: Case, seed: int, device: torch.device, dtype: torch.dtype = torch.float16, *, stress: bool = False
) -> Inputs:
    """Random tensors by the names of the operator's arguments, in their order; points lie where networks put them.

    Args:
        stress: in the second image points lie on pixels, on half pixels and on the border, too, and in the third also
            outside, where a kernel takes another way than it does for an image of the first kind.
    """
    generator = torch.Generator(device).manual_seed(seed)
    scales = {"relative_position_bias_table": 0.5, "padding_qkv": 0.1}
    inputs = {}
    for name, kind in list(dtypes_of(case, dtype).items())[:-1]:
        random = torch.randn(case.inputs[name], generator=generator, device=device)
        if name == "sampling_locations":
            random = _locations(case, random, stress=stress)
        inputs[name] = (scales.get(name, 1.0) * random).to(kind)
    return inputs


def _locations(case: Case, random: Tensor, *, stress: bool) -> Tensor:
    """[B, G, Hk, Wk, 2] in the place of standard normal numbers."""
    points = reference_points(*case.sampled, half_pixel=case.half_pixel, device=random.device)
    reach = torch.tensor(case.sampled, device=random.device)
    located = points + random.tanh() * 2 / reach if case.half_pixel else (points + 0.1 * random).clamp(-1, 1)
    if not stress:
        return located
    steps = torch.tensor([max(case.height - 1, 1), max(case.width - 1, 1)], device=random.device) / 2
    pixels = ((located + 1) * steps).round() / steps - 1
    kinds = torch.stack([located, pixels, pixels + 0.5 / steps, located.sign(), 1.7 * located])
    point = torch.arange(math.prod(case.sampled), device=random.device).reshape(*case.sampled, 1)
    which = torch.stack([point % count for count in itertools.islice(itertools.cycle((1, 4, 5)), case.batch)])
    return kinds.gather(0, which[None, :, None].expand(1, *random.shape))[0]


def judged(case: Case, inputs: Inputs, results: dict[str, Tensor]) -> tuple[dict[str, float], str | None]:
    """The largest error beside what is allowed, and a sentence if any is too large; of many images in the first and
    the last."""
    slots = list(range(case.batch)) if case.batch <= 4 else [0, case.batch - 1]
    picked = {name: x if name in SHARED else x[slots] for name, x in inputs.items()}
    reference = getattr(REFERENCE, case.operator)
    exact = reference(**{name: x.double() for name, x in picked.items()}, **case.attributes)
    eager = (reference(**picked, **case.attributes).double() - exact).abs().max().item()
    largest = exact.abs().max().item()
    allowed = 2 * eager + slack(next(iter(inputs.values())).dtype) * largest
    errors = {what: (result[slots].double() - exact).abs().max().item() for what, result in results.items()}
    worst = max(errors, key=lambda what: math.inf if math.isnan(errors[what]) else errors[what])
    numbers = {"max_error": errors[worst], "allowed_error": allowed, "eager_error": eager, "largest_output": largest}
    sentence = f"wrong, {worst}: off by {errors[worst]:.3g} where {allowed:.3g} is allowed"
    return numbers, None if errors[worst] <= allowed else sentence  # a NaN is wrong, too


def check(case: Case, what: str, gpu: Any, *, dtype: str = "fp16") -> Found:
    """Whether the kernel is right.

    Args:
        what: default, as the operator launches it; configurations, in each; unaligned, on views that begin anywhere;
            graph, replayed from a CUDA graph on other inputs.
    """
    operator, kind = functools.partial(getattr(FUSED, case.operator), **case.attributes), PRECISIONS[dtype].dtype
    inputs = make_inputs(case, 1, gpu.device, kind, stress=True)
    if what == "unaligned":  # one element into a buffer
        buffers = {name: x.new_empty(x.numel() + 1)[1:] for name, x in inputs.items()}
        inputs = {name: buffers[name].view(x.shape).copy_(x) for name, x in inputs.items()}
    with recorded_jobs() as jobs:
        results = {"as launched": operator(**inputs).clone()}
    if len(jobs) != 1:
        return Found({}, error=f"{len(jobs)} kernels were launched where one must be: the reference computed this")
    [job] = jobs
    every = job.kernel.configurations(job.problem)
    for configuration in every if what == "configurations" else [_taken(job)[0]]:
        job.output.fill_(math.nan)  # what is not written shows
        job.run(configuration)
        results[describe(configuration)] = job.output.clone()
    if what == "graph":
        held: dict[str, Tensor] = {}

        def call() -> Tensor:
            held["output"] = operator(**inputs)
            return held["output"]

        replay, captured = gpu.capture(call), held["output"]
        for name, other in make_inputs(case, 2, gpu.device, kind, stress=True).items():
            inputs[name].copy_(other)
        captured.fill_(math.nan)
        replay()
        gpu.release()
        results = {"replayed": captured}
    numbers, error = judged(case, inputs, results)
    return Found(numbers | {"launches": len(results)}, error=error)


def _taken(job: Job) -> tuple[Configuration, bool]:
    """What the operator launches, and whether it was measured to be the fastest here."""
    tuned = tuning.tuned_configuration(job.operator, job.problem, job.output)
    return tuned or job.kernel.configurations(job.problem)[0], tuned is not None


def tuned_share(jobs: Sequence[Job]) -> float:
    """Of these launches, how many are in a configuration that was measured to be the fastest here."""
    return sum(_taken(job)[1] for job in jobs) / len(jobs)


def describe(configuration: Configuration) -> str:
    tiles = " ".join(f"{name}={size}" for name, size in configuration.tiles)
    limit = f" registers<={configuration.max_registers}" if configuration.max_registers else ""
    return f"{tiles} warps={configuration.num_warps} stages={configuration.num_stages}{limit}"


# The peers. What each makes is the call that is timed; what does not depend on the images is made before.


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, ..., C] -> [B, M, N, D]"""
    return x.reshape(x.shape[0], -1, num_heads, x.shape[-1] // num_heads).transpose(1, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, heads: int, score_mod: Any, block_mask: Any = None) -> Tensor:
    """FlexAttention of [B, ..., C]; the result has the shape of `query`."""
    from torch.nn.attention.flex_attention import flex_attention

    parts = (_heads(x, heads) for x in (query, key, value))
    out = flex_attention(*parts, score_mod=score_mod, block_mask=block_mask)
    return out.transpose(1, 2).reshape(query.shape)


def flex_deformable_attention(
    query: Tensor, key: Tensor, value: Tensor, locations: Tensor, table: Tensor, heads: int, half_pixel: bool
) -> Tensor:
    """The bias is read from the table where the score is made: four entries a score, zeros outside."""
    (_, height, width, _), (_, table_height, table_width) = query.shape, table.shape
    heads_a_group, (ys, xs) = heads // locations.shape[1], locations.flatten(2, 3).unbind(-1)

    def coordinate(index: Tensor, size: int, location: Tensor, table_size: int) -> Tensor:
        position = (index + 0.5) / size * 2 - 1 if half_pixel else index / max(size - 1, 1) * 2 - 1
        return ((position - location) * 0.5 + 1) * 0.5 * (table_size - 1)

    def score_mod(score: Tensor, b: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        group = head // heads_a_group
        y = coordinate(query_index // width, height, ys[b, group, key_index], table_height)
        x = coordinate(query_index % width, width, xs[b, group, key_index], table_width)
        top, left = y.floor(), x.floor()

        def entry(row: Tensor, column: Tensor) -> Tensor:
            inside = (row >= 0) & (row < table_height) & (column >= 0) & (column < table_width)
            row, column = row.clamp(0, table_height - 1), column.clamp(0, table_width - 1)
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
            return torch.where(inside, weight * table[head, row.to(torch.int32), column.to(torch.int32)], 0.0)

        upper = entry(top, left) + entry(top, left + 1)
        return score + upper + entry(top + 1, left) + entry(top + 1, left + 1)

    return _flex(query, key, value, heads, score_mod)


def flex_with_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int) -> Tensor:
    """The bias [B, M, N, Ns] is read where the score is made."""
    return _flex(query, key, value, heads, lambda score, b, head, m, n: score + bias[b, head, m, n])


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int) -> Tensor:
    """scaled_dot_product_attention with the bias as its mask."""
    out = F.scaled_dot_product_attention(*(_heads(x, heads) for x in (query, key, value)), attn_mask=bias)
    return out.transpose(1, 2).reshape(query.shape)


def _aligned(bias: Tensor) -> Tensor:
    """The same in rows that begin at multiples of 8, without which SDPA copies its mask in every call."""
    keys = bias.shape[-1]
    return F.pad(bias, (0, -keys % 8))[..., :keys]


def _in_windows(attend: Callable[..., Tensor], qkv: Tensor, bias: Tensor, case: Case) -> Tensor:
    """Windows are the batch; `attend` takes query, key, value, bias and heads."""
    shift, size = case.shift_size, case.window_size
    windows = window_partition(qkv.roll((-shift, -shift), dims=(1, 2)) if shift else qkv, size)  # B, nW, Ws², 3C
    out = attend(*windows.flatten(0, 1).chunk(3, dim=-1), bias, case.heads)
    out = window_merge(out.reshape(*windows.shape[:3], case.channels), case.height, case.width, size)
    return out.roll((shift, shift), dims=(1, 2)) if shift else out


def flex_window_attention(qkv: Tensor, bias: Tensor, mask: Tensor, case: Case) -> Tensor:
    """bias: [M, Ws², Ws²]; mask: [nW, Ws², Ws²], or [1, Ws², Ws²] for all windows."""
    count = mask.shape[0]

    def attend(query: Tensor, key: Tensor, value: Tensor, _: Tensor, heads: int) -> Tensor:
        return _flex(query, key, value, heads, lambda s, b, head, m, n: s + bias[head, m, n] + mask[b % count, m, n])

    return _in_windows(attend, qkv, bias, case)


def flex_neighborhood_attention(qkv: Tensor, table: Tensor, block_mask: Any, case: Case) -> Tensor:
    """The block mask leaves the neighbors; the map must not be smaller than their square."""
    width, kernel_size = case.width, case.kernel_size

    def entry(query_position: Tensor, key_position: Tensor) -> Tensor:
        # What is no neighbor is masked, whatever it reads; it must only read inside of the table.
        return (key_position - query_position + kernel_size - 1).clamp(0, 2 * kernel_size - 2)

    def score_mod(score: Tensor, b: Tensor, head: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return score + table[head, entry(m // width, n // width), entry(m % width, n % width)]

    return _flex(*qkv.chunk(3, dim=-1), case.heads, score_mod, block_mask)


@functools.lru_cache(maxsize=2)
def _block_mask(case: Case, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def is_neighbor(query: Tensor, key: Tensor, size: int) -> Tensor:
        first = (query - case.kernel_size // 2).clamp(0, size - case.kernel_size)
        return (key >= first) & (key < first + case.kernel_size)

    def mask_mod(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = is_neighbor(query // case.width, key // case.width, case.height)
        return rows & is_neighbor(query % case.width, key % case.width, case.width)

    pixels = case.height * case.width
    return create_block_mask(mask_mod, None, None, pixels, pixels, device=device)


def implementation(case: Case, name: str, gpu: Any) -> Callable[[Inputs], Call]:
    """Takes inputs and gives the call to be timed."""
    if name in ("fused", "eager", "compile"):
        operator = getattr(FUSED if name == "fused" else REFERENCE, case.operator)
        called = torch.compile(operator, dynamic=False) if name == "compile" else operator
        return lambda inputs: functools.partial(called, **inputs, **case.attributes)
    compiled = functools.partial(torch.compile, dynamic=False)
    if case.operator == "deformable_attention":
        if name == "flex":
            flex = compiled(flex_deformable_attention)
            return lambda inputs: functools.partial(flex, *inputs.values(), *case.attributes.values())
        attend = sdpa if name == "sdpa" else compiled(flex_with_bias)

        def with_bias(inputs: Inputs) -> Call:
            query, key, value, locations, table = inputs.values()
            bias = interpolated_bias(table, locations, case.height, case.width, case.half_pixel).to(query.dtype)
            return functools.partial(attend, query, key, value, _aligned(bias), case.heads)

        return with_bias
    if case.operator == "neighborhood_attention":
        flex = compiled(flex_neighborhood_attention)
        return lambda inputs: functools.partial(
            flex, inputs["qkv"], inputs["relative_position_bias_table"], _block_mask(case, gpu.device.type), case
        )

    def in_windows(inputs: Inputs) -> Call:
        qkv, table = inputs.values()
        bias = table[relative_position_index(case.window_size, table.device)].permute(2, 0, 1).contiguous()
        mask = table.new_zeros(1, *bias.shape[1:])
        if case.shift_size:
            mask = shifted_window_mask(case.height, case.width, case.window_size, case.shift_size, table.device)
        if name == "flex":
            return functools.partial(compiled(flex_window_attention), qkv, bias, mask, case)
        of_windows = (bias + mask[:, None]).to(qkv.dtype)  # 1 or nW, M, Ws², Ws²
        of_all = _aligned(of_windows if len(mask) == 1 else of_windows.repeat(case.batch, 1, 1, 1))
        return functools.partial(_in_windows, sdpa, qkv, of_all, case)

    return in_windows


def ceilings(gpu: Any, *, size: int = 8192, words: int = 2**29, milliseconds: int = 1500) -> Found:
    """What this GPU reaches: products of random float16, and additions by the bytes they read and write."""
    a, b = (torch.randn(size, size, device=gpu.device).half() for _ in range(2))
    product = torch.empty_like(a)
    products, _ = gpu.times(lambda: torch.mm(a, b, out=product), milliseconds=milliseconds)
    source, copy = torch.randn(words, device=gpu.device), torch.empty(words, device=gpu.device)
    # Not `copy_`, which in a CUDA graph is a copy of the driver's and slower than a kernel.
    copies, _ = gpu.times(lambda: torch.add(source, 1, out=copy), milliseconds=milliseconds)
    numbers = {"tflop_per_s": 2 * size**3 / products["median"] / 1e6, "tb_per_s": 8 * words / copies["median"] / 1e6}
    numbers |= {"product_mhz": products["sm_mhz"], "copy_mhz": copies["sm_mhz"]}
    return Found(numbers, (f"float16 product of {size}x{size}; addition of 1 to {4 * words / 2**30:.0f} GiB",))


def measure(case: Case, name: str, gpu: Any) -> Found:
    """One implementation at one shape: right or wrong, how long, and the work that its floor is made of."""
    torch.compiler.reset()
    inputs = make_inputs(case, 0, gpu.device)
    call = implementation(case, name, gpu)(inputs)
    with recorded_jobs() as jobs:
        right, error = judged(case, inputs, {name: call()})
    gpu.release()
    took, how = gpu.times(call)
    numbers = {"median_us": took["median"], "cold_us": took["cold_median"]}
    numbers |= {"samples": took["samples"], "sm_mhz": took["sm_mhz"]} | right
    numbers |= {"flops": case.flops, "bytes": case.bytes_moved, "exponentials": case.exponentials}
    notes = [how, *(f"{describe(_taken(job)[0])}" for job in jobs)]
    notes += [f"{name}: its bias was computed before"] if name in ("flex+bias", "sdpa") else []
    if jobs:
        numbers["tuned"] = tuned_share(jobs)
    return Found(numbers, tuple(notes), error)
