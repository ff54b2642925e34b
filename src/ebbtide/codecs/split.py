"""A float32 number split into a bfloat16 and the bits that it cannot hold.

The split is of the bits, as whole numbers: high·2¹⁶ + residual, magnitudes with the sign kept
in the high half. With a residual of 16 bits every finite number comes back exactly; with 8 bits the
lowest 8 bits have been rounded off. The high half is the number rounded to nearest, ties away from
zero; it reads as infinite where rounding the number to bfloat16 would overflow, and the residual
brings the number back.
"""

from __future__ import annotations

from ebbtide.codecs.floats import float_bits, from_bits

__all__ = ["join", "split"]


def split(x: float, residual_bits: int, bits: int | None = None) -> tuple[int, int]:
    """Split a number into a bfloat16 code and a residual.

    Args:
        x: A float32 number.
        residual_bits: 8 or 16.
        bits: 8 random bits that round what 8 bits of residual cannot hold; `None` rounds to
            nearest.

    Returns:
        The bfloat16 code, and the residual as a signed number of `residual_bits` bits.

    Example:
        >>> high, low = split(0.1, 16)
        >>> join(high, low, 16) == from_bits(float_bits(0.1))
        True
        >>> split(1.0, 8), split(1 + 2**-9, 8)
        ((16256, 0), (16256, 64))
    """
    u = float_bits(x)
    magnitude, sign = u & 0x7FFFFFFF, u >> 16 & 0x8000
    if magnitude >= 0x7F800000:
        return sign | magnitude >> 16 | (0x40 if magnitude > 0x7F800000 else 0), 0
    if residual_bits == 8:
        rounded = magnitude + (0x80 if bits is None else bits)
        magnitude = min(rounded, 0x7F7FFFFF) & ~0xFF
    high = (magnitude + 0x8000) >> 16
    return sign | high, (magnitude - (high << 16)) >> (16 - residual_bits)


def join(high: int, residual: int, residual_bits: int) -> float:
    """Return the number that `split` took apart.

    Where the high half has been set to zero from outside, a residual below zero is ignored.

    Example:
        >>> join(0x3F80, -1, 8), join(0, -5, 16)
        (0.9999847412109375, 0.0)
    """
    if high & 0x7FFF == 0:
        residual = max(residual, 0)
    magnitude = ((high & 0x7FFF) << 16) + (residual << (16 - residual_bits))
    return from_bits((high & 0x8000) << 16 | magnitude)
