"""The picture of a learning rate and a decay over a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "plot_curves"]

# A longer legend would hide the curves.
_MOST_NAMED = 12
_STYLES = {"applied": "-", "planned": "--"}


class Curve(NamedTuple):
    """One line of the picture: its panel, its name, its points and how it is drawn."""

    panel: str
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    status: str = "applied"


def plot_curves(curves: Sequence[Curve], *, title: str = "", now: float | None = None) -> Figure:
    """Draw curves over the steps of a run, one panel above the other; needs matplotlib.

    Args:
        curves: What to draw; curves of the same panel share its axes, curves of the same label
            their colour. "planned" curves are dashed.
        title: Title of the picture.
        now: Step at which a thin vertical line separates what was from what will be.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(curve.panel for curve in curves))
    figure = Figure(figsize=(7.0, 1.0 + 2.0 * len(panels)), layout="constrained")
    every_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    labels = list(dict.fromkeys(curve.label for curve in curves))
    for panel, axes in zip(panels, every_axes, strict=True):
        named: set[str] = set()
        for curve in curves:
            if curve.panel != panel:
                continue
            label = None if curve.label in named else curve.label
            named.add(curve.label)
            color = f"C{labels.index(curve.label) % 10}"
            # A line through a single point would not be seen.
            style = _STYLES[curve.status] if len(curve.steps) > 1 else "."
            axes.plot(curve.steps, curve.values, style, color=color, label=label)
        axes.set_ylabel(panel)
        axes.grid(alpha=0.3)
        axes.margins(x=0)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if now is not None:
            axes.axvline(now, color="0.4", linewidth=0.8)
    if any(labels) and len(labels) <= _MOST_NAMED:
        every_axes[0].legend(fontsize="small")
    every_axes[-1].set_xlabel("step")
    every_axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    figure.align_ylabels()
    return figure
