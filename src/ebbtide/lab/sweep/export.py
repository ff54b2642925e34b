"""The numbers of a sweep as JSON and CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ebbtide.lab.export import to_bytes, to_csv
from ebbtide.lab.sweep.results import Cell, Results
from ebbtide.lab.sweep.words import Said

__all__ = ["as_json", "csv_files", "json_bytes"]

_COLUMNS = ("optimizer", "lr", "weight_decay", "seed", "outcome", "value", "seconds", "where")


def json_bytes(results: Results, items: Sequence[Said], files: Sequence[str]) -> bytes:
    """Return the file that also marks the folder as a report."""
    return to_bytes({"command": "sweep", "files": sorted(files), **as_json(results, items)})


def as_json(results: Results, items: Sequence[Said]) -> dict[str, Any]:
    """Return everything that was asked and found."""
    outcomes = {cell.record.outcome for cell in results.cells if cell.record is not None}
    return {
        "study": results.name,
        "definition": asdict(results.definition),
        "sha256": results.hashes,
        "metric": results.metric,
        "cells": len(results.cells),
        "missing": results.missing,
        "outcomes": {outcome: results.count(outcome) for outcome in sorted(outcomes)},
        "optimizers": [_optimizer(item) for item in items],
        "records": [_record(cell) for cell in results.cells],
    }


def csv_files(results: Results) -> dict[str, bytes]:
    """Return the cells, and what they reported, as CSV files by name."""
    return {
        "cells.csv": to_csv(_COLUMNS, map(_row, results.cells)),
        "curves.csv": to_csv((*_COLUMNS[:4], "step", "value"), _points(results.cells)),
    }


def _optimizer(item: Said) -> dict[str, Any]:
    arm = item.arm
    best = arm.best
    return {
        "name": arm.optimizer,
        "label": arm.label,
        "best": None if best is None else {**arm.settings(best), "seed": None},
        "value": None if best is None else item.best_value,
        "by_seed": None if best is None else arm.values[:, best],
        "noise": None if item.noise is None else _noise(item),
        "lr_width": None if item.width is None else asdict(item.width),
        "coupling": None if item.coupling is None else asdict(item.coupling),
        "edges": [f"{end} {axis}" for axis, end in item.edges],
        "sentences": [item.best_sentence(), item.width_sentence(), item.coupling_sentence()],
    }


def _noise(item: Said) -> dict[str, Any]:
    assert item.noise is not None
    within = [item.arm.settings(int(point)) for point in item.noise.within.nonzero()[0]]
    cells = [{"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
             for settings in within]  # fmt: skip
    return {"deviation": item.noise.deviation, "band": item.noise.band, "cells_within": cells}


def _record(cell: Cell) -> dict[str, Any]:
    record = cell.record
    if record is None:
        return {**cell.settings, "outcome": None}
    kept: Mapping[str, Any] = {
        key: value
        for key, value in record.to_dict().items()
        if key not in ("curve", "output") and value not in ("", {})
    }
    return {**cell.settings, **kept}


def _row(cell: Cell) -> tuple[Any, ...]:
    places = [cell.settings.get(name, "") for name in _COLUMNS[:4]]
    record = cell.record
    if record is None:
        return (*places, "", "", "", "")
    value = "" if record.value is None else record.value
    return (*places, record.outcome, value, record.seconds, record.where)


def _points(cells: Iterable[Cell]) -> Iterable[tuple[Any, ...]]:
    for cell in cells:
        for step, value in cell.record.curve if cell.record is not None else ():
            yield (*(cell.settings[name] for name in _COLUMNS[:4]), step, value)
