"""The pictures of a sweep's report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ebbtide.lab.pictures import (
    Curve,
    CurvePanel,
    DotRow,
    Draw,
    HeatMap,
    HeatMaps,
    Profile,
    Scatter,
    draw_curves,
    draw_dots,
    draw_heat_maps,
    draw_profiles,
    draw_scatters,
)
from ebbtide.lab.statistics import bootstrap_mean
from ebbtide.lab.sweep.axes import AXES
from ebbtide.lab.sweep.outcome import Outcome
from ebbtide.lab.sweep.results import Results
from ebbtide.lab.sweep.words import Said

__all__ = ["MARKS", "best_curves", "dots", "maps", "profiles", "short"]

MARKS = {Outcome.FAILED: "F", Outcome.TIMEOUT: "T", Outcome.PRUNED: "P"}
"""Letters of cells without a value."""

_FITTING = 1e4
_HIGHEST_GLYPH = 0x2FFF  # beyond it matplotlib's own font has none
_X_LABELS = {**AXES, "timescale": "timescale 1/(lr·λ), steps"}


def maps(results: Results, items: Sequence[Said]) -> Draw:
    """Return the maps of all optimizers on one colour scale."""
    x_label, metric = _X_LABELS[results.definition.axis], _plain(results.metric)
    maximize = results.definition.maximize
    if results.definition.sampler != "grid":
        panels = [_scatter(item) for item in items]
        return draw_scatters(panels, label=metric, x_label=x_label, higher_is_better=maximize)
    scale = _scale(items)
    label = metric if scale == 1 else f"{metric} / {scale:.0e}"
    panels_of_grid = [_heat_map(results, item, scale) for item in items]
    return draw_heat_maps(HeatMaps(panels_of_grid, label, maximize, x_label=x_label, write=short))


def profiles(results: Results, items: Sequence[Said]) -> Draw:
    """Return the result over the lr at each optimizer's best second axis."""
    known = [item for item in items if item.width is not None]
    return draw_profiles(
        [_profile(item) for item in known],
        y_label=_plain(results.metric),
        higher_is_better=results.definition.maximize,
    )


def best_curves(results: Results, items: Sequence[Said]) -> Draw | None:
    """Return the reported values of the best cells, or None where none were reported."""
    curves = [curve for item in items if (curve := _curve(item)) is not None]
    if not curves or max(curve.steps.size for curve in curves) < 2:
        return None
    log = all((curve.values > 0).all() for curve in curves)
    return draw_curves([CurvePanel("Best cells", _plain(results.metric), curves, log)])


def dots(results: Results, items: Sequence[Said]) -> Draw | None:
    """Return the best cells seed by seed, or None with a single seed."""
    rows = [
        DotRow(item.arm.label, values, bootstrap_mean(values[np.isfinite(values)]))
        for item in items
        if item.arm.best is not None
        and np.isfinite(values := item.arm.values[:, item.arm.best]).any()
    ]
    if len(results.definition.seeds) < 2 or not rows:
        return None
    return draw_dots(rows, x_label=_plain(results.metric))


def short(value: float) -> str:
    """Write a number in the five characters that a cell has room for.

    Example:
        >>> [short(value) for value in (0.12345, 12.345, 1234.5, 123456.0, -0.5, 0.00012)]
        ['0.123', '12.35', '1234', '1e+05', '-0.50', '1e-04']
    """
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}"
    for decimals in (3, 2, 1, 0):
        text = f"{value:.{decimals}f}"
        if len(text) <= 5:
            return text
    return f"{value:.0e}"


def _heat_map(results: Results, item: Said, scale: float) -> HeatMap:
    arm, definition = item.arm, results.definition
    lrs, seconds = definition.lrs[arm.optimizer], definition.seconds[arm.optimizer]
    rows = np.searchsorted(lrs, arm.lrs)
    columns = np.searchsorted(seconds, arm.seconds)
    shape = len(lrs), len(seconds)
    values = np.full(shape, np.nan)
    values[rows, columns] = arm.mean / scale
    diverged = np.zeros(shape, np.bool_)
    diverged[rows, columns] = arm.diverged
    band = np.zeros(shape, np.bool_)
    if item.noise is not None:
        band[rows, columns] = item.noise.within
    marks = {
        (int(rows[point]), int(columns[point])): letter
        for outcome, letter in MARKS.items()
        for point in np.flatnonzero(arm.has(outcome) & ~np.isfinite(arm.mean) & ~arm.diverged)
    }
    best = None if arm.best is None else (int(rows[arm.best]), int(columns[arm.best]))
    if best is not None:
        band[best] = False  # it has a frame of its own
    return HeatMap(arm.label, lrs, seconds, values, diverged, best, band, marks)


def _scatter(item: Said) -> Scatter:
    arm = item.arm
    band = None if item.noise is None else item.noise.within
    return Scatter(arm.label, arm.lrs, arm.seconds, arm.mean, arm.diverged, arm.best, band)


def _profile(item: Said) -> Profile:
    arm, width = item.arm, item.width
    assert arm.best is not None
    assert width is not None
    line = np.flatnonzero(arm.seconds == arm.seconds[arm.best])
    line = line[np.argsort(arm.lrs[line])]
    lr = float(arm.lrs[arm.best])
    level = item.best_value + (-width.amount if arm.maximize else width.amount)
    ends = lr / width.below.factor, lr * width.above.factor
    return Profile(arm.label, arm.lrs[line], arm.values[:, line], level, ends)


def _curve(item: Said) -> Curve | None:
    """Return the reports of the best cell at the steps that all its seeds have."""
    if item.arm.best is None:
        return None
    reported = [dict(record.curve) for record in item.arm.records(item.arm.best) if record.curve]
    steps = sorted(set.intersection(*map(set, reported))) if reported else []
    finite = [step for step in steps if all(math.isfinite(curve[step]) for curve in reported)]
    if not finite:
        return None
    values = np.array([[curve[step] for step in finite] for curve in reported], np.float64)
    return Curve(item.arm.label, np.array(finite, np.int64), values)


def _scale(items: Sequence[Said]) -> float:
    """Return the power of ten to divide by, so that the better numbers fit into the cells."""
    best = [abs(item.best_value) for item in items if item.arm.best is not None]
    size = max(best, default=0.0)
    every = np.abs(np.concatenate([item.arm.mean[~item.arm.diverged] for item in items]))
    if size and float(np.nanmax(every)) > _FITTING * size:
        return 1.0  # numbers of all sizes: each is written on its own
    if size == 0 or 1e-2 <= size < 1e4:
        return 1.0
    return float(10.0 ** math.floor(math.log10(size)))


def _plain(text: str) -> str:
    """Return a name that the user chose so that matplotlib takes it for nothing but text."""
    shown = "".join(c if c.isprintable() and ord(c) <= _HIGHEST_GLYPH else "?" for c in text[:40])
    return shown.replace("\\", "/").replace("$", r"\$")
