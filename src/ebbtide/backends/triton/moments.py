"""The moments of Adam in eight bits by blocks: `ebbtide.codecs.moments` in Triton.

A tile is a matrix with a row for each block of 128 elements; windows and scales are one number a
row. What a block cannot hold is always looked for, element by element, where `csrc/moments.h` does
so in a branch; the codes are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ebbtide.backends.triton.codecs import flushed, pointer, put, take
from ebbtide.backends.triton.rows import ROW_BLOCKS, ROW_SCALE_OF, ROW_STATE

__all__ = ["close_moments", "open_moments"]

_SIGNED8 = tl.constexpr(4)  # ebbtide.plan.Format
_WINDOW8 = tl.constexpr(5)

_SMALLEST = tl.constexpr(1 << 24)
_LARGEST = tl.constexpr(0x7E800000)
_DORMANT = tl.constexpr(16 << 23)
_MOST_RATIO = tl.constexpr(0x5F800000)
_INFINITE = tl.constexpr(0x7F800000)
_NONE = tl.constexpr(0xFFFFFFFF)


@triton.jit
def open_moments(
    row: tl.tensor,
    first: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    MAXIMUM: tl.constexpr,
    BLOCKS: tl.constexpr,
    FAST: tl.constexpr,
) -> tl.tensor:
    """Decode the moments of a tile: the first, the second, its maximum (or the second again).

    Args:
        row: Of the table.
        first: Block that the tile begins with.
        at: Index of each element in the row.
        inside: Whether an element is one of the row.
        MAXIMUM: Whether there is a maximum.
        BLOCKS: Blocks of a tile.
        FAST: Whether the tile is whole and aligned.
    """
    block, there = _blocks_of(row, first, BLOCKS)
    exp_avg_sq = _opened_window(row, 1, block, there, at, inside, FAST)
    maximum = exp_avg_sq
    if MAXIMUM:
        maximum = _opened_window(row, 2, block, there, at, inside, FAST)
    codes = take(pointer(tl.load(row + ROW_STATE), _SIGNED8, FAST), at, inside, FAST)
    scales = tl.load(row + ROW_SCALE_OF).to(tl.pointer_type(tl.float32))
    scale = tl.load(scales + block, mask=there, other=0.0)
    return _opened_first(codes, scale, exp_avg_sq), exp_avg_sq, maximum


@triton.jit
def close_moments(
    row: tl.tensor,
    first: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    maximum: tl.tensor,
    words: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    MAXIMUM: tl.constexpr,
    BLOCKS: tl.constexpr,
    FAST: tl.constexpr,
) -> None:
    """Encode the moments of a tile.

    Args:
        row: As in `open_moments`.
        first: As there.
        exp_avg: First moments.
        exp_avg_sq: Second moments.
        maximum: Their maximum, where MAXIMUM.
        words: 32 random bits of each element.
        at: As there.
        inside: As there.
        MAXIMUM: As there.
        BLOCKS: As there.
        FAST: As there.
    """
    block, there = _blocks_of(row, first, BLOCKS)
    of_maximum = exp_avg_sq
    if MAXIMUM:
        of_maximum = maximum
    exp_avg, bits, bits_of_maximum, ratio = _holdable(exp_avg, exp_avg_sq, of_maximum)
    decoded = _close_window(row, 1, bits, ratio, words, block, there, at, inside, FAST)
    if MAXIMUM:
        _close_window(row, 2, bits_of_maximum, ratio, words, block, there, at, inside, FAST)
    codes, scale = _encode_first(exp_avg, ratio, decoded, words)
    put(pointer(tl.load(row + ROW_STATE), _SIGNED8, FAST), at, codes, inside, FAST)
    scales = tl.load(row + ROW_SCALE_OF).to(tl.pointer_type(tl.float32))
    tl.store(scales + block, scale, mask=there)


@triton.jit
def _blocks_of(row: tl.tensor, first: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    block = first + tl.arange(0, BLOCKS)
    return block, block < tl.load(row + ROW_BLOCKS)


@triton.jit
def _opened_window(
    row: tl.tensor,
    index: tl.constexpr,
    block: tl.tensor,
    there: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    FAST: tl.constexpr,
) -> tl.tensor:
    codes = take(pointer(tl.load(row + ROW_STATE + index), _WINDOW8, FAST), at, inside, FAST)
    windows = tl.load(row + ROW_SCALE_OF + index).to(tl.pointer_type(tl.uint16))
    return _opened_second(codes, tl.load(windows + block, mask=there, other=0))


@triton.jit
def _close_window(
    row: tl.tensor,
    index: tl.constexpr,
    bits: tl.tensor,
    ratio: tl.tensor,
    words: tl.tensor,
    block: tl.tensor,
    there: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    FAST: tl.constexpr,
) -> tl.tensor:
    """Encode second moments; returns the bits of what will be read."""
    shift, base, window = _window_of(bits, ratio)
    codes, decoded = _encode_second(bits, words, shift, base)
    put(pointer(tl.load(row + ROW_STATE + index), _WINDOW8, FAST), at, codes, inside, FAST)
    windows = tl.load(row + ROW_SCALE_OF + index).to(tl.pointer_type(tl.uint16))
    tl.store(windows + block, window, mask=there)
    return decoded


@triton.jit
def _opened_second(code: tl.tensor, window: tl.tensor) -> tl.tensor:
    """Decode second moments from their codes and their blocks' windows."""
    run = window.to(tl.uint32)
    ones = run * 0
    leading = ones + 1
    for bit in tl.static_range(15, 8, -1):
        leading = leading & (run >> bit)
        ones += leading
    base = run & ((ones * 0 + 0xFFFF) >> ones)
    wide = code.to(tl.uint32)
    bits = (wide + base[:, None]) << (ones + 16)[:, None]
    return tl.where(wide != 0, bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _opened_first(code: tl.tensor, scale: tl.tensor, exp_avg_sq: tl.tensor) -> tl.tensor:
    """Decode first moments from their codes, their blocks' scales and the second moments."""
    bits = exp_avg_sq.to(tl.uint32, bitcast=True)
    unit = ((bits >> 1) & _INFINITE).to(tl.float32, bitcast=True)
    number = code.to(tl.float32)
    factor = scale * 18446744073709551616.0  # 2^64
    return flushed(number * tl.abs(number) * factor[:, None] * unit)


@triton.jit
def _alive(second: tl.tensor) -> tl.tensor:
    """Return the bits of second moments, 0 where they count as zero."""
    bits = second.to(tl.int32, bitcast=True)
    return tl.where(bits >= _SMALLEST, bits, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _ratio(first: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """Return m/S: S is the power of two nearest the root of the number with these bits."""
    inverse = (0x5F000000 - ((bits >> 1) & _INFINITE)).to(tl.float32, bitcast=True)
    return flushed(first * inverse)


@triton.jit
def _magnitude(x: tl.tensor) -> tl.tensor:
    return x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _holdable(first: tl.tensor, second: tl.tensor, maximum: tl.tensor) -> tl.tensor:
    """Return what can be kept: the first moment, bits of the second and the maximum, m/S."""
    bits = _alive(second)
    bits_of_maximum = _alive(maximum)
    keeps = (bits < _INFINITE) & (bits_of_maximum < _INFINITE)
    bits = tl.minimum(bits, _LARGEST)
    bits_of_maximum = tl.minimum(bits_of_maximum, _LARGEST)
    first = tl.where(bits != 0, flushed(first), 0.0)
    ratio = _ratio(first, bits)
    keeps = keeps & (_magnitude(ratio) < _MOST_RATIO)
    return (
        tl.where(keeps, first, 0.0),
        tl.where(keeps, bits, 0),
        tl.where(keeps, bits_of_maximum, 0),
        tl.where(keeps, ratio, 0.0),
    )


@triton.jit
def _window_of(bits: tl.tensor, ratio: tl.tensor) -> tl.tensor:
    """Return shift, base and window of each block of second moments."""
    highest = tl.max(bits, axis=1)
    nonzero = bits != 0
    lowest = tl.min(tl.where(nonzero, bits, _NONE), axis=1)
    moving = tl.min(tl.where(nonzero & (_magnitude(ratio) != 0), bits, _NONE), axis=1)
    floor = tl.where(highest > _DORMANT, highest - tl.minimum(highest, _DORMANT), 0)
    low = tl.minimum(tl.minimum(moving, highest), tl.maximum(lowest, floor))
    shift = highest * 0 + 16
    for _ in tl.static_range(7):
        wide = (highest >> shift) - (low >> shift) > 253
        shift = tl.where(wide, shift + 1, shift)
    empty = highest == 0
    base = tl.where(empty, 0, (tl.maximum(low, _SMALLEST) >> shift) - 1)
    ones = shift - 16
    window = ((ones * 0 + 0xFFFF0000) >> ones) & 0xFFFF
    return shift, base, tl.where(empty, 0, window | base).to(tl.uint16)


@triton.jit
def _encode_second(
    bits: tl.tensor, words: tl.tensor, shift: tl.tensor, base: tl.tensor
) -> tl.tensor:
    """Return the codes of second moments, and the bits of what they stand for."""
    rounded = (bits + (words >> (32 - shift)[:, None])) >> shift[:, None]
    code = tl.maximum(rounded.to(tl.int32) - base.to(tl.int32)[:, None], 1).to(tl.uint32)
    code = tl.where(bits != 0, code, 0)
    return code.to(tl.uint8), (code + base[:, None]) << shift[:, None]


@triton.jit
def _encode_first(
    first: tl.tensor, ratio: tl.tensor, decoded: tl.tensor, words: tl.tensor
) -> tl.tensor:
    """Return the codes of first moments and the scale of each block.

    Args:
        first: From `_holdable`, with `ratio`.
        ratio: m/S.
        decoded: Bits of the second moments as they will be read, from `_encode_second`.
        words: 32 random bits of each element.
    """
    largest = tl.max(_magnitude(ratio), axis=1).to(tl.float32, bitcast=True)
    some = largest >= 8.673617379884035e-19  # 2^-60
    divisor = tl.where(some, largest, 1.0)
    scale = tl.where(some, tl.div_rn(largest, largest * 0.0 + 16129.0), 0.0)
    inverse = tl.div_rn(divisor * 0.0 + 16128.9, divisor) * 4294967296.0  # 2^32
    inverse = tl.where(some, inverse, 0.0)
    new_ratio = _ratio(first, decoded)
    root = tl.sqrt_rn(tl.abs(new_ratio) * inverse[:, None]).to(tl.int32)
    signed = tl.where(new_ratio < 0, -root, root)
    dither = (words & 0xFFFF).to(tl.int32)
    return ((signed + dither) >> 16).to(tl.int8), scale
