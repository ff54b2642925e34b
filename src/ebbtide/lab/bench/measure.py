"""Timing side by side: in one process, in turn, as ratios of neighbours."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Ratio", "Steppable", "Timing", "interleaved", "quartiles", "step_peak_bytes"]


class Steppable(Protocol):
    """What can be timed."""

    def backward(self) -> None:
        """Prepare a step; not timed."""
        ...

    def step(self) -> None:
        """Take a step; timed."""
        ...


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline: median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Timing:
    """One contestant's result.

    Attributes:
        step_us: Median time of a step in microseconds.
        ratio: Time of the baseline in the same round over time of this one.
        rounds: How often.
    """

    step_us: float
    ratio: Ratio
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile.

    Example:
        >>> quartiles([4.0, 1.0, 3.0, 2.0, 5.0])
        (2.0, 3.0, 4.0)
    """
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def interleaved(
    contestants: Mapping[str, Steppable],
    baseline: str,
    *,
    seconds: float,
    repeats: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every contestant in turn, in an order that alternates, until the time is over.

    Args:
        contestants: By name; each is stepped twice before it is timed.
        baseline: Whose time the ratios are taken against.
        seconds: About how long; at least five rounds are made.
        repeats: Steps that are timed together as one, for short steps.
        tick: Called after each round.
    """
    names = list(contestants)
    for contestant in contestants.values():
        for _ in range(2):
            contestant.backward()
            contestant.step()
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(times[baseline]) < 5 or time.perf_counter() < end:
            for name in names:
                times[name].append(_time(contestants[name], repeats))
            names.reverse()
            tick()
    finally:
        gc.enable()
    return {name: _timing(times[name], times[baseline]) for name in contestants}


def _time(contestant: Steppable, repeats: int) -> float:
    taken = 0.0
    for _ in range(repeats):
        contestant.backward()
        start = time.perf_counter()
        contestant.step()
        taken += time.perf_counter() - start
    return taken / repeats


def _timing(times: list[float], baseline: list[float]) -> Timing:
    low, median, high = quartiles([b / t for b, t in zip(baseline, times, strict=True)])
    return Timing(statistics.median(times) * 1e6, Ratio(median, low, high), len(times))


def step_peak_bytes(contestant: Steppable) -> int | None:
    """Return how far the process's memory rises in one step; `None` where Linux does not tell.

    Args:
        contestant: Already stepped once, so that its state exists.
    """
    clear = Path("/proc/self/clear_refs")
    contestant.backward()
    try:
        clear.write_text("5")  # forget the peak so far
        before = _status("VmRSS")
        contestant.step()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
