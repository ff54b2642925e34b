"""Handwritten digits: scikit-learn's bundled 8 x 8 pictures, on a small perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.optimizers import OptimizerSpec
from ebbtide.lab.tasks import Arm, Cell, Metric, Outcomes, Task, Tick
from ebbtide.lab.training import Course, Part, Parts, StackTraining, accuracy, loss
from ebbtide.schedules import Constant, Cosine, Schedule

__all__ = ["DigitsArm", "digits_task"]

_CLASSES = 10
_ACCURACY = Metric("accuracy", "%")


@dataclass(frozen=True)
class DigitsArm:
    """Digits with chosen scales of the input columns.

    Attributes:
        name: Short name, used in files.
        title: Heading in the report.
        description: What sets the arm apart.
        column_spread: Standard deviation of the decimal exponent by which a seed multiplies
            each input column; 0 leaves the pixels as they are, in [0, 1].
        standardise: Whether columns are brought to mean 0 and deviation 1 afterwards.
        steps: Steps of one training run.
        batch_size: Pictures a step.
        hidden: Width of the hidden layer.
        train_size: Pictures trained on.
        validation_size: Pictures that settings are chosen by; the rest is the test.
        label_noise: Share of the training labels replaced by another digit.
        loss_scale: Factor of the loss that gradients are taken of.
        schedule: Makes the lr's schedule from the number of steps.
        decay_schedule: Makes the weight decay's schedule from the number of steps.
        metric: What the arm measures: accuracy, or the loss if it is called so.
        loss_name: What the loss is.
    """

    name: str
    title: str
    description: str
    column_spread: float = 0.0
    standardise: bool = False
    steps: int = 1000
    batch_size: int = 50
    hidden: int = 64
    train_size: int = 400
    validation_size: int = 500
    label_noise: float = 0.2
    loss_scale: float = 1.0
    schedule: Callable[[int], Schedule] = Cosine
    decay_schedule: Callable[[int], Schedule] = field(default=lambda _: Constant())
    metric: Metric = _ACCURACY
    loss_name: str = "cross-entropy (nats)"

    def train(
        self,
        spec: OptimizerSpec,
        cells: Sequence[Cell],
        seeds: Sequence[int],
        *,
        curve_points: int,
        tick: Tick,
    ) -> Outcomes:
        """Train every cell under every seed, all of them as one stacked model."""
        parts = self.data(seeds)
        sizes = (parts.train.inputs.shape[-1], self.hidden, _CLASSES)
        course = Course(
            self.steps,
            self.batch_size,
            self.schedule(self.steps),
            self.decay_schedule(self.steps),
            self.loss_scale,
        )
        training = StackTraining(spec, cells, seeds, parts, sizes=sizes, course=course)
        score = loss if self.metric.name == "loss" else accuracy
        return training.run(score=score, curve_points=curve_points, tick=tick)

    def data(self, seeds: Sequence[int]) -> Parts:
        """Return the training, validation and test parts, a row a seed."""
        inputs, labels = (np.stack(arrays) for arrays in zip(*map(self._draw, seeds), strict=True))
        cuts = [self.train_size, self.train_size + self.validation_size]
        pieces = zip(np.split(inputs, cuts, axis=1), np.split(labels, cuts, axis=1), strict=True)
        return Parts(*(Part(np.ascontiguousarray(x), np.ascontiguousarray(y)) for x, y in pieces))

    def _draw(self, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the pictures in the seed's order, its wrong labels and column scales put in."""
        generator = np.random.default_rng([seed, 0])
        pixels, digits = _load()
        order = generator.permutation(len(digits))
        inputs, labels = pixels[order], digits[order]
        wrong = generator.random(self.train_size) < self.label_noise
        shift = generator.integers(1, _CLASSES, self.train_size)
        labels[: self.train_size] += np.where(wrong, shift, 0)
        labels %= _CLASSES
        inputs *= 10 ** generator.normal(0, self.column_spread, inputs.shape[1])
        if self.standardise:
            known = inputs[: self.train_size]
            deviation = known.std(axis=0)
            # A pixel that is blank in the training part has no deviation to divide by.
            inputs = (inputs - known.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
        return inputs.astype(np.float32), labels


def digits_task(*, quick: bool) -> Task:
    """Return the digits in two arms: as they are, and with columns on very different scales."""
    steps = 400 if quick else 1000
    plain = DigitsArm(
        "plain",
        "Pixels as they are",
        "Every input lies in [0, 1], so that all weights see gradients of about the same size.",
        steps=steps,
    )
    scaled = DigitsArm(
        "multi-scale",
        "Columns on very different scales",
        "Each of the 64 input columns is multiplied by its own factor, drawn anew for each seed: "
        "10 to the power of a normal number with deviation 0.7. Two columns in three lie within "
        "a factor of 5 of where they were, one in twenty beyond a factor of 25.",
        column_spread=0.7,
        steps=steps,
    )
    arms: tuple[Arm, ...] = (plain, scaled)
    return Task(
        "digits",
        "Handwritten digits",
        f"A perceptron 64-{plain.hidden}-10 with ReLU learns scikit-learn's 8 x 8 digits from "
        f"{plain.train_size} pictures, of whose labels {plain.label_noise:.0%} are wrong on "
        f"purpose; {plain.validation_size} others choose the settings and the remaining "
        f"{1797 - plain.train_size - plain.validation_size} are the test. {steps} steps of "
        f"{plain.batch_size} pictures in float32, the lr falling to zero along a cosine. "
        "Weight decay acts on the matrices, not on the biases.",
        arms,
    )


@cache
def _load() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    return pixels / 16, digits.astype(np.int64)
