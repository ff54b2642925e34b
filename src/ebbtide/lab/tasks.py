"""What an optimizer is tried on: the contract of a task, and the tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.errors import InputError
from ebbtide.lab.optimizers import OptimizerSpec

__all__ = ["TASKS", "Arm", "Cell", "Metric", "Outcomes", "Task", "Tick", "load_task"]

Tick = Callable[[int], None]
"""Called during training with the number of steps done since the last call; raises to stop."""


@dataclass(frozen=True)
class Cell:
    """One point of a grid, in the optimizer's own units."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Metric:
    """The number that cells are chosen by and optimizers compared by."""

    name: str
    unit: str
    higher_is_better: bool = True
    decimals: int = 1

    def best(self, values: NDArray[np.float64]) -> int:
        """Return the flat index of the best value; NaN is never the best.

        Raises:
            InputError: Every value is NaN.
        """
        if np.isnan(values).all():
            raise InputError("every cell of the grid diverged; extend the grid to smaller lr")
        return int(np.nanargmax(values) if self.higher_is_better else np.nanargmin(values))


@dataclass(frozen=True)
class Outcomes:
    """What S seeds by C cells came to; every array starts with these two dimensions.

    Attributes:
        validation: Metric on the data that cells are chosen by, (S, C).
        test: Metric on the data that nothing is chosen by, (S, C).
        diverged: Whether training lost the way, (S, C); the metrics are NaN there.
        steps: Steps at which the losses were measured, (P,).
        train_loss: (S, C, P).
        test_loss: (S, C, P).
    """

    validation: NDArray[np.float64]
    test: NDArray[np.float64]
    diverged: NDArray[np.bool_]
    steps: NDArray[np.int64]
    train_loss: NDArray[np.float64]
    test_loss: NDArray[np.float64]


class Arm(Protocol):
    """One training problem."""

    @property
    def name(self) -> str:
        """Short name, used in files."""

    @property
    def title(self) -> str:
        """Heading in the report."""

    @property
    def description(self) -> str:
        """What is trained on what, in one or two sentences."""

    @property
    def metric(self) -> Metric:
        """What the arm measures."""

    @property
    def loss_name(self) -> str:
        """What the loss is, with its unit, for the axis of a picture."""

    @property
    def steps(self) -> int:
        """Steps of one training run."""

    def train(
        self,
        spec: OptimizerSpec,
        cells: Sequence[Cell],
        seeds: Sequence[int],
        *,
        curve_points: int,
        tick: Tick,
    ) -> Outcomes:
        """Train every cell under every seed from that seed's own start and data order.

        The same seed gives the same data, start and order whatever the optimizer and the cell.
        `tick` is called with the steps done, `self.steps` for each cell and seed in all.
        """


@dataclass(frozen=True)
class Task:
    """A training problem in one or more variants."""

    name: str
    title: str
    description: str
    arms: tuple[Arm, ...]


def _digits(quick: bool) -> Task:
    from ebbtide.lab.digits import digits_task

    return digits_task(quick=quick)


TASKS: dict[str, Callable[[bool], Task]] = {"digits": _digits}
"""Tasks by name; each is made with `quick` or not."""


def load_task(name: str, *, quick: bool = False) -> Task:
    """Return a task by its name.

    Raises:
        InputError: There is no such task.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; choose among {', '.join(TASKS)}")
    return TASKS[name](quick)
