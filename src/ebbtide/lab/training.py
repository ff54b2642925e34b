"""Train a stack of networks, a grid cell and a seed each, with one optimizer call a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.optimizers import OptimizerSpec, numpy_optimizer
from ebbtide.lab.stack import StackedMLP
from ebbtide.lab.tasks import Cell, Outcomes, Tick
from ebbtide.schedules import Constant, Schedule

__all__ = ["Course", "Part", "Parts", "Score", "StackTraining", "accuracy", "loss"]

Array = NDArray[np.float32]
Labels = NDArray[np.int64]

_STEPS_A_TICK = 10
_UNSCHEDULED = Constant()


@dataclass(frozen=True)
class Part:
    """Inputs (S, n, features) and labels (S, n) of one part of the data, a row a seed."""

    inputs: Array
    labels: Labels


@dataclass(frozen=True)
class Parts:
    """The data of S seeds."""

    train: Part
    validation: Part
    test: Part


Score = Callable[[StackedMLP, Part], NDArray[np.float64]]
"""Measures every network of a stack on one part of the data, (S, C)."""


def accuracy(model: StackedMLP, part: Part) -> NDArray[np.float64]:
    """Return the share of rows that each network gets right, in percent."""
    right = model.logits(part.inputs).argmax(axis=-1) == part.labels[:, None]
    return np.asarray(100 * right.mean(axis=-1), np.float64)


def loss(model: StackedMLP, part: Part) -> NDArray[np.float64]:
    """Return each network's mean cross-entropy in nats."""
    return model.loss(part.inputs, part.labels)


@dataclass(frozen=True)
class Course:
    """How a training run goes.

    Attributes:
        steps: Its length.
        batch_size: Rows a step, at most the size of the training part.
        schedule: Multiplier of the lr.
        decay_schedule: Multiplier of the weight decay.
        loss_scale: Factor of the loss that gradients are taken of.
    """

    steps: int
    batch_size: int
    schedule: Schedule
    decay_schedule: Schedule = _UNSCHEDULED
    loss_scale: float = 1.0


class StackTraining:
    """S·C networks in training: C grid cells under each of S seeds.

    Networks of the same seed share data, start and order.

    Args:
        spec: The optimizer.
        cells: Its settings.
        seeds: One for each row of `parts`.
        parts: The data.
        sizes: Widths of the networks' layers.
        course: How the run goes.
        model: Networks to go on with; by default new ones.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        cells: Sequence[Cell],
        seeds: Sequence[int],
        parts: Parts,
        *,
        sizes: Sequence[int],
        course: Course,
        model: StackedMLP | None = None,
    ) -> None:
        self._parts = parts
        self.model = model or StackedMLP(seeds, len(cells), sizes)
        self._grads = self.model.grads()
        members = self.model.members()
        settings = [cell for _ in seeds for cell in cells]
        self._optimizer = numpy_optimizer(
            spec,
            [
                {"params": params, "lr": cell.lr, "weight_decay": cell.weight_decay}
                for params, cell in zip(members, settings, strict=True)
            ],
        )
        self._settings = settings
        self._course = course
        self._steps = course.steps
        self._order = _batches(seeds, parts.train.labels.shape[1], course.steps, course.batch_size)

    def run(self, *, score: Score = accuracy, curve_points: int, tick: Tick) -> Outcomes:
        """Train to the end and measure.

        Args:
            score: The metric.
            curve_points: Points of the loss curves, evenly over the run; with 1, the end only.
            tick: Called with the steps done, summed over the networks.
        """
        measured = np.unique(np.linspace(self._steps, 0, curve_points).round().astype(np.int64))
        losses = []
        networks = len(self._settings)
        with np.errstate(all="ignore"):  # a diverging network overflows, and that is a result
            start_loss = loss(self.model, self._parts.train)
            for step in range(self._steps + 1):
                if step in measured:
                    parts = self._parts.train, self._parts.test
                    losses.append([loss(self.model, part) for part in parts])
                if step == self._steps:
                    break
                self.step(step)
                if (step + 1) % _STEPS_A_TICK == 0:
                    tick(_STEPS_A_TICK * networks)
            tick(self._steps % _STEPS_A_TICK * networks)
            train_loss, test_loss = (
                np.stack(curve, axis=-1) for curve in zip(*losses, strict=True)
            )
            # Not `>`: a loss that is NaN is no better than one that rose.
            diverged = ~(train_loss[..., -1] <= start_loss)
            return Outcomes(
                validation=np.where(diverged, np.nan, score(self.model, self._parts.validation)),
                test=np.where(diverged, np.nan, score(self.model, self._parts.test)),
                diverged=diverged,
                steps=measured,
                train_loss=train_loss,
                test_loss=test_loss,
            )

    def step(self, step: int) -> None:
        """Take one step, counted from 0."""
        rows = self._order[step]
        starts = np.arange(len(rows))[:, None]
        train = self._parts.train
        course = self._course
        inputs, labels = train.inputs[starts, rows], train.labels[starts, rows]
        self.model.backward(inputs, labels, loss_scale=course.loss_scale)
        multiplier, decay_multiplier = course.schedule(step), course.decay_schedule(step)
        for group, cell in zip(self._optimizer.param_groups, self._settings, strict=True):
            group["lr"] = cell.lr * multiplier
            group["weight_decay"] = cell.weight_decay * decay_multiplier
        self._optimizer.step(self._grads)


def _batches(seeds: Sequence[int], size: int, steps: int, batch_size: int) -> NDArray[np.int64]:
    """Return the rows of each step, (steps, S, batch_size): each pass in a new order."""
    passes = -(-steps * batch_size // size)
    orders = []
    for seed in seeds:
        generator = np.random.default_rng([seed, 2])
        order = np.concatenate([generator.permutation(size) for _ in range(passes)])
        orders.append(order[: steps * batch_size].reshape(steps, batch_size))
    return np.stack(orders, axis=1)
