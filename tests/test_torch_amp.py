"""GradScaler: with `fused=True` the step unscales, skips and says so; else the scaler does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from ebbtide.torch import SGD, Adam, AdamW

CLASSES = {"AdamW": AdamW, "Adam": Adam, "SGD": SGD}
each_class = pytest.mark.parametrize("name", CLASSES)
each_way = pytest.mark.parametrize("fused", [None, True], ids=["scaler unscales", "fused"])


def options(name: str) -> dict[str, Any]:
    return {"lr": 0.05, **({"momentum": 0.9} if name == "SGD" else {})}


def train(optimizer: Any, model: nn.Module, bad: set[int], unscale: bool, steps: int = 8) -> Any:
    """Train with a scaler; in the steps of `bad` one gradient is infinite."""
    scaler = GradScaler("cpu", init_scale=128.0, growth_interval=3)
    skipped = []
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step)).double()
        loss = model(inputs).square().mean()
        scaler.scale(loss).backward()
        if step in bad:
            model.weight.grad[0, 0] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        skipped.append(getattr(optimizer, "last_step_skipped", None))
    return skipped


def model_of() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


@each_class
@each_way
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled before"])
def test_training_with_a_scaler_is_training_without_the_bad_steps(
    name: str, fused: bool | None, unscale: bool
) -> None:
    bad = {0, 3, 4}
    mine, other = model_of(), model_of()
    ours = CLASSES[name](mine.parameters(), fused=fused, **options(name))
    theirs = getattr(torch.optim, name)(other.parameters(), **options(name))
    assert hasattr(ours, "_step_supports_amp_scaling") == bool(fused)
    skipped = train(ours, mine, bad, unscale)
    train(theirs, other, bad, unscale=True)
    for param, wanted in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param, wanted, rtol=1e-12, atol=1e-12)
        for key, value in theirs.state[wanted].items():
            torch.testing.assert_close(
                ours.state[param][key].double(), value.double(), rtol=1e-12, atol=1e-12
            )
    if fused:
        assert [step for step, was in enumerate(skipped) if was] == sorted(bad)
        assert ours.skipped_steps == len(bad)
        assert not hasattr(ours, "found_inf")


@each_class
def test_a_skipped_step_leaves_everything_untouched(name: str) -> None:
    model = model_of()
    optimizer = CLASSES[name](model.parameters(), fused=True, **options(name))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    everything = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    before = [value.detach().clone() for value in everything]
    versions = [param._version for param in model.parameters()]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert optimizer.last_step_skipped
    assert all(map(torch.equal, before, everything))
    assert [param._version for param in model.parameters()] == versions
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not optimizer.last_step_skipped


@each_class
@each_way
def test_clipping_inside_the_step_is_legal_with_a_scaler(name: str, fused: bool | None) -> None:
    """The norm is that of the unscaled gradients."""
    mine, other = model_of(), model_of()
    ours = CLASSES[name](mine.parameters(), fused=fused, clip_grad_norm=0.01, **options(name))
    train(ours, mine, set(), unscale=False)
    theirs = getattr(torch.optim, name)(other.parameters(), **options(name))
    scaler = GradScaler("cpu", init_scale=128.0)
    for step in range(8):
        theirs.zero_grad()
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step)).double()
        scaler.scale(other(inputs).square().mean()).backward()
        scaler.unscale_(theirs)
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.01)
        scaler.step(theirs)
        scaler.update()
    torch.testing.assert_close(mine.weight, other.weight, rtol=1e-9, atol=1e-12)
    assert ours.last_grad_norm == pytest.approx(float(norm), rel=1e-6)


@each_class
def test_under_a_scaler_the_scaler_decides(name: str) -> None:
    """It looked at the gradients: what it lets through is applied, nothing is raised."""
    model = model_of()
    optimizer = CLASSES[name](model.parameters(), fused=True, **options(name))
    for param in model.parameters():
        param.grad = torch.full_like(param, math.nan)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(0.0)
    optimizer.step()
    assert bool(model.weight.isnan().all())


def test_closures_are_refused_with_a_scaler_as_in_torch() -> None:
    model = model_of()
    optimizer = AdamW(model.parameters(), fused=True)
    scaler = GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 3).double()).sum()).backward()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)


def test_a_warning_about_the_order_of_scheduler_and_step_comes_only_where_it_is_due() -> None:
    model = model_of()
    optimizer = AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    scheduler.step()  # warnings are errors in this suite
    late = AdamW(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"`lr_scheduler\.step\(\)` before `optimizer\.step\(\)`"):
        torch.optim.lr_scheduler.StepLR(late, 1).step()
