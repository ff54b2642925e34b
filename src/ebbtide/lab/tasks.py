"""What an optimizer is tried on: the contract of a task, and the tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.errors import InputError
from ebbtide.lab.optimizers import OptimizerSpec

__all__ = ["TASKS", "Arm", "Cell", "Metric", "Outcomes", "Search", "Task", "Tick", "load_task"]

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
        steps: Steps at which the losses were measured, (P,); empty where none were.
        train_loss: (S, C, P); NaN throughout where only the other is known.
        test_loss: (S, C, P).
        test_loss_name: What the second curve is.
    """

    validation: NDArray[np.float64]
    test: NDArray[np.float64]
    diverged: NDArray[np.bool_]
    steps: NDArray[np.int64]
    train_loss: NDArray[np.float64]
    test_loss: NDArray[np.float64]
    test_loss_name: str = "test loss"


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
class Search:
    """How much is searched where the user does not say.

    Attributes:
        lr: Grid of learning rates, in AdamW's units.
        weight_decay: Grid of weight decays, in AdamW's units.
        seeds: Number of paired test seeds.
    """

    lr: str
    weight_decay: str
    seeds: int


# A factor of about √10 apart, in round numbers.
_SEARCH = Search("1e-4,3e-4,1e-3,3e-3,0.01,0.03,0.1", "0,0.03,0.1,0.3,1,3,10", 10)
_QUICK_SEARCH = Search("3e-4,1e-3,3e-3,0.01,0.03", "0,0.1,0.3,1,3", 5)


@dataclass(frozen=True)
class Task:
    """A training problem in one or more variants.

    Attributes:
        name: What the command line calls it.
        title: What the report calls it.
        description: What is trained on what, in a few sentences.
        arms: The variants.
        search: How much is searched by default.
        unit: What an arm's `steps` are.
        diverged: When a cell has diverged, as a sentence.
        facts: What a report should record of it, by name.
    """

    name: str
    title: str
    description: str
    arms: tuple[Arm, ...]
    search: Search = _SEARCH
    unit: str = "training steps"
    diverged: str = (
        "A cell has diverged when its training loss ends above where it began, or is not finite."
    )
    facts: Mapping[str, str] = field(default_factory=dict)


def _digits(quick: bool) -> Task:
    from ebbtide.lab.digits import digits_task

    task = digits_task(quick=quick)
    return replace(task, search=_QUICK_SEARCH) if quick else task


def _charlm(quick: bool) -> Task:
    from ebbtide.lab.charlm import charlm_task

    return charlm_task(quick=quick)


def _convnet(quick: bool) -> Task:
    from ebbtide.lab.convnet import convnet_task

    return convnet_task(quick=quick)


TASKS: dict[str, Callable[[bool], Task]] = {
    "digits": _digits,
    "char-lm": _charlm,
    "convnet": _convnet,
}
"""Tasks by name; each is made with `quick` or not."""


def load_task(
    name: str, *, quick: bool = False, metric: str | None = None, maximize: bool = False
) -> Task:
    """Return a task by its name, or that of the user's own function.

    Args:
        name: One of `TASKS`, or `FILE.py:FUNCTION`.
        quick: Whether small grids and short runs are enough.
        metric: Which of the numbers that the function returns counts.
        maximize: Whether more of it is better.

    Raises:
        InputError: There is no such task, or the function cannot be used.
    """
    if ":" in name:
        from ebbtide.lab.user_task import user_task

        return user_task(name, quick=quick, metric=metric, maximize=maximize)
    if name not in TASKS:
        raise InputError(
            f"unknown task {name!r}; choose among {', '.join(TASKS)}, or write FILE.py:FUNCTION"
        )
    if metric is not None or maximize:
        raise InputError(f"the task {name} has a metric of its own; FILE.py:FUNCTION takes one")
    return TASKS[name](quick)
