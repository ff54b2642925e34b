"""Train a stack of networks, a grid cell and a seed each, with one optimizer call a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.optimizers import OptimizerSpec, numpy_optimizer
from ebbtide.lab.stack import StackedMLP
from ebbtide.lab.tasks import Cell, Outcomes, Tick
from ebbtide.schedules import Cosine

__all__ = ["Part", "Parts", "StackTraining"]

Array = NDArray[np.float32]
Labels = NDArray[np.int64]

_STEPS_A_TICK = 10


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


class StackTraining:
    """S·C networks in training: C grid cells under each of S seeds.

    The lr falls to zero along a cosine. Networks of the same seed share data, start and order.

    Args:
        spec: The optimizer.
        cells: Its settings.
        seeds: One for each row of `parts`.
        parts: The data.
        sizes: Widths of the networks' layers.
        steps: Steps of the run.
        batch_size: Rows a step, at most the size of the training part.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        cells: Sequence[Cell],
        seeds: Sequence[int],
        parts: Parts,
        *,
        sizes: Sequence[int],
        steps: int,
        batch_size: int,
    ) -> None:
        self._parts = parts
        self._model = StackedMLP(seeds, len(cells), sizes)
        self._grads = self._model.grads()
        members = self._model.members()
        settings = [cell for _ in seeds for cell in cells]
        self._optimizer = numpy_optimizer(
            spec,
            [
                {"params": params, "lr": cell.lr, "weight_decay": cell.weight_decay}
                for params, cell in zip(members, settings, strict=True)
            ],
        )
        self._lrs = [cell.lr for cell in settings]
        self._schedule = Cosine(steps)
        self._steps = steps
        self._order = _batches(seeds, parts.train.labels.shape[1], steps, batch_size)

    def run(self, *, curve_points: int, tick: Tick) -> Outcomes:
        """Train to the end and measure.

        Args:
            curve_points: Points of the loss curves, evenly over the run; with 1, the end only.
            tick: Called with the steps done, summed over the networks.
        """
        measured = np.unique(np.linspace(self._steps, 0, curve_points).round().astype(np.int64))
        losses = []
        networks = len(self._lrs)
        with np.errstate(all="ignore"):  # a diverging network overflows, and that is a result
            start_loss = self._loss(self._parts.train)
            for step in range(self._steps + 1):
                if step in measured:
                    losses.append((self._loss(self._parts.train), self._loss(self._parts.test)))
                if step == self._steps:
                    break
                self._step(step)
                if (step + 1) % _STEPS_A_TICK == 0:
                    tick(_STEPS_A_TICK * networks)
            tick(self._steps % _STEPS_A_TICK * networks)
            train_loss, test_loss = (
                np.stack(curve, axis=-1) for curve in zip(*losses, strict=True)
            )
            # Not `>`: a loss that is NaN is no better than one that rose.
            diverged = ~(train_loss[..., -1] <= start_loss)
            return Outcomes(
                validation=np.where(diverged, np.nan, self._accuracy(self._parts.validation)),
                test=np.where(diverged, np.nan, self._accuracy(self._parts.test)),
                diverged=diverged,
                steps=measured,
                train_loss=train_loss,
                test_loss=test_loss,
            )

    def _step(self, step: int) -> None:
        rows = self._order[step]
        starts = np.arange(len(rows))[:, None]
        train = self._parts.train
        self._model.backward(train.inputs[starts, rows], train.labels[starts, rows])
        multiplier = self._schedule(step)
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * multiplier
        self._optimizer.step(self._grads)

    def _loss(self, part: Part) -> NDArray[np.float64]:
        return self._model.loss(part.inputs, part.labels)

    def _accuracy(self, part: Part) -> NDArray[np.float64]:
        right = self._model.logits(part.inputs).argmax(axis=-1) == part.labels[:, None]
        return np.asarray(100 * right.mean(axis=-1), np.float64)


def _batches(seeds: Sequence[int], size: int, steps: int, batch_size: int) -> NDArray[np.int64]:
    """Return the rows of each step, (steps, S, batch_size): each pass in a new order."""
    passes = -(-steps * batch_size // size)
    orders = []
    for seed in seeds:
        generator = np.random.default_rng([seed, 2])
        order = np.concatenate([generator.permutation(size) for _ in range(passes)])
        orders.append(order[: steps * batch_size].reshape(steps, batch_size))
    return np.stack(orders, axis=1)
