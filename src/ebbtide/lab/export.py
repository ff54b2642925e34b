"""The numbers of a comparison as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ebbtide.lab.experiment import ArmResult, Experiment, OptimizerResult
from ebbtide.lab.statistics import Interval

__all__ = ["as_json", "csv_files", "to_bytes", "to_csv"]


def to_bytes(content: Any) -> bytes:
    """Return JSON text; numbers that are not finite become null."""
    return (json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n").encode()


def as_json(experiment: Experiment, arms: Sequence[ArmResult]) -> dict[str, Any]:
    """Return everything that was asked and found."""
    return {
        "task": experiment.task.name,
        "lr_grid": experiment.lrs,
        "weight_decay_grid": experiment.weight_decays,
        "selection_seeds": experiment.selection_seeds,
        "test_seeds": experiment.test_seeds,
        "arms": [_arm(arm) for arm in arms],
    }


def csv_files(arms: Sequence[ArmResult]) -> dict[str, bytes]:
    """Return the grids, the test runs and the curves as CSV files by name."""
    return {
        "grid.csv": to_csv(
            ("arm", "optimizer", "lr", "weight_decay", "seed_index", "validation", "diverged"),
            (row for arm in arms for result in arm.results for row in _grid_rows(arm, result)),
        ),
        "test.csv": to_csv(
            ("arm", "optimizer", "lr", "weight_decay", "seed_index", "test"),
            (row for arm in arms for result in arm.results for row in _test_rows(arm, result)),
        ),
        "curves.csv": to_csv(
            ("arm", "optimizer", "seed_index", "step", "train_loss", "test_loss"),
            (row for arm in arms for result in arm.results for row in _curve_rows(arm, result)),
        ),
    }


def _arm(arm: ArmResult) -> dict[str, Any]:
    metric = arm.arm.metric
    return {
        "name": arm.arm.name,
        "title": arm.arm.title,
        "metric": {"name": metric.name, "unit": metric.unit},
        "reference": arm.reference.spec.name,
        "optimizers": [_optimizer(arm, result) for result in arm.results],
    }


def _optimizer(arm: ArmResult, result: OptimizerResult) -> dict[str, Any]:
    gain = result.gain_from_decay()
    return {
        "name": result.spec.name,
        "label": result.spec.label,
        "best": {"lr": result.best.lr, "weight_decay": result.best.weight_decay},
        "edges": result.grid.edges(),
        "validation": result.grid.mean[result.grid.best],
        "test": _interval(result.test()),
        "test_by_seed": result.chosen.test[:, 0],
        "reference_minus_this": None
        if result is arm.reference
        else _interval(arm.advantage(result)),
        "gain_from_decay": _interval(gain) if gain else None,
        "grid": {
            "lr": result.grid.lrs,
            "weight_decay": result.grid.weight_decays,
            "validation": result.grid.mean,
            "diverged": result.grid.diverged,
        },
    }


def _interval(interval: Interval) -> dict[str, Any]:
    return {
        "mean": interval.mean, "low": interval.low, "high": interval.high, "seeds": interval.count
    }  # fmt: skip


def _grid_rows(arm: ArmResult, result: OptimizerResult) -> Iterable[tuple[Any, ...]]:
    grid = result.grid
    for seed, row, column in np.ndindex(grid.validation.shape):
        cell = grid.cell((row, column))
        value = float(grid.validation[seed, row, column])
        yield (arm.arm.name, result.spec.name, cell.lr, cell.weight_decay, seed, value,
               int(math.isnan(value)))  # fmt: skip


def _test_rows(arm: ArmResult, result: OptimizerResult) -> Iterable[tuple[Any, ...]]:
    for seed, value in enumerate(result.chosen.test[:, 0]):
        best = result.best
        yield arm.arm.name, result.spec.name, best.lr, best.weight_decay, seed, float(value)


def _curve_rows(arm: ArmResult, result: OptimizerResult) -> Iterable[tuple[Any, ...]]:
    chosen = result.chosen
    for seed, point in np.ndindex(chosen.train_loss[:, 0].shape):
        losses = chosen.train_loss[seed, 0, point], chosen.test_loss[seed, 0, point]
        yield (arm.arm.name, result.spec.name, seed, int(chosen.steps[point]),
               *map(float, losses))  # fmt: skip


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a CSV file; numbers keep all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def _finite(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
