"""Warm restarts, and the weight decay normalised to their cycles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from ebbtide.schedules._arithmetic import between, check_length, position

__all__ = ["CosineRestarts", "Cycle", "CycleNormalized"]

_Exact = int | Fraction


def _exact(number: float) -> _Exact:
    return int(number) if number == int(number) else Fraction(number)


def _plain(number: _Exact) -> float:
    return number if isinstance(number, int) else float(number)


class Cycle(NamedTuple):
    """One cycle of warm restarts: its number from 0, first step and length."""

    number: int
    start: float
    length: float


@dataclass(frozen=True)
class CosineRestarts:
    """Anneal along half a cosine, restart at the peak, each cycle longer by a factor.

        T_i  = first_cycle·cycle_factor^i
        peak = end + (1 - end)·peak_decay^i
        η    = end + (peak - end)·(1 + cos(π·T_cur/T_i))/2

    The step at which a cycle ends is the first of the next one and has its peak. The cycle is
    found in exact arithmetic: a logarithm, rounded, names the wrong cycle at some restarts
    (first_cycle 1, cycle_factor 3, step 121 is one).

    Args:
        first_cycle: Length of the first cycle; above 0.
        cycle_factor: Whole number of at least 1.
        end: Value that each cycle approaches.
        peak_decay: Factor of the peaks from cycle to cycle, in (0, 1].

    Example:
        >>> schedule = CosineRestarts(100, 2)
        >>> [schedule(t) for t in (0, 50, 100, 300, 700)]
        [1.0, 0.5, 1.0, 1.0, 1.0]
        >>> schedule.cycle(299)
        Cycle(number=1, start=100, length=200)

    References:
        Loshchilov & Hutter 2017, arXiv:1608.03983; 2019, Eq. 14 and 15, arXiv:1711.05101.
    """

    first_cycle: float
    cycle_factor: int = 1
    end: float = 0.0
    peak_decay: float = 1.0

    def __post_init__(self) -> None:
        check_length("first_cycle", self.first_cycle)
        if self.cycle_factor != int(self.cycle_factor) or self.cycle_factor < 1:
            raise ValueError(
                f"cycle_factor must be a whole number of at least 1, got {self.cycle_factor}"
            )
        if not 0 < self.peak_decay <= 1:
            raise ValueError(f"peak_decay must be in (0, 1], got {self.peak_decay}")

    def cycle(self, step: float) -> Cycle:
        """Return the cycle to which `step` belongs."""
        index, start, length = self._exact_cycle(_exact(position(step)))
        return Cycle(index, _plain(start), _plain(length))

    def __call__(self, step: float) -> float:
        """Return the value at `step`."""
        exact_step = _exact(position(step))
        index, start, length = self._exact_cycle(exact_step)
        progress = float((exact_step - start) / length)
        share_left = 0.5 * (1.0 + math.cos(math.pi * progress))
        return between(self.end, 1.0, self.peak_decay**index * share_left)

    def _exact_cycle(self, step: _Exact) -> tuple[int, _Exact, _Exact]:
        length = _exact(self.first_cycle)
        factor = int(self.cycle_factor)
        if factor == 1:
            index = step // length
            return index, index * length, length
        index = 0
        start: _Exact = 0
        while step >= start + length:
            index, start, length = index + 1, start + length, length * factor
        return index, start, length


@dataclass(frozen=True)
class CycleNormalized:
    """Turn a normalised weight decay λ_norm into that of each warm restart: AdamWR.

        1/√(batch passes of the current cycle)

    Give the optimizer λ_norm as its weight decay with `decay_policy="independent"`, drive the
    learning rate with the restarts and the weight decay with this.

    Args:
        cycles: The restarts that drive the learning rate.
        batches: Batch passes in one unit of the length of a cycle: 1 where cycles are counted
            in steps, the steps of an epoch where they are counted in epochs.

    Example:
        From one cycle to the next the decay falls by √cycle_factor:

        >>> normalized = CycleNormalized(CosineRestarts(100, 4))
        >>> normalized(99), normalized(100)
        (0.1, 0.05)

    References:
        Loshchilov & Hutter 2019, section B.1, arXiv:1711.05101.
    """

    cycles: CosineRestarts
    batches: float = 1.0

    def __post_init__(self) -> None:
        check_length("batches", self.batches)
        if not isinstance(self.cycles, CosineRestarts):
            raise TypeError(f"cycles must be CosineRestarts, got {self.cycles!r}")

    def __call__(self, step: float) -> float:
        """Return the multiplier of λ_norm at `step`."""
        return 1.0 / math.sqrt(self.cycles.cycle(step).length * self.batches)
