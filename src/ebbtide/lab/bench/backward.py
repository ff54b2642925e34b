"""Backward and step together: what stepping inside backward saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ebbtide.torch import AdamW, step_in_backward

__all__ = ["INSIDE", "BackwardAndStep", "backward_contestants"]

# Who steps inside backward, and how that is said in a table.
INSIDE = {
    "ebbtide, inside backward": "inside backward",
    "ebbtide, 8-bit, inside backward": "with 8-bit state",
}


class BackwardAndStep:
    """A chain of square linear layers whose backward and step are timed together.

    Args:
        make: Builds the optimizer from the model; may arrange for steps inside backward.
        width: Of each layer.
        layers: How many.
        batch: Rows of a batch.
    """

    def __init__(
        self,
        make: Callable[[torch.nn.Module], Any],
        *,
        width: int = 1024,
        layers: int = 24,
        batch: int = 8,
    ) -> None:
        torch.manual_seed(0)
        modules: list[torch.nn.Module] = []
        for _ in range(layers):
            modules += [torch.nn.Linear(width, width), torch.nn.GELU()]
        self.model = torch.nn.Sequential(*modules)
        self.optimizer = make(self.model)
        self._inputs = torch.randn(batch, width)
        self.backward()

    def backward(self) -> None:
        """Run forward, which is not timed."""
        self._loss = self.model(self._inputs).square().mean()

    def step(self) -> None:
        """Run backward and step, and let go of the gradients."""
        self._loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def backward_contestants(**size: int) -> dict[str, BackwardAndStep]:
    """Return torch's fused step after backward, ours after it, and ours inside it, twice."""

    def inside(**options: str) -> Callable[[torch.nn.Module], AdamW]:
        def make(model: torch.nn.Module) -> AdamW:
            optimizer = AdamW(model.parameters(), **options)  # type: ignore[arg-type]
            step_in_backward(model, optimizer)
            return optimizer

        return make

    first, second = INSIDE
    return {
        "fused": BackwardAndStep(lambda m: torch.optim.AdamW(m.parameters(), fused=True), **size),
        "ebbtide": BackwardAndStep(lambda m: AdamW(m.parameters()), **size),
        first: BackwardAndStep(inside(), **size),
        second: BackwardAndStep(inside(state_format="8bit"), **size),
    }
