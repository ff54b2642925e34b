"""Intervals from a handful of seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Interval", "bootstrap_mean", "bootstrap_statistic", "paired_difference"]

_RESAMPLES = 10_000
_FEWEST_RESAMPLED = 8
_STATISTIC_RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the range it is known to."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the mean is certain."""
        return self.low > 0 or self.high < 0


def bootstrap_mean(values: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Return the mean with its expanded percentile bootstrap interval.

    The plain percentile interval of n values is too narrow by about √((n-1)/n)·z/t; the
    expanded one takes its percentiles further out by that much. Resamples of fewer than eight
    values do not reach far enough (five normal values: 92.6 of 100 intervals hold the mean
    instead of 95), so these get Student's interval, mean ± t·s/√n.

    Args:
        values: One number a seed; at least one. With a single value the interval is unbounded.
        confidence: Share of such intervals that hold the true mean, in (0, 1).

    Example:
        >>> interval = bootstrap_mean([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> interval.low < 2 < interval.mean == 3 < 4 < interval.high
        True

    References:
        Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.4,
        arXiv:1411.5279.
    """
    from scipy.special import stdtrit

    sample = np.asarray(values, dtype=np.float64)
    count = sample.size
    mean = float(sample.mean())
    if count == 1 or not np.isfinite(sample).all():
        return Interval(mean, -np.inf, np.inf, count)
    quantile = float(stdtrit(count - 1, 0.5 + confidence / 2))
    if count < _FEWEST_RESAMPLED:
        reach = quantile * float(sample.std(ddof=1)) / math.sqrt(count)
        return Interval(mean, mean - reach, mean + reach, count)
    tail = NormalDist().cdf(-quantile * math.sqrt(count / (count - 1)))
    # A fixed seed: the same numbers always print the same interval.
    chosen = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    low, high = np.quantile(sample[chosen].mean(axis=1), [tail, 1 - tail])
    return Interval(mean, float(low), float(high), count)


def bootstrap_statistic(
    statistic: Callable[..., float], *samples: NDArray[np.float64], confidence: float = 0.95
) -> Interval:
    """Return a number computed from all seeds, with its percentile bootstrap interval.

    Args:
        statistic: Takes the samples, or as many seeds drawn from them with replacement, the
            same seeds of each.
        samples: Arrays whose first dimension is the seeds.
        confidence: Share of such intervals that hold the true value, in (0, 1). With few seeds
            and a number that jumps, such as the place of a maximum, it is a rough one.

    Example:
        >>> values = np.array([[1.0, 5.0], [2.0, 4.0], [3.0, 6.0]])
        >>> bootstrap_statistic(lambda v: float(v.mean(axis=0).argmax()), values)
        Interval(mean=1.0, low=1.0, high=1.0, count=3)
    """
    count = len(samples[0])
    generator = np.random.default_rng(0)
    found = [
        statistic(*(sample[chosen] for sample in samples))
        for chosen in generator.integers(count, size=(_STATISTIC_RESAMPLES, count))
    ]
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(statistic(*samples), float(low), float(high), count)


def paired_difference(first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Return the interval of first - second, seed by seed.

    Example:
        What the seeds share cancels:

        >>> paired_difference([10.0, 20.0, 30.0], [9.0, 19.0, 29.0]).low
        1.0
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return bootstrap_mean(difference, confidence=confidence)
