"""The user's own training function as a task of the comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.errors import InputError, Stopped
from ebbtide.lab.optimizers import OptimizerSpec
from ebbtide.lab.sweep.process import Ending, Order, run_cell
from ebbtide.lab.sweep.target import Target
from ebbtide.lab.sweep.workers import cell_words, check_target
from ebbtide.lab.tasks import Arm, Cell, Metric, Outcomes, Search, Task, Tick

__all__ = ["FunctionArm", "user_task"]

_SEARCH = Search("3e-4,1e-3,3e-3,0.01,0.03", "0,0.1,1", 5)
_QUICK_SEARCH = Search("1e-3,0.01", "0,0.3", 3)
_TEST = "test"


@dataclass(frozen=True)
class FunctionArm:
    """A function of settings that returns a number, or several by name.

    Attributes:
        target: The function.
        number: Which of its numbers chooses the settings; None for `loss`, or the only one.
        metric: What that is.
    """

    target: Target
    number: str | None
    metric: Metric
    name: str = "function"
    loss_name: str = "reported value"
    steps: int = 1

    @property
    def title(self) -> str:
        """Heading in the report."""
        return str(self.target)

    @property
    def description(self) -> str:
        """What is reported."""
        return (
            f"Settings are chosen by the function's {self.metric.name} under some seeds; what is "
            f"reported is its {_TEST!r} under others, or the same number where it returns none."
        )

    def train(
        self,
        spec: OptimizerSpec,
        cells: Sequence[Cell],
        seeds: Sequence[int],
        *,
        curve_points: int,
        tick: Tick,
    ) -> Outcomes:
        """Call the function for every cell and seed, each in a process of its own."""
        endings = []
        for seed in seeds:
            for cell in cells:
                settings = {
                    "optimizer": spec.name,
                    "lr": cell.lr,
                    "weight_decay": cell.weight_decay,
                    "seed": seed,
                }
                order = Order(self.target, settings, metric=self.number, threads=1)
                ending = run_cell(order, stopped=lambda: _is_over(tick))
                _check(ending, self.target, settings)
                endings.append(ending)
                tick(1)
        shape = (len(seeds), len(cells))
        validation, test = (
            np.array([_number(ending, which) for ending in endings]).reshape(shape)
            for which in (None, _TEST)
        )
        diverged = ~np.isfinite(validation + test)
        validation, test = (np.where(diverged, np.nan, each) for each in (validation, test))
        steps, reported = _curves(endings) if curve_points > 1 else _curves([])
        curves = reported.reshape(*shape, len(steps))
        unknown = np.full_like(curves, np.nan)
        return Outcomes(validation, test, diverged, steps, unknown, curves, "reported value")


def _is_over(tick: Tick) -> bool:
    try:
        tick(0)
    except Stopped:
        return True
    return False


def _check(ending: Ending, target: Target, settings: dict[str, Any]) -> None:
    """Raise what ends the comparison: everything but a number, and a divergence."""
    if ending.kind == "stopped":
        raise Stopped
    if ending.kind == "result" or ending.message.get("diverged"):
        return
    if ending.kind == "changed":
        raise InputError(f"{target.path.name} was changed while it was running")
    error = ending.message.get("error") or f"its process ended with status {ending.status}"
    raise InputError(
        f"{target} failed at {cell_words(settings)}: {error} (`ebbtide sweep` keeps the traceback "
        "of such a cell, and goes on with the others)"
    )


def _number(ending: Ending, name: str | None) -> float:
    """Return the number that counts, or another one where there is one of that name."""
    if ending.kind != "result":
        return math.nan
    value = ending.message["value"]
    return float(ending.message["numbers"].get(name, value))


def _curves(endings: Sequence[Ending]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the steps at which all runs have reported, and the values there, a row a run."""
    curves = [dict(ending.curve.points()) for ending in endings]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    values = [[curve[step] for step in shared] for curve in curves]
    return np.array(shared, np.int64), np.array(values, np.float64)


def user_task(text: str, *, quick: bool, metric: str | None, maximize: bool) -> Task:
    """Return the task of a function.

    Args:
        text: `FILE.py:FUNCTION`; the function takes `ebbtide.lab.sweep.Settings`.
        quick: Whether a small grid is enough.
        metric: Which of the numbers that it returns counts.
        maximize: Whether more of it is better.

    Raises:
        InputError: There is no such function, or it cannot be used.
    """
    target = Target.parse(text)
    versions = check_target(target)
    name = metric or "result"
    arms: tuple[Arm, ...] = (
        FunctionArm(target, metric, Metric(name, "", higher_is_better=maximize, decimals=4)),
    )
    return Task(
        text,
        str(target),
        f"The function {target.function} of {target.path.name}, called with an optimizer, a "
        f"learning rate, a weight decay and a seed; {'more' if maximize else 'less'} is better.",
        arms,
        search=_QUICK_SEARCH if quick else _SEARCH,
        unit="runs of the function",
        diverged="A cell has diverged when the function returned a number that is not finite, or "
        "raised FloatingPointError.",
        facts={"SHA-256 of the file": target.sha256, **versions},
    )
