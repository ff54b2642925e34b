"""Every seed a dot, the mean and its interval beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.pictures.canvas import Draw, Theme, new_figure, style_axes
from ebbtide.lab.statistics import Interval

__all__ = ["DotRow", "draw_dots"]


@dataclass(frozen=True)
class DotRow:
    """One line of the picture: a name, a number for each seed, and the mean with its interval."""

    label: str
    values: NDArray[np.float64]
    interval: Interval


def draw_dots(rows: Sequence[DotRow], *, x_label: str, zero_line: bool = False) -> Draw:
    """Return the picture of the rows, first row on top.

    Args:
        rows: What to draw.
        x_label: What the numbers are, with their unit.
        zero_line: Whether 0 means something, such as "no difference", and is drawn as a line.
    """

    def draw(theme: Theme, narrow: bool) -> Any:
        width = 4.3 if narrow else 8.6
        figure = new_figure(theme, width, 0.5 * len(rows) + 1.1)
        axes = figure.subplots()
        for place, row in enumerate(rows):
            color = theme.lines[place % len(theme.lines)]
            _draw_row(axes, row, place, color, theme)
        if zero_line:
            axes.axvline(0, color=theme.ink, linewidth=1)
        axes.set(xlabel=x_label, ylim=(len(rows) - 0.4, -0.6))
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        style_axes(axes, theme)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        return figure

    return draw


def _draw_row(axes: Any, row: DotRow, place: int, color: str, theme: Theme) -> None:
    shown = row.values[np.isfinite(row.values)]
    axes.plot(shown, np.full(shown.size, place + 0.2), "o", color=color, alpha=0.5, markersize=4)
    ends = [row.interval.low, row.interval.high]
    if np.isfinite(ends).all():
        axes.plot(ends, [place - 0.08] * 2, color=color, linewidth=3, solid_capstyle="butt")
    if np.isfinite(row.interval.mean):
        axes.plot(row.interval.mean, place - 0.08, "D", color=color, markersize=7,
                  markeredgecolor=theme.paper)  # fmt: skip
