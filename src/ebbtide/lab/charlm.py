"""A small character transformer on the topics that CPython's `help()` shows."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ebbtide.lab.tasks import Arm, Metric, Search, Task
from ebbtide.lab.torch_training import Lesson, TaughtArm, new_model

__all__ = ["CharacterArm", "Transformer", "charlm_task", "text_of"]

_CONTEXT, _WIDTH, _HEADS, _LAYERS = 64, 32, 4, 2
_BATCH, _MEASURED = 8, 32
_SEARCH = Search("1e-3,3e-3,0.01,0.03", "0,0.1,1,3", 5)
_QUICK_SEARCH = Search("3e-3,0.01,0.03", "0,1", 3)
_METRIC = Metric("loss", "nats", higher_is_better=False, decimals=3)


class Transformer(nn.Module):
    """Decoder-only: embeddings, causal blocks with LayerNorm before each part, a linear head."""

    def __init__(self, characters: int, width: int = _WIDTH) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, width)
        self.position = nn.Embedding(_CONTEXT, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Return logits (B, T, characters) for the characters that follow codes (B, T)."""
        x = self.token(codes) + self.position.weight[: codes.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, _HEADS, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        down: torch.Tensor = self.down(functional.gelu(self.up(self.norm(x))))
        return x + down


@dataclass(frozen=True)
class CharacterArm(TaughtArm):
    """The text, a different part of its paragraphs to train on for every seed."""

    steps: int
    name: str = "char-lm"
    title: str = "Python's help texts, character by character"
    description: str = (
        "A seed deals the paragraphs of the text to training, validation and test, 8 to 1 to 1. "
        "No paragraph is in the text twice."
    )
    metric: Metric = _METRIC
    loss_name: str = "cross-entropy (nats a character)"

    def lesson(self, seed: int) -> Lesson:
        """Return what a seed fixes."""
        return _Reading(seed)


class _Reading:
    """The lesson of one seed."""

    def __init__(self, seed: int) -> None:
        paragraphs, self._characters = _encoded()
        generator = np.random.default_rng([seed, 0])
        order = generator.permutation(len(paragraphs))
        cuts = [len(order) * 8 // 10, len(order) * 9 // 10]
        self._texts = {
            part: torch.from_numpy(np.concatenate([paragraphs[i] for i in chosen]))
            for part, chosen in zip(
                ("train", "validation", "test"), np.split(order, cuts), strict=True
            )
        }
        self._seed = seed
        self._measured = {part: self._windows(part, _MEASURED, generator) for part in self._texts}

    def model(self) -> nn.Module:
        return new_model(lambda: Transformer(self._characters), self._seed)

    def batch_loss(self, model: nn.Module, step: int) -> torch.Tensor:
        generator = np.random.default_rng([self._seed, 2, step])
        return _loss(model, self._windows("train", _BATCH, generator))

    def loss(self, model: nn.Module, part: str) -> float:
        with torch.no_grad():
            return float(_loss(model, self._measured[part]))

    def score(self, model: nn.Module, part: str) -> float:
        return self.loss(model, part)

    def _windows(self, part: str, count: int, generator: np.random.Generator) -> torch.Tensor:
        """Return pieces of the text (count, context + 1), from anywhere in it."""
        text = self._texts[part]
        starts = generator.integers(0, len(text) - _CONTEXT, count)
        return text.unfold(0, _CONTEXT + 1, 1)[torch.from_numpy(starts)]


def _loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@cache
def text_of() -> tuple[str, ...]:
    """Return the paragraphs of all topics, each once, in their order."""
    from pydoc_data.topics import topics

    texts: dict[str, str] = topics
    found: dict[str, str] = {}  # by their words: the same paragraph may be indented elsewhere
    for text in texts.values():
        for piece in text.split("\n\n"):
            found.setdefault(" ".join(piece.split()), piece.strip("\n"))
    return tuple(piece for words, piece in found.items() if words)


@cache
def _encoded() -> tuple[list[Any], int]:
    """Return the paragraphs as numbers of their characters, and how many characters there are."""
    paragraphs = [piece + "\n\n" for piece in text_of()]
    numbers = {character: i for i, character in enumerate(sorted(set("".join(paragraphs))))}
    return [np.array([numbers[c] for c in piece]) for piece in paragraphs], len(numbers)


def charlm_task(*, quick: bool) -> Task:
    """Return the character language model."""
    steps = 100 if quick else 300
    text = "\n\n".join(text_of())
    arms: tuple[Arm, ...] = (CharacterArm(steps),)
    return Task(
        "char-lm",
        "A character transformer",
        f"A transformer of {_LAYERS} layers, width {_WIDTH} and {_HEADS} heads learns to foretell "
        f"each of {_CONTEXT} characters in the {len(text):,} characters of CPython's help "
        f"topics. {steps} steps of {_BATCH} pieces in float32, the lr falling to zero along a "
        "cosine. Weight decay acts on matrices and embeddings, not on biases and gains.",
        arms,
        search=_QUICK_SEARCH if quick else _SEARCH,
        facts={
            "torch": torch.__version__,
            "text": f"pydoc_data.topics, CPython {platform.python_version()}, each paragraph once",
            "SHA-256 of the text": hashlib.sha256(text.encode()).hexdigest(),
        },
    )
