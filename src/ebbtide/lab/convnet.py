"""A small convolutional net on scikit-learn's handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ebbtide.lab.digits import DigitsArm
from ebbtide.lab.tasks import Arm, Metric, Search, Task
from ebbtide.lab.torch_training import Lesson, TaughtArm, new_model

__all__ = ["ConvolutionalArm", "convnet_task"]

_CHANNELS, _CLASSES, _BATCH, _MEASURED = (8, 16), 10, 50, 200
_SEARCH = Search("1e-3,3e-3,0.01,0.03", "0,0.1,1,3", 5)
_QUICK_SEARCH = Search("3e-3,0.01,0.03", "0,1", 3)
_METRIC = Metric("accuracy", "%")
_DATA = DigitsArm("data", "", "")


@dataclass(frozen=True)
class ConvolutionalArm(TaughtArm):
    """The digits as pictures of 8 x 8."""

    steps: int
    name: str = "convnet"
    title: str = "Digits as pictures"
    description: str = "The same pictures as the task digits has, in their two dimensions."
    metric: Metric = _METRIC
    loss_name: str = "cross-entropy (nats)"

    def lesson(self, seed: int) -> Lesson:
        """Return what a seed fixes."""
        return _Pictures(seed)


class _Pictures:
    """The lesson of one seed."""

    def __init__(self, seed: int) -> None:
        parts = _DATA.data([seed])
        named = {"train": parts.train, "validation": parts.validation, "test": parts.test}
        self._parts = {
            name: (
                torch.from_numpy(part.inputs[0]).reshape(-1, 1, 8, 8),
                torch.from_numpy(part.labels[0]),
            )
            for name, part in named.items()
        }
        self._seed = seed

    def model(self) -> nn.Module:
        """Return the net at its start."""
        return new_model(_net, self._seed)

    def batch_loss(self, model: nn.Module, step: int) -> torch.Tensor:
        """Return the loss on the batch of a step; each pass is in a new order."""
        inputs, labels = self._parts["train"]
        a_pass, batch = divmod(step, len(labels) // _BATCH)
        order = np.random.default_rng([self._seed, 2, a_pass]).permutation(len(labels))
        rows = torch.from_numpy(order[batch * _BATCH : (batch + 1) * _BATCH])
        return functional.cross_entropy(model(inputs[rows]), labels[rows])

    def loss(self, model: nn.Module, part: str) -> float:
        """Return the loss on the first pictures of a part, for the curves."""
        inputs, labels = (each[:_MEASURED] for each in self._parts[part])
        with torch.no_grad():
            return float(functional.cross_entropy(model(inputs), labels))

    def score(self, model: nn.Module, part: str) -> float:
        """Return the share of pictures told right, in percent."""
        inputs, labels = self._parts[part]
        with torch.no_grad():
            right: Any = model(inputs).argmax(dim=1) == labels
        return 100.0 * float(right.double().mean())


def _net() -> nn.Module:
    first, second = _CHANNELS
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * 16, _CLASSES),
    )


def convnet_task(*, quick: bool) -> Task:
    """Return the convolutional net."""
    steps = 100 if quick else 400
    arms: tuple[Arm, ...] = (ConvolutionalArm(steps),)
    return Task(
        "convnet",
        "A convolutional net",
        f"Two convolutions of 3 x 3 with {_CHANNELS[0]} and {_CHANNELS[1]} channels and a linear "
        f"layer learn scikit-learn's digits from {_DATA.train_size} pictures, of whose labels "
        f"{_DATA.label_noise:.0%} are wrong on purpose; {_DATA.validation_size} others choose the "
        f"settings, the rest is the test. {steps} steps of {_BATCH} pictures in float32, the lr "
        "falling to zero along a cosine. Weight decay acts on kernels and the matrix, not on "
        "biases.",
        arms,
        search=_QUICK_SEARCH if quick else _SEARCH,
        facts={"torch": torch.__version__},
    )
