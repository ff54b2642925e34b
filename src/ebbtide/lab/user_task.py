"""The user's own training function as a task of the comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.errors import InputError, Stopped
from ebbtide.lab.memory import FORGETFUL, Arrays, Memory
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
        memory: Of calls made before.
    """

    target: Target
    number: str | None
    metric: Metric
    name: str = "function"
    loss_name: str = "reported value"
    steps: int = 1
    memory: Memory = FORGETFUL

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

    def keeping(self, memory: Memory) -> FunctionArm:
        """Return the arm with each of its calls kept, since one may take long."""
        return replace(self, memory=memory)

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
        calls = []
        for seed in seeds:
            for cell in cells:
                calls.append(self._call(spec.name, cell, seed, tick))
                tick(1)
        shape = (len(seeds), len(cells))
        validation, test = (
            np.array([call[which] for call in calls]).reshape(shape)
            for which in ("validation", "test")
        )
        diverged = ~np.isfinite(validation + test)
        validation, test = (np.where(diverged, np.nan, each) for each in (validation, test))
        steps, reported = _curves(calls) if curve_points > 1 else _curves([])
        curves = reported.reshape(*shape, len(steps))
        unknown = np.full_like(curves, np.nan)
        return Outcomes(validation, test, diverged, steps, unknown, curves, "reported value")

    def _call(self, optimizer: str, cell: Cell, seed: int, tick: Tick) -> Arrays:
        settings = {
            "optimizer": optimizer,
            "lr": cell.lr,
            "weight_decay": cell.weight_decay,
            "seed": seed,
        }
        order = Order(self.target, settings, metric=self.number, threads=1)

        def make() -> Arrays:
            ending = run_cell(order, stopped=lambda: _is_over(tick))
            _check(ending, self.target, settings)
            return _kept(ending)

        return self.memory.arrays(repr(settings), make, lambda: None)


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


def _kept(ending: Ending) -> Arrays:
    """Return what is needed of a call: the number that counts, that for the test, the curve."""
    points = ending.curve.points()
    value = ending.message["value"] if ending.kind == "result" else math.nan
    numbers = ending.message.get("numbers", {})
    return {
        "validation": np.array(value, np.float64),
        "test": np.array(numbers.get(_TEST, value), np.float64),
        "steps": np.array([step for step, _ in points], np.int64),
        "values": np.array([value for _, value in points], np.float64),
    }


def _curves(calls: Sequence[Arrays]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the steps at which all calls have reported, and the values there, a row a call."""
    curves = [dict(zip(call["steps"], call["values"], strict=True)) for call in calls]
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
