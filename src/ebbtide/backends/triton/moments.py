"""The moments of Adam in eight bits by blocks: `ebbtide.codecs.moments` in Triton.

A tile is a matrix with a row for each block of 128 elements; windows and scales are one number a
row. What a block cannot hold is always looked for, element by element, where `csrc/moments.h` does
so in a branch; the codes are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ebbtide.backends.triton.arithmetic import product, quotient, root
from ebbtide.backends.triton.codecs import pointer, put, take
from ebbtide.backends.triton.rows import ROW_BLOCKS, ROW_SCALE_OF, ROW_STATE

__all__ = ["are_holdable", "close_moments", "close_ordinary", "extremes", "open_moments"]

_SIGNED8 = tl.constexpr(4)  # ebbtide.plan.Format
_WINDOW8 = tl.constexpr(5)

_SMALLEST = tl.constexpr(1 << 24)
_LARGEST = tl.constexpr(0x7E800000)
_DORMANT = tl.constexpr(28 << 23)
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
def extremes(first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """Return, of each block, the bits of the largest and least second moment and largest |m/S|."""
    bits = second.to(tl.uint32, bitcast=True)
    largest = tl.max(_magnitude(_ratio(first, bits)), axis=1)
    return tl.max(bits, axis=1), tl.min(bits, axis=1), largest


@triton.jit
def are_holdable(largest: tl.tensor) -> tl.tensor:
    """Tell whether blocks can hold a tile of which `rules.are_usual` holds."""
    return tl.max(largest, axis=0) < _MOST_RATIO


@triton.jit
def close_ordinary(
    row: tl.tensor,
    first: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    highest: tl.tensor,
    lowest: tl.tensor,
    largest: tl.tensor,
    words: tl.tensor,
    at: tl.tensor,
    BLOCKS: tl.constexpr,
) -> None:
    """Encode the moments of a whole tile that has nothing but what a block can hold, and no zero.

    Args:
        row: As in `close_moments`.
        first: As there.
        exp_avg: As there.
        exp_avg_sq: As there.
        highest: From `extremes`.
        lowest: From there.
        largest: From there.
        words: As there.
        at: As there.
        BLOCKS: As there.
    """
    block = first + tl.arange(0, BLOCKS)
    shift, base, coarse, window = _window_from(highest, lowest)
    kept = _dithered(exp_avg_sq.to(tl.uint32, bitcast=True), words, shift, base, coarse)
    codes = _codes_of((kept >> shift[:, None]) - base[:, None], coarse).to(tl.uint8)
    put(pointer(tl.load(row + ROW_STATE + 1), _WINDOW8, True), at, codes, codes, True)
    tl.store(tl.load(row + ROW_SCALE_OF + 1).to(tl.pointer_type(tl.uint16)) + block, window)
    scale, inverse = _scale_of(largest)
    ratio = _ratio(exp_avg, kept)
    size = root(product(tl.abs(ratio), inverse[:, None]), True).to(tl.uint32, bitcast=True)
    sign = ratio.to(tl.uint32, bitcast=True) & 0x80000000
    signed = (size | sign).to(tl.float32, bitcast=True).to(tl.int32)
    codes = ((signed + (words & 0xFFFF).to(tl.int32)) >> 16).to(tl.int8)
    put(pointer(tl.load(row + ROW_STATE), _SIGNED8, True), at, codes, codes, True)
    tl.store(tl.load(row + ROW_SCALE_OF).to(tl.pointer_type(tl.float32)) + block, scale)


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
    shift, base, coarse, window = _window_of(bits, ratio)
    codes, decoded = _encode_second(bits, words, shift, base, coarse)
    put(pointer(tl.load(row + ROW_STATE + index), _WINDOW8, FAST), at, codes, inside, FAST)
    windows = tl.load(row + ROW_SCALE_OF + index).to(tl.pointer_type(tl.uint16))
    tl.store(windows + block, window, mask=there)
    return decoded


@triton.jit
def _opened_second(code: tl.tensor, window: tl.tensor) -> tl.tensor:
    """Decode second moments from their codes and their blocks' windows."""
    run = window.to(tl.uint32)
    shift = run * 0 + 16
    leading = run * 0 + 1
    for bit in tl.static_range(15, 8, -1):
        leading = leading & (run >> bit)
        shift += leading
    unit = tl.minimum(24 - shift, 4)
    coarse = (run >> (23 - shift)) & (256 - (256 >> unit))
    base = (run << unit) & ((1 << (31 - shift)) - 1)
    wide = code.to(tl.uint32)
    bits = (wide + tl.minimum(wide, coarse[:, None]) + base[:, None]) << shift[:, None]
    return tl.where(wide != 0, bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _opened_first(code: tl.tensor, scale: tl.tensor, exp_avg_sq: tl.tensor) -> tl.tensor:
    """Decode first moments from their codes, their blocks' scales and the second moments."""
    bits = exp_avg_sq.to(tl.uint32, bitcast=True)
    unit = ((bits >> 1) & _INFINITE).to(tl.float32, bitcast=True)
    number = code.to(tl.float32)
    factor = product(scale, 18446744073709551616.0)  # 2^64
    return product(product(number * tl.abs(number), factor[:, None]), unit)


@triton.jit
def _alive(second: tl.tensor) -> tl.tensor:
    """Return the bits of second moments, 0 where they count as zero."""
    bits = second.to(tl.int32, bitcast=True)
    return tl.where(bits >= _SMALLEST, bits, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _ratio(first: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """Return m/S: S is the power of two nearest the root of the number with these bits."""
    inverse = (0x5F000000 - ((bits >> 1) & _INFINITE)).to(tl.float32, bitcast=True)
    return product(first, inverse)


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
    first = tl.where(bits != 0, first, 0.0)
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
    """Return shift, base, coarse codes and window of each block of second moments."""
    highest = tl.max(bits, axis=1)
    nonzero = bits != 0
    lowest = tl.min(tl.where(nonzero, bits, _NONE), axis=1)
    moving = tl.min(tl.where(nonzero & (_magnitude(ratio) != 0), bits, _NONE), axis=1)
    floor = tl.where(highest > _DORMANT, highest - tl.minimum(highest, _DORMANT), 0)
    low = tl.minimum(tl.minimum(moving, highest), tl.maximum(lowest, floor))
    return _window_from(highest, low)


@triton.jit
def _window_from(highest: tl.tensor, low: tl.tensor) -> tl.tensor:
    """Return shift, base, coarse codes and window that hold the bits from `low` to `highest`."""
    shift = highest * 0 + 16
    for _ in tl.static_range(7):
        unit = tl.minimum(24 - shift, 4)
        wide = (highest >> shift) - (low >> shift) > 509 - (1 << unit) - (256 >> unit)
        shift = tl.where(wide, shift + 1, shift)
    unit = tl.minimum(24 - shift, 4)
    empty = highest == 0
    base = tl.where(empty, 0, ((tl.maximum(low, _SMALLEST) >> shift) - 2) >> unit << unit)
    missing = tl.maximum((highest >> shift) - base, 254) - 254
    coarse = (missing + (256 >> unit) - 1) >> (8 - unit) << (8 - unit)
    leading = ((shift * 0 + 0xFFFF) << (32 - shift)) & 0xFFFF
    window = leading | (coarse << (23 - shift)) | (base >> unit)
    return shift, base, coarse, tl.where(empty, 0, window).to(tl.uint16)


@triton.jit
def _dithered(
    bits: tl.tensor, words: tl.tensor, shift: tl.tensor, base: tl.tensor, coarse: tl.tensor
) -> tl.tensor:
    """Return the bits of second moments with what makes rounding them down stochastic."""
    dither = words >> (32 - shift)[:, None]
    edge = ((base + 2 * coarse) << shift)[:, None]
    return tl.minimum(bits + 2 * dither, tl.maximum(bits + dither, edge))


@triton.jit
def _codes_of(steps: tl.tensor, coarse: tl.tensor) -> tl.tensor:
    """Return the codes of steps above the base: half of the coarse ones, all beyond."""
    return steps - tl.minimum((steps + 1) >> 1, coarse[:, None])


@triton.jit
def _encode_second(
    bits: tl.tensor, words: tl.tensor, shift: tl.tensor, base: tl.tensor, coarse: tl.tensor
) -> tl.tensor:
    """Return the codes of second moments, and bits with the exponent of what they stand for."""
    least = ((base + 2) << shift)[:, None]
    kept = tl.maximum(_dithered(bits, words, shift, base, coarse), least)
    codes = _codes_of((kept >> shift[:, None]) - base[:, None], coarse)
    return tl.where(bits != 0, codes, 0).to(tl.uint8), kept


@triton.jit
def _encode_first(
    first: tl.tensor, ratio: tl.tensor, decoded: tl.tensor, words: tl.tensor
) -> tl.tensor:
    """Return the codes of first moments and the scale of each block.

    Args:
        first: From `_holdable`, with `ratio`.
        ratio: m/S.
        decoded: From `_encode_second`.
        words: 32 random bits of each element.
    """
    scale, inverse = _scale_of(tl.max(_magnitude(ratio), axis=1))
    new_ratio = _ratio(first, decoded)
    size = root(product(tl.abs(new_ratio), inverse[:, None])).to(tl.int32)
    signed = tl.where(new_ratio < 0, -size, size)
    dither = (words & 0xFFFF).to(tl.int32)
    return ((signed + dither) >> 16).to(tl.int8), scale


@triton.jit
def _scale_of(largest: tl.tensor) -> tl.tensor:
    """Return each block's scale and what m/S is multiplied by, from the bits of its largest."""
    largest = largest.to(tl.float32, bitcast=True)
    some = largest >= 8.673617379884035e-19  # 2^-60
    divisor = tl.where(some, largest, 1.0)
    scale = tl.where(some, quotient(largest, largest * 0.0 + 16129.0), 0.0)
    inverse = product(quotient(divisor * 0.0 + 16128.9, divisor), 4294967296.0)  # 2^32
    return scale, tl.where(some, inverse, 0.0)
