"""State, settings and parameters that change between the steps of a torch optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebbtide.torch import SGD, AdamW
from tests.test_torch_contract import CLASSES, each_class


@each_class
def test_hyperparameters_may_change_between_steps(name: str) -> None:
    """Among them those that decide which state there is."""
    changes: dict[str, list[dict[str, Any]]] = {
        "SGD": [
            {}, {"momentum": 0.9}, {"lr": 0.2, "momentum": 0.8}, {"nesterov": True},
            {"momentum": 0.0, "nesterov": False}, {"weight_decay": 0.5, "maximize": True},
        ],
        "Adam": [
            {}, {"amsgrad": True}, {"betas": (0.5, 0.9)}, {"eps": 1e-3}, {"amsgrad": False},
            {"maximize": True}, {"lr": torch.tensor(0.05)}, {"lr": 0.1},
        ],
    }  # fmt: skip
    mine, other = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    ours, theirs = CLASSES[name]([mine], lr=0.1), getattr(torch.optim, name)([other], lr=0.1)
    for change in changes["SGD" if name == "SGD" else "Adam"]:
        ours.param_groups[0].update(change)
        theirs.param_groups[0].update(change)
        if change.get("amsgrad"):  # torch creates it at the first step only
            theirs.state[other]["max_exp_avg_sq"] = torch.zeros(3, dtype=torch.float64)
        for step in range(2):
            mine.grad = other.grad = torch.full((3,), 1.0 + step, dtype=torch.float64)
            ours.step()
            theirs.step()
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-7)


def late_steps(name: str, change: Callable[[Any, list[Tensor]], None]) -> list[Tensor]:
    """Step 40 small parameters, change the state, step on; returns the weights."""
    params = [nn.Parameter(torch.full((3,), 1.0 + i)) for i in range(40)]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = CLASSES[name](params, lr=0.1, **options)
    for step in range(6):
        if step == 3:
            change(optimizer, params)
        for index, param in enumerate(params):
            param.grad = torch.full((3,), math.sin(index + step))
        optimizer.step()
    return [param.detach() for param in params]


def arrays_of(optimizer: Any) -> list[tuple[dict[str, Any], str]]:
    return [(s, key) for s in optimizer.state.values() for key in s if key != "step"]


def halve_in_place(optimizer: Any, params: list[Tensor]) -> None:
    for state, key in arrays_of(optimizer):
        state[key].mul_(0.5)


def halve_by_replacing(optimizer: Any, params: list[Tensor]) -> None:
    for state, key in arrays_of(optimizer):
        state[key] = state[key] * 0.5


def halve_by_moving(optimizer: Any, params: list[Tensor]) -> None:
    for state, key in arrays_of(optimizer):
        state[key].data = state[key].data * 0.5


def halve_in_new_dicts(optimizer: Any, params: list[Tensor]) -> None:
    for param in params:
        state = optimizer.state[param]
        half = {key: value * 0.5 if key != "step" else value for key, value in state.items()}
        optimizer.state[param] = half


@each_class
@pytest.mark.parametrize("change", [halve_by_replacing, halve_by_moving, halve_in_new_dicts])
def test_state_that_is_replaced_or_moved_is_noticed(
    name: str, change: Callable[[Any, list[Tensor]], None]
) -> None:
    expected = late_steps(name, halve_in_place)
    assert all(map(torch.equal, late_steps(name, change), expected))


def clear(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state.clear()


def clear_by_a_new_mapping(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state = defaultdict(dict)


def clear_by_a_new_optimizer(optimizer: Any, params: list[Tensor]) -> None:
    fresh = type(optimizer)(params, **{k: optimizer.defaults[k] for k in ("lr",)})
    fresh.param_groups[0].update(
        {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    )
    optimizer.__setstate__({"state": fresh.state, "param_groups": optimizer.param_groups})


@each_class
@pytest.mark.parametrize("change", [clear, clear_by_a_new_mapping])
def test_state_that_is_cleared_begins_anew(
    name: str, change: Callable[[Any, list[Tensor]], None]
) -> None:
    expected = late_steps(name, clear_by_a_new_optimizer)
    assert all(map(torch.equal, late_steps(name, change), expected))


@each_class
def test_step_counts_may_be_set(name: str) -> None:
    def early(optimizer: Any, params: list[Tensor]) -> None:
        for param in params[::2]:
            if "step" in optimizer.state[param]:
                optimizer.state[param]["step"].fill_(100.0)

    def replaced(optimizer: Any, params: list[Tensor]) -> None:
        for param in params[::2]:
            if "step" in optimizer.state[param]:
                optimizer.state[param]["step"] = torch.tensor(100.0)

    assert all(map(torch.equal, late_steps(name, early), late_steps(name, replaced)))


@each_class
def test_parameters_that_are_replaced_in_the_groups_are_stepped(name: str) -> None:
    """As FSDP does: the list in the group gets other tensors."""
    old, new = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = CLASSES[name]([old])
    old.grad = new.grad = torch.ones(3)
    optimizer.step()
    optimizer.step()
    after = old.detach().clone()
    optimizer.param_groups[0]["params"][0] = new
    optimizer.step()
    assert torch.equal(old.detach(), after)
    assert bool((new != 1).all())


@each_class
def test_parameters_whose_memory_moves_are_stepped_there(name: str) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = CLASSES[name]([param])
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.step()
    old = param.data
    kept = old.clone()
    param.data = torch.ones(3)
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(old, kept)
    assert bool((param != 1).all())


def test_sgd_without_momentum_keeps_no_state() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = SGD([param])
    for _ in range(3):
        param.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [None, True])
def test_the_step_count_has_torchs_dtype(default: torch.dtype, fused: bool | None) -> None:
    torch.set_default_dtype(default)
    try:
        params = [nn.Parameter(torch.ones(3, dtype=torch.float32)) for _ in range(2)]
        kinds: tuple[Any, Any] = (AdamW, torch.optim.AdamW)
        optimizers = [kind([p], fused=fused) for kind, p in zip(kinds, params, strict=True)]
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.ones(3, dtype=torch.float32)
            optimizer.step()
            optimizer.step()
        ours, theirs = (o.state[p]["step"] for o, p in zip(optimizers, params, strict=True))
        assert (ours.dtype, ours.shape, float(ours)) == (theirs.dtype, theirs.shape, float(theirs))
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_order_of_state_keys_is_torchs() -> None:
    for options in ({}, {"amsgrad": True}):
        mine, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
        mine.grad = other.grad = torch.ones(3)
        ours, theirs = AdamW([mine], **options), torch.optim.AdamW([other], **options)
        ours.step()
        theirs.step()
        assert list(ours.state[mine]) == list(theirs.state[other])


@pytest.mark.parametrize("dtypes", [["bfloat16"], ["float32"], ["float32", "bfloat16"]], ids=str)
def test_sgd_remembers_its_plan_whatever_the_dtypes(dtypes: list[str]) -> None:
    """16-bit parameters count their steps, for the random bits; others do not."""
    params = [nn.Parameter(torch.ones(3, dtype=getattr(torch, name))) for name in dtypes]
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    planned = []
    plan = optimizer._plan_and_run
    optimizer._plan_and_run = lambda: planned.append(1) or plan()  # type: ignore[method-assign]
    for _ in range(5):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert len(planned) == 1
