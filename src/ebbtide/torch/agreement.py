"""What ranks must agree on of a step that GPUs take, without making the host wait for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ebbtide.torch.ranks import Way, largest, over_shards

__all__ = ["Agreement", "Ranks"]


class Ranks:
    """Adds up over processes what parameters have spread over them.

    Args:
        ways: In which they are spread, by `way_of`.
        meshes: Every rank of them takes part.
    """

    def __init__(self, ways: Sequence[Way | None], meshes: Sequence[Any]) -> None:
        self._ways, self._meshes = ways, meshes

    @property
    def ways(self) -> int:
        """In how many ways parameters are spread over processes."""
        return len(self._ways)

    def total(self, sums: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of each way over all shards; what every rank holds counts once."""
        pairs = zip(sums, self._ways, strict=True)
        totals = [over_shards(each.sum().view(1), way) for each, way in pairs]
        return totals[0] if len(totals) == 1 else torch.cat(totals)

    def largest(self, value: torch.Tensor) -> torch.Tensor:
        """Return the largest value of any rank."""
        return largest(value, self._meshes)


class Agreement:
    """Whether a flag is set on any rank: asked at once, known later.

    Args:
        flag: A number on a device, not 0 where it is set.
        meshes: Every rank of them takes part.
    """

    def __init__(self, flag: torch.Tensor, meshes: Iterable[Any]) -> None:
        flag = largest(flag, meshes)
        self._done: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._found = torch.empty(1, dtype=flag.dtype, pin_memory=True)
            self._found.copy_(flag, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(flag.device))
        else:
            self._found = flag

    def reached(self) -> bool:
        """Return what was agreed; waits until the step that asked is over, for nothing after it."""
        if self._done is not None:
            self._done.synchronize()
        return bool(self._found.item())
