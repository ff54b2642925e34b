"""The plain shapes: one formula of the step each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ebbtide.schedules._arithmetic import between, check_length, position, progress_of

__all__ = ["WSD", "Constant", "Cosine", "InverseSqrt", "Linear", "Polynomial"]


@dataclass(frozen=True)
class Constant:
    """Return the same number at every step.

    Example:
        >>> Constant()(7), Constant(0.95)(7)
        (1.0, 0.95)
    """

    value: float = 1.0

    def __call__(self, step: float) -> float:
        """Return the value."""
        position(step)
        return self.value


@dataclass(frozen=True)
class Linear:
    """Go from `start` to `end` in a straight line; by default from 1 to zero.

        start·(1 - t/steps) + end·t/steps

    Args:
        steps: Length; above 0.
        start: Value at step 0.
        end: Value from `steps` on.

    Example:
        >>> [Linear(4)(t) for t in (0, 1, 2.5, 4, 9)]
        [1.0, 0.75, 0.375, 0.0, 0.0]
        >>> Linear(1000, start=0.85, end=0.95)(500)
        0.8999999999999999

    References:
        Bergsma et al. 2025, linear decay to zero, arXiv:2502.15938.
    """

    steps: float
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        check_length("steps", self.steps)

    def __call__(self, step: float) -> float:
        """Return the value at `step`."""
        return between(self.start, self.end, progress_of(step, self.steps))


@dataclass(frozen=True)
class Cosine:
    """Go from `start` to `end` along half a cosine.

        end + (start - end)·(1 + cos(π·t/steps))/2

    Args:
        steps: Length; above 0.
        start: Value at step 0.
        end: Value from `steps` on.

    Example:
        >>> [round(Cosine(100)(t), 4) for t in (0, 50, 100, 200)]
        [1.0, 0.5, 0.0, 0.0]

    References:
        Loshchilov & Hutter 2017, arXiv:1608.03983.
    """

    steps: float
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        check_length("steps", self.steps)

    def __call__(self, step: float) -> float:
        """Return the value at `step`."""
        share_left = 0.5 * (1.0 + math.cos(math.pi * progress_of(step, self.steps)))
        return between(self.end, self.start, share_left)


@dataclass(frozen=True)
class Polynomial:
    """Go from `start` to `end` with a power of the share of steps left.

        end + (start - end)·(1 - t/steps)^power

    Args:
        steps: Length; above 0.
        power: Exponent; above 0. 1 is `Linear`.
        start: Value at step 0.
        end: Value from `steps` on.

    Example:
        >>> [Polynomial(4, power=2)(t) for t in (0, 2, 4)]
        [1.0, 0.25, 0.0]
    """

    steps: float
    power: float = 1.0
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        check_length("steps", self.steps)
        check_length("power", self.power)

    def __call__(self, step: float) -> float:
        """Return the value at `step`."""
        share_left = (1.0 - progress_of(step, self.steps)) ** self.power
        return between(self.end, self.start, share_left)


@dataclass(frozen=True)
class InverseSqrt:
    """Fall with the square root of the step.

        √(steps / (steps + t))

    Args:
        steps: Time scale; above 0. After 3·steps the value is a half.

    Example:
        `Warmup(w, InverseSqrt(w))` is the schedule of the Transformer:

        >>> InverseSqrt(1000)(0), InverseSqrt(1000)(3000)
        (1.0, 0.5)

    References:
        Vaswani et al. 2017, section 5.3, arXiv:1706.03762. Deviation: the peak lasts for one
        step more, as after every `Warmup`.
    """

    steps: float

    def __post_init__(self) -> None:
        check_length("steps", self.steps)

    def __call__(self, step: float) -> float:
        """Return the value at `step`."""
        return math.sqrt(self.steps / (self.steps + position(step)))


@dataclass(frozen=True)
class WSD:
    """Warm up, stay, decay.

        t < warmup_steps                   min((t + 1)/warmup_steps, 1)
        t < warmup_steps + stable_steps    1
        then, with s the share of decay_steps gone by
            shape "linear"                 1 - (1 - end)·s
            shape "sqrt"                   1 - (1 - end)·√s

    Args:
        warmup_steps: Length of the rise; 0 for none.
        stable_steps: Length of the plateau; it may be extended while the run is on it.
        decay_steps: Length of the fall; above 0.
        end: Last value.
        shape: "linear" or "sqrt".

    Example:
        >>> schedule = WSD(500, 7500, 2000)
        >>> [schedule(t) for t in (0, 499, 8000, 9000, 10_000)]
        [0.002, 1.0, 1.0, 0.5, 0.0]

    References:
        Hu et al. 2024 (WSD), arXiv:2404.06395; Hägele et al. 2024 (1-sqrt), arXiv:2405.18392.
    """

    warmup_steps: float
    stable_steps: float
    decay_steps: float
    end: float = 0.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        check_length("warmup_steps", self.warmup_steps, zero_allowed=True)
        check_length("stable_steps", self.stable_steps, zero_allowed=True)
        check_length("decay_steps", self.decay_steps)
        if self.shape not in ("linear", "sqrt"):
            raise ValueError(f"shape must be 'linear' or 'sqrt', got {self.shape!r}")

    def __call__(self, step: float) -> float:
        """Return the value at `step`."""
        if position(step) < self.warmup_steps:
            return min((step + 1.0) / self.warmup_steps, 1.0)
        share = progress_of(
            max(step - self.warmup_steps - self.stable_steps, 0.0), self.decay_steps
        )
        return between(1.0, self.end, math.sqrt(share) if self.shape == "sqrt" else share)
