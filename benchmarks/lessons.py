"""Four small tasks on real data that a seed fixes: the start and the order of the batches.

The data are the same under every seed, so that what differs between seeds is the training alone.
All matrices that matter have 4096 elements or more, as smaller ones keep their state in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ebbtide.lab.charlm import Transformer, text_of
from ebbtide.lab.torch_training import new_model

Batch = tuple[torch.Tensor, torch.Tensor]
Forward = Callable[[torch.Tensor], torch.Tensor]
_TEST_SHARE = 0.25


class Lesson:
    """Inputs and labels, held in two parts, and the model that learns them.

    Args:
        make: Makes the model, whatever its numbers.
        train: Inputs and labels to learn.
        test: Inputs and labels to measure with.
        batch_size: Inputs a step.
        seed: Of the start and of the batches.
    """

    def __init__(
        self, make: Callable[[], nn.Module], train: Batch, test: Batch, batch_size: int, seed: int
    ) -> None:
        self._make, self._train, self._test = make, train, test
        self._batch_size, self._seed = batch_size, seed

    def model(self) -> nn.Module:
        """Return the model at its start; the same at every call."""
        return new_model(self._make, self._seed)

    def batch_loss(self, forward: Forward, step: int) -> torch.Tensor:
        """Return the loss on the batch of a step, counted from 0."""
        generator = np.random.default_rng([self._seed, 2, step])
        chosen = torch.from_numpy(
            generator.integers(0, len(self._train[0]), self._batch_size, np.int64)
        )
        return _loss(forward, (self._train[0][chosen], self._train[1][chosen]))

    def test_loss(self, forward: Forward) -> float:
        """Return the loss on all of the test part."""
        with torch.no_grad():
            return float(_loss(forward, self._test))


def _loss(forward: Forward, batch: Batch) -> torch.Tensor:
    logits = forward(batch[0])
    return functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def perceptron(seed: int) -> Lesson:
    """scikit-learn's digits on 64-128-128-10."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    return Lesson(make, *_digits(), 64, seed)


def convnet(seed: int) -> Lesson:
    """The same digits as pictures, on three convolutions."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    return Lesson(make, *_digits(), 64, seed)


def transformer(seed: int) -> Lesson:
    """The characters of CPython's help texts, 64 of them foretold at a time."""
    pieces, characters = _characters()
    train, test = _parts(pieces)
    learnt, measured = ((part[:, :-1], part[:, 1:]) for part in (train, test[:96]))
    return Lesson(lambda: Transformer(characters, width=64), learnt, measured, 8, seed)


def embedding(seed: int) -> Lesson:
    """The word in the middle of four others, from the mean of their embeddings."""
    windows, words = _words()
    train, test = _parts(windows)
    learnt, measured = ((part[:, [0, 1, 3, 4]], part[:, 2:3]) for part in (train, test[:4000]))
    return Lesson(lambda: Bag(words), learnt, measured, 128, seed)


LESSONS: dict[str, Callable[[int], Lesson]] = {
    "perceptron": perceptron,
    "convnet": convnet,
    "transformer": transformer,
    "embedding": embedding,
}


class Bag(nn.Module):
    """Mean of embeddings, then a linear layer: most rows of the table rest in a step."""

    def __init__(self, words: int, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.head = nn.Linear(width, words)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 1, words) for contexts (B, 4)."""
        logits: torch.Tensor = self.head(self.table(context).mean(1, keepdim=True))
        return logits


def _parts(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split rows in two, the same way every time."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
    held = int(len(rows) * _TEST_SHARE)
    return rows[order[held:]], rows[order[:held]]


@cache
def _digits() -> tuple[Batch, Batch]:
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    rows = torch.from_numpy(np.column_stack([pixels / 16, digits]).astype(np.float32))
    train, test = ((part[:, :64], part[:, 64:].long()) for part in _parts(rows))
    return train, test


@cache
def _characters() -> tuple[torch.Tensor, int]:
    """Return pieces of the text (count, 65) as numbers, and how many characters there are."""
    text = "\n\n".join(text_of())
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([numbers[each] for each in text])
    return codes[: len(codes) // 65 * 65].view(-1, 65), len(numbers)


@cache
def _words() -> tuple[torch.Tensor, int]:
    """Return all windows of five words (count, 5) as numbers, and how many words there are."""
    words = " ".join(text_of()).lower().split()
    known, counts = np.unique(words, return_counts=True)
    frequent = {str(word): i + 1 for i, word in enumerate(known[counts >= 5])}
    codes = torch.tensor([frequent.get(word, 0) for word in words])  # 0: any other word
    windows = codes.unfold(0, 5, 1)
    return windows[windows[:, 2] > 0], len(frequent) + 1
