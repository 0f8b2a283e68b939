"""Arithmetic on pairs of float16 numbers, which costs what one operation on float32 does.

A pair is an int32, its first number in the low half. Triton has no such type: on a GPU these are instructions of PTX
that every GPU since sm_53 has, and in Triton's interpreter, which takes none, the same arithmetic in float32.
"""

import triton
import triton.language as tl

__all__ = [
    "ASSEMBLY",
    "half2",
    "half2_first",
    "half2_firsts",
    "half2_fma",
    "half2_fma_of_first",
    "half2_fma_of_second",
    "half2_fnma_of_first",
    "half2_fnma_of_second",
    "half2_part_above",
    "half2_second",
    "half2_sub",
]

ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def half2_first(pair):
    return (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def half2_second(pair):
    return ((pair >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _half2_of_halves(a, b):
    return (a.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (b.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def half2(a, b):
    """A pair of two float32, rounded to nearest."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; cvt.rn.f16.f32 l, $1; cvt.rn.f16.f32 h, $2; mov.b32 $0, {l, h}; }",
            "=r,f,f",
            [a, b],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return _half2_of_halves(a.to(tl.float16), b.to(tl.float16))


@triton.jit
def half2_firsts(a, b):
    """The firsts of two pairs, as a pair."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (a & 0xFFFF) | (b << 16)


@triton.jit
def half2_sub(a, b):
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return _half2_of_halves(half2_first(a) - half2_first(b), half2_second(a) - half2_second(b))


@triton.jit
def half2_part_above(a, b):
    """max(a - b, 0) of numbers that are less than 1 apart; 0 for a NaN."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "sub.rn.sat.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        first, second = half2_first(a) - half2_first(b), half2_second(a) - half2_second(b)
        return _half2_of_halves(
            tl.where(first > 0, first, 0.0).to(tl.float16), tl.where(second > 0, second, 0.0).to(tl.float16)
        )


@triton.jit
def half2_fma(a, b, c):
    """a · b + c, rounded once."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        first = half2_first(a).to(tl.float32) * half2_first(b).to(tl.float32) + half2_first(c).to(tl.float32)
        second = half2_second(a).to(tl.float32) * half2_second(b).to(tl.float32) + half2_second(c).to(tl.float32)
        return _half2_of_halves(first.to(tl.float16), second.to(tl.float16))


@triton.jit
def half2_fma_of_first(a, b, c):
    """The first of a times both of b, plus c; the repetition is a modifier of the operand and costs nothing."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; .reg .b32 d; mov.b32 {l, h}, $1; mov.b32 d, {l, l}; fma.rn.f16x2 $0, d, $2, $3; }",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return half2_fma(_half2_of_halves(half2_first(a), half2_first(a)), b, c)


@triton.jit
def half2_fma_of_second(a, b, c):
    """The second of a times both of b, plus c."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; .reg .b32 d; mov.b32 {l, h}, $1; mov.b32 d, {h, h}; fma.rn.f16x2 $0, d, $2, $3; }",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return half2_fma(_half2_of_halves(half2_second(a), half2_second(a)), b, c)


@triton.jit
def half2_fnma_of_first(a, b, c):
    """c less the first of a times both of b."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; .reg .b32 d; mov.b32 {l, h}, $1; mov.b32 d, {l, l}; neg.f16x2 d, d; "
            "fma.rn.f16x2 $0, d, $2, $3; }",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return half2_fma(_half2_of_halves(-half2_first(a), -half2_first(a)), b, c)


@triton.jit
def half2_fnma_of_second(a, b, c):
    """c less the second of a times both of b."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; .reg .b32 d; mov.b32 {l, h}, $1; mov.b32 d, {h, h}; neg.f16x2 d, d; "
            "fma.rn.f16x2 $0, d, $2, $3; }",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return half2_fma(_half2_of_halves(-half2_second(a), -half2_second(a)), b, c)
