"""A training function that `ebbtide sweep` can run: a small network on scikit-learn's digits.

    ebbtide sweep examples/sweep_digits.py:train --optimizer adamw,adam,sgdw --seeds 3 \
        --lr 1e-4..1e-1:7 --lr sgdw=1e-3..1:7 --weight-decay 1e-2..10:7 --workers 2

It needs NumPy and scikit-learn only. A cell takes about two seconds, half of it the import of
scikit-learn.
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from ebbtide.lab.sweep import Settings

STEPS, BATCH = 300, 64


def train(settings: Settings) -> dict[str, float]:
    """Train at the given settings; return the validation loss in nats and the accuracy."""
    rng = np.random.default_rng(settings.seed)
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    inputs, labels = (digits.data[order] / 16).astype(np.float32), digits.target[order]
    weights = {
        "hidden": rng.normal(0, 0.15, (64, 64)).astype(np.float32),
        "bias": np.zeros(64, np.float32),
        "output": rng.normal(0, 0.15, (64, 10)).astype(np.float32),
    }
    optimizer = settings.numpy_optimizer(weights)
    train_x, train_y = inputs[:400], labels[:400]
    for step in range(STEPS):
        rows = rng.integers(len(train_y), size=BATCH)
        _, grads = loss_and_grads(weights, train_x[rows], train_y[rows])
        # The lr falls to zero along a cosine.
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        optimizer.step(grads)
        if step % 30 == 29:
            settings.report(step + 1, loss_and_grads(weights, inputs[400:], labels[400:])[0])
    loss, _ = loss_and_grads(weights, inputs[400:], labels[400:])
    hidden = np.maximum(inputs[400:] @ weights["hidden"] + weights["bias"], 0)
    right = (hidden @ weights["output"]).argmax(axis=1) == labels[400:]
    return {"loss": loss, "accuracy": float(right.mean())}


def loss_and_grads(
    weights: dict[str, np.ndarray], inputs: np.ndarray, labels: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """Return the mean cross-entropy and its gradients."""
    with np.errstate(all="ignore"):  # a diverging network overflows, and that is a result
        hidden = np.maximum(inputs @ weights["hidden"] + weights["bias"], 0)
        scores = hidden @ weights["output"]
        scores -= scores.max(axis=1, keepdims=True)
        shares = np.exp(scores)
        shares /= shares.sum(axis=1, keepdims=True)
        rows = np.arange(len(labels))
        loss = float(-np.log(shares[rows, labels]).mean())
        shares[rows, labels] -= 1
        shares /= len(labels)
        back = (shares @ weights["output"].T) * (hidden > 0)
        return loss, {
            "hidden": inputs.T @ back,
            "bias": back.sum(axis=0),
            "output": hidden.T @ shares,
        }
