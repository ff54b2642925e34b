"""Schedules written as text, for command lines and configuration files."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ebbtide.schedules._arithmetic import Schedule
from ebbtide.schedules.combine import Warmup
from ebbtide.schedules.restarts import CosineRestarts
from ebbtide.schedules.shapes import WSD, Constant, Cosine, InverseSqrt, Linear, Polynomial

__all__ = ["SCHEDULE_NAMES", "parse_schedule"]


def parse_schedule(text: str, *, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Build a schedule from its name and settings, such as `cosine:end=0.1`.

        constant      value=1
        linear        start=1, end=0
        cosine        start=1, end=0
        polynomial    power, start=1, end=0
        inverse-sqrt  scale (the warmup, where there is one)
        wsd           decay, end=0, shape=linear
        restarts      first, factor=1, peak=1 (from cycle to cycle), end=0

    Those that have an end reach it at `total_steps`. With a percent sign the lengths, `decay`,
    `first` and `scale`, are that share of `total_steps`, as in `wsd:decay=20%`; other settings are
    hundredths, so that `end=10%` is `end=0.1`.

    Args:
        text: Name, then a colon and settings separated by commas where there are any.
        total_steps: Length of the run, warmup included.
        warmup_steps: Length of a linear warmup before the schedule begins.

    Raises:
        ValueError: The name or a setting is unknown, missing or out of range.

    Example:
        >>> parse_schedule("cosine:end=0.1", total_steps=1000, warmup_steps=100)
        Warmup(steps=100, then=Cosine(steps=900, start=1.0, end=0.1), start=0.0)
        >>> parse_schedule("wsd:decay=20%", total_steps=1000, warmup_steps=100)
        WSD(warmup_steps=100, stable_steps=700.0, decay_steps=200.0, end=0.0, shape='linear')
    """
    name, _, settings = text.strip().partition(":")
    if name not in _BUILDERS:
        raise ValueError(f"unknown schedule {name!r}; choose from {', '.join(SCHEDULE_NAMES)}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"the warmup of {warmup_steps} steps must be shorter than the run of {total_steps}"
        )
    build = _BUILDERS[name]
    values = _settings(name, settings, total_steps)
    schedule = build(_Run(total_steps, warmup_steps), **values)
    if warmup_steps == 0 or isinstance(schedule, WSD):
        return schedule
    return Warmup(warmup_steps, schedule)


@dataclass(frozen=True)
class _Run:
    total_steps: int
    warmup_steps: int

    @property
    def steps(self) -> int:
        return self.total_steps - self.warmup_steps


def _settings(name: str, text: str, total_steps: int) -> dict[str, Any]:
    known = dict(list(inspect.signature(_BUILDERS[name]).parameters.items())[1:])
    values: dict[str, Any] = {}
    for setting in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"schedule {name!r} has no setting {setting!r}; it has {', '.join(known)}"
            )
        values[key] = value if key == "shape" else _number(key, value, total_steps)
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in values:
            raise ValueError(f"schedule {name!r} needs {key}, as in {name}:{key}=...")
    return values


def _number(key: str, text: str, total_steps: int) -> float:
    try:
        if text.endswith("%"):
            # Divided last: 7 % of 100 steps is 7, but 0.07·100 is a rounding more.
            return float(text[:-1]) * (total_steps if key in _LENGTHS else 1) / 100.0
        number = float(text)
    except ValueError:
        raise ValueError(f"{key} must be a number, got {text!r}") from None
    return int(number) if number.is_integer() else number


def _constant(_run: _Run, value: float = 1.0) -> Schedule:
    return Constant(value)


def _linear(run: _Run, start: float = 1.0, end: float = 0.0) -> Schedule:
    return Linear(run.steps, start, end)


def _cosine(run: _Run, start: float = 1.0, end: float = 0.0) -> Schedule:
    return Cosine(run.steps, start, end)


def _polynomial(run: _Run, power: float, start: float = 1.0, end: float = 0.0) -> Schedule:
    return Polynomial(run.steps, power, start, end)


def _inverse_sqrt(run: _Run, scale: float = 0.0) -> Schedule:
    if not scale and not run.warmup_steps:
        raise ValueError(
            "schedule 'inverse-sqrt' needs a warmup or scale, as in inverse-sqrt:scale=..."
        )
    return InverseSqrt(scale or run.warmup_steps)


def _wsd(run: _Run, decay: float, end: float = 0.0, shape: str = "linear") -> Schedule:
    if decay > run.steps:
        after_warmup = f"the {run.steps} steps after the warmup"
        room = after_warmup if run.warmup_steps else f"the run's {run.steps}"
        raise ValueError(f"a decay of {decay:g} steps does not fit into {room}")
    return WSD(run.warmup_steps, run.steps - decay, decay, end, shape)


def _restarts(
    _run: _Run, first: float, factor: int = 1, peak: float = 1.0, end: float = 0.0
) -> Schedule:
    return CosineRestarts(first, factor, end, peak)


_BUILDERS: dict[str, Callable[..., Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "inverse-sqrt": _inverse_sqrt,
    "wsd": _wsd,
    "restarts": _restarts,
}
SCHEDULE_NAMES = tuple(_BUILDERS)
_LENGTHS = ("decay", "first", "scale")
