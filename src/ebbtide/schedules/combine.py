"""Schedules made of other schedules."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ebbtide.schedules._arithmetic import (
    Schedule,
    between,
    check_length,
    check_schedule,
    position,
)

__all__ = ["Join", "Reciprocal", "Warmup"]


@dataclass(frozen=True)
class Warmup:
    """Rise in a straight line to the first value of another schedule, then follow it.

        t < steps    then(0)·(start + (1 - start)·min((t + 1)/steps, 1))
        otherwise    then(t - steps)

    The first step already has 1/steps of the peak: a step at learning rate 0 is a step lost.

    Args:
        steps: Length of the rise; 0 for none.
        then: Schedule that starts when the rise ends.
        start: Share of the peak from which the rise begins.

    Example:
        >>> from ebbtide.schedules import Linear
        >>> schedule = Warmup(4, Linear(2))
        >>> [schedule(t) for t in range(7)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.5, 0.0]
    """

    steps: float
    then: Schedule
    start: float = 0.0

    def __post_init__(self) -> None:
        check_length("steps", self.steps, zero_allowed=True)
        check_schedule("then", self.then)

    def __call__(self, step: float) -> float:
        """Return the value at `step`."""
        if position(step) >= self.steps:
            return self.then(step - self.steps)
        share = min((step + 1.0) / self.steps, 1.0)
        return self.then(0) * between(self.start, 1.0, share)


@dataclass(frozen=True)
class Join:
    """Follow one schedule after another, each from its own step 0.

    Args:
        schedules: The schedules, in order.
        boundaries: Steps at which the second, third, … begin; rising.

    Example:
        >>> from ebbtide.schedules import Constant, Linear
        >>> schedule = Join((Constant(), Linear(10), Constant(0.1)), (5, 15))
        >>> [schedule(t) for t in (4, 5, 10, 15)]
        [1.0, 1.0, 0.5, 0.1]
    """

    schedules: tuple[Schedule, ...]
    boundaries: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.schedules) != len(self.boundaries) + 1:
            raise ValueError(
                f"{len(self.schedules)} schedules meet at {len(self.schedules) - 1} boundaries, "
                f"got {len(self.boundaries)}"
            )
        starts = (0.0, *self.boundaries)
        if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
            raise ValueError(f"boundaries must rise from above 0, got {self.boundaries}")

    def __call__(self, step: float) -> float:
        """Return the value at `step`."""
        position(step)
        passed = sum(step >= boundary for boundary in self.boundaries)
        start = self.boundaries[passed - 1] if passed else 0
        return self.schedules[passed](step - start)


@dataclass(frozen=True)
class Reciprocal:
    """Undo another schedule, up to a limit.

        min(1/schedule(t), most)

    As schedule of the weight decay under the `decoupled` or `independent` policy it makes the
    share removed each step constant, whatever the learning rate does. The limit says where that
    ends, since 1/η has no bound as η goes to 0.

    Example:
        >>> from ebbtide.schedules import Linear
        >>> [Reciprocal(Linear(4), most=10.0)(t) for t in (0, 2, 3, 4)]
        [1.0, 2.0, 4.0, 10.0]
    """

    schedule: Schedule
    most: float

    def __post_init__(self) -> None:
        check_length("most", self.most)

    def __call__(self, step: float) -> float:
        """Return the value at `step`."""
        value = self.schedule(step)
        return self.most if value * self.most <= 1.0 else 1.0 / value
