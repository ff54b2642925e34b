"""What the results of one optimizer say: noise, width of the lr, coupling, edges."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.statistics import Interval
from ebbtide.lab.sweep.results import ArmResults

__all__ = ["Coupling", "Noise", "Side", "Width", "coupling", "edges", "noise", "width"]

_BEST_SHARE = 0.25  # of the points tell the noise near the best
_BASIN_SHARE = 0.4  # of the points are fitted for the coupling
_FEWEST_FITTED = 9
_RESAMPLES = 1000
_MOST_WITHOUT_VALLEY = 0.2
_NEAR_THE_END = 0.05  # of a sampled range


@dataclass(frozen=True)
class Noise:
    """How far apart two points must be to be told apart.

    Attributes:
        deviation: Standard deviation of a result over seeds, without what all points share.
        band: Difference of two points' means that is beyond noise, at 95 %.
        within: Points whose mean is within the band of the best, (P,).
    """

    deviation: float
    band: float
    within: NDArray[np.bool_]


def noise(arm: ArmResults) -> Noise | None:
    """Return the noise of an optimizer's results near its best, or None with a single seed.

        r_sp = v_sp - mean_p - mean_s + mean,    d² = Σ r²/((S - 1)(P - 1))
        band = t·d·√(2/S)

    A seed that makes all points better or worse is no noise, since points are compared under
    the same seeds. Points far from the best are often noisier, and only the best quarter counts.
    """
    points = np.flatnonzero(arm.complete)
    seeds = len(arm.cells)
    if seeds < 2 or len(points) < 2 or arm.best is None:
        return None
    from scipy.special import stdtrit

    order = points[np.argsort(_cost(arm)[points])]
    chosen = arm.values[:, order[: max(4, math.ceil(_BEST_SHARE * len(order)))]]
    residuals = chosen - chosen.mean(axis=0) - chosen.mean(axis=1, keepdims=True) + chosen.mean()
    freedom = (seeds - 1) * (chosen.shape[1] - 1)
    deviation = math.sqrt(float((residuals**2).sum()) / freedom)
    band = float(stdtrit(freedom, 0.975)) * deviation * math.sqrt(2 / seeds)
    within = arm.complete & (_cost(arm) <= _cost(arm)[arm.best] + band)
    return Noise(deviation, band, within)


@dataclass(frozen=True)
class Side:
    """How far the lr can be off in one direction.

    Attributes:
        factor: By what factor, at least 1.
        until: What ends the range there: rise (the result worsens by the amount), edge (the
            grid ends first), or unknown (the next point diverged, failed or has not been run).
    """

    factor: float
    until: str

    @property
    def is_known(self) -> bool:
        """Whether anything lies on that side."""
        return self.factor > 1 or self.until == "rise"


@dataclass(frozen=True)
class Width:
    """How far the lr can be off before the result worsens by an amount.

    Attributes:
        amount: The amount.
        below: Towards smaller lr.
        above: Towards larger lr.
    """

    amount: float
    below: Side
    above: Side


def width(arm: ArmResults, amount: float) -> Width | None:
    """Return the width of the lr around the best point, the second axis kept there.

    Between two points the result is interpolated over the logarithm of the lr.

    Returns:
        None where fewer than two learning rates stand at the best value of the second axis.
    """
    if arm.best is None:
        return None
    line = np.flatnonzero(arm.seconds == arm.seconds[arm.best])
    line = line[np.argsort(arm.lrs[line])]
    if len(line) < 2:
        return None
    place = int(np.flatnonzero(line == arm.best)[0])
    cost, logs = _cost(arm)[line], np.log(arm.lrs[line])
    limit = float(cost[place]) + amount
    below = _side(logs[place::-1], cost[place::-1], limit)
    return Width(amount, below, _side(logs[place:], cost[place:], limit))


def _side(logs: NDArray[np.float64], cost: NDArray[np.float64], limit: float) -> Side:
    for index in range(1, len(logs)):
        if not math.isfinite(cost[index]):
            return Side(math.exp(abs(logs[index - 1] - logs[0])), "unknown")
        if cost[index] > limit:
            share = (limit - cost[index - 1]) / (cost[index] - cost[index - 1])
            end = logs[index - 1] + share * (logs[index] - logs[index - 1])
            return Side(math.exp(abs(end - logs[0])), "rise")
    return Side(math.exp(abs(logs[-1] - logs[0])), "edge")


@dataclass(frozen=True)
class Coupling:
    """How much the best value of one axis depends on the other.

    Attributes:
        number: With its interval: 0 where each axis can be tuned alone, ±1 where only a
            combination of the two counts.
        slope: Factor of ten by which the best value of the second axis moves with ten times
            the lr.
        points: How many points were fitted.
    """

    number: Interval
    slope: float
    points: int


def coupling(arm: ArmResults) -> Coupling | None:
    """Return the coupling of the two axes in the valley of an optimizer's results.

        v ≈ a + b·x + c·y + d·x² + e·x·y + f·y²      x, y the logarithms of the two axes
        number = -e/(2·√(d·f)),    slope = -e/(2·f)

    fitted to the best 40 % of the points (9 at least). The interval is the percentile interval
    of a bootstrap over the residuals, so that a valley that is no parabola widens it.

    Returns:
        None where there are too few points, or too few values of an axis among them, or where
        the results have no valley in both directions.
    """
    points = np.flatnonzero(arm.complete & (arm.seconds > 0))
    points = points[np.argsort(_cost(arm)[points])]
    points = points[: max(_FEWEST_FITTED, math.ceil(_BASIN_SHARE * len(points)))]
    x, y = np.log10(arm.lrs[points]), np.log10(arm.seconds[points])
    if len(points) < _FEWEST_FITTED or min(len(set(x)), len(set(y))) < 3:
        return None
    x_unit, y_unit = x.std(), y.std()
    x, y = (x - x.mean()) / x_unit, (y - y.mean()) / y_unit
    cost = _cost(arm)[points]
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    if np.linalg.matrix_rank(terms) < terms.shape[1]:
        return None
    solve = np.linalg.pinv(terms)
    fit = solve @ cost
    number = float(_tilt(fit))
    if not math.isfinite(number):
        return None
    residuals = (cost - terms @ fit) * math.sqrt(len(points) / (len(points) - terms.shape[1]))
    draw = np.random.default_rng(0)  # the same results always print the same interval
    picks = draw.integers(len(points), size=(len(points), _RESAMPLES))
    found = _tilt(solve @ ((terms @ fit)[:, None] + residuals[picks]))
    valleys = found[np.isfinite(found)]
    if len(valleys) < (1 - _MOST_WITHOUT_VALLEY) * len(found):
        return None
    low, high = np.quantile(valleys, [0.025, 0.975])
    interval = Interval(number, float(low), float(high), len(points))
    slope = -float(fit[4]) / (2 * float(fit[5]))
    return Coupling(interval, slope * float(y_unit / x_unit), len(points))


def _tilt(fit: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the coupling of fitted coefficients; NaN where they make no valley."""
    d, e, f = fit[3:]
    valley = (d > 0) & (f > 0)
    tilt = -e / (2 * np.sqrt(np.where(valley, d * f, 1.0)))
    return np.where(valley, np.clip(tilt, -1, 1), np.nan)


def edges(arm: ArmResults, *, sampled: bool) -> list[tuple[str, str]]:
    """Return the edges that the best point lies on: (lr or second, smallest or largest).

    Args:
        arm: The results.
        sampled: Whether points were drawn from a range; then near its end counts as on it.
    """
    if arm.best is None:
        return []
    found = []
    for name, axis in (("lr", arm.lrs), ("second", arm.seconds)):
        known = axis[np.isfinite(axis)]
        low, high, value = known.min(), known.max(), axis[arm.best]
        if low == high:
            continue
        margin = _NEAR_THE_END * math.log(high / low) if sampled else 0.0
        # No decay at all has nothing below it.
        if value > 0 and low > 0 and math.log(value / low) <= margin:
            found.append((name, "smallest"))
        if value > 0 and math.log(high / value) <= margin:
            found.append((name, "largest"))
    return found


def _cost(arm: ArmResults) -> NDArray[np.float64]:
    """Return the means with less as better, (P,)."""
    return -arm.mean if arm.maximize else arm.mean
