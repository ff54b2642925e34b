"""Compare optimizers, each at its own best settings.

The protocol, fixed before any number is seen:

1. Every optimizer searches a grid of the same size, placed by its units (`optimizers.py`).
2. Cells are chosen by the mean of the validation metric over the selection seeds, and compared
   at the end of training only.
3. The chosen cell is trained anew under test seeds that played no part in the choice, and only
   the test metric of these runs is reported. The best cell without weight decay is trained
   beside it.
4. Seeds are paired: a seed fixes data, start and order, the same for every optimizer, and
   differences are taken seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.memory import FORGETFUL, Memory
from ebbtide.lab.optimizers import OptimizerSpec, scaled_grid
from ebbtide.lab.parallel import on_all_processors, stoppable
from ebbtide.lab.statistics import Interval, bootstrap_mean, paired_difference
from ebbtide.lab.tasks import Arm, Cell, Outcomes, Task, Tick

__all__ = ["ArmResult", "Experiment", "Grid", "KeepsCalls", "OptimizerResult", "Watcher", "run"]


class Watcher(Protocol):
    """Whoever shows how far the work has come."""

    def start(self, title: str, total: int) -> None:
        """Announce work of `total` units."""

    def advance(self, units: int) -> None:
        """Count units done; called from several threads."""

    def skip(self, units: int) -> None:
        """Count units that need not be done, since an earlier command did them."""


@runtime_checkable
class KeepsCalls(Protocol):
    """An arm with runs so long that each is worth keeping."""

    def keeping(self, memory: Memory) -> Arm:
        """Return the arm with each of its runs kept."""


@dataclass(frozen=True)
class Experiment:
    """What is compared on what.

    Attributes:
        task: The training problems.
        specs: The optimizers.
        lrs: Learning rates of the grid, in AdamW's units, increasing.
        weight_decays: Weight decays of the grid, in AdamW's units, increasing.
        selection_seeds: Seeds that cells are chosen by.
        test_seeds: Seeds that the chosen cells are measured by; none of the others.
        curve_points: Points of the loss curves.
    """

    task: Task
    specs: tuple[OptimizerSpec, ...]
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    selection_seeds: tuple[int, ...]
    test_seeds: tuple[int, ...]
    curve_points: int = 31

    def total_steps(self) -> int:
        """Return the training steps of the whole experiment."""
        chosen = 2 if self.weight_decays[0] == 0 else 1
        cells = len(self.lrs) * len(self.weight_decays) * len(self.selection_seeds)
        runs = cells + chosen * len(self.test_seeds)
        return runs * len(self.specs) * sum(arm.steps for arm in self.task.arms)


@dataclass(frozen=True)
class Grid:
    """The selection runs of one optimizer: L learning rates by W weight decays.

    Attributes:
        lrs: In the optimizer's own units, (L,).
        weight_decays: In the optimizer's own units, (W,).
        validation: Metric of each selection seed, (S, L, W); NaN where it diverged.
        best: Index of the best cell.
    """

    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    validation: NDArray[np.float64]
    best: tuple[int, int]

    @property
    def diverged(self) -> NDArray[np.bool_]:
        """Whether any seed diverged, (L, W)."""
        return np.asarray(np.isnan(self.validation).any(axis=0))

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean over the seeds, (L, W); NaN where any seed diverged."""
        return np.asarray(self.validation.mean(axis=0), np.float64)

    def cell(self, place: tuple[int, int]) -> Cell:
        """Return the settings at an index."""
        return Cell(self.lrs[place[0]], self.weight_decays[place[1]])

    def edges(self) -> tuple[str, ...]:
        """Say on which edges of the grid the best cell lies, where the grid could go on."""
        (row, column), found = self.best, []
        if len(self.lrs) > 1 and row == 0:
            found.append("smallest lr")
        if len(self.lrs) > 1 and row == len(self.lrs) - 1:
            found.append("largest lr")
        if len(self.weight_decays) > 1 and column == len(self.weight_decays) - 1:
            found.append("largest weight decay")
        # No decay at all has nothing below it.
        if len(self.weight_decays) > 1 and column == 0 and self.weight_decays[0] > 0:
            found.append("smallest weight decay")
        return tuple(found)


@dataclass(frozen=True)
class OptimizerResult:
    """One optimizer on one arm.

    Attributes:
        spec: The optimizer.
        grid: Its selection runs.
        chosen: The best cell under the test seeds, (R, 1).
        undecayed: The best cell without weight decay under the test seeds, (R, 1); None where
            the grid has no such cell.
    """

    spec: OptimizerSpec
    grid: Grid
    chosen: Outcomes
    undecayed: Outcomes | None

    @property
    def best(self) -> Cell:
        """The chosen settings."""
        return self.grid.cell(self.grid.best)

    def test(self) -> Interval:
        """Return the test metric of the chosen cell."""
        return bootstrap_mean(self.chosen.test[:, 0])

    def gain_from_decay(self) -> Interval | None:
        """Return by how much decay raises the test metric, or None where this is not known."""
        if self.undecayed is None:
            return None
        return paired_difference(self.chosen.test[:, 0], self.undecayed.test[:, 0])


@dataclass(frozen=True)
class ArmResult:
    """All optimizers on one arm."""

    arm: Arm
    results: tuple[OptimizerResult, ...]

    @property
    def reference(self) -> OptimizerResult:
        """The one the others are compared with: AdamW if it took part, else the last."""
        named = {result.spec.name: result for result in self.results}
        return named.get("adamw", self.results[-1])

    def others(self) -> tuple[OptimizerResult, ...]:
        """Return all but the reference."""
        return tuple(result for result in self.results if result is not self.reference)

    def advantage(self, other: OptimizerResult) -> Interval:
        """Return the test metric of the reference minus that of another."""
        return paired_difference(self.reference.chosen.test[:, 0], other.chosen.test[:, 0])


_Train = Callable[[str, Arm, OptimizerSpec, Sequence[Cell], Sequence[int], int], Outcomes]
"""Trains, or recalls: key, arm, optimizer, cells, seeds, points of the curves."""


def run(
    experiment: Experiment, watcher: Watcher, memory: Memory = FORGETFUL
) -> tuple[ArmResult, ...]:
    """Carry out an experiment on all processors.

    Runs share nothing, so the numbers do not depend on how many there are.

    Args:
        experiment: What to do.
        watcher: Told how far it has come.
        memory: Of runs made before.

    Raises:
        InputError: Every cell of some optimizer's grid diverged.
        KeyboardInterrupt: Passed on once the training threads have stopped, which takes a moment.
    """
    calls = memory.within("calls")
    arms = tuple(
        arm.keeping(calls) if isinstance(arm, KeepsCalls) else arm for arm in experiment.task.arms
    )
    pairs = [(arm, spec) for arm in arms for spec in experiment.specs]
    watcher.start(experiment.task.title, experiment.total_steps())
    stop = Event()
    tick, skip = stoppable(watcher.advance, stop), stoppable(watcher.skip, stop)

    def train(
        key: str, arm: Arm, spec: OptimizerSpec, cells: Sequence[Cell], seeds: Sequence[int],
        curve_points: int,
    ) -> Outcomes:  # fmt: skip
        return memory.outcomes(
            f"{key}/{arm.name}/{spec.name}",
            lambda: arm.train(spec, cells, seeds, curve_points=curve_points, tick=tick),
            lambda: skip(len(cells) * len(seeds) * arm.steps),
        )

    def search(arm: Arm, spec: OptimizerSpec, seed: int) -> NDArray[np.float64]:
        return _search(experiment, arm, spec, seed, train, tick)

    def measure(arm: Arm, spec: OptimizerSpec, grid: Grid) -> OptimizerResult:
        return _measure(experiment, arm, spec, grid, train)

    jobs = [(arm, spec, seed) for arm, spec in pairs for seed in experiment.selection_seeds]
    searched = on_all_processors(search, jobs, stop)
    seeds = len(experiment.selection_seeds)
    grids = [
        _grid(experiment, arm, spec, searched[i * seeds : (i + 1) * seeds])
        for i, (arm, spec) in enumerate(pairs)
    ]
    measured = on_all_processors(
        measure, [(*pair, g) for pair, g in zip(pairs, grids, strict=True)], stop
    )
    count = len(experiment.specs)
    return tuple(
        ArmResult(arm, tuple(measured[i * count : (i + 1) * count])) for i, arm in enumerate(arms)
    )


def _search(
    experiment: Experiment, arm: Arm, spec: OptimizerSpec, seed: int, train: _Train, tick: Tick
) -> NDArray[np.float64]:
    """Train the grid under one seed; returns the validation metric (L, W), NaN where it diverged.

    Cells that would remove a whole parameter in one step are not trained and count as diverged.
    """
    lrs, weight_decays = scaled_grid(spec, experiment.lrs, experiment.weight_decays)
    cells = [Cell(lr, weight_decay) for lr in lrs for weight_decay in weight_decays]
    possible = np.array([spec.can_run(cell.lr, cell.weight_decay) for cell in cells])
    validation = np.full(len(cells), np.nan)
    if possible.any():
        chosen = [cell for cell, can_run in zip(cells, possible, strict=True) if can_run]
        outcomes = train(f"search/{seed}", arm, spec, chosen, [seed], 1)
        validation[possible] = np.where(outcomes.diverged, np.nan, outcomes.validation)[0]
    tick(int((~possible).sum()) * arm.steps)
    return validation.reshape(len(lrs), len(weight_decays))


def _grid(
    experiment: Experiment, arm: Arm, spec: OptimizerSpec, seeds: Sequence[NDArray[np.float64]]
) -> Grid:
    """Gather the seeds of one optimizer and choose its best cell."""
    lrs, weight_decays = scaled_grid(spec, experiment.lrs, experiment.weight_decays)
    validation = np.stack(seeds)
    row, column = divmod(arm.metric.best(validation.mean(axis=0)), len(weight_decays))
    return Grid(lrs, weight_decays, validation, (row, column))


def _measure(
    experiment: Experiment, arm: Arm, spec: OptimizerSpec, grid: Grid, train: _Train
) -> OptimizerResult:
    """Train the chosen cells under the test seeds."""
    cells = [grid.cell(grid.best)]
    if grid.weight_decays[0] == 0:
        cells.append(grid.cell((_best_undecayed(arm, grid), 0)))
    seeds = experiment.test_seeds
    outcomes = train("measure", arm, spec, cells, seeds, experiment.curve_points)
    chosen, *rest = (_column(outcomes, i) for i in range(len(cells)))
    return OptimizerResult(spec, grid, chosen, rest[0] if rest else None)


def _best_undecayed(arm: Arm, grid: Grid) -> int:
    column = grid.mean[:, 0]
    return 0 if np.isnan(column).all() else arm.metric.best(column)


def _column(outcomes: Outcomes, index: int) -> Outcomes:
    keep = slice(index, index + 1)
    return replace(
        outcomes,
        validation=outcomes.validation[:, keep],
        test=outcomes.test[:, keep],
        diverged=outcomes.diverged[:, keep],
        train_loss=outcomes.train_loss[:, keep],
        test_loss=outcomes.test_loss[:, keep],
    )
