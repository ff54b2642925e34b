"""How numbers are stored in fewer bits: the definition that `csrc/codec.h` repeats.

Plain Python on single numbers and the standard library only. Encoding rounds by adding bits below
the kept part: a fixed pattern rounds to nearest, uniform bits round stochastically (the
expected value is the number itself). The bits come from a counter-based hash, so a run can be
repeated exactly on any number of threads and resumed from the step count alone.
"""

from __future__ import annotations

import struct
from functools import cache

__all__ = [
    "bfloat16_decode",
    "bfloat16_encode",
    "dither_bits",
    "float16_decode",
    "float16_encode",
    "lane_constant",
    "row_key",
]

_MASK64 = (1 << 64) - 1


def _float_bits(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def _from_bits(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _mix(x: int) -> int:
    """Mix 64 bits (the finaliser of splitmix64)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


@cache
def lane_constant(lane: int) -> int:
    """Return the 32 bits by which one of the 128 elements of a block varies the block's hash."""
    reversed_lane = int(f"{lane:07b}"[::-1], 2)
    return (reversed_lane << 25) | (_mix(lane) >> 39)


def row_key(seed: int, step: int, salt: int) -> int:
    """Return the key of one parameter at one step.

    Args:
        seed: Of the optimizer's group.
        step: 1-based count of the step.
        salt: 64 bits of the parameter's name.
    """
    return _mix(_mix(seed) ^ _mix((step * 0xD1342543DE82EF95) & _MASK64) ^ salt)


def dither_bits(key: int, element: int, *, state: bool) -> int:
    """Return the 32 random bits of one element.

    Args:
        key: From `row_key`.
        element: Index in the whole parameter; blocks of 128 elements share a hash.
        state: Bits for the state, or for the parameter.

    Example:
        The 128 elements of a block are spread evenly, whatever the key:

        >>> sorted(dither_bits(12345, e, state=False) >> 25 for e in range(128)) == list(range(128))
        True
    """
    block = _mix(key ^ (element >> 7 << 1))
    return lane_constant(element & 127) ^ (block >> 32 if state else block & 0xFFFFFFFF)


def bfloat16_decode(code: int) -> float:
    """Return the number a bfloat16 code stands for."""
    return _from_bits(code << 16)


def bfloat16_encode(x: float, bits: int | None = None) -> int:
    """Encode to bfloat16; finite numbers stay finite.

    Args:
        x: A float32 number.
        bits: 16 random bits, or `None` to round to nearest, ties to even.

    Example:
        >>> bfloat16_decode(bfloat16_encode(1.004)), bfloat16_decode(bfloat16_encode(1.004, 0xFFFF))
        (1.0078125, 1.0078125)
    """
    u = _float_bits(x)
    magnitude, sign = u & 0x7FFFFFFF, (u >> 16) & 0x8000
    if magnitude > 0x7F800000:
        return sign | (magnitude >> 16) | 0x40
    if magnitude == 0x7F800000:
        return sign | 0x7F80
    add = 0x7FFF + ((u >> 16) & 1) if bits is None else bits
    return sign | min((magnitude + add) >> 16, 0x7F7F)


def float16_decode(code: int) -> float:
    """Return the number a float16 code stands for."""
    return float(struct.unpack("<e", struct.pack("<H", code))[0])


def float16_encode(x: float, bits: int | None = None) -> int:
    """Encode to float16; finite numbers stay finite.

    Args:
        x: A float32 number.
        bits: 13 random bits, or `None` to round to nearest.

    Example:
        >>> float16_decode(float16_encode(0.1)), float16_decode(float16_encode(1e6))
        (0.0999755859375, 65504.0)
    """
    u = _float_bits(x)
    magnitude, sign = u & 0x7FFFFFFF, (u >> 16) & 0x8000
    if magnitude > 0x7F800000:
        return sign | 0x7E00
    if magnitude == 0x7F800000:
        return sign | 0x7C00
    add = 0xFFF + ((u >> 13) & 1) if bits is None else bits & 0x1FFF
    if magnitude < 113 << 23:  # below 2⁻¹⁴: a multiple of 2⁻²⁴
        return sign | int(_from_bits(magnitude) * 2.0**24 + add * 2.0**-13)
    return sign | min(((magnitude + add) >> 13) - (112 << 10), 0x7BFF)
