"""The sentences of a sweep's report, each from the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ebbtide.lab.conclusions import advantages, join
from ebbtide.lab.grid import format_value, parse_grid
from ebbtide.lab.statistics import paired_difference
from ebbtide.lab.sweep.analysis import Coupling, Noise, Side, Width, coupling, edges, noise, width
from ebbtide.lab.sweep.axes import AXES
from ebbtide.lab.sweep.results import ArmResults, Results

__all__ = ["Said", "across", "extended", "factor_words", "said", "widest", "winner"]

_NEARLY_SEPARABLE = 0.3
_MOST_DECIMALS = 6


@dataclass(frozen=True)
class Said:
    """What can be said of one optimizer.

    Attributes:
        arm: Its results.
        noise: How far apart two of its points must be; None with a single seed.
        width: How far its lr can be off, if that is known.
        coupling: Whether its axes can be tuned one by one, if that is known.
        edges: The edges that its best point lies on.
        results: The whole sweep.
        decimals: Digits after the point that its numbers deserve.
    """

    arm: ArmResults
    noise: Noise | None
    width: Width | None
    coupling: Coupling | None
    edges: Sequence[tuple[str, str]]
    results: Results
    decimals: int

    def number(self, value: float) -> str:
        """Write a result."""
        if abs(value) >= 1e6 or self.decimals > _MOST_DECIMALS:
            return f"{value:.4g}"
        return f"{value:.{self.decimals}f}"

    @property
    def place(self) -> str:
        """Where the best point lies."""
        settings = self.arm.settings(self.arm.best or 0)
        words = f"lr {format_value(settings['lr'])}, weight decay " + format_value(
            settings["weight_decay"]
        )
        axis = self.results.definition.axis
        if axis != "weight_decay":
            words += f" ({AXES[axis]} {format_value(settings[axis])})"
        return words

    @property
    def best_value(self) -> float:
        """The mean at the best point."""
        return float(self.arm.mean[self.arm.best or 0])

    def best_sentence(self) -> str:
        """Say where the best point lies and what it stands out from."""
        label, metric = self.arm.label, self.results.metric
        if self.arm.best is None:
            return f"{_nothing([self], f' of {label}')}."
        seeds = len(self.arm.cells)
        so_far = " so far" if self.results.missing else ""
        words = f"{label} is best{so_far} at {self.place}: {metric} {self.number(self.best_value)}"
        if self.noise is None:
            return f"{words} (one seed: the noise is not known)." if seeds == 1 else f"{words}."
        if self.arm.ignores_seeds:
            return f"{words}; every seed gave the same numbers: is settings.seed used?"
        others = int(self.noise.within.sum()) - 1
        band = f"the noise of {self.number(self.noise.band)} between means of {seeds} seeds"
        if others <= 0:
            return f"{words}; no other cell comes within {band}."
        cells = "1 other cell lies" if others == 1 else f"{others} other cells lie"
        return f"{words}; {cells} within {band} and cannot be told from it."

    def width_sentence(self) -> str:
        """Say how far the lr can be off."""
        if self.width is None:
            return f"How far {self.arm.label}'s lr can be off needs a grid with several lr."
        change = "falls" if self.arm.maximize else "rises"
        size, relative = self.results.rise
        share = f" ({100 * size:g} %)" if relative else ""
        axis = AXES[self.results.definition.axis]
        sides = ((self.width.below, "smaller"), (self.width.above, "larger"))
        known = [_side_words(*side) for side in sides if side[0].is_known]
        unknown = [
            f"how much {direction} is not known ({_reason(side)})"
            for side, direction in sides
            if not side.is_known
        ]
        if not known:
            return f"{self.arm.label}'s lr: {' and '.join(unknown)}."
        words = (
            f"{self.arm.label}'s lr can be {' and '.join(known)} before the {self.results.metric} "
            f"{change} by {self.number(self.width.amount)}{share}, the {axis} kept"
        )
        words = "; ".join([words, *unknown])
        if self.noise is not None and self.width.amount < self.noise.band:
            return f"{words}; that is less than the noise, so take it as a rough number."
        return f"{words}."

    def coupling_sentence(self) -> str:
        """Say whether the two axes can be tuned one by one."""
        axis = AXES[self.results.definition.axis]
        if self.coupling is None:
            return (
                f"Whether {self.arm.label}'s lr and {axis} can be tuned separately cannot be said: "
                "that needs a valley in both directions and three values of each in it."
            )
        number = self.coupling.number
        span = f"coupling {number.mean:z.2f}, {number.low:z.2f} to {number.high:z.2f}"
        if max(abs(number.low), abs(number.high)) < _NEARLY_SEPARABLE:
            return f"{self.arm.label}'s lr and {axis} can be tuned separately ({span})."
        if not number.excludes_zero:
            return (
                f"Whether {self.arm.label}'s lr and {axis} can be tuned separately cannot be told "
                f"({span})."
            )
        factor = 10**self.coupling.slope
        change = f"{factor:.2g} times larger" if factor > 1 else f"{1 / factor:.2g} times smaller"
        return (
            f"{self.arm.label}'s lr and {axis} belong together: with ten times the lr the best "
            f"{axis} is {change} ({span})."
        )

    def edge_notes(self) -> list[str]:
        """Say which axis to extend, and how."""
        notes = []
        for axis, end in self.edges:
            name = "lr" if axis == "lr" else AXES[self.results.definition.axis]
            notes.append(
                f"{self.arm.label}'s best cell lies at the {end} {name} of the sweep: a better one "
                f"may lie beyond. Extend it with {self._extension(axis, end)} and --reuse, which "
                "takes over the finished cells."
            )
        return notes

    def edge_sentence(self) -> str:
        """Say on which edges the best point lies."""
        axis = AXES[self.results.definition.axis]
        ends = join([f"{end} {'lr' if name == 'lr' else axis}" for name, end in self.edges])
        return f"The best lies at the {ends} of the sweep: a wider one may find a better."

    def _extension(self, axis: str, end: str) -> str:
        definition = self.results.definition
        points = (definition.lrs if axis == "lr" else definition.seconds)[self.arm.optimizer]
        option = "--lr" if axis == "lr" else "--" + definition.axis.replace("_", "-")
        text = extended(points, end, sampled=definition.sampler != "grid")
        only = len(definition.optimizers) > 1
        return f"{option} {self.arm.optimizer}={text}" if only else f"{option} {text}"


def said(results: Results) -> list[Said]:
    """Return what can be said of each optimizer."""
    sampled = results.definition.sampler != "grid"
    decimals = _decimals(results)
    return [
        Said(
            arm,
            noise(arm),
            _width(results, arm),
            coupling(arm),
            edges(arm, sampled=sampled),
            results,
            decimals,
        )
        for arm in results.arms
    ]


def _width(results: Results, arm: ArmResults) -> Width | None:
    if results.definition.sampler != "grid" or arm.best is None:
        return None
    amount = results.amount(float(arm.mean[arm.best]))
    return width(arm, amount) if amount > 0 else None


def across(items: Sequence[Said]) -> str:
    """Say where the best optimizer stands against the others, each at its best."""
    known = [item for item in items if item.arm.best is not None]
    if not known:
        return f"{_nothing(items)}."
    metric = known[0].results.metric
    maximize = known[0].arm.maximize
    order = sorted(known, key=lambda item: item.best_value, reverse=maximize)
    best = order[0]
    if len(order) == 1:
        return best.best_sentence()
    complete = all(item.arm.complete[item.arm.best] for item in order)
    if len(best.arm.cells) == 1 or not complete:
        listed = join([f"{item.arm.label} {item.number(item.best_value)}" for item in order])
        return f"The best {metric} is {listed}; whether that is more than chance, more seeds say."
    found = {
        item.arm.label: paired_difference(
            best.arm.values[:, best.arm.best], item.arm.values[:, item.arm.best]
        )
        for item in order[1:]
    }
    return advantages(
        best.arm.label, f"best {metric}", found, unit="", decimals=best.decimals
    ).replace("  ", " ")


def winner(items: Sequence[Said]) -> str:
    """Say which cell is the best of all."""
    known = [item for item in items if item.arm.best is not None]
    if not known:
        return f"{_nothing(items)}."
    best = max(known, key=lambda item: item.best_value * (1 if item.arm.maximize else -1))
    value = f"{best.results.metric} {best.number(best.best_value)}"
    return f"The best cell is {best.arm.label}'s at {best.place}: {value}."


def widest(items: Sequence[Said]) -> str:
    """Say which optimizer leaves the lr the most room, and which the least."""
    known = [item for item in items if item.width is not None]
    if len(known) < 2:
        return known[0].width_sentence() if known else "No width is known."
    rooms = sorted(known, key=lambda item: -_room(item.width))
    listed = join([f"{item.arm.label} {_room_words(item.width)}" for item in rooms])
    return f"The room of the lr, from its smallest to its largest value of the bar: {listed}."


def _nothing(items: Sequence[Said], whose: str = "") -> str:
    """Say why there is no best point."""
    if any(np.isfinite(item.arm.values).any() for item in items):
        return f"Every point{whose} that came to a value diverged under another seed"
    return f"No cell{whose} has come to a result"


def extended(points: Sequence[float], end: str, *, sampled: bool) -> str:
    """Return a grid that goes on by two points at one end, as the command line takes it.

    Example:
        >>> extended((0.001, 0.01, 0.1), "largest", sampled=False)
        '0.001..0.1:3,1,10'
    """
    positive = sorted(point for point in points if point > 0)
    low, high = positive[0], positive[-1]
    if sampled:
        low, high = (low, 10 * high) if end == "largest" else (low / 10, high)
        return f"{low:.3g}..{high:.3g}"
    step = (high / low) ** (1 / (len(positive) - 1)) if len(positive) > 1 else 10.0
    more = [high * step, high * step**2] if end == "largest" else [low / step**2, low / step]
    new = [f"{point:.3g}" for point in more]
    old = [_compact(positive)]
    parts = old + new if end == "largest" else new + old
    return ",".join(["0", *parts] if 0 in points else parts)


def _compact(points: Sequence[float]) -> str:
    """Return text that gives exactly these points again."""
    text = f"{points[0]!r}..{points[-1]!r}:{len(points)}"
    if len(points) > 2 and parse_grid(text, name="") == tuple(points):
        return text
    return ",".join(map(repr, points))


def _room(width: Width | None) -> float:
    return 0.0 if width is None else width.below.factor * width.above.factor


def _room_words(width: Width | None) -> str:
    assert width is not None
    exact = width.below.until == width.above.until == "rise"
    return f"{'' if exact else 'at least '}{factor_words(_room(width))}-fold"


def _side_words(side: Side, direction: str) -> str:
    times = f"{factor_words(side.factor)} times {direction}"
    return times if side.until == "rise" else f"at least {times} ({_reason(side)})"


def _reason(side: Side) -> str:
    return "the grid ends" if side.until == "edge" else "the next cell came to no result"


def factor_words(factor: float) -> str:
    """Write by how much an lr can be off.

    Example:
        >>> [factor_words(factor) for factor in (1.0, 1.0123, 1.26, 12.6)]
        ['1', '1.01', '1.3', '13']
    """
    return f"{factor:.3g}" if factor < 1.1 else f"{factor:.2g}"


def _decimals(results: Results) -> int:
    """Return how many digits after the point show a hundredth of the best results."""
    best = [abs(float(arm.mean[arm.best])) for arm in results.arms if arm.best is not None]
    size = min((value for value in best if value > 0), default=1.0)
    return min(8, max(0, 2 - math.floor(math.log10(size))))
