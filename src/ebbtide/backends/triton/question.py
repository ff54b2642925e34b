"""What a step asks the devices to decide, so that the host need not wait for their answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

__all__ = ["Question", "Ranks"]


class Ranks(Protocol):
    """What adds up over processes, on the device."""

    @property
    def ways(self) -> int:
        """In how many ways parameters are spread over processes."""

    def total(self, sums: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return numbers whose sum is that over all shards, from addends of each way."""

    def largest(self, value: torch.Tensor) -> torch.Tensor:
        """Return the largest value of any rank."""


@dataclass(frozen=True)
class Question:
    """What has to be decided of a step on the device.

    Attributes:
        found_inf: What a GradScaler found; the step is dropped where it is not 0.
        loss_scale: That the gradients are divided by.
        max_norm: Clip the global norm to this.
        skip: Drop the step where the norm is not finite.
        finite_only: Leave elements that are not finite out of the norm.
        ranks: Of the processes that decide together, `None` for one.
    """

    found_inf: torch.Tensor | None = None
    loss_scale: torch.Tensor | None = None
    max_norm: float | None = None
    skip: bool = False
    finite_only: bool = False
    ranks: Ranks | None = None

    @property
    def wants_norm(self) -> bool:
        """Whether the gradients must be summed up first."""
        return self.max_norm is not None or self.skip

    def on(self, device: torch.device) -> Question:
        """Return the question with its tensors on a device."""
        moved = [
            value
            if value is None or value.device == device
            else value.to(device, non_blocking=True)
            for value in (self.found_inf, self.loss_scale)
        ]
        found_inf = moved[0]
        if self.ranks is not None and found_inf is not None:
            found_inf = self.ranks.largest(found_inf)
        return replace(self, found_inf=found_inf, loss_scale=moved[1])
