"""Paper, ink and files: what all pictures share."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["DARK", "LIGHT", "Draw", "Theme", "new_figure", "style_axes", "to_png", "to_svg"]


@dataclass(frozen=True)
class Theme:
    """Colours that a picture is drawn in."""

    name: str
    paper: str
    ink: str
    soft: str
    faint: str
    lines: tuple[str, ...]


Draw = Callable[[Theme, bool], Any]
"""Draws a picture in a theme, narrow or wide, and returns matplotlib's figure."""

# Okabe and Ito's palette, which colour-blind readers can tell apart: darkened until it stands
# out on white paper, lightened on dark paper.
LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1f2328",
    soft="#8c959f",
    faint="#d5dae0",
    lines=("#a86f00", "#00805c", "#0072b2", "#c4400c", "#8e4585", "#57606a"),
)
DARK = Theme(
    name="dark",
    paper="#14181e",
    ink="#e6e9ee",
    soft="#7d8792",
    faint="#3a414b",
    lines=("#e6a93a", "#2fbf95", "#5ab4f0", "#ff7f50", "#d59bcb", "#a0a8b2"),
)


def new_figure(theme: Theme, width: float, height: float) -> Any:
    """Return an empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor=theme.paper, layout="constrained")


def style_axes(axes: Any, theme: Theme, *, grid: bool = True) -> None:
    """Give axes the theme's colours and leave out what carries no information."""
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.ink, which="both", labelsize=9, color=theme.faint)
    for name, spine in axes.spines.items():
        spine.set_color(theme.faint)
        spine.set_visible(name in ("left", "bottom"))
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    axes.title.set_color(theme.ink)
    if grid:
        axes.grid(color=theme.faint, linewidth=0.6, alpha=0.7)
        axes.set_axisbelow(True)


def to_png(draw: Draw, *, theme: Theme = LIGHT, narrow: bool = False, dpi: int = 160) -> bytes:
    """Return a picture as a PNG file."""
    return _save(draw(theme, narrow), "png", dpi=dpi)


def to_svg(draw: Draw, *, theme: Theme = LIGHT, narrow: bool = False) -> bytes:
    """Return a picture as an SVG file that needs no font; the same picture gives the same bytes."""
    return _save(draw(theme, narrow), "svg", metadata={"Date": None})


def _save(figure: Any, kind: str, **options: Any) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "ebbtide", "svg.fonttype": "path", "hatch.linewidth": 0.8}):
        figure.savefig(buffer, format=kind, facecolor=figure.get_facecolor(), **options)
    return buffer.getvalue()
