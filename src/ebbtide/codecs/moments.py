"""The two moments of Adam in eight bits each, by blocks of 128 elements.

**Second moment v.** The code counts steps on the float's own bits from a base, so its grid is that
of a float with a shorter mantissa: fixed while the window moves, finer where a block spans few
powers of two. A step is 2ˢ from as many codes below the block's largest v as can be, and twice that
in the coarse codes below: the small v of a block are few, and spread over many powers of two. One
uint16 a block, the window, holds all three: s - 16 leading ones, a zero, the number of coarse codes
and the base. The base is counted by 16 steps, or as many as make a factor of four: gradients times
a power of two have the same codes. Code 0 is exactly zero and nothing else
is, so an element with a gradient never loses its denominator. Rounded stochastically: at β2 = 0.999
v moves by less than half a step of the grid, and would stay where it is every time.

**First moment m.** What matters of m is m/√v, so that is what is kept: m divided by S(v), the power
of two nearest √v, with the v of the code. Blocks are then even, whatever the range of v within
them. The code is the signed square root of m/S relative to the block's largest, a float32 scale
beside it; rounded stochastically, as rounding to nearest would hold small momentum for ever.
Zero is exactly zero.

An element whose m is zero is dormant: it counts for the window within 2²⁸ of the block's largest v
only, and is lifted to the window where it lies lower, so that dead units do not cost the living
their precision. v below 2⁻¹²⁵ counts as zero. What a block cannot hold (non-finite numbers, m
beyond 2⁶⁴·√v) is forgotten, m and v set to zero, so that it harms no neighbour.

All arithmetic is float32 with subnormals flushed, in the order written here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

from ebbtide.codecs.floats import float_bits, from_bits

__all__ = [
    "EncodedMoments",
    "decode_first",
    "decode_second",
    "encode_moments",
    "encode_second",
    "window_of",
]

_LARGEST = 0x7E800000  # bits of v that still round up to a finite number
_DORMANT = 28 << 23  # bits below the block's largest v at which a dormant element stops to count
_LEVELS = 127.0


class EncodedMoments(NamedTuple):
    """One block: a code an element and moment, and what the codes are relative to."""

    first: list[int]
    scale: float
    seconds: list[list[int]]
    windows: list[int]


def encode_moments(moments: Sequence[Sequence[float]], words: Sequence[int]) -> EncodedMoments:
    """Encode the moments of one block.

    Args:
        moments: First moment, second moment and, for AMSGrad, the maximum of the second: float32
            numbers, 128 each at most.
        words: 32 random bits an element, from `dither_bits(..., state=True)`; 0x8000_8000 rounds to
            nearest.

    Example:
        >>> nearest = [0x8000_8000] * 3
        >>> block = encode_moments([[0.5, -0.001, 0.0], [1.0, 0.25, 0.0]], nearest)
        >>> block.first, block.seconds[0], hex(block.windows[0])
        ([127, -8, 0], [240, 8, 0], '0x13e7')
    """
    first, seconds = _holdable(moments)
    ratios = [_ratio(m, u) for m, u in zip(first, seconds[0], strict=True)]
    moving = [ratio != 0 for ratio in ratios]
    windows = [window_of(bits, moving) for bits in seconds]
    codes = [encode_second(b, w, words) for b, w in zip(seconds, windows, strict=True)]
    largest = max((abs(ratio) for ratio in ratios), default=0.0)
    if largest < 2.0**-60:
        return EncodedMoments([0] * len(first), 0.0, codes, windows)
    inverse = _f32(_f32(16128.9) / largest) * 2.0**32
    first_codes = []
    for m, code, word in zip(first, codes[0], words, strict=True):
        ratio = _ratio(m, float_bits(decode_second(code, windows[0])))
        root = int(_f32(math.sqrt(_f32(abs(ratio) * inverse))))
        first_codes.append(((-root if ratio < 0 else root) + (word & 0xFFFF)) >> 16)
    return EncodedMoments(first_codes, _f32(largest / (_LEVELS * _LEVELS)), codes, windows)


def _holdable(moments: Sequence[Sequence[float]]) -> tuple[list[float], list[list[int]]]:
    """Return the first moments, and the bits of the others, with zero for what cannot be kept."""
    first, *seconds = moments
    kept: list[float] = []
    bits: list[list[int]] = [[] for _ in seconds]
    for m, *values in zip(first, *seconds, strict=True):
        found = [min(float_bits(v + 0.0), _LARGEST) if 0 <= v < math.inf else 0 for v in values]
        found = [u if u >= 1 << 24 else 0 for u in found]
        ratio = abs(_ratio(m, found[0])) if found[0] else 0.0
        holds = all(v < math.inf for v in values) and ratio < 2.0**64
        kept.append(m if holds and found[0] else 0.0)
        for target, u in zip(bits, found, strict=True):
            target.append(u if holds else 0)
    return kept, bits


def window_of(bits: Sequence[int], moving: Sequence[bool]) -> int:
    """Return the window that a block of second moments is encoded in.

    Args:
        bits: Of the numbers as float32; 0, or 2²⁴ and more.
        moving: Whether the first moment is not zero.
    """
    highest = max(bits, default=0)
    if highest == 0:
        return 0
    lowest = min(u for u in bits if u)
    moving_low = min(
        (u for u, moves in zip(bits, moving, strict=True) if u and moves), default=highest
    )
    low = min(moving_low, max(lowest, highest - _DORMANT))
    # The base lies two steps below, so that rounding cannot reach code 0, and as many more as its
    # unit asks for. 254 codes lie above it: the last of the 255 is for rounding up. Up to
    # 256 - (256 >> unit) of them can be coarse, which reach a step further each.
    shift = next(
        s
        for s in range(16, 24)
        if (highest >> s) - (low >> s) <= 509 - (1 << _unit(s)) - (256 >> _unit(s))
    )
    unit = _unit(shift)
    base = ((low >> shift) - 2) & -(1 << unit)
    missing = max((highest >> shift) - base - 254, 0)
    coarse = (missing + (256 >> unit) - 1) & -(256 >> unit)
    return (0xFFFF << (32 - shift) & 0xFFFF) | coarse << (23 - shift) | base >> unit


def encode_second(bits: Sequence[int], window: int, words: Sequence[int]) -> list[int]:
    """Encode second moments in a window; 0 becomes 0, everything else 1 to 255.

    Args:
        bits: Of the numbers as float32; 0, or 2²⁴ and more.
        window: From `window_of`.
        words: 32 random bits an element.
    """
    shift, base, coarse = _grid(window)
    edge = (base + 2 * coarse) << shift
    codes = []
    for u, word in zip(bits, words, strict=True):
        dither = word >> (32 - shift)
        kept = u + dither if u >= edge else min(u + 2 * dither, edge)
        steps = max((kept >> shift) - base, 2)
        codes.append(max(steps >> 1, steps - coarse) if u else 0)
    return codes


def decode_second(code: int, window: int) -> float:
    """Return the second moment that a code stands for.

    Example:
        >>> [decode_second(code, 0x13E7) for code in (0, 8, 9, 239, 240)]
        [0.0, 0.25, 0.25390625, 0.99609375, 1.0]
    """
    shift, base, coarse = _grid(window)
    return from_bits((base + code + min(code, coarse)) << shift) if code else 0.0


def decode_first(code: int, scale: float, exp_avg_sq: float) -> float:
    """Return the first moment that a code stands for.

    Args:
        code: -127 to 127.
        scale: Of the block.
        exp_avg_sq: The second moment of the same element, from `decode_second`.

    Example:
        >>> decode_first(-127, 1 / 127**2, 0.25)
        -0.5
    """
    unit = from_bits(float_bits(exp_avg_sq) >> 1 & 0x7F800000)
    return _f32(_f32(float(code * abs(code)) * _f32(scale * 2.0**64)) * unit)


def _grid(window: int) -> tuple[int, int, int]:
    """Return the shift, the base in steps of 2^shift, and how many codes are coarse."""
    shift = 16
    while shift < 23 and window >> (31 - shift) & 1:
        shift += 1
    unit = _unit(shift)
    base = (window << unit) & ((1 << (31 - shift)) - 1)
    return shift, base, (window >> (23 - shift)) & (256 - (256 >> unit))


def _unit(shift: int) -> int:
    """Return k of a window that counts the base by 2^k steps and the coarse codes by 2^(8 - k)."""
    return min(24 - shift, 4)


def _ratio(m: float, bits: int) -> float:
    """Return m/S: S is the power of two nearest the root of the number with these bits."""
    return _f32(m * from_bits(0x5F000000 - (bits >> 1 & 0x7F800000)))


def _f32(x: float) -> float:
    """Round to float32, subnormal numbers to zero."""
    try:
        rounded = float(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)
    return math.copysign(0.0, x) if abs(rounded) < 2.0**-126 else rounded  # NaN stays
