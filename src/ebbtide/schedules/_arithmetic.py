"""Checks and arithmetic that the schedules share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Schedule = Callable[[float], float]


def position(step: float) -> float:
    """Return `step`, or refuse it where it is negative or not finite."""
    if not 0 <= step < math.inf:
        raise ValueError(f"step must be a finite number of at least 0, got {step}")
    return step


def check_length(name: str, length: float, *, zero_allowed: bool = False) -> None:
    """Refuse a length that is not a finite number above 0 (or of at least 0)."""
    at_least = length >= 0 if zero_allowed else length > 0
    if not (at_least and length < math.inf):
        bound = "at least 0" if zero_allowed else "above 0"
        raise ValueError(f"{name} must be a finite number {bound}, got {length}")


def check_schedule(name: str, schedule: Any) -> None:
    """Refuse what cannot be called with a step, such as text or a number."""
    if not callable(schedule):
        raise TypeError(
            f"{name} must be a schedule, a function of the step, got {schedule!r}; "
            "parse_schedule() reads one from text"
        )


def progress_of(step: float, steps: float) -> float:
    """Return the share of `steps` gone by, at most 1."""
    return min(position(step) / steps, 1.0)


def between(start: float, end: float, share: float) -> float:
    """Return the point at `share` of the way from `start` to `end`."""
    # Not start + (end - start)·share, which need not reach `end` exactly.
    return start * (1.0 - share) + end * share
