"""torch.optim as an independent witness, over a thousand steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import ebbtide.torch
from tests.tolerances import TORCH_FLOAT64, TORCH_TAIL_ULP

# (class, keywords): what torch has too.
RULES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 1e-3}),
    ("AdamW", {"lr": 1e-2, "betas": (0.3, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    ("AdamW", {"lr": 1e-3, "amsgrad": True}),
    ("AdamW", {"lr": 1e-3, "maximize": True}),
    ("Adam", {"lr": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"lr": 1e-3, "amsgrad": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 1e-2, "weight_decay": 0.01}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
]
SHAPES = [(64, 33), (7,), (), (129, 8), (0, 4), (3, 5, 7)]


def trajectory(
    kind: Any, words: dict[str, Any], dtype: torch.dtype, steps: int
) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Step the same parameters along the same gradients; returns parameters and their state."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in SHAPES
    ]
    optimizer = kind(params, **words)
    for step in range(steps):
        for param in params:
            scale = 3.0 if step % 5 == 0 else 0.1
            param.grad = torch.randn(param.shape, generator=generator, dtype=dtype) * scale
        optimizer.step()
    return [param.detach() for param in params], [optimizer.state[param] for param in params]


@pytest.mark.parametrize(("name", "words"), RULES, ids=lambda value: str(value))
def test_float64_follows_torch_over_a_thousand_steps(name: str, words: dict[str, Any]) -> None:
    ours, our_state = trajectory(getattr(ebbtide.torch, name), words, torch.float64, 1000)
    theirs, their_state = trajectory(getattr(torch.optim, name), words, torch.float64, 1000)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **TORCH_FLOAT64)
    for a, b in zip(our_state, their_state, strict=True):
        assert list(a) == list(b)
        for key in a:
            np.testing.assert_allclose(a[key], b[key], **TORCH_FLOAT64)


def assert_equal_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert equal bits in torch's vector body and a few ulp in its scalar tail."""
    ours, theirs = ours.detach().flatten(), theirs.detach().flatten()
    body = ours.numel() // 8 * 8
    assert torch.equal(ours[:body], theirs[:body])
    np.testing.assert_array_max_ulp(ours[body:].numpy(), theirs[body:].numpy(), TORCH_TAIL_ULP)


@pytest.mark.parametrize(("name", "words"), RULES, ids=lambda value: str(value))
def test_float32_has_the_bits_of_torchs_fused_kernel(name: str, words: dict[str, Any]) -> None:
    ours, our_state = trajectory(getattr(ebbtide.torch, name), words, torch.float32, 1)
    fused = {**words, "fused": True}
    theirs, their_state = trajectory(getattr(torch.optim, name), fused, torch.float32, 1)
    for a, b in zip(ours, theirs, strict=True):
        assert_equal_bits(a, b)
    for a, b in zip(our_state, their_state, strict=True):
        for key in b:
            assert_equal_bits(a[key], b[key])


@pytest.mark.parametrize(("name", "words"), RULES, ids=lambda value: str(value))
def test_float32_keeps_the_bits_over_a_thousand_steps(name: str, words: dict[str, Any]) -> None:
    """Shapes without a scalar tail, since a difference there would grow along a trajectory."""
    shapes, dtype = [(64, 32), (1024,)], torch.float32
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    pairs = []
    for kind, flags in ((ebbtide.torch, {}), (torch.optim, {"fused": True})):
        params = [value.clone().requires_grad_() for value in start]
        pairs.append((params, getattr(kind, name)(params, **words, **flags)))
    for _ in range(1000):
        grads = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
        for params, optimizer in pairs:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
    (ours, our_optimizer), (theirs, their_optimizer) = pairs
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for key, value in their_optimizer.state[b].items():
            assert torch.equal(our_optimizer.state[a][key], value)
