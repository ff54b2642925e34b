"""The kernel: a step of every row of a table in one launch.

A program takes one tile, some blocks of one row. It finds the row through `row_of_tile`, the row's
memory through a table of addresses. A whole and aligned tile takes the path marked FAST, with
16-byte loads; the other path finds each block as `locate` of `csrc/codec.h` does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ebbtide.backends.triton.arithmetic import product
from ebbtide.backends.triton.codecs import (
    block_words,
    close,
    joined,
    opened,
    pointer,
    put,
    residual_pointer,
    split,
    take,
)
from ebbtide.backends.triton.moments import (
    are_holdable,
    close_moments,
    close_ordinary,
    extremes,
    open_moments,
)
from ebbtide.backends.triton.rows import (
    ROW_ALIGNED,
    ROW_BLOCKS,
    ROW_ENTRY,
    ROW_FIRST_BLOCK,
    ROW_FIRST_TILE,
    ROW_NUMEL,
    ROW_PARAM,
    ROW_RESIDUAL,
    ROW_SALT,
    ROW_SCALARS,
    ROW_STATE,
    ROW_WIDTH,
    located,
)
from ebbtide.backends.triton.rules import adam_moments, adam_param, are_usual, sgd

__all__ = ["step"]

# Columns of the scalars that are read here; the others are read in rules.py.
_SCALAR_COUNT = tl.constexpr(19)
_GRAD_SCALE = tl.constexpr(4)
_STEP = tl.constexpr(15)
_KEY = tl.constexpr(17)  # of codecs.epoch_key, the lower and the upper half

# Columns of the verdict, prologue.py.
_SCALE = tl.constexpr(0)
_APPLY = tl.constexpr(1)

_FLOAT64 = tl.constexpr(1)  # ebbtide.plan.Format
_SIGNED8 = tl.constexpr(4)


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
    RESIDUAL: tl.constexpr,
    GRAD: tl.constexpr,
    STATE0: tl.constexpr,
    STATE1: tl.constexpr,
    STATE2: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GUARD: tl.constexpr,
    JUDGED: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Step one tile.

    Args:
        rows: `COLUMNS` of each row.
        grads: Address of each row's gradient.
        row_of_tile: Index of the row that a tile belongs to.
        scalars: `Scalars` and key of each group and step count, float64.
        verdict: `VERDICT`; read where JUDGED.
        lanes: The constants of the 128 lanes, for the random bits.
        spoilt: Of each entry of the plan: a step whose gradient was not finite, 0 for none, and
            the number of elements left untouched then.
        alarm: Address of an int32 in the host's memory that is set where `spoilt` is.
        RULE: 0 for Adam, 1 for SGD.
        PARAM: Format of the parameter.
        RESIDUAL: Bits of the parameter's residual, 0 for none.
        GRAD: Of the gradient.
        STATE0: Of the state arrays, -1 where there is none.
        STATE1: The second.
        STATE2: The third.
        STOCHASTIC: Round the parameter stochastically.
        GUARD: Leave elements untouched whose new state would not be finite.
        JUDGED: Whether the verdict has a say.
        PLAIN: Whether `tables.is_plain` of all scalars.
        BLOCKS: Blocks of a tile.
    """
    if JUDGED:  # noqa: SIM102
        if tl.load(verdict + _APPLY) == 0:
            return
    tile = tl.program_id(0)
    index = tl.load(row_of_tile + tile).to(tl.int64)
    row = rows + index * ROW_WIDTH
    grad = tl.load(grads + index)
    first = (tile - tl.load(row + ROW_FIRST_TILE)) * BLOCKS
    whole = (first + BLOCKS) * 128 <= tl.load(row + ROW_NUMEL)
    if (tl.load(row + ROW_ALIGNED) != 0) & (grad % 16 == 0) & whole:
        _step_tile(row, grad, first, scalars, verdict, lanes, spoilt, alarm, RULE, PARAM,
                   RESIDUAL, GRAD, STATE0, STATE1, STATE2, STOCHASTIC, GUARD, JUDGED, PLAIN, BLOCKS,
                   True)  # fmt: skip
    else:
        # Block by block: a tile of masked elements would need half as many registers again, for
        # whole tiles too.
        blocks = tl.minimum(first + BLOCKS, tl.load(row + ROW_BLOCKS))
        for block in range(first, blocks):
            _step_tile(row, grad, block, scalars, verdict, lanes, spoilt, alarm, RULE, PARAM,
                       RESIDUAL, GRAD, STATE0, STATE1, STATE2, STOCHASTIC, GUARD, JUDGED, PLAIN, 1,
                       False)  # fmt: skip


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
    RESIDUAL: tl.constexpr,
    GRAD: tl.constexpr,
    STATE0: tl.constexpr,
    STATE1: tl.constexpr,
    STATE2: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GUARD: tl.constexpr,
    JUDGED: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCKS: tl.constexpr,
    FAST: tl.constexpr,
) -> None:
    at, inside = located(row, first, BLOCKS, FAST)
    s = scalars + tl.load(row + ROW_SCALARS) * _SCALAR_COUNT
    param = _open_param(row, at, inside, PARAM, RESIDUAL, FAST)
    grad = opened(take(pointer(grad_address, GRAD, FAST), at, inside, FAST), GRAD)
    grad_scale = tl.load(s + _GRAD_SCALE)
    if JUDGED:
        grad_scale = grad_scale * tl.load(verdict + _SCALE)
    grad = product(grad, grad_scale.to(param.dtype))
    if STATE0 == _SIGNED8:
        state0, state1, state2 = open_moments(row, first, at, inside, STATE2 >= 0, BLOCKS, FAST)
    else:
        state0 = _open_state(row, 0, param, at, inside, STATE0, FAST)
        state1 = _open_state(row, 1, param, at, inside, STATE1, FAST)
        state2 = _open_state(row, 2, param, at, inside, STATE2, FAST)
    new1 = state1
    new2 = state2
    if RULE == 0:
        new0, new1, new2 = adam_moments(param, grad, state0, state1, state2, s, STATE2 >= 0, PLAIN)
        if FAST and PLAIN and PARAM != _FLOAT64 and STATE2 < 0:  # noqa: SIM102
            if are_usual(param, new0, new1, s):
                _close_usual(row, s, lanes, first, at, inside, param, new0, new1, PARAM, RESIDUAL,
                             STATE0, STATE1, STOCHASTIC, BLOCKS)  # fmt: skip
                return
        new = adam_param(param, new0, new2, s, PLAIN, False)
        witness = new1
    else:
        new, new0, witness = sgd(param, grad, state0, s, STATE0 >= 0, PLAIN)
    if GUARD:
        finite = witness - witness == 0
        count = tl.sum(tl.sum((inside & (finite == 0)).to(tl.int32), axis=1), axis=0)
        if count > 0:
            new = tl.where(finite, new, param)
            new0 = tl.where(finite, new0, state0)
            new1 = tl.where(finite, new1, state1)
            new2 = tl.where(finite, new2, state2)
            at_step = tl.load(s + _STEP).to(tl.int64)
            _report(spoilt + tl.load(row + ROW_ENTRY) * 2, alarm, at_step, count)
    for_param, for_state = _bits(row, s, lanes, first, BLOCKS)
    _close_param(row, new, for_param, at, inside, PARAM, RESIDUAL, STOCHASTIC, FAST, False)
    if STATE0 == _SIGNED8:
        close_moments(row, first, new0, new1, new2, for_state, at, inside, STATE2 >= 0, BLOCKS,
                      FAST)  # fmt: skip
    else:
        _close_states(row, new0, new1, new2, for_state, at, inside, STATE0, STATE1, STATE2, FAST,
                      False)  # fmt: skip


@triton.jit
def _close_usual(
    row: tl.tensor,
    s: tl.tensor,
    lanes: tl.tensor,
    first: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    param: tl.tensor,
    new0: tl.tensor,
    new1: tl.tensor,
    PARAM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STATE0: tl.constexpr,
    STATE1: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Finish a tile of which `are_usual` holds: the same results for half the instructions."""
    new = adam_param(param, new0, new1, s, True, True)
    for_param, for_state = _bits(row, s, lanes, first, BLOCKS)
    _close_param(row, new, for_param, at, inside, PARAM, RESIDUAL, STOCHASTIC, True, True)
    if STATE0 != _SIGNED8:
        _close_states(row, new0, new1, new1, for_state, at, inside, STATE0, STATE1, -1, True,
                      True)  # fmt: skip
    else:
        highest, lowest, largest = extremes(new0, new1)
        if are_holdable(largest):
            close_ordinary(row, first, new0, new1, highest, lowest, largest, for_state, at,
                           BLOCKS)  # fmt: skip
        else:
            close_moments(row, first, new0, new1, new1, for_state, at, inside, False, BLOCKS, True)


@triton.jit
def _open_param(
    row: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    PARAM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FAST: tl.constexpr,
) -> tl.tensor:
    codes = take(pointer(tl.load(row + ROW_PARAM), PARAM, FAST), at, inside, FAST)
    if RESIDUAL == 0:
        param = opened(codes, PARAM)
    else:
        low = take(residual_pointer(tl.load(row + ROW_RESIDUAL), RESIDUAL, FAST), at, inside, FAST)
        param = joined(codes, low, PARAM, RESIDUAL)
    return param


@triton.jit
def _close_param(
    row: tl.tensor,
    param: tl.tensor,
    bits: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    PARAM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FAST: tl.constexpr,
    USUAL: tl.constexpr,
) -> None:
    to = pointer(tl.load(row + ROW_PARAM), PARAM, FAST)
    if RESIDUAL == 0:
        put(to, at, close(param, bits, PARAM, STOCHASTIC, USUAL), inside, FAST)
    else:
        codes, low = split(param, bits, PARAM, RESIDUAL, USUAL)
        put(to, at, codes, inside, FAST)
        to_low = residual_pointer(tl.load(row + ROW_RESIDUAL), RESIDUAL, FAST)
        put(to_low, at, low, inside, FAST)


@triton.jit
def _open_state(
    row: tl.tensor,
    index: tl.constexpr,
    param: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    FORMAT: tl.constexpr,
    FAST: tl.constexpr,
) -> tl.tensor:
    """Load a state array; the parameter stands in for one that is not there."""
    state = param
    if FORMAT >= 0:
        to = pointer(tl.load(row + ROW_STATE + index), FORMAT, FAST)
        state = opened(take(to, at, inside, FAST), FORMAT)
    return state


@triton.jit
def _close_states(
    row: tl.tensor,
    new0: tl.tensor,
    new1: tl.tensor,
    new2: tl.tensor,
    bits: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    STATE0: tl.constexpr,
    STATE1: tl.constexpr,
    STATE2: tl.constexpr,
    FAST: tl.constexpr,
    USUAL: tl.constexpr,
) -> None:
    # The first moment is rounded to nearest; moments of squares would stall that way.
    if STATE0 >= 0:
        to = pointer(tl.load(row + ROW_STATE), STATE0, FAST)
        put(to, at, close(new0, bits, STATE0, False, USUAL), inside, FAST)
    if STATE1 >= 0:
        to = pointer(tl.load(row + ROW_STATE + 1), STATE1, FAST)
        put(to, at, close(new1, bits, STATE1, True, USUAL), inside, FAST)
    if STATE2 >= 0:
        to = pointer(tl.load(row + ROW_STATE + 2), STATE2, FAST)
        put(to, at, close(new2, bits, STATE2, True, USUAL), inside, FAST)


@triton.jit
def _bits(
    row: tl.tensor, s: tl.tensor, lanes: tl.tensor, first: tl.tensor, BLOCKS: tl.constexpr
) -> tl.tensor:
    """Return the random bits of a tile's elements, for the parameter and for its state."""
    block = tl.load(row + ROW_FIRST_BLOCK) + first + tl.arange(0, BLOCKS)
    for_param, for_state = block_words(
        tl.load(s + _KEY).to(tl.uint64) | (tl.load(s + _KEY + 1).to(tl.uint64) << 32),
        tl.load(s + _STEP).to(tl.uint64),
        tl.load(row + ROW_SALT).to(tl.uint64, bitcast=True),
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
