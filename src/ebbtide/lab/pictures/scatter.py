"""Learning rate by weight decay where the points lie on no grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.pictures.canvas import Draw, Theme, new_figure, style_axes
from ebbtide.lab.pictures.heat import ColorScale, draw_scale

__all__ = ["Scatter", "draw_scatters"]

_MOST_COLUMNS = 4


@dataclass(frozen=True)
class Scatter:
    """The points of one map.

    Attributes:
        title: Heading.
        lrs: (P,).
        seconds: Weight decay, or what the second axis is, (P,).
        values: (P,); NaN where there is none.
        diverged: (P,); crosses.
        best: Index of the point to mark, if any.
        band: Points that cannot be told from the best, circled, (P,).
    """

    title: str
    lrs: NDArray[np.float64]
    seconds: NDArray[np.float64]
    values: NDArray[np.float64]
    diverged: NDArray[np.bool_]
    best: int | None = None
    band: NDArray[np.bool_] | None = None


def draw_scatters(
    panels: Sequence[Scatter], *, label: str, x_label: str, higher_is_better: bool
) -> Draw:
    """Return the picture of the maps on one colour scale."""

    def draw(theme: Theme, narrow: bool) -> Any:
        columns = 1 if narrow else min(len(panels), _MOST_COLUMNS)
        rows = -(-len(panels) // columns)
        size = (4.3, 3.5 * rows + 0.6) if narrow else (3.4 * columns + 0.8, 3.5 * rows)
        figure = new_figure(theme, *size)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for spare in grid[len(panels) :]:
            spare.remove()
        used = list(grid[: len(panels)])
        values = np.concatenate([panel.values for panel in panels])
        colors = ColorScale(values, theme, higher_is_better=higher_is_better)
        for index, (axes, panel) in enumerate(zip(used, panels, strict=True)):
            _draw_panel(axes, panel, colors)
            axes.set_xlabel(x_label)
            if index % columns == 0:
                axes.set_ylabel("learning rate")
        draw_scale(figure, used, colors, label, narrow=narrow)
        return figure

    return draw


def _draw_panel(axes: Any, panel: Scatter, colors: ColorScale) -> None:
    theme = colors.theme
    known = np.isfinite(panel.values)
    faces = colors.of(panel.values[known])
    axes.scatter(panel.seconds[known], panel.lrs[known], c=faces, s=46, edgecolors=theme.soft,
                 linewidths=0.5)  # fmt: skip
    lost = panel.diverged
    axes.scatter(panel.seconds[lost], panel.lrs[lost], marker="x", s=30, color=theme.soft)
    if panel.band is not None:
        axes.scatter(panel.seconds[panel.band], panel.lrs[panel.band], s=95, facecolors="none",
                     edgecolors=theme.ink, linewidths=0.9)  # fmt: skip
    if panel.best is not None:
        place = [panel.seconds[panel.best]], [panel.lrs[panel.best]]
        axes.scatter(*place, s=150, facecolors="none", edgecolors="#ff4d4d", linewidths=2)
    axes.set(xscale="log", yscale="log", title=panel.title)
    style_axes(axes, theme)
