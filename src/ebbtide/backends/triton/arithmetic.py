"""The arithmetic of the CPU's kernels on a GPU: float32 without subnormal numbers.

Whatever a float32 operation reads or returns below the smallest normal number counts as zero. The
instructions of a GPU do so where they are told to, which Triton's operators do not; so they are
written out here. A product and a sum are contracted by `fused` alone, and never in float64
(kernels are launched with `enable_fp_fusion=False`); roots and quotients are rounded to nearest.

Triton's interpreter computes with NumPy: there results are flushed afterwards, and `fused` rounds
twice before version 3.9, as on the CPU's baseline instruction set.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["difference", "flushed", "fused", "product", "quotient", "root", "total", "usual_share"]

_COMPILES = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def flushed(x: tl.tensor) -> tl.tensor:
    """Replace subnormal numbers by zero, where operations do not do so themselves."""
    if x.dtype == tl.float64:
        x = tl.where(tl.abs(x) < 2.2250738585072014e-308, x * 0.0, x)
    elif not _COMPILES:
        x = tl.where(tl.abs(x) < 1.1754943508222875e-38, x * 0.0, x)
    return x


@triton.jit
def product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Return a·b."""
    if _COMPILES and a.dtype == tl.float32:
        c = tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        c = flushed(a * b)
    return c


@triton.jit
def total(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Return a + b."""
    if _COMPILES and a.dtype == tl.float32:
        c = tl.inline_asm_elementwise(
            "add.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        c = flushed(a + b)
    return c


@triton.jit
def difference(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Return a - b."""
    if _COMPILES and a.dtype == tl.float32:
        c = tl.inline_asm_elementwise(
            "sub.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        c = flushed(a - b)
    return c


@triton.jit
def fused(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    """Return a·b + c, rounded once in float32."""
    if c.dtype == tl.float64:
        d = flushed(a * b + c)
    elif _COMPILES:
        d = tl.inline_asm_elementwise(
            "fma.rn.ftz.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        d = flushed(tl.fma(a, b, c))
    return d


@triton.jit
def root(x: tl.tensor, USUAL: tl.constexpr = False) -> tl.tensor:
    """Return √x; USUAL promises x from 2⁻¹⁰⁰ to 2¹²⁰.

    What is promised saves the question for numbers whose correction would be subnormal, which
    parts the elements of a thread from each other. The instructions are those that the assembler
    makes of sqrt.rn for the others.
    """
    if x.dtype == tl.float64:
        y = tl.sqrt(x)
    elif not _COMPILES:
        y = tl.sqrt_rn(x)
    elif USUAL:
        y = tl.inline_asm_elementwise(
            """{
            .reg .f32 y, g, h, r;
            rsqrt.approx.ftz.f32 y, $1;
            mul.rn.ftz.f32 g, $1, y;
            mul.rn.ftz.f32 h, y, 0f3F000000;
            neg.ftz.f32 r, g;
            fma.rn.ftz.f32 r, r, g, $1;
            fma.rn.ftz.f32 $0, r, h, g;
            }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        y = tl.inline_asm_elementwise(
            "sqrt.rn.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def quotient(a: tl.tensor, b: tl.tensor, USUAL: tl.constexpr = False) -> tl.tensor:
    """Return a/b; USUAL promises a zero or from 2⁻¹⁰⁰ to 2¹⁰⁰, b and a/b from 2⁻¹⁰⁰ to 2¹⁰⁰.

    As in `root`.
    """
    if a.dtype == tl.float64:
        c = flushed(a / b)
    elif not _COMPILES:
        c = flushed(tl.div_rn(a, tl.broadcast_to(b, a.shape)))
    elif USUAL:
        c = tl.inline_asm_elementwise(
            """{
            .reg .f32 y, e, n;
            rcp.approx.ftz.f32 y, $2;
            neg.ftz.f32 n, $2;
            fma.rn.ftz.f32 e, n, y, 0f3F800000;
            fma.rn.ftz.f32 y, y, e, y;
            mul.rn.ftz.f32 e, $1, y;
            fma.rn.ftz.f32 n, n, e, $1;
            fma.rn.ftz.f32 $0, y, n, e;
            }""",
            "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        c = tl.inline_asm_elementwise(
            "div.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return c


@triton.jit
def usual_share(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Return a/b of all elements and one number, as `quotient` does where that is USUAL.

    With the rounded reciprocal of b a quotient that is off by one unit becomes the rounded one
    (P. Markstein, IBM J. Res. Dev. 34, 1990); the product may be off by two, so this is done twice.
    """
    if a.dtype == tl.float64 or not _COMPILES:
        c = quotient(a, b)
    else:
        c = tl.inline_asm_elementwise(
            """{
            .reg .f32 n, q, r;
            neg.ftz.f32 n, $2;
            mul.rn.ftz.f32 q, $1, $3;
            fma.rn.ftz.f32 r, n, q, $1;
            fma.rn.ftz.f32 q, r, $3, q;
            fma.rn.ftz.f32 r, n, q, $1;
            fma.rn.ftz.f32 $0, r, $3, q;
            }""",
            "=f,f,f,f", [a, b, quotient(b * 0.0 + 1.0, b)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return c
