"""The values a cell reports on the way, thinned out as they become many."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

__all__ = ["Curve", "Medians"]

_MOST_POINTS = 200
_FEWEST_OTHERS = 5


class Curve:
    """Values over steps; at most 200 of them, evenly over the reports, and the last one.

    Cells that report alike keep the same steps, so that they can be compared there.

    Example:
        >>> curve = Curve()
        >>> for step in range(1000):
        ...     curve.add(step, 1.0 / (step + 1))
        >>> len(curve.points()), curve.points()[:3], curve.points()[-1]
        (126, ((0, 1.0), (8, 0.1111111111111111), (16, 0.058823529411764705)), (999, 0.001))
    """

    def __init__(self) -> None:
        self.count = 0
        self.last: tuple[int, float] | None = None
        self._low, self._high = math.inf, -math.inf
        self._kept: dict[int, float] = {}
        self._stride = 1

    def add(self, step: int, value: float) -> None:
        """Take a report."""
        if self.count % self._stride == 0:
            self._kept[step] = value
            if len(self._kept) > _MOST_POINTS:
                self._kept = dict(list(self._kept.items())[::2])
                self._stride *= 2
        self.count += 1
        self.last = step, value
        if math.isfinite(value):
            self._low, self._high = min(self._low, value), max(self._high, value)

    def best(self, *, maximize: bool) -> float:
        """Return the best finite value so far; infinitely bad before the first."""
        return self._high if maximize else self._low

    def points(self) -> tuple[tuple[int, float], ...]:
        """Return what is kept, in the order of the steps, the last report included."""
        kept = dict(self._kept)
        if self.last is not None:
            kept[self.last[0]] = self.last[1]
        return tuple(sorted(kept.items()))


class Medians:
    """The median rule, by which a cell is found hopeless.

    It is, when its best value so far is worse than what half of the finished cells had at the
    same step.

    Args:
        curves: The curves of finished cells.
        maximize: Whether more is better.
        after: Step up to which nothing is hopeless.

    References:
        Golovin et al. 2017, "Google Vizier: A Service for Black-Box Optimization", section 3.2.1.
        Deviation: the median of the values at the step, not of the averages up to it.
    """

    def __init__(
        self, curves: Iterable[Iterable[tuple[int, float]]], *, maximize: bool, after: int
    ) -> None:
        self._maximize, self._after = maximize, after
        self._values: dict[int, list[float]] = {}
        for curve in curves:
            for step, value in curve:
                if math.isfinite(value):
                    self._values.setdefault(step, []).append(value)

    def rule_out(self, curve: Curve) -> bool:
        """Return whether a cell with this curve is hopeless at its last report.

        Example:
            >>> curves = [[(10, loss)] for loss in (1, 2, 3, 4, 5)]
            >>> medians = Medians(curves, maximize=False, after=0)
            >>> curve = Curve()
            >>> curve.add(10, 3.5)
            >>> medians.rule_out(curve)
            True
        """
        if curve.last is None or curve.last[0] <= self._after:
            return False
        step, value = curve.last
        if not math.isfinite(value):
            return True
        others = self._values.get(step, [])
        if len(others) < _FEWEST_OTHERS:
            return False
        best, middle = curve.best(maximize=self._maximize), median(others)
        return best < middle if self._maximize else best > middle
