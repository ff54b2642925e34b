"""What came of a sweep, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.optimizers import OPTIMIZERS
from ebbtide.lab.sweep.definition import Definition
from ebbtide.lab.sweep.outcome import Outcome, Record
from ebbtide.lab.sweep.study import Sweep

__all__ = ["ArmResults", "Cell", "Results", "read"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """A cell and its record, if it has ended."""

    point: int
    settings: Mapping[str, Any]
    record: Record | None


@dataclass(frozen=True)
class ArmResults:
    """One optimizer: P points under S seeds.

    Attributes:
        optimizer: Its name.
        lrs: lr of each point, (P,); NaN where the sampler has not chosen it.
        seconds: Value of the second axis, (P,).
        cells: The cells, S rows of P.
        maximize: Whether more is better.
    """

    optimizer: str
    lrs: Array
    seconds: Array
    cells: Sequence[Sequence[Cell]]
    maximize: bool = False

    @property
    def label(self) -> str:
        """What a picture calls it."""
        spec = OPTIMIZERS.get(self.optimizer)
        return self.optimizer if spec is None else spec.label

    @cached_property
    def values(self) -> Array:
        """Results, (S, P); NaN where a cell came to none."""
        return np.array([[_value(cell) for cell in row] for row in self.cells], np.float64)

    @cached_property
    def diverged(self) -> NDArray[np.bool_]:
        """Points that diverged under at least one seed, (P,)."""
        return self.has(Outcome.DIVERGED)

    @cached_property
    def mean(self) -> Array:
        """Mean over the seeds that came to a value, (P,); NaN where a point diverged."""
        known = np.isfinite(self.values)
        total = np.where(known, self.values, 0).sum(axis=0)
        mean = np.full(len(self.lrs), np.nan)
        np.divide(total, known.sum(axis=0), out=mean, where=known.any(axis=0) & ~self.diverged)
        return mean

    @cached_property
    def complete(self) -> NDArray[np.bool_]:
        """Points that came to a value under every seed, (P,)."""
        return np.asarray(np.isfinite(self.values).all(axis=0) & ~self.diverged, np.bool_)

    @cached_property
    def best(self) -> int | None:
        """The best point, among the complete ones while there are any."""
        mean = np.where(self.complete, self.mean, np.nan) if self.complete.any() else self.mean
        if not np.isfinite(mean).any():
            return None
        return int(np.nanargmax(mean) if self.maximize else np.nanargmin(mean))

    @cached_property
    def ignores_seeds(self) -> bool:
        """Whether several seeds came to the same values, at every complete point."""
        values = self.values[:, self.complete]
        return len(values) > 1 and values.size > 0 and bool((values == values[0]).all())

    def has(self, outcome: str) -> NDArray[np.bool_]:
        """Return the points with such an outcome under at least one seed, (P,)."""
        found = [[c.record is not None and c.record.outcome == outcome for c in row]
                 for row in self.cells]  # fmt: skip
        return np.asarray(np.array(found).any(axis=0), np.bool_)

    def settings(self, point: int) -> Mapping[str, Any]:
        """Return the settings of a point, under the first seed."""
        return self.cells[0][point].settings

    def records(self, point: int) -> list[Record]:
        """Return the records of a point, those that there are."""
        return [row[point].record for row in self.cells if row[point].record is not None]  # type: ignore[misc]


@dataclass(frozen=True)
class Results:
    """A whole sweep.

    Attributes:
        name: Name of the study.
        definition: What was swept.
        arms: The optimizers.
        hashes: Hashes of the user's file, the last one last.
        facts: Versions and the like.
        rise: What counts as worse for the width of the lr: (amount, whether it is relative).
    """

    name: str
    definition: Definition
    arms: Sequence[ArmResults]
    hashes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    rise: tuple[float, bool] = (0.05, True)

    @property
    def cells(self) -> list[Cell]:
        """All cells, optimizer by optimizer."""
        return [cell for arm in self.arms for row in arm.cells for cell in row]

    def count(self, outcome: str) -> int:
        """Return how many cells have an outcome."""
        return sum(cell.record is not None and cell.record.outcome == outcome
                   for cell in self.cells)  # fmt: skip

    @property
    def missing(self) -> int:
        """Cells that have not ended."""
        return sum(cell.record is None for cell in self.cells)

    @property
    def metric(self) -> str:
        """What the function's number is called."""
        if self.definition.metric:
            return self.definition.metric
        named = (cell.record.metric for cell in self.cells if cell.record and cell.record.metric)
        return next(named, "value")

    def amount(self, value: float) -> float:
        """Return the rise from a value that counts as worse."""
        size, relative = self.rise
        return size * abs(value) if relative else size


def read(sweep: Sweep) -> Results:
    """Return what a sweep has come to by now."""
    definition = sweep.definition
    rows: dict[tuple[str, int], dict[int, Cell]] = {}
    for slot, settings, record in sweep.queue.cells():
        row = rows.setdefault((slot.optimizer, slot.seed), {})
        row[slot.point] = Cell(slot.point, settings, record)
    arms = [
        _arm(definition, optimizer, [rows[optimizer, seed] for seed in definition.seeds])
        for optimizer in definition.optimizers
    ]
    facts = {str(name): str(version) for name, version in sweep.options.get("versions", {}).items()}
    return Results(sweep.name, definition, arms, sweep.hashes, facts)


def _arm(definition: Definition, optimizer: str, rows: list[dict[int, Cell]]) -> ArmResults:
    cells = [[row[point] for point in sorted(row)] for row in rows]
    # A point may be chosen under the first seed before its repetitions are queued.
    chosen = [cell.settings for cell in cells[0]]
    lrs = np.array([settings.get("lr", np.nan) for settings in chosen], np.float64)
    seconds = np.array([settings.get(definition.axis, np.nan) for settings in chosen], np.float64)
    return ArmResults(optimizer, lrs, seconds, cells, definition.maximize)


def _value(cell: Cell) -> float:
    record = cell.record
    if record is None or not record.is_number or record.value is None:
        return float("nan")
    return record.value
