"""Losses over the steps of training, a line an optimizer with a band over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.pictures.canvas import Draw, Theme, new_figure, style_axes

__all__ = ["Curve", "CurvePanel", "draw_curves"]

_STYLES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), "-", (0, (6, 1.5, 1.2, 1.5)), "-")

_WIDE = 3.0


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        label: Name in the legend; lines of the same name share a colour.
        steps: (P,).
        values: (seeds, P); the line is their mean, the band one standard deviation around it.
    """

    label: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class CurvePanel:
    """One set of axes.

    Attributes:
        title: Heading.
        y_label: What is drawn, with its unit.
        curves: The lines.
        log: Whether the axis may be logarithmic; all values are above 0 then.
    """

    title: str
    y_label: str
    curves: Sequence[Curve]
    log: bool = True


def draw_curves(panels: Sequence[CurvePanel], *, x_label: str = "step") -> Draw:
    """Return the picture of the panels, side by side or one below the other where it is narrow."""

    def draw(theme: Theme, narrow: bool) -> Any:
        count = len(panels)
        size = (4.3, 3.0 * count + 0.6) if narrow else (max(8.6, 5.4 * count), 3.9)
        figure = new_figure(theme, *size)
        shape = (count, 1) if narrow else (1, count)
        labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
        for axes, panel in zip(figure.subplots(*shape, squeeze=False).ravel(), panels, strict=True):
            log = panel.log and _is_wide(panel.curves)
            for curve in panel.curves:
                _draw_curve(axes, curve, labels.index(curve.label), theme, log=log)
            axes.set(title=panel.title, xlabel=x_label, ylabel=panel.y_label)
            axes.margins(x=0.01)
            if log:
                axes.set(yscale="log", ylim=(None, _top(panel.curves)))
                _plain_ticks(axes)
            style_axes(axes, theme)
        handles = _one_a_label(figure.axes)
        legend = figure.legend(
            handles.values(), handles.keys(),
            loc="outside upper center", ncols=2 if narrow else 4, frameon=False,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_color(theme.ink)
        return figure

    return draw


def _draw_curve(axes: Any, curve: Curve, index: int, theme: Theme, *, log: bool) -> None:
    color = theme.lines[index % len(theme.lines)]
    mean, spread = curve.values.mean(axis=0), curve.values.std(axis=0)
    style = _STYLES[index % len(_STYLES)]
    axes.plot(curve.steps, mean, color=color, linestyle=style, linewidth=1.8, label=curve.label)
    # The lower edge must stay on a logarithmic axis.
    low = np.maximum(mean - spread, mean / 10) if log else mean - spread
    axes.fill_between(curve.steps, low, mean + spread, color=color, alpha=0.18, linewidth=0)


def _is_wide(curves: Sequence[Curve]) -> bool:
    """Tell whether the values span so much that a logarithmic axis shows them better."""
    means = np.concatenate([curve.values.mean(axis=0) for curve in curves])
    return float(means.max()) > _WIDE * float(means.min())


def _top(curves: Sequence[Curve]) -> float:
    """Return the upper end of the axis: the start, from which all fall, need not be seen."""
    later = [curve.values[:, 1:] if curve.values.shape[1] > 1 else curve.values for curve in curves]
    return 1.15 * max(float((v.mean(axis=0) + v.std(axis=0)).max()) for v in later)


def _plain_ticks(axes: Any) -> None:
    """Write 0.5 and 2 rather than 5 x 10^-1 on a logarithmic axis of a decade or two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _one_a_label(all_axes: Sequence[Any]) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    return handles
