"""The kernels: a step of every row of a table in one launch, and what a step may need before it.

A program takes one tile, some blocks of one row. It finds the row through `row_of_tile`, the row's
memory through a table of addresses. A whole and aligned tile takes the path marked FAST, with
16-byte loads; the other path finds each block as `locate` of `csrc/codec.h` does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ebbtide.backends.triton.codecs import block_words, close, opened, pointer, put, take
from ebbtide.backends.triton.rules import adam, sgd

__all__ = ["COLUMNS", "step", "sum_squares"]

# Columns of a row in the table, all int64.
COLUMNS = ("param", "state0", "state1", "state2", "numel", "run_length", "lead", "first_block",
           "salt", "first_tile", "scalars", "entry", "aligned")  # fmt: skip
_PARAM = tl.constexpr(0)
_STATE0 = tl.constexpr(1)
_STATE1 = tl.constexpr(2)
_STATE2 = tl.constexpr(3)
_NUMEL = tl.constexpr(4)
_RUN_LENGTH = tl.constexpr(5)
_LEAD = tl.constexpr(6)
_FIRST_BLOCK = tl.constexpr(7)
_SALT = tl.constexpr(8)
_FIRST_TILE = tl.constexpr(9)
_SCALARS = tl.constexpr(10)
_ENTRY = tl.constexpr(11)
_ALIGNED = tl.constexpr(12)
_WIDTH = tl.constexpr(len(COLUMNS))

# Columns of the scalars that are read here; the others are read in rules.py.
_SCALAR_COUNT = tl.constexpr(17)
_GRAD_SCALE = tl.constexpr(4)
_STEP = tl.constexpr(15)
_SEED = tl.constexpr(16)

# Columns of the verdict, prologue.py.
_SCALE = tl.constexpr(0)
_APPLY = tl.constexpr(1)


@triton.jit
def step(
    rows: tl.tensor,
    grads: tl.tensor,
    row_of_tile: tl.tensor,
    scalars: tl.tensor,
    verdict: tl.tensor,
    lanes: tl.tensor,
    spoilt: tl.tensor,
    alarm: tl.tensor,
    RULE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE0: tl.constexpr,
    STATE1: tl.constexpr,
    STATE2: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GUARD: tl.constexpr,
    JUDGED: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Step one tile.

    Args:
        rows: `COLUMNS` of each row.
        grads: Address of each row's gradient.
        row_of_tile: Index of the row that a tile belongs to.
        scalars: `Scalars` of each group and step count, float64.
        verdict: `VERDICT`; read where JUDGED.
        lanes: The constants of the 128 lanes, for the random bits.
        spoilt: Of each entry of the plan: a step whose gradient was not finite, 0 for none, and
            the number of elements left untouched then.
        alarm: Address of an int32 in the host's memory that is set where `spoilt` is.
        RULE: 0 for Adam, 1 for SGD.
        PARAM: Format of the parameter.
        GRAD: Of the gradient.
        STATE0: Of the state arrays, -1 where there is none.
        STATE1: The second.
        STATE2: The third.
        STOCHASTIC: Round the parameter stochastically.
        GUARD: Leave elements untouched whose new state would not be finite.
        JUDGED: Whether the verdict has a say.
        BLOCKS: Blocks of a tile.
    """
    if JUDGED:  # noqa: SIM102
        if tl.load(verdict + _APPLY) == 0:
            return
    tile = tl.program_id(0)
    index = tl.load(row_of_tile + tile).to(tl.int64)
    row = rows + index * _WIDTH
    grad = tl.load(grads + index)
    first = (tile - tl.load(row + _FIRST_TILE)) * BLOCKS
    whole = (first + BLOCKS) * 128 <= tl.load(row + _NUMEL)
    if (tl.load(row + _ALIGNED) != 0) & (grad % 16 == 0) & whole:
        _step_tile(row, grad, first, scalars, verdict, lanes, spoilt, alarm, RULE, PARAM,
                   GRAD, STATE0, STATE1, STATE2, STOCHASTIC, GUARD, JUDGED, BLOCKS,
                   True)  # fmt: skip
    else:
        _step_tile(row, grad, first, scalars, verdict, lanes, spoilt, alarm, RULE, PARAM,
                   GRAD, STATE0, STATE1, STATE2, STOCHASTIC, GUARD, JUDGED, BLOCKS,
                   False)  # fmt: skip


@triton.jit
def _located(
    row: tl.tensor, first: tl.tensor, BLOCKS: tl.constexpr, FAST: tl.constexpr
) -> tl.tensor:
    """Find a tile's elements: their index in the row, and whether they are inside of it."""
    lane = tl.arange(0, 128)[None, :]
    block = tl.arange(0, BLOCKS)[:, None]
    if FAST:
        at = first * 128 + (block * 128 + lane)
        inside = at >= 0
    else:
        run_length, lead = tl.load(row + _RUN_LENGTH), tl.load(row + _LEAD)
        blocks_per_run = (lead + run_length + 127) // 128
        run = (first + block) // blocks_per_run
        in_run = ((first + block) % blocks_per_run) * 128 - lead + lane
        at = run * run_length + in_run
        inside = (in_run >= 0) & (in_run < run_length) & (at < tl.load(row + _NUMEL))
    return at, inside


@triton.jit
def _step_tile(
    row: tl.tensor,
    grad_address: tl.tensor,
    first: tl.tensor,
    scalars: tl.tensor,
    verdict: tl.tensor,
    lanes: tl.tensor,
    spoilt: tl.tensor,
    alarm: tl.tensor,
    RULE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE0: tl.constexpr,
    STATE1: tl.constexpr,
    STATE2: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GUARD: tl.constexpr,
    JUDGED: tl.constexpr,
    BLOCKS: tl.constexpr,
    FAST: tl.constexpr,
) -> None:
    at, inside = _located(row, first, BLOCKS, FAST)
    s = scalars + tl.load(row + _SCALARS) * _SCALAR_COUNT
    to_param = pointer(tl.load(row + _PARAM), PARAM, FAST)
    param = opened(take(to_param, at, inside, FAST), PARAM)
    grad = opened(take(pointer(grad_address, GRAD, FAST), at, inside, FAST), GRAD)
    grad_scale = tl.load(s + _GRAD_SCALE)
    if JUDGED:
        grad_scale = grad_scale * tl.load(verdict + _SCALE)
    grad = grad * grad_scale.to(param.dtype)
    state0 = param
    state1 = param
    state2 = param
    if STATE0 >= 0:
        to_state0 = pointer(tl.load(row + _STATE0), STATE0, FAST)
        state0 = opened(take(to_state0, at, inside, FAST), STATE0)
    if STATE1 >= 0:
        to_state1 = pointer(tl.load(row + _STATE1), STATE1, FAST)
        state1 = opened(take(to_state1, at, inside, FAST), STATE1)
    if STATE2 >= 0:
        to_state2 = pointer(tl.load(row + _STATE2), STATE2, FAST)
        state2 = opened(take(to_state2, at, inside, FAST), STATE2)
    new1 = state1
    new2 = state2
    if RULE == 0:
        new, new0, new1, new2, witness = adam(param, grad, state0, state1, state2, s, STATE2 >= 0)
    else:
        new, new0, witness = sgd(param, grad, state0, s, STATE0 >= 0)
    if GUARD:
        finite = witness - witness == 0
        new = tl.where(finite, new, param)
        new0 = tl.where(finite, new0, state0)
        new1 = tl.where(finite, new1, state1)
        new2 = tl.where(finite, new2, state2)
        count = tl.sum(tl.sum((inside & (finite == 0)).to(tl.int32), axis=1), axis=0)
        if count > 0:
            _report(
                spoilt + tl.load(row + _ENTRY) * 2, alarm, tl.load(s + _STEP).to(tl.int64), count
            )
    for_param, for_state = _bits(row, s, lanes, first, BLOCKS)
    put(to_param, at, close(new, for_param, PARAM, STOCHASTIC), inside, FAST)
    # The first moment is rounded to nearest; moments of squares would stall that way.
    if STATE0 >= 0:
        put(to_state0, at, close(new0, for_state, STATE0, False), inside, FAST)
    if STATE1 >= 0:
        put(to_state1, at, close(new1, for_state, STATE1, True), inside, FAST)
    if STATE2 >= 0:
        put(to_state2, at, close(new2, for_state, STATE2, True), inside, FAST)


@triton.jit
def _bits(
    row: tl.tensor, s: tl.tensor, lanes: tl.tensor, first: tl.tensor, BLOCKS: tl.constexpr
) -> tl.tensor:
    """Return the random bits of a tile's elements, for the parameter and for its state."""
    block = tl.load(row + _FIRST_BLOCK) + first + tl.arange(0, BLOCKS)
    for_param, for_state = block_words(
        tl.load(s + _SEED).to(tl.uint64),
        tl.load(s + _STEP).to(tl.uint64),
        tl.load(row + _SALT).to(tl.uint64, bitcast=True),
        block.to(tl.uint64),
    )
    lane = tl.load(lanes + tl.arange(0, 128)).to(tl.uint32, bitcast=True)[None, :]
    return for_param[:, None] ^ lane, for_state[:, None] ^ lane


@triton.jit
def _report(to: tl.tensor, alarm: tl.tensor, at_step: tl.tensor, count: tl.tensor) -> None:
    """Count elements that were left untouched; of several steps the first is kept."""
    before = tl.atomic_cas(to, tl.zeros_like(at_step), at_step)
    if (before == 0) | (before == at_step):
        tl.atomic_add(to + 1, count.to(tl.int64))
    tl.store(alarm.to(tl.pointer_type(tl.int32)), 1)


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
        row = rows + index * _WIDTH
        first = (tile - tl.load(row + _FIRST_TILE)) * BLOCKS
        at, inside = _located(row, first, BLOCKS, False)
        grad = opened(take(pointer(tl.load(grads + index), GRAD, False), at, inside, False), GRAD)
        square = grad.to(tl.float64) * grad.to(tl.float64)
        if FINITE_ONLY:
            square = tl.where(square - square == 0, square, 0.0)
        total += square
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))
