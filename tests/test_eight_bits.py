"""Whole tensors into eight bits: in pieces, so that it needs little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ebbtide.torch import eight_bits
from ebbtide.torch.eight_bits import encode


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not func.is_view:
            self.bytes = max(self.bytes, made.nbytes)
        return made


def test_encoding_needs_little_memory_beside_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    moments = [torch.randn(50, 300), torch.rand(50, 300)]
    whole = encode(moments)
    monkeypatch.setattr(eight_bits, "_AT_ONCE", 1000)
    with Largest() as largest:
        parts = encode(moments)
    assert largest.bytes <= moments[0].numel()  # the codes of one moment
    for found, expected in zip(parts, whole, strict=True):
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)
    (codes, _), (scales, _) = encode([each[:0] for each in moments])
    assert (codes.shape, scales.shape) == ((0, 300), (0, 3))
