"""Sums of squares of all gradients, for the global norm."""

from __future__ import annotations

import triton
import triton.language as tl

from ebbtide.backends.triton.codecs import opened, pointer, take
from ebbtide.backends.triton.rows import ROW_FIRST_TILE, ROW_WIDTH, located

__all__ = ["sum_squares"]


@triton.jit
def sum_squares(
    rows: tl.tensor,
    grads: tl.tensor,
    row_of_tile: tl.tensor,
    tiles: tl.tensor,
    partial: tl.tensor,
    GRAD: tl.constexpr,
    FINITE_ONLY: tl.constexpr,
    BLOCKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """Sum the squares of every PROGRAMS-th tile, in float64 and in a fixed order.

    Args:
        rows: As in `step`.
        grads: As in `step`.
        row_of_tile: As in `step`.
        tiles: Number of tiles.
        partial: The sum of each program; written.
        GRAD: Format of the gradients.
        FINITE_ONLY: Leave out elements whose square is not finite.
        BLOCKS: Blocks of a tile.
        PROGRAMS: Number of programs.
    """
    total = tl.zeros((BLOCKS, 128), tl.float64)
    for tile in range(tl.program_id(0), tiles, PROGRAMS):
        index = tl.load(row_of_tile + tile).to(tl.int64)
        row = rows + index * ROW_WIDTH
        first = (tile - tl.load(row + ROW_FIRST_TILE)) * BLOCKS
        at, inside = located(row, first, BLOCKS, False)
        grad = opened(take(pointer(tl.load(grads + index), GRAD, False), at, inside, False), GRAD)
        square = grad.to(tl.float64) * grad.to(tl.float64)
        if FINITE_ONLY:
            square = tl.where(square - square == 0, square, 0.0)
        total += square
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))
