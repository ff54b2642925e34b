"""Learning rate by weight decay, one map an optimizer, all on one colour scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.grid import format_value
from ebbtide.lab.pictures.canvas import Draw, Theme, new_figure, style_axes

__all__ = ["ColorScale", "HeatMap", "HeatMaps", "draw_heat_maps", "draw_scale"]

_MOST_COLUMNS = 4
_MOST_PRINTED = 12  # cells across, beyond which numbers would overlap
_MANY_TIMES = 20  # the good end: then equal ratios get equal steps of colour
_QUANTILE = 0.3  # of the cells lie beyond the end of the colour scale that matters less


@dataclass(frozen=True)
class HeatMap:
    """One map.

    Attributes:
        title: Heading.
        lrs: Rows, increasing, (L,).
        weight_decays: Columns, increasing, (W,).
        values: (L, W); NaN where nothing was measured.
        diverged: (L, W); hatched.
        best: Index of the cell to mark, if any.
        band: (L, W); cells that cannot be told from the best, framed thinly.
        marks: A letter for a cell without a value.
    """

    title: str
    lrs: Sequence[float]
    weight_decays: Sequence[float]
    values: NDArray[np.float64]
    diverged: NDArray[np.bool_]
    best: tuple[int, int] | None = None
    band: NDArray[np.bool_] | None = None
    marks: Mapping[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True)
class HeatMaps:
    """Maps that share a colour scale.

    Attributes:
        panels: The maps.
        label: What the colour is, with its unit.
        higher_is_better: Which end of the scale matters: it is drawn in full, and the other
            is cut where the worst cells would take all the colours.
        decimals: Digits after the point of the numbers in the cells.
        x_label: What the columns are.
        write: Writes the numbers in the cells, where `decimals` will not do.
    """

    panels: Sequence[HeatMap]
    label: str
    higher_is_better: bool = True
    decimals: int = 0
    x_label: str = "weight decay"
    write: Callable[[float], str] | None = None


def draw_heat_maps(maps: HeatMaps) -> Draw:
    """Return the picture of the maps side by side, or one below the other where it is narrow."""

    def draw(theme: Theme, narrow: bool) -> Any:
        columns = 1 if narrow else min(len(maps.panels), _MOST_COLUMNS)
        rows = -(-len(maps.panels) // columns)
        size = (4.3, 3.5 * rows + 0.6) if narrow else (3.2 * columns + 0.8, 3.5 * rows)
        figure = new_figure(theme, *size)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for spare in grid[len(maps.panels) :]:
            spare.remove()
        used = list(grid[: len(maps.panels)])
        values = np.concatenate([panel.values[~panel.diverged] for panel in maps.panels])
        colors = ColorScale(values, theme, higher_is_better=maps.higher_is_better)
        write = maps.write or (lambda value: f"{value:.{maps.decimals}f}")
        for index, (axes, panel) in enumerate(zip(used, maps.panels, strict=True)):
            _draw_panel(axes, panel, colors, write)
            axes.set_xlabel(maps.x_label)
            if index % columns == 0:
                axes.set_ylabel("learning rate")
        draw_scale(figure, used, colors, maps.label, narrow=narrow)
        return figure

    return draw


class ColorScale:
    """One colour scale for all maps of a picture.

    Args:
        values: Everything that gets a colour; what is not finite counts for nothing.
        theme: The picture's colours.
        higher_is_better: Which end matters: it is drawn in full.
    """

    def __init__(
        self, values: NDArray[np.float64], theme: Theme, *, higher_is_better: bool
    ) -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm, Normalize

        values = values[np.isfinite(values)]
        if not values.size:
            values = np.zeros(1)
        low, high = float(values.min()), float(values.max())
        if higher_is_better:
            low = float(np.quantile(values, _QUANTILE))
        else:
            high = float(np.quantile(values, 1 - _QUANTILE))
        # The good end is the bright one, so that the eye finds it, whichever end that is.
        colormap = colormaps["viridis" if higher_is_better else "viridis_r"]
        self.theme = theme
        self._low = low
        self.log = low > 0 and high > _MANY_TIMES * low
        norm = LogNorm if self.log else Normalize
        self.mappable = ScalarMappable(norm(low, high if high > low else low + 1), colormap)
        beyond = bool(values.min() < low or values.max() > high)
        self.extend = ("min" if higher_is_better else "max") if beyond else "neither"

    def of(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the RGBA colours of values."""
        known = np.where(np.isfinite(values), values, self._low)
        return np.asarray(self.mappable.to_rgba(known), np.float64)

    def ink_on(self, color: NDArray[np.float64]) -> str:
        """Return black or white, whichever can be read on a colour."""
        luminance = float(color[:3] @ np.array([0.299, 0.587, 0.114]))
        return "#101418" if luminance > 0.52 else "#ffffff"


def _draw_panel(
    axes: Any, panel: HeatMap, colors: ColorScale, write: Callable[[float], str]
) -> None:
    """Draw a map: equal cells, since the points of a grid lie at equal ratios."""
    from matplotlib.patches import Rectangle

    theme = colors.theme
    rows, columns = panel.values.shape
    rgba = colors.of(panel.values)
    printed = max(rows, columns) <= _MOST_PRINTED
    size = min(8.0, max(6.0, 48 / columns))  # so that five characters fit
    for row, column in np.ndindex(rows, columns):
        value, known = panel.values[row, column], np.isfinite(panel.values[row, column])
        lost = bool(panel.diverged[row, column])
        shown = known and not lost
        face = rgba[row, column] if shown else theme.paper
        tile = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=face, linewidth=0.8)
        tile.set_edgecolor(theme.soft if lost else theme.paper)
        tile.set_hatch("////" if lost else "")
        axes.add_patch(tile)
        said = write(float(value)) if shown else panel.marks.get((row, column), "")
        if said and (printed or not shown):
            ink = colors.ink_on(rgba[row, column]) if shown else theme.ink
            axes.text(column, row, said, color=ink, fontsize=size).set(ha="center", va="center")
    if panel.band is not None:
        for row, column in np.argwhere(panel.band):
            _frame(axes, row, column, colors.ink_on(rgba[row, column]))
    if panel.best is not None:
        _mark_best(axes, panel.best, theme)
    style_axes(axes, theme, grid=False)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(-0.5, rows - 0.5), title=panel.title)
    axes.set_xticks(range(columns), [format_value(v) for v in panel.weight_decays])
    for label in axes.get_xticklabels():
        label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(rows), [format_value(v) for v in panel.lrs])
    axes.tick_params(length=0)


def _mark_best(axes: Any, best: tuple[int, int], theme: Theme) -> None:
    from matplotlib.patches import Rectangle

    row, column = best
    # Two frames, one dark and one light: one of them stands out on any colour.
    for color, width in ((theme.ink, 3.4), ("#ff4d4d", 1.8)):
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=color)
        frame.set(linewidth=width, zorder=3, clip_on=False)
        axes.add_patch(frame)


def _frame(axes: Any, row: int, column: int, color: str) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.42, row - 0.42)
    axes.add_patch(Rectangle(corner, 0.84, 0.84, fill=False, edgecolor=color, linewidth=0.9))


def draw_scale(
    figure: Any, used: Sequence[Any], colors: ColorScale, label: str, *, narrow: bool
) -> None:
    """Draw the colour scale beside the axes, or below them where the picture is narrow."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    place: dict[str, Any] = {"location": "bottom", "aspect": 32} if narrow else {"aspect": 24}
    bar = figure.colorbar(colors.mappable, ax=used, extend=colors.extend, pad=0.02, **place)
    if colors.log:
        bar.locator, bar.formatter = LogLocator(), FuncFormatter(lambda value, _: f"{value:g}")
        bar.minorformatter = NullFormatter()
    elif narrow:
        bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.set_label(label, color=colors.theme.ink)
    bar.ax.tick_params(which="both", colors=colors.theme.ink, labelsize=9)
    bar.outline.set_edgecolor(colors.theme.faint)
