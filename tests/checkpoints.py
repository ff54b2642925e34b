"""Models, optimizers and checks that the tests of checkpoints share."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import ebbtide.torch


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {}),
    "adamw-amsgrad": ("AdamW", {"amsgrad": True, "maximize": True}),
    "adam": ("Adam", {"weight_decay": 0.1}),
    "adamw-tensors": ("AdamW", {"lr": number(0.01), "betas": (number(0.8), number(0.99))}),
    "sgd": ("SGD", {}),
    "sgd-momentum": ("SGD", {"momentum": 0.9, "dampening": 0.1}),
    "sgd-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}
EVERY = pytest.mark.parametrize("which", list(OPTIMIZERS))


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def build(which: str, model: nn.Module, *, ours: bool = True, named: bool = True) -> Any:
    kind, options = OPTIMIZERS[which]
    face: Any = ebbtide.torch if ours else torch.optim
    options = {"lr": 0.01, **copy.deepcopy(options)}
    return getattr(face, kind)(model.named_parameters() if named else model.parameters(), **options)


def train(model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 5, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def through_a_file(state_dict: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def assert_equal_weights(model: nn.Module, expected: list[torch.Tensor], ulp: int = 0) -> None:
    for param, value in zip(model.parameters(), expected, strict=True):
        eps = ulp * torch.finfo(value.dtype).eps
        torch.testing.assert_close(param.detach(), value, rtol=eps, atol=eps)


@contextmanager
def unchanged(optimizer: Any) -> Iterator[None]:
    """Assert that nothing of the optimizer has changed."""
    before = copy.deepcopy(optimizer.state_dict())
    groups = [id(group) for group in optimizer.param_groups]
    yield
    after = optimizer.state_dict()
    assert [id(group) for group in optimizer.param_groups] == groups
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for index, values in before["state"].items():
        for key, value in values.items():
            assert torch.equal(after["state"][index][key], value)
