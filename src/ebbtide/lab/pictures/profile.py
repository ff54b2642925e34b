"""The result over the learning rate, a line an optimizer, with the width of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.pictures.canvas import Draw, Theme, new_figure, style_axes

__all__ = ["Profile", "draw_profiles"]

_SHOWN = 0.6  # of the points of every line lie within the picture, the better ones


@dataclass(frozen=True)
class Profile:
    """One line.

    Attributes:
        label: Name in the legend.
        lrs: Increasing, (L,).
        values: (S, L); NaN where there is none.
        level: The result at which the width is measured.
        ends: From which lr to which the result is no worse than the level.
    """

    label: str
    lrs: NDArray[np.float64]
    values: NDArray[np.float64]
    level: float
    ends: tuple[float, float]


def draw_profiles(profiles: Sequence[Profile], *, y_label: str, higher_is_better: bool) -> Draw:
    """Return the picture of the lines; a bar at its level shows the width of each."""

    def draw(theme: Theme, narrow: bool) -> Any:
        figure = new_figure(theme, *((4.3, 3.8) if narrow else (8.6, 4.2)))
        axes = figure.subplots()
        for index, profile in enumerate(profiles):
            _draw_profile(axes, profile, theme.lines[index % len(theme.lines)])
        axes.set(xscale="log", xlabel="learning rate", ylabel=y_label)
        axes.set_ylim(*_limits(profiles, higher_is_better))
        style_axes(axes, theme)
        legend = figure.legend(loc="outside upper center", ncols=2 if narrow else 4, frameon=False)
        for text in legend.get_texts():
            text.set_color(theme.ink)
        return figure

    return draw


def _draw_profile(axes: Any, profile: Profile, color: str) -> None:
    axes.plot(profile.lrs, _means(profile), "o-", color=color, linewidth=1.8, markersize=4,
              label=profile.label)  # fmt: skip
    for row in profile.values:
        axes.plot(profile.lrs, row, ".", color=color, alpha=0.4, markersize=4)
    axes.plot(profile.ends, [profile.level] * 2, color=color, linewidth=5, alpha=0.45,
              solid_capstyle="butt")  # fmt: skip


def _means(profile: Profile) -> NDArray[np.float64]:
    """Return the mean over the seeds that came to a result, (L,); NaN where none did."""
    known = np.isfinite(profile.values)
    count = known.sum(axis=0)
    sums = np.where(known, profile.values, 0).sum(axis=0)
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan)


def _limits(profiles: Sequence[Profile], higher_is_better: bool) -> tuple[float, float]:
    """Return the ends of the axis: what is far worse would leave no room for the rest."""
    sign = -1.0 if higher_is_better else 1.0
    low = min(float(np.nanmin(sign * profile.values)) for profile in profiles)
    costs = [sign * _means(profile) for profile in profiles]
    sorted_costs = [np.sort(cost[np.isfinite(cost)]) for cost in costs]
    # The best lr and one beside it at least.
    shown = max(
        float(cost[min(cost.size - 1, max(1, int(_SHOWN * (cost.size - 1))))])
        for cost in sorted_costs
    )
    high = max(shown, *(sign * profile.level for profile in profiles))
    margin = 0.06 * (high - low) or 0.06 * abs(low) or 1.0
    ends = sign * (low - margin), sign * (high + margin)
    return min(ends), max(ends)
