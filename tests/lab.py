"""What tests of the laboratory share: an arm that is a formula, and somebody who counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ebbtide.lab.experiment import Experiment
from ebbtide.lab.optimizers import OPTIMIZERS, OptimizerSpec
from ebbtide.lab.tasks import Cell, Metric, Outcomes, Task, Tick

BEST = Cell(1e-2, 0.1)
ACCURACY = Metric("accuracy", "%")
SPECS = (OPTIMIZERS["adam"], OPTIMIZERS["adamw"])


@dataclass(frozen=True)
class FormulaArm:
    """An arm whose metric is a formula: 90 at the best cell, less for each decade away.

    `advantage` is added for AdamW; every seed adds its own luck, the same for all.
    """

    best: Cell = BEST
    advantage: float = 0.0
    noise: float = 0.0
    name: str = "formula"
    title: str = "Formula"
    description: str = "A formula."
    metric: Metric = ACCURACY
    loss_name: str = "loss"
    steps: int = 2
    calls: list[tuple[str, tuple[Cell, ...], tuple[int, ...]]] = field(default_factory=list)

    def score(self, spec: OptimizerSpec, cell: Cell, seed: int) -> float:
        lr, decay = cell.lr / spec.lr_unit, cell.weight_decay / spec.weight_decay_unit
        away = abs(np.log10(lr / self.best.lr))
        away += abs(np.log10(decay / self.best.weight_decay)) if decay else 3.0
        luck = np.random.default_rng(seed).normal(0, 3)
        own = np.random.default_rng([seed, *spec.name.encode()]).normal(0, self.noise)
        if away > 3.9:
            return float("nan")
        return 90 - away + luck + own + self.advantage * (spec.name == "adamw")

    def train(
        self, spec: OptimizerSpec, cells: Sequence[Cell], seeds: Sequence[int], *,
        curve_points: int, tick: Tick,
    ) -> Outcomes:  # fmt: skip
        self.calls.append((spec.name, tuple(cells), tuple(seeds)))
        tick(self.steps * len(cells) * len(seeds))
        scores = np.array([[self.score(spec, cell, seed) for cell in cells] for seed in seeds])
        curve = np.repeat(100 - scores[..., None], curve_points, axis=-1)
        steps = np.arange(curve_points)
        return Outcomes(scores, scores - 1, np.isnan(scores), steps, curve, curve)


class Counter:
    """Counts what a progress display would show."""

    def __init__(self) -> None:
        self.total = self.done = self.skipped = 0

    def start(self, title: str, total: int) -> None:
        self.total = total

    def advance(self, units: int) -> None:
        self.done += units

    def skip(self, units: int) -> None:
        self.skipped += units
        self.advance(units)


def experiment(arm: FormulaArm, **changes: object) -> Experiment:
    plan = Experiment(
        task=Task("formula", "Formula", "A formula.", (arm,)),
        specs=SPECS,
        lrs=(1e-4, 1e-3, 1e-2, 1e-1),
        weight_decays=(0.0, 1e-2, 1e-1, 1.0),
        selection_seeds=(0, 1, 2),
        test_seeds=(10, 11, 12, 13, 14, 15),
        curve_points=3,
    )
    return dataclasses.replace(plan, **changes)
