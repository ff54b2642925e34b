"""Intervals: they hold the truth about as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from ebbtide.lab.statistics import bootstrap_mean, paired_difference


@pytest.mark.parametrize("count", [3, 5, 8, 20])
def test_interval_holds_the_mean_about_95_times_in_100(count: int) -> None:
    generator = np.random.default_rng(count)
    samples = generator.normal(3.0, 2.0, (400, count))
    intervals = [bootstrap_mean(sample) for sample in samples]
    share = np.mean([i.low <= 3.0 <= i.high for i in intervals])
    # 400 draws at 0.95 have a deviation of 0.011.
    assert 0.915 <= share <= 0.985


def test_interval_narrows_with_confidence_and_count() -> None:
    sample = np.random.default_rng(0).normal(size=40)
    wide, narrow = bootstrap_mean(sample), bootstrap_mean(sample, confidence=0.5)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    few = bootstrap_mean(sample[:10])
    assert few.high - few.low > wide.high - wide.low


def test_one_seed_says_nothing() -> None:
    interval = bootstrap_mean([3.0])
    assert (interval.mean, interval.low, interval.high) == (3.0, -np.inf, np.inf)
    assert not interval.excludes_zero


def test_a_run_that_diverged_leaves_the_mean_unknown() -> None:
    interval = bootstrap_mean([1.0, np.nan, 2.0])
    assert np.isnan(interval.mean)
    assert not interval.excludes_zero


def test_pairing_removes_what_the_seeds_share() -> None:
    generator = np.random.default_rng(1)
    shared = generator.normal(0, 10, 10)
    first, second = shared + 1 + generator.normal(0, 0.1, 10), shared
    assert paired_difference(first, second).excludes_zero
    assert not bootstrap_mean(first).excludes_zero or not bootstrap_mean(second).excludes_zero


def test_the_same_numbers_give_the_same_interval() -> None:
    sample = [1.0, 2.0, 4.0, 8.0]
    assert bootstrap_mean(sample) == bootstrap_mean(sample)
