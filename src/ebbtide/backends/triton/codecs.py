"""Codecs and random bits on the device: `ebbtide.codecs` and `csrc/codec.h` in Triton.

Numbers are encoded through their bits, never by a conversion of the hardware's, so that a CPU and a
GPU store the same codes. A tile is a matrix: a row for each block of 128 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ebbtide.backends.triton.arithmetic import flushed, product, total

__all__ = [
    "block_words", "close", "epoch_key", "joined", "opened", "pointer", "put",
    "residual_pointer", "split", "take",
]  # fmt: skip

# The values of ebbtide.plan.Format.
_FLOAT32 = tl.constexpr(0)
_FLOAT64 = tl.constexpr(1)
_BFLOAT16 = tl.constexpr(2)
_FLOAT16 = tl.constexpr(3)
_SIGNED8 = tl.constexpr(4)
_WINDOW8 = tl.constexpr(5)


@triton.jit
def pointer(address: tl.tensor, FORMAT: tl.constexpr, FAST: tl.constexpr) -> tl.tensor:
    """Make a pointer of an address; where FAST its 16-byte alignment is promised."""
    if FORMAT == _FLOAT64:
        to = address.to(tl.pointer_type(tl.float64))
    elif FORMAT == _FLOAT32:
        to = address.to(tl.pointer_type(tl.float32))
    elif FORMAT == _SIGNED8:
        to = address.to(tl.pointer_type(tl.int8))
    elif FORMAT == _WINDOW8:
        to = address.to(tl.pointer_type(tl.uint8))
    else:
        to = address.to(tl.pointer_type(tl.uint16))
    if FAST:
        to = tl.multiple_of(to, 16)
    return to


@triton.jit
def residual_pointer(address: tl.tensor, BITS: tl.constexpr, FAST: tl.constexpr) -> tl.tensor:
    """Make a pointer to residuals of 8 or 16 bits."""
    if BITS == 8:
        to = address.to(tl.pointer_type(tl.int8))
    else:
        to = address.to(tl.pointer_type(tl.int16))
    if FAST:
        to = tl.multiple_of(to, 16)
    return to


@triton.jit
def take(to: tl.tensor, at: tl.tensor, inside: tl.tensor, FAST: tl.constexpr) -> tl.tensor:
    """Load a tile; where FAST nothing of it lies outside."""
    return tl.load(to + at) if FAST else tl.load(to + at, mask=inside, other=0)


@triton.jit
def put(
    to: tl.tensor, at: tl.tensor, value: tl.tensor, inside: tl.tensor, FAST: tl.constexpr
) -> None:
    """Store a tile."""
    if FAST:
        tl.store(to + at, value)
    else:
        tl.store(to + at, value, mask=inside)


@triton.jit
def opened(code: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Decode loaded codes to the numbers that the rules work on."""
    if FORMAT == _BFLOAT16:
        number = (code.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == _FLOAT16:
        number = code.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        number = code
    return flushed(number)


@triton.jit
def close(
    number: tl.tensor,
    bits: tl.tensor,
    FORMAT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    USUAL: tl.constexpr = False,
) -> tl.tensor:
    """Encode numbers; `bits` are 32 random ones of each element.

    USUAL promises that no number comes near the largest one.
    """
    if FORMAT == _BFLOAT16 and USUAL:
        u = flushed(number).to(tl.uint32, bitcast=True)
        below = bits >> 16 if STOCHASTIC else ((u >> 16) & 1) + 0x7FFF
        code = ((u + below) >> 16).to(tl.uint16)
    elif FORMAT == _BFLOAT16:
        code = _to_bfloat16(flushed(number), bits, STOCHASTIC)
    elif FORMAT == _FLOAT16:
        code = _to_float16(flushed(number), bits, STOCHASTIC)
    else:
        code = flushed(number)
    return code


@triton.jit
def joined(high: tl.tensor, low: tl.tensor, FORMAT: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Return the numbers that codes of 16 bits and residuals of BITS bits stand for."""
    high = high.to(tl.uint32) << 16
    position = (high & 0x7FFFFFFF).to(tl.int32) + low.to(tl.int32) * (1 << (16 - BITS))
    position = tl.maximum(position, 0)  # a zero that was set from outside has no residual
    if FORMAT == _FLOAT16:
        small = position.to(tl.float32) * 9.094947017729282e-13  # 2^-40
        normal = ((position >> 3) + (112 << 23)).to(tl.float32, bitcast=True)
        position = tl.where(position < 0x4000000, small, normal).to(tl.int32, bitcast=True)
    number = (position.to(tl.uint32) | (high & 0x80000000)).to(tl.float32, bitcast=True)
    if FORMAT == _FLOAT16:
        is_finite = (high & 0x7FFFFFFF) < 0x7C000000
        number = tl.where(is_finite, number, opened((high >> 16).to(tl.uint16), FORMAT))
    return flushed(number)


@triton.jit
def split(
    number: tl.tensor,
    bits: tl.tensor,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    USUAL: tl.constexpr = False,
) -> tl.tensor:
    """Return codes of 16 bits and the residuals of BITS bits that complete them; USUAL as there."""
    u = flushed(number).to(tl.uint32, bitcast=True)
    if FORMAT == _BFLOAT16 and USUAL:
        position = u + (bits >> 24) if BITS == 8 else u
        codes = ((position + 0x8000) >> 16).to(tl.uint16)
    else:
        position, codes = _split_with_care(u, bits, FORMAT, BITS)
    # The rest of it, signed.
    return codes, (position >> 8).to(tl.int8) if BITS == 8 else position.to(tl.int16)


@triton.jit
def _split_with_care(
    u: tl.tensor, bits: tl.tensor, FORMAT: tl.constexpr, BITS: tl.constexpr
) -> tl.tensor:
    magnitude = u & 0x7FFFFFFF
    finite = magnitude < 0x7F800000
    quiet = tl.where(magnitude > 0x7F800000, 0x400000, 0).to(tl.uint32)
    if FORMAT == _FLOAT16:
        position = _float16_position(tl.where(finite, magnitude, 0))
        last = 0x7BFF7FFF
        special = 0x7C000000 | (quiet << 3)
    else:
        position = magnitude
        last = 0x7F7FFFFF
        special = (magnitude & 0x7FFF0000) | quiet
    if BITS == 8:
        position = tl.minimum(position + (bits >> 24), last) & 0xFFFFFF00
    position = tl.where(finite, position, special)
    codes = (((position + 0x8000) | (u & 0x80000000)) >> 16).to(tl.uint16)
    return position, codes


@triton.jit
def _float16_position(magnitude: tl.tensor) -> tl.tensor:
    """Return where numbers lie among the codes of float16, from the bits of their magnitudes."""
    exponent = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | 0x800000
    down = tl.minimum(tl.maximum(exponent, 85), 109)
    small = (significand + (1 << (109 - down)).to(tl.uint32)) >> (110 - down)
    up = tl.minimum(tl.maximum(exponent, 110), 112)
    small = tl.where(exponent < 110, small, significand << (up - 110))
    small = tl.where(exponent < 85, 0, small)
    normal = tl.minimum(tl.maximum(magnitude, 113 << 23) - (112 << 23), 0x0F7FEFFF) << 3
    return tl.where(magnitude < (113 << 23), small, normal)


@triton.jit
def _to_bfloat16(x: tl.tensor, bits: tl.tensor, STOCHASTIC: tl.constexpr) -> tl.tensor:
    u = x.to(tl.uint32, bitcast=True)
    magnitude = u & 0x7FFFFFFF
    below = bits >> 16 if STOCHASTIC else ((u >> 16) & 1) + 0x7FFF
    rounded = tl.minimum((magnitude + below) >> 16, 0x7F7F)
    quiet = tl.where(magnitude > 0x7F800000, 0x40, 0).to(tl.uint32)
    rounded = tl.where(magnitude < 0x7F800000, rounded, (magnitude >> 16) | quiet)
    return (rounded | ((u >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def _to_float16(x: tl.tensor, bits: tl.tensor, STOCHASTIC: tl.constexpr) -> tl.tensor:
    u = x.to(tl.uint32, bitcast=True)
    magnitude = u & 0x7FFFFFFF
    below = bits >> 19 if STOCHASTIC else ((u >> 13) & 1) + 0xFFF
    normal = tl.minimum(((magnitude + below) >> 13) - (112 << 10), 0x7BFF)
    # Below 2^-14: a multiple of 2^-24.
    small = product(tl.minimum(magnitude, 113 << 23).to(tl.float32, bitcast=True), 16777216.0)
    small = total(small, below.to(tl.int32).to(tl.float32) * 0.0001220703125).to(tl.int32)
    rounded = tl.where(magnitude < (113 << 23), small.to(tl.uint32), normal)
    rounded = tl.where(magnitude == 0x7F800000, 0x7C00, rounded)
    rounded = tl.where(magnitude > 0x7F800000, 0x7E00, rounded)
    return (rounded | ((u >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def mix(x: tl.tensor) -> tl.tensor:
    """Mix 64 bits (the finaliser of splitmix64)."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def epoch_key(seed: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Return what the random bits of all parameters have in common, the same for 128 steps."""
    return mix(seed) ^ mix((step >> 7) * 0xD1342543DE82EF95)


@triton.jit
def block_words(key: tl.tensor, step: tl.tensor, salt: tl.tensor, block: tl.tensor) -> tl.tensor:
    """Return the 32 random bits of each block for the parameter, and those for its state.

    Args:
        key: From `epoch_key`.
        step: Count of the step.
        salt: Of the parameter's name.
        block: Of the whole parameter.
    """
    words = mix(mix(key ^ salt) ^ (block << 1))
    advance = step * 0x9E376A09
    for_param = (words + advance) & 0xFFFFFFFF
    for_state = ((words >> 32) + advance) & 0xFFFFFFFF
    return for_param.to(tl.uint32), for_state.to(tl.uint32)
