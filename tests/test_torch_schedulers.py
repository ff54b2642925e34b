"""torch's and transformers' schedulers, unmodified, drive ours as they drive torch's classes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

import ebbtide.numpy
from ebbtide.torch import SGD, AdamW, decay_in_force
from ebbtide.weight_decay import DECAY_POLICIES

TOTAL = 20
Maker = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Maker] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.95**step),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [3, 7]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, total_iters=8),
    "LinearLR that misses zero": lambda o: lrs.LinearLR(o, 0.7, 0.0, 3),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, TOTAL, 2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, TOTAL),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 5, 2),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 1e-3, 1e-1, 4, cycle_momentum=True),
    "CyclicLR without momentum": lambda o: lrs.CyclicLR(o, 1e-3, 1e-1, 4, cycle_momentum=False),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 1e-1, TOTAL),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=5), lrs.CosineAnnealingLR(o, TOTAL - 5)], [5]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.LinearLR(o, 0.1, total_iters=5), lrs.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, 0.02, anneal_epochs=4),
}
MOMENTUM = {"momentum": 0.9, "nesterov": True}


def drive(make: Maker, kind: Any, **options: Any) -> tuple[list[Any], torch.Tensor]:
    """Return the hyperparameters of every step and the weights after the last."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.02, "weight_decay": 0}]
    optimizer = kind(groups, lr=0.05, **options)
    scheduler = make(optimizer)
    seen = []
    for step in range(TOTAL):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        keys = ("lr", "betas", "momentum", "initial_lr")
        seen.append([{k: g[k] for k in keys if k in g} for g in optimizer.param_groups])
        loss = (float(step % 3),) if isinstance(scheduler, lrs.ReduceLROnPlateau) else ()
        if step < TOTAL - 1:
            scheduler.step(*loss)
    return seen, model.weight.detach()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_torchs_schedulers(name: str, kind: str) -> None:
    ours: Any = AdamW if kind == "AdamW" else SGD
    options = {} if kind == "AdamW" else MOMENTUM
    seen, weights = drive(SCHEDULERS[name], ours, **options)
    expected, wanted = drive(SCHEDULERS[name], getattr(torch.optim, kind), **options)
    assert seen == expected
    torch.testing.assert_close(weights, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "CyclicLR", "SequentialLR"])
def test_a_tensor_lr_is_filled_in_place(name: str) -> None:
    lr = torch.tensor(0.05, dtype=torch.float64)
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = AdamW([param], lr=lr)
    scheduler = SCHEDULERS[name](optimizer)
    for _ in range(3):
        param.grad = torch.ones(3, dtype=torch.float64)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) != 0.05


@pytest.mark.parametrize("name", SCHEDULERS)
def test_training_goes_on_after_save_and_load(name: str) -> None:
    def run(interrupt: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        optimizer = AdamW(model.parameters(), lr=0.05)
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(12):
            if step == interrupt:
                saved = optimizer.state_dict(), scheduler.state_dict()
                optimizer = AdamW(model.parameters(), lr=0.7)
                scheduler = SCHEDULERS[name](optimizer)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            for param in model.parameters():
                param.grad = torch.full_like(param, 1.0 + step % 2)
            optimizer.step()
            scheduler.step(*((1.0,) if isinstance(scheduler, lrs.ReduceLROnPlateau) else ()))
        return model.weight.detach()

    assert torch.equal(run(None), run(6))


def test_one_cycle_with_decay_relative_to_base_lr_warns_unless_that_is_the_peak() -> None:
    def step(**options: Any) -> None:
        param = nn.Parameter(torch.ones(3))
        optimizer = AdamW([param], decay_policy="independent", **options)
        scheduler = lrs.OneCycleLR(optimizer, 0.1, TOTAL)
        for _ in range(3):
            param.grad = torch.ones(3)
            optimizer.step()
            scheduler.step()

    with pytest.warns(
        UserWarning, match=r"base_lr=0\.001, but a schedule's max_lr is 0\.1"
    ) as seen:
        step(lr=1e-3)
    assert len(seen) == 1
    step(lr=1e-3, base_lr=0.1)


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "get_constant_schedule": {},
    "get_constant_schedule_with_warmup": {"num_warmup_steps": 4},
    "get_linear_schedule_with_warmup": {"num_warmup_steps": 4, "num_training_steps": TOTAL},
    "get_cosine_schedule_with_warmup": {"num_warmup_steps": 4, "num_training_steps": TOTAL},
    "get_cosine_with_hard_restarts_schedule_with_warmup": {
        "num_warmup_steps": 4, "num_training_steps": TOTAL, "num_cycles": 2,
    },
    "get_polynomial_decay_schedule_with_warmup": {
        "num_warmup_steps": 4, "num_training_steps": TOTAL, "lr_end": 1e-5,
    },
    "get_inverse_sqrt_schedule": {"num_warmup_steps": 4},
    "get_cosine_with_min_lr_schedule_with_warmup": {
        "num_warmup_steps": 4, "num_training_steps": TOTAL, "min_lr": 1e-4,
    },
    "get_wsd_schedule": {
        "num_warmup_steps": 4, "num_decay_steps": 6, "num_training_steps": TOTAL,
    },
    "get_reduce_on_plateau_schedule": {},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers' own imports
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_schedulers(name: str) -> None:
    make = getattr(importlib.import_module("transformers.optimization"), name)

    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return make(optimizer, **TRANSFORMERS[name])

    seen, weights = drive(scheduler, AdamW)
    expected, wanted = drive(scheduler, torch.optim.AdamW)
    assert seen == expected
    torch.testing.assert_close(weights, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", DECAY_POLICIES)
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_schedule_that_ends_at_zero_may_miss_it_by_its_rounding(kind: Any, policy: str) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = kind([param], lr=0.05, weight_decay=0.1, decay_policy=policy)
    scheduler = lrs.LinearLR(optimizer, 0.7, 0.0, 3)
    for _ in range(5):
        param.grad, before = torch.ones(3), param.detach().clone()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0
    assert torch.equal(param, before)
    assert decay_in_force(optimizer)
    for lr in (-1e-9, -5e-12):
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises(ValueError, match="Invalid learning rate"):
            optimizer.step()


@pytest.mark.parametrize("policy", DECAY_POLICIES)
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_nothing_decays_a_hair_below_zero_where_the_learning_rate_is_not_read(
    kind: Any, policy: str
) -> None:
    param = torch.ones(3, dtype=torch.float64, requires_grad=True).clone()
    lr = torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)
    words: Any = {"lr": lr, "weight_decay": 0.9, "decay_policy": policy, "differentiable": True}
    optimizer = kind([param], **words)
    lr.data.fill_(-1e-12)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.ones_like(param), rtol=0, atol=2e-12)


@pytest.mark.parametrize("kind", [AdamW, SGD, ebbtide.numpy.AdamW, ebbtide.numpy.SGD])
@pytest.mark.parametrize("lr", [-1e-13, -5e-12, -0.1])
def test_a_learning_rate_below_zero_is_refused_by_its_name_where_it_is_given(
    kind: Any, lr: float
) -> None:
    of_torch = issubclass(kind, torch.optim.Optimizer)
    param: Any = nn.Parameter(torch.ones(2)) if of_torch else np.ones(2)
    for build in (
        lambda: kind([param], lr=lr),
        lambda: kind([{"params": [param], "lr": lr}]),
        lambda: kind([{"params": [param], "lr": lr}], lr=0.1),
    ):
        with pytest.raises(ValueError, match=f"Invalid learning rate: {lr}"):
            build()
