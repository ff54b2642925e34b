"""The reference behind the backend interface: right, and slow.

For tests, and for machines without the compiled core. It reads and writes the rows' memory through
`ctypes`, one element at a time.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from typing import Any

from ebbtide import codecs, reference
from ebbtide.plan import Bucket, Field, Format, Outcome, Plan, Row

__all__ = ["PureBackend"]

_CTYPES: dict[Format, Any] = {
    Format.FLOAT32: ctypes.c_float,
    Format.FLOAT64: ctypes.c_double,
    Format.BFLOAT16: ctypes.c_uint16,
    Format.FLOAT16: ctypes.c_uint16,
}


class _Array:
    """Elements of one field as Python floats."""

    def __init__(self, each: Field, numel: int) -> None:
        self.format = each.format
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

    def put(self, index: int, value: float, bits: int | None) -> None:
        if self.format is Format.BFLOAT16:
            code = codecs.bfloat16_encode(value, None if bits is None else bits >> 16)
            self._items[index] = code
        elif self.format is Format.FLOAT16:
            code = codecs.float16_encode(value, None if bits is None else bits >> 19)
            self._items[index] = code
        else:
            self._items[index] = value


class PureBackend:
    """Runs plans through `ebbtide.reference`. Says once that it is slow."""

    name = "pure"
    buckets: tuple[tuple[int, int], ...] = ()
    _warned = False

    def __init__(self) -> None:
        if not PureBackend._warned:
            PureBackend._warned = True
            warnings.warn(
                "ebbtide runs without its compiled core, one element at a time: right, but "
                "thousands of times slower. `ebbtide doctor` tells why.",
                RuntimeWarning,
                stacklevel=4,
            )

    def load(self, plan: Plan) -> list[tuple[int, int]]:
        """Return the (group, step) pairs that the plan needs scalars for."""
        return list(dict.fromkeys((group, _next_step(row)) for _, group, row in plan.rows()))

    def forget(self) -> None:
        """Do nothing: every step is planned anew."""

    def look(self, *_: object) -> None:
        """Do nothing: there is no table to look at."""

    def stepped(self) -> None:
        """Do nothing: no step was taken without a plan."""

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
            for grad in [_Array(row.grad, row.numel)]
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
    param, grad = _Array(row.param, row.numel), _Array(row.grad, row.numel)
    state = [_Array(each, row.numel) for each in row.state]
    key = codecs.row_key(int(bucket.scalars.seed), int(bucket.scalars.step), row.salt)
    one = _adam_element if rule == "adam" else _sgd_element
    limit = 1.7976931348623157e308 if row.param.format is Format.FLOAT64 else 3.4028234663852886e38
    untouched = 0
    for i in range(row.numel):
        old = (param[i], *(array[i] for array in state))
        try:
            new = one(old, grad[i] * grad_scale, bucket)
        except OverflowError:
            new = (math.nan,) * len(old)
        witness = new[2] if rule == "adam" else new[-1]
        if guard and not abs(witness) <= limit:
            untouched += 1
            new = old
        element = row.first_block * 128 + row.lead + i
        param.put(
            i, new[0], codecs.dither_bits(key, element, state=False) if row.stochastic else None
        )
        for k, array in enumerate(state):
            bits = codecs.dither_bits(key, element, state=True) if k > 0 else None
            array.put(i, new[1 + k], bits)
    return untouched


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
