"""The laboratory's pictures.

A picture is a function of a theme and a width, so that a report can hold it light and dark, for
a laptop and for a phone. matplotlib is imported when one is drawn.
"""

from ebbtide.lab.pictures.canvas import DARK, LIGHT, Draw, Theme, to_png, to_svg
from ebbtide.lab.pictures.curves import Curve, CurvePanel, draw_curves
from ebbtide.lab.pictures.dots import DotRow, draw_dots
from ebbtide.lab.pictures.heat import HeatMap, HeatMaps, draw_heat_maps
from ebbtide.lab.pictures.profile import Profile, draw_profiles
from ebbtide.lab.pictures.scatter import Scatter, draw_scatters

__all__ = [
    "DARK",
    "LIGHT",
    "Curve",
    "CurvePanel",
    "DotRow",
    "Draw",
    "HeatMap",
    "HeatMaps",
    "Profile",
    "Scatter",
    "Theme",
    "draw_curves",
    "draw_dots",
    "draw_heat_maps",
    "draw_profiles",
    "draw_scatters",
    "to_png",
    "to_svg",
]
