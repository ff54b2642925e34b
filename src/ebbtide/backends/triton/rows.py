"""The table of rows that the kernels read, and where the elements of a tile lie in a row."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["COLUMNS", "located"]

# Columns of a row in the table, all int64. "first_tile" counts the tiles of the row's launch,
# "tiles_before" those of all launches.
COLUMNS = (
    "param", "state0", "state1", "state2", "scale0", "scale1", "scale2", "residual", "numel",
    "blocks", "run_length", "lead", "first_block", "salt", "first_tile", "scalars", "entry",
    "aligned", "grad_format", "tiles_before",
)  # fmt: skip
ROW_PARAM = tl.constexpr(0)
ROW_STATE = tl.constexpr(1)
ROW_SCALE_OF = tl.constexpr(4)
ROW_RESIDUAL = tl.constexpr(7)
ROW_NUMEL = tl.constexpr(8)
ROW_BLOCKS = tl.constexpr(9)
ROW_RUN_LENGTH = tl.constexpr(10)
ROW_LEAD = tl.constexpr(11)
ROW_FIRST_BLOCK = tl.constexpr(12)
ROW_SALT = tl.constexpr(13)
ROW_FIRST_TILE = tl.constexpr(14)
ROW_SCALARS = tl.constexpr(15)
ROW_ENTRY = tl.constexpr(16)
ROW_ALIGNED = tl.constexpr(17)
ROW_GRAD_FORMAT = tl.constexpr(18)
ROW_TILES_BEFORE = tl.constexpr(19)
ROW_WIDTH = tl.constexpr(len(COLUMNS))


@triton.jit
def located(
    row: tl.tensor, first: tl.tensor, BLOCKS: tl.constexpr, FAST: tl.constexpr
) -> tl.tensor:
    """Find a tile's elements: their index in the row, and whether they are inside of it."""
    lane = tl.arange(0, 128)[None, :]
    block = tl.arange(0, BLOCKS)[:, None]
    if FAST:
        at = first * 128 + (block * 128 + lane)
        inside = tl.full((BLOCKS, 128), 1, tl.int1)
    else:
        run_length, lead = tl.load(row + ROW_RUN_LENGTH), tl.load(row + ROW_LEAD)
        blocks_per_run = (lead + run_length + 127) // 128
        run = (first + block) // blocks_per_run
        in_run = ((first + block) % blocks_per_run) * 128 - lead + lane
        at = run * run_length + in_run
        inside = (in_run >= 0) & (in_run < run_length) & (at < tl.load(row + ROW_NUMEL))
    return at, inside
