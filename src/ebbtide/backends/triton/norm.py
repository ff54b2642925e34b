"""Sums of squares of all gradients, for the global norm, in one launch whatever their formats."""

from __future__ import annotations

import triton
import triton.language as tl

from ebbtide.backends.triton.codecs import opened, pointer, take
from ebbtide.backends.triton.rows import (
    ROW_GRAD_FORMAT,
    ROW_NUMEL,
    ROW_TILES_BEFORE,
    ROW_WIDTH,
)

__all__ = ["sum_squares"]

# The values of ebbtide.plan.Format.
_FLOAT32 = tl.constexpr(0)
_FLOAT64 = tl.constexpr(1)
_BFLOAT16 = tl.constexpr(2)
_FLOAT16 = tl.constexpr(3)


@triton.jit(do_not_specialize=["begin", "end"])
def sum_squares(
    rows: tl.tensor,
    grads: tl.tensor,
    row_of_tile: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    partial: tl.tensor,
    FINITE_ONLY: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Sum the squares of every n-th tile of some, n programs in all, in float64 and in fixed order.

    Args:
        rows: As in `step`.
        grads: As in `step`.
        row_of_tile: Index of the row that a tile belongs to, of all launches.
        begin: First of the tiles.
        end: Behind the last one.
        partial: The sum of each program; written.
        FINITE_ONLY: Leave out elements whose square is not finite.
        SIZE: Elements of a tile.
    """
    total = tl.zeros((SIZE,), tl.float64)
    for tile in range(begin + tl.program_id(0), end, tl.num_programs(0)):
        index = tl.load(row_of_tile + tile).to(tl.int64)
        row = rows + index * ROW_WIDTH
        first = (tile - tl.load(row + ROW_TILES_BEFORE)) * SIZE
        numel = tl.load(row + ROW_NUMEL)
        address = tl.load(grads + index)
        form = tl.load(row + ROW_GRAD_FORMAT)
        if form == _FLOAT32:
            total += _of_tile(address, first, numel, _FLOAT32, FINITE_ONLY, SIZE)
        elif form == _BFLOAT16:
            total += _of_tile(address, first, numel, _BFLOAT16, FINITE_ONLY, SIZE)
        elif form == _FLOAT16:
            total += _of_tile(address, first, numel, _FLOAT16, FINITE_ONLY, SIZE)
        else:
            total += _of_tile(address, first, numel, _FLOAT64, FINITE_ONLY, SIZE)
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _of_tile(
    address: tl.tensor,
    first: tl.tensor,
    numel: tl.tensor,
    FORMAT: tl.constexpr,
    FINITE_ONLY: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """Square one tile; a gradient has no gaps, whatever the blocks of its row."""
    at = first + tl.arange(0, SIZE)
    if (first + SIZE <= numel) & (address % 16 == 0):
        square = _squared(take(pointer(address, FORMAT, True), at, at, True), FORMAT, FINITE_ONLY)
    else:
        codes = take(pointer(address, FORMAT, False), at, at < numel, False)
        square = _squared(codes, FORMAT, FINITE_ONLY)
    return square


@triton.jit
def _squared(codes: tl.tensor, FORMAT: tl.constexpr, FINITE_ONLY: tl.constexpr) -> tl.tensor:
    grad = opened(codes, FORMAT).to(tl.float64)
    square = grad * grad
    if FINITE_ONLY:
        square = tl.where(square - square == 0, square, 0.0)
    return square
