"""bfloat16 and float16: single codes, rounded to nearest or by random bits."""

from __future__ import annotations

import struct

__all__ = [
    "bfloat16_decode",
    "bfloat16_encode",
    "float16_decode",
    "float16_encode",
    "float_bits",
    "from_bits",
]


def float_bits(x: float) -> int:
    """Return the bits of a float32 number."""
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def from_bits(bits: int) -> float:
    """Return the float32 number of 32 bits."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def bfloat16_decode(code: int) -> float:
    """Return the number a bfloat16 code stands for."""
    return from_bits(code << 16)


def bfloat16_encode(x: float, bits: int | None = None) -> int:
    """Encode to bfloat16; finite numbers stay finite.

    Args:
        x: A float32 number.
        bits: 16 random bits, or `None` to round to nearest, ties to even.

    Example:
        >>> bfloat16_decode(bfloat16_encode(1.004)), bfloat16_decode(bfloat16_encode(1.004, 0xFFFF))
        (1.0078125, 1.0078125)
    """
    u = float_bits(x)
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
    u = float_bits(x)
    magnitude, sign = u & 0x7FFFFFFF, (u >> 16) & 0x8000
    if magnitude > 0x7F800000:
        return sign | 0x7E00
    if magnitude == 0x7F800000:
        return sign | 0x7C00
    add = 0xFFF + ((u >> 13) & 1) if bits is None else bits & 0x1FFF
    if magnitude < 113 << 23:  # below 2⁻¹⁴: a multiple of 2⁻²⁴
        return sign | int(from_bits(magnitude) * 2.0**24 + add * 2.0**-13)
    return sign | min(((magnitude + add) >> 13) - (112 << 10), 0x7BFF)
