"""A torch training function that `ebbtide sweep` can run: a small network that learns parity.

ebbtide sweep examples/sweep_torch.py:train --lr 1e-3..1e-1:5 --weight-decay 1e-2..1:5
"""

from __future__ import annotations

import torch
from torch import nn

from ebbtide.lab.sweep import Settings
from ebbtide.torch import param_groups

STEPS, BITS = 400, 6


def train(settings: Settings) -> float:
    """Return the loss on inputs that were not trained on, in nats."""
    inputs = torch.rand(2000, BITS).round()  # torch is seeded already
    labels = inputs.sum(dim=1).long() % 2
    model = nn.Sequential(nn.Linear(BITS, 64), nn.ReLU(), nn.Linear(64, 2))
    # Biases do not decay.
    groups = param_groups(model, weight_decay=settings.weight_decay)
    optimizer = settings.torch_optimizer(groups)
    for step in range(STEPS):
        rows = torch.randint(1000, (128,))
        loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            settings.report(step + 1, evaluate(model, inputs[1000:], labels[1000:]))
    return evaluate(model, inputs[1000:], labels[1000:])


@torch.no_grad()
def evaluate(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the mean cross-entropy."""
    return float(nn.functional.cross_entropy(model(inputs), labels))
