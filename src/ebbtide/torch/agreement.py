"""What ranks must agree on of a step that GPUs take, without making the host wait for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ebbtide.torch.ranks import reduced

__all__ = ["Agreement", "Ranks"]


class Ranks:
    """Adds up over processes what one layout of parameters has spread over them.

    Args:
        layout: Mesh and placements of all parameters.
    """

    def __init__(self, layout: tuple[Any, Any]) -> None:
        self._mesh, placements = layout
        self._dims = [dim for dim, each in enumerate(placements) if each.is_shard()]

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over all shards; what every rank holds counts once."""
        return reduced(value, self._mesh, "SUM", self._dims)

    def largest(self, value: torch.Tensor) -> torch.Tensor:
        """Return the largest value of any rank."""
        return reduced(value, self._mesh, "MAX", range(self._mesh.ndim))


class Agreement:
    """Whether a flag is set on any rank: asked at once, known later.

    Args:
        flag: A number on a device, not 0 where it is set.
        meshes: Every rank of them takes part.
    """

    def __init__(self, flag: torch.Tensor, meshes: Iterable[Any]) -> None:
        for mesh in meshes:
            flag = reduced(flag, mesh, "MAX", range(mesh.ndim))
        self._done: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._found = torch.empty(1, dtype=flag.dtype, pin_memory=True)
            self._found.copy_(flag, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._found = flag

    def reached(self) -> bool:
        """Return what was agreed; waits until the step that asked is over, for nothing after it."""
        if self._done is not None:
            self._done.synchronize()
        return bool(self._found.item())
