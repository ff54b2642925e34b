"""The reference behind the backend interface: right, and slow.

For tests, and for machines without the compiled core. It reads and writes the rows' memory through
`ctypes`, one element at a time.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

from ebbtide import codecs, reference
from ebbtide.notice import warn
from ebbtide.plan import Bucket, Field, Format, Outcome, Plan, Row

__all__ = ["PureBackend"]

_CTYPES: dict[Format, Any] = {
    Format.FLOAT32: ctypes.c_float,
    Format.FLOAT64: ctypes.c_double,
    Format.BFLOAT16: ctypes.c_uint16,
    Format.FLOAT16: ctypes.c_uint16,
}


class _Array:
    """Elements of one field as Python floats; `put` takes the 32 random bits of the element."""

    def __init__(self, each: Field, numel: int, *, stochastic: bool) -> None:
        self.format = each.format
        self.stochastic = stochastic
        self._items: Any = (
            (_CTYPES[each.format] * numel).from_address(each.address) if numel else ()
        )

    def __getitem__(self, index: int) -> float:
        item = self._items[index]
        if self.format is Format.BFLOAT16:
            return codecs.bfloat16_decode(int(item))
        if self.format is Format.FLOAT16:
            return codecs.float16_decode(int(item))
        return float(item)

    def put(self, index: int, value: float, word: int) -> None:
        if self.format is Format.BFLOAT16:
            bits = word >> 16 if self.stochastic else None
            self._items[index] = codecs.bfloat16_encode(value, bits)
        elif self.format is Format.FLOAT16:
            bits = word >> 19 if self.stochastic else None
            self._items[index] = codecs.float16_encode(value, bits)
        else:
            self._items[index] = value


class _Split:
    """A parameter of 16 bits with those that it cannot hold."""

    def __init__(self, row: Row) -> None:
        self._bits = row.residual_bits
        self._float16 = row.param.format is Format.FLOAT16
        low = ctypes.c_int8 if row.residual_bits == 8 else ctypes.c_int16
        self._high: Any = (ctypes.c_uint16 * row.numel).from_address(row.param.address)
        self._low: Any = (low * row.numel).from_address(row.residual)

    def __getitem__(self, index: int) -> float:
        high, low = int(self._high[index]), int(self._low[index])
        return codecs.join(high, low, self._bits, float16=self._float16)

    def put(self, index: int, value: float, word: int) -> None:
        parts = codecs.split(value, self._bits, word >> 24, float16=self._float16)
        self._high[index], self._low[index] = parts


class _Moments8:
    """The moments of a row in eight bits, decoded as a whole and encoded block by block."""

    def __init__(self, row: Row) -> None:
        self._row = row
        blocks = row.numel // row.run_length * -(-row.run_length // 128) if row.numel else 0
        first, *seconds = row.state
        self._first: Any = (ctypes.c_int8 * row.numel).from_address(first.address)
        self._scale: Any = (ctypes.c_float * blocks).from_address(first.scale)
        self._seconds: list[Any] = [
            (ctypes.c_uint8 * row.numel).from_address(each.address) for each in seconds
        ]
        self._windows: list[Any] = [
            (ctypes.c_uint16 * blocks).from_address(each.scale) for each in seconds
        ]

    def _blocks(self) -> Iterator[tuple[int, range]]:
        row = self._row
        starts = (
            range(run + start, min(run + start + 128, run + row.run_length))
            for run in range(0, row.numel, row.run_length)
            for start in range(0, row.run_length, 128)
        )
        return enumerate(starts)

    def decode(self) -> list[list[float]]:
        moments: list[list[float]] = [[0.0] * self._row.numel for _ in self._row.state]
        for block, elements in self._blocks():
            for i in elements:
                for k, codes in enumerate(self._seconds):
                    code = int(codes[i])
                    moments[1 + k][i] = codecs.decode_second(code, int(self._windows[k][block]))
                code, scale = int(self._first[i]), float(self._scale[block])
                moments[0][i] = codecs.decode_first(code, scale, moments[1][i])
        return moments

    def encode(self, moments: list[list[float]], words: list[int]) -> None:
        for block, elements in self._blocks():
            part = slice(elements.start, elements.stop)
            encoded = codecs.encode_moments([m[part] for m in moments], words[part])
            self._first[part] = encoded.first
            self._scale[block] = encoded.scale
            for k, codes in enumerate(self._seconds):
                codes[part] = encoded.seconds[k]
                self._windows[k][block] = encoded.windows[k]


class PureBackend:
    """Runs plans through `ebbtide.reference`. Says once that it is slow."""

    name = "pure"
    loaded = others = False  # every step is planned anew
    norm = 0.0
    _warned = False

    def __init__(self) -> None:
        if not PureBackend._warned:
            PureBackend._warned = True
            warn(
                "ebbtide runs without its compiled core, one element at a time: right, but "
                "thousands of times slower. `ebbtide doctor` tells why.",
                RuntimeWarning,
            )

    def load(self, plan: Plan) -> list[tuple[int, int]]:
        """Return the (group, step) pairs that the plan needs scalars for."""
        plan.check_formats()
        return list(dict.fromkeys((group, _next_step(row)) for _, group, row in plan.rows()))

    def forget(self) -> None:
        """Do nothing: every step is planned anew."""

    def stepped(self) -> list[Any]:
        """Return nothing: no step was taken without a plan."""
        return []

    def rerun(self, *_: object) -> None:
        """Do nothing: there is no table to run again."""

    def run(self, plan: Plan, buckets: list[Bucket], *, grad_scale: float, guard: bool) -> Outcome:
        """Take one step of every row through the reference."""
        by_key = {(each.group, int(each.scalars.step)): each for each in buckets}
        untouched = []
        for index, group, row in plan.rows():
            bucket = by_key[group, _next_step(row)]
            count = _run_row(row, bucket, grad_scale, guard, plan.rule.name)
            counter = _step_counter(row)
            if counter is not None:
                counter[0] += 1
            if count:
                untouched.append((index, count))
        return Outcome(untouched)

    def sum_squares(self, plan: Plan) -> float:
        """Return the sum of squares of all gradients."""
        return math.fsum(
            value * value
            for _, _, row in plan.rows()
            for grad in [_Array(row.grad, row.numel, stochastic=False)]
            for value in (grad[i] for i in range(row.numel))
        )


def _next_step(row: Row) -> int:
    counter = _step_counter(row)
    return (row.count if counter is None else int(counter[0])) + 1


def _step_counter(row: Row) -> ctypes.Array[ctypes.c_float] | ctypes.Array[ctypes.c_double] | None:
    if row.step_address == 0:
        return None
    kind = ctypes.c_double if row.step_is_double else ctypes.c_float
    return (kind * 1).from_address(row.step_address)


def _run_row(row: Row, bucket: Bucket, grad_scale: float, guard: bool, rule: str) -> int:
    grad = _Array(row.grad, row.numel, stochastic=False)
    param = (
        _Split(row)
        if row.residual_bits
        else _Array(row.param, row.numel, stochastic=row.stochastic)
    )
    blockwise = _Moments8(row) if any(f.format is Format.SIGNED8 for f in row.state) else None
    arrays = [
        _Array(each, row.numel, stochastic=k > 0)
        for k, each in enumerate(() if blockwise else row.state)
    ]
    decoded = blockwise.decode() if blockwise else []
    one = _adam_element if rule == "adam" else _sgd_element
    limit = 1.7976931348623157e308 if row.param.format is Format.FLOAT64 else 3.4028234663852886e38
    words = _words(row, bucket, state=True)
    untouched = 0
    for i, word in enumerate(_words(row, bucket, state=False)):
        old = (param[i], *(array[i] for array in (decoded or arrays)))
        try:
            new = one(old, grad[i] * grad_scale, bucket)
        except OverflowError:
            new = (math.nan,) * len(old)
        witness = new[2] if rule == "adam" else new[-1]
        if guard and not abs(witness) <= limit:
            untouched += 1
            new = old
        param.put(i, new[0], word)
        for k, values in enumerate(decoded):
            values[i] = new[1 + k]
        for k, array in enumerate(arrays):
            array.put(i, new[1 + k], words[i])
    if blockwise:
        blockwise.encode(decoded, words)
    return untouched


def _words(row: Row, bucket: Bucket, *, state: bool) -> list[int]:
    """Return the 32 random bits of each element; blocks start anew with each run."""
    step = int(bucket.scalars.step)
    key = codecs.row_key(int(bucket.scalars.seed), step, row.salt)
    per_run = -(-(row.lead + row.run_length) // 128) if row.numel else 0
    firsts = [
        (row.first_block + run * per_run) * 128 + row.lead
        for run in range(row.numel // row.run_length if row.numel else 0)
    ]
    return [
        codecs.dither_bits(key, step, first + i, state=state)
        for first in firsts
        for i in range(row.run_length)
    ]


def _adam_element(old: tuple[float, ...], grad: float, bucket: Bucket) -> tuple[float, ...]:
    group, scalars = bucket.hyperparameters, bucket.scalars
    new = reference.adam(
        reference.AdamState(*old),
        grad,
        step=int(scalars.step),
        lr=scalars.lr,
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=scalars.eps,
        decay=scalars.decay,
        l2=scalars.l2,
        cautious=bool(scalars.cautious),
        maximize=scalars.grad_scale < 0,
        bias_correction=bool(group["bias_correction"]),
    )
    return tuple(value for value in new if value is not None)


def _sgd_element(old: tuple[float, ...], grad: float, bucket: Bucket) -> tuple[float, ...]:
    group, scalars = bucket.hyperparameters, bucket.scalars
    buffer = old[1] if len(old) > 1 and bucket.scalars.step > 1 else None
    new = reference.sgd(
        reference.SGDState(old[0], buffer),
        grad,
        lr=scalars.lr,
        momentum=scalars.momentum,
        dampening=float(group["dampening"]),
        nesterov=bool(scalars.nesterov),
        decay=scalars.decay,
        l2=scalars.l2,
        cautious=bool(scalars.cautious),
        maximize=scalars.grad_scale < 0,
    )
    return (new.param,) if new.momentum_buffer is None else (new.param, new.momentum_buffer)
