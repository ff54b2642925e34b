"""Train small torch models one after the other, a grid cell and a seed each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from torch import nn

import ebbtide.torch
from ebbtide.lab.optimizers import OptimizerSpec
from ebbtide.lab.tasks import Cell, Outcomes, Tick
from ebbtide.schedules import Cosine

__all__ = ["Lesson", "TaughtArm", "new_model", "one_torch_thread", "train_cells"]

_STEPS_A_TICK = 10


class Lesson(Protocol):
    """What a seed fixes: the data, the start and the order of the batches."""

    def model(self) -> nn.Module:
        """Return the model at its start; the same at every call."""

    def batch_loss(self, model: nn.Module, step: int) -> torch.Tensor:
        """Return the loss on the batch of a step, counted from 0."""

    def loss(self, model: nn.Module, part: str) -> float:
        """Return the loss on a part of the data: train, validation or test."""

    def score(self, model: nn.Module, part: str) -> float:
        """Return the arm's metric on a part of the data: validation or test."""


class TaughtArm:
    """An arm that is trained by torch, one lesson a seed."""

    steps: int

    def lesson(self, seed: int) -> Lesson:
        """Return what a seed fixes."""
        raise NotImplementedError

    def train(
        self,
        spec: OptimizerSpec,
        cells: Sequence[Cell],
        seeds: Sequence[int],
        *,
        curve_points: int,
        tick: Tick,
    ) -> Outcomes:
        """Train every cell under every seed."""
        return train_cells(
            self.lesson, spec, cells, seeds, steps=self.steps, curve_points=curve_points, tick=tick
        )


def train_cells(
    lesson: Callable[[int], Lesson],
    spec: OptimizerSpec,
    cells: Sequence[Cell],
    seeds: Sequence[int],
    *,
    steps: int,
    curve_points: int,
    tick: Tick,
) -> Outcomes:
    """Train every cell under every seed, the lr falling to zero along a cosine.

    Args:
        lesson: Makes the lesson of a seed.
        spec: The optimizer.
        cells: Its settings.
        seeds: Paired over optimizers and cells.
        steps: Steps of a run.
        curve_points: Points of the loss curves, evenly over the run; with 1, the end only.
        tick: Called with the steps done.
    """
    measured = np.unique(np.linspace(steps, 0, curve_points).round().astype(np.int64))
    shape = (len(seeds), len(cells))
    validation, test = np.full((2, *shape), np.nan)
    train_loss, test_loss = np.full((2, *shape, len(measured)), np.nan)
    with one_torch_thread():
        for row, seed in enumerate(seeds):
            taught = lesson(seed)
            for column, cell in enumerate(cells):
                at = row, column
                model = _train(
                    taught, spec, cell, steps, measured, train_loss[at], test_loss[at], tick
                )
                if model is not None:
                    validation[at] = taught.score(model, "validation")
                    test[at] = taught.score(model, "test")
    return Outcomes(validation, test, np.isnan(validation), measured, train_loss, test_loss)


def _train(
    lesson: Lesson,
    spec: OptimizerSpec,
    cell: Cell,
    steps: int,
    measured: np.ndarray[tuple[int], np.dtype[np.int64]],
    train_loss: np.ndarray[tuple[int], np.dtype[np.float64]],
    test_loss: np.ndarray[tuple[int], np.dtype[np.float64]],
    tick: Tick,
) -> nn.Module | None:
    """Train one model and write its curves; None if it diverged, which ends the run."""
    model = lesson.model()
    optimizer = _optimizer(spec, model, cell)
    schedule = Cosine(steps)
    start_loss = lesson.loss(model, "train")
    points = {int(step): index for index, step in enumerate(measured)}
    told = 0
    for step in range(steps + 1):
        if step in points:
            train_loss[points[step]] = lesson.loss(model, "train")
            test_loss[points[step]] = lesson.loss(model, "test")
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = cell.lr * schedule(step)
        loss = lesson.batch_loss(model, step)
        if not math.isfinite(float(loss.detach())):
            tick(steps - told)
            return None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % _STEPS_A_TICK == 0:
            tick(_STEPS_A_TICK)
            told += _STEPS_A_TICK
    tick(steps - told)
    # Not `>`: a loss that is NaN is no better than one that rose.
    return model if train_loss[-1] <= start_loss else None


def _optimizer(spec: OptimizerSpec, model: nn.Module, cell: Cell) -> torch.optim.Optimizer:
    groups = ebbtide.torch.param_groups(model, weight_decay=cell.weight_decay)
    make = getattr(ebbtide.torch, spec.family)
    optimizer: torch.optim.Optimizer = make(
        groups, lr=cell.lr, nonfinite="propagate", **spec.options
    )
    return optimizer


def new_model(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a model whose numbers depend on the seed alone, whatever other threads draw.

    Matrices and kernels are normal with variance 1/fan-in, embeddings with deviation 0.1; biases
    are 0, gains 1.
    """
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                param.fill_(0.0 if name.endswith("bias") else 1.0)
            elif id(param) in embeddings:
                param.normal_(0.0, 0.1, generator=generator)
            else:
                param.normal_(0.0, param[0].numel() ** -0.5, generator=generator)
    return model


_lock = Lock()
_inside = 0
_threads_outside = 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread, in all threads that are in here; afterwards what it used before."""
    global _inside, _threads_outside
    with _lock:
        if _inside == 0:
            _threads_outside = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch.set_num_threads(_threads_outside)
