"""A float32 number split into a code of 16 bits and the bits that it cannot hold.

The split is of the number's position among the codes of its format: a whole number that counts
steps of 2⁻¹⁶ of a code, high·2¹⁶ + residual with a residual of 16 bits, so that a residual crosses
from one power of two to the next without a special case. The high half is the number rounded to
nearest, ties away from zero. With a residual of 8 bits the lowest 8 bits have been rounded off.

For bfloat16 the position is what the bits of the number say: every finite number comes back exactly
from 16 bits. The high half reads as infinite where rounding to bfloat16 would overflow, and the
residual brings the number back.

For float16 the position has three bits to spare between 2⁻¹⁴ and 65,520, where every number comes
back exactly from 16 bits. Below, codes are a fixed 2⁻²⁴ apart and positions 2⁻⁴⁰: numbers come
back to the nearest of these. Beyond, they stop below 65,520, so that the high half is at most
65,504.
"""

from __future__ import annotations

from ebbtide.codecs.floats import (
    bfloat16_encode,
    float16_decode,
    float16_encode,
    float_bits,
    from_bits,
)

__all__ = ["join", "split"]

_REBIAS = 112 << 23  # between the exponents of float32 and float16
_SMALLEST = 113 << 23  # bits of 2⁻¹⁴, where float16's normal numbers begin
_LAST = {False: 0x7F7FFFFF, True: 0x7BFF7FFF}  # positions; float16's: of the last finite code


def split(
    x: float, residual_bits: int, bits: int | None = None, *, float16: bool = False
) -> tuple[int, int]:
    """Split a number into a code of 16 bits and a residual.

    Args:
        x: A float32 number.
        residual_bits: 8 or 16.
        bits: 8 random bits that round what 8 bits of residual cannot hold; `None` rounds to
            nearest.
        float16: The code is a float16, not a bfloat16.

    Returns:
        The code, and the residual as a signed number of `residual_bits` bits.

    Example:
        >>> high, low = split(0.1, 16)
        >>> join(high, low, 16) == from_bits(float_bits(0.1))
        True
        >>> split(1.0, 8), split(1 + 2**-9, 8), split(1 + 2**-12, 8, float16=True)
        ((16256, 0), (16256, 64), (15360, 64))
    """
    u = float_bits(x)
    magnitude, sign = u & 0x7FFFFFFF, u >> 16 & 0x8000
    if magnitude >= 0x7F800000:
        return float16_encode(x) if float16 else bfloat16_encode(x), 0
    position = _float16_position(magnitude) if float16 else magnitude
    if residual_bits == 8:
        position = min(position + (0x80 if bits is None else bits), _LAST[float16]) & ~0xFF
    high = (position + 0x8000) >> 16
    return sign | high, (position - (high << 16)) >> (16 - residual_bits)


def join(high: int, residual: int, residual_bits: int, *, float16: bool = False) -> float:
    """Return the number that `split` took apart.

    Where the high half has been set to zero from outside, a residual below zero is ignored.

    Example:
        >>> join(0x3F80, -1, 8), join(0, -5, 16), join(0x3C00, 64, 8, float16=True)
        (0.9999847412109375, 0.0, 1.000244140625)
    """
    code, sign = high & 0x7FFF, (high & 0x8000) << 16
    if float16 and code >= 0x7C00:
        return float16_decode(high)
    if code == 0:
        residual = max(residual, 0)
    position = (code << 16) + (residual << (16 - residual_bits))
    if not float16:
        return from_bits(sign | position)
    if position < 0x400 << 16:
        return from_bits(sign | float_bits(position * 2.0**-40))
    return from_bits(sign | ((position >> 3) + _REBIAS))


def _float16_position(magnitude: int) -> int:
    """Return where a number lies among the codes of float16, from the bits of its magnitude."""
    if magnitude >= _SMALLEST:
        return min(magnitude - _REBIAS, _LAST[True] >> 3) << 3
    exponent, significand = magnitude >> 23, magnitude & 0x7FFFFF | 0x800000
    if exponent >= 110:
        return significand << (exponent - 110)
    return (significand + (1 << (109 - exponent))) >> (110 - exponent)
