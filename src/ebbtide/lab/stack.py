"""Many small perceptrons trained side by side as one model.

S starts (one a seed) times C copies (one a grid cell) are S·C networks whose weights lie in one
array a layer, (S, C, inputs, outputs). A layer is then one batched product, and the optimizer
gets each network's slice as a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["StackedMLP"]

Array = NDArray[np.float32]


class StackedMLP:
    """S·C multilayer perceptrons with ReLU and a softmax cross-entropy loss.

    Args:
        seeds: One for each start; the C copies of a start begin with the same weights.
        copies: C, networks that share a start and its data.
        sizes: Widths of the layers, inputs first and classes last.
    """

    def __init__(self, seeds: Sequence[int], copies: int, sizes: Sequence[int]) -> None:
        self.shape = (len(seeds), copies)
        self.weights: list[Array] = []
        self.biases: list[Array] = []
        generators = [np.random.default_rng([seed, 1]) for seed in seeds]
        for inputs, outputs in pairwise(sizes):
            spread = np.sqrt(2 / inputs)  # He: keeps the size of a ReLU network's signals
            start = np.stack([g.normal(0, spread, (inputs, outputs)) for g in generators])
            shape = (*self.shape, inputs, outputs)
            # astype alone would keep the broadcast's order, and a slice would not be one block.
            weight = np.broadcast_to(start[:, None], shape).astype(np.float32, order="C")
            self.weights.append(weight)
            self.biases.append(np.zeros((*self.shape, outputs), np.float32))
        self._weight_grads = [np.zeros_like(weight) for weight in self.weights]
        self._bias_grads = [np.zeros_like(bias) for bias in self.biases]

    def members(self) -> list[dict[str, Array]]:
        """Return each network's parameters as named views, C of the first start first."""
        return self._views(self.weights, self.biases)

    def grads(self) -> dict[str, Array]:
        """Return views of all gradients by the names of `members`; `backward` fills them."""
        views = self._views(self._weight_grads, self._bias_grads)
        return {name: grad for member in views for name, grad in member.items()}

    def logits(self, inputs: Array) -> Array:
        """Return the class scores (S, C, n, classes) for inputs (S, n, features)."""
        return self._forward(inputs)[-1]

    def loss(self, inputs: Array, labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the mean cross-entropy in nats, (S, C), for labels (S, n)."""
        logits = self.logits(inputs)
        chosen = np.take_along_axis(logits, labels[:, None, :, None], axis=-1)[..., 0]
        top = logits.max(axis=-1)
        log_total = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
        return np.asarray((log_total - chosen).mean(axis=-1), np.float64)

    def backward(
        self, inputs: Array, labels: NDArray[np.int64], *, loss_scale: float = 1.0
    ) -> None:
        """Write the gradients of `loss_scale` times a batch's mean cross-entropy into `grads`."""
        signals = self._forward(inputs)
        error = _softmax(signals.pop())
        starts, rows = np.ogrid[: labels.shape[0], : labels.shape[1]]
        error[starts, :, rows, labels] -= 1
        error *= np.float32(loss_scale / labels.shape[1])
        for layer in reversed(range(len(self.weights))):
            signal = signals[layer]
            np.matmul(signal.swapaxes(-1, -2), error, out=self._weight_grads[layer])
            np.sum(error, axis=-2, out=self._bias_grads[layer])
            if layer:
                error = np.matmul(error, self.weights[layer].swapaxes(-1, -2))
                error *= signal > 0

    def _forward(self, inputs: Array) -> list[Array]:
        """Return what enters each layer, and the scores last."""
        signals = [inputs[:, None]]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            signal = np.matmul(signals[-1], weight)
            signal += bias[:, :, None]
            if layer < len(self.weights) - 1:
                np.maximum(signal, 0, out=signal)
            signals.append(signal)
        return signals

    def _views(self, weights: list[Array], biases: list[Array]) -> list[dict[str, Array]]:
        return [
            {f"{index}.{kind}{layer}": array[place]
             for kind, arrays in (("weight", weights), ("bias", biases))
             for layer, array in enumerate(arrays)}
            for index, place in enumerate(np.ndindex(self.shape))
        ]  # fmt: skip


def _softmax(logits: Array) -> Array:
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits
