"""State dicts between ours and torch's: round trips, names, precision, old files."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ebbtide.torch
from tests.checkpoints import (
    EVERY,
    assert_equal_weights,
    build,
    network,
    through_a_file,
    train,
    weights,
)


@EVERY
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_resuming_equals_going_on(which: str, named: bool, steps: int) -> None:
    model = network()
    optimizer = build(which, model, named=named)
    train(model, optimizer, steps)
    state = through_a_file(optimizer.state_dict())
    resumed = copy.deepcopy(model)
    train(model, optimizer, 3, first=steps)
    fresh = build(which, resumed, named=named)
    fresh.load_state_dict(state)
    train(resumed, fresh, 3, first=steps)
    assert_equal_weights(resumed, weights(model))


# In float64, where another order of operations is far below the tolerance.
@EVERY
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("path", ["ours-torch-ours", "torch-ours-torch"])
def test_there_and_back(which: str, named: bool, steps: int, path: str) -> None:
    model, alone = network(torch.float64), network(torch.float64)
    own = build(which, alone, ours=False, named=named)
    optimizer = None
    for turn, face in enumerate(path.split("-")):
        following = build(which, model, ours=face == "ours", named=named)
        if optimizer is not None:
            following.load_state_dict(through_a_file(optimizer.state_dict()))
        optimizer = following
        train(model, optimizer, steps, first=turn * steps)
    train(alone, own, 3 * steps)
    for param, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-14)
        theirs, ours = own.state[expected], optimizer.state[param]
        assert [key for key in theirs if theirs[key] is not None] == [*ours]
        for key, value in ours.items():
            assert theirs[key].dtype == value.dtype
            torch.testing.assert_close(value, theirs[key], rtol=1e-9, atol=1e-15)


def test_order_and_grouping_may_change() -> None:
    model = network()
    optimizer = build("adamw", model)
    train(model, optimizer, 3)
    resumed = copy.deepcopy(model)
    state = through_a_file(optimizer.state_dict())
    named = list(resumed.named_parameters())[::-1]
    regrouped = ebbtide.torch.AdamW(
        [
            {"params": [(n, p) for n, p in named if p.ndim == 1], "weight_decay": 0.0},
            {"params": [(n, p) for n, p in named if p.ndim == 2]},
        ],
        lr=0.5,
    )
    with pytest.warns(UserWarning, match=r"moved between groups \(2\): '2.weight' 0 → 1"):
        regrouped.load_state_dict(state)
    assert [group["lr"] for group in regrouped.param_groups] == [0.01, 0.01]
    assert [group["weight_decay"] for group in regrouped.param_groups] == [0.0, 0.01]
    for (name, old), new in zip(model.named_parameters(), resumed.parameters(), strict=True):
        for key, value in optimizer.state[old].items():
            assert torch.equal(regrouped.state[new][key], value), name


def test_what_loads_is_a_copy() -> None:
    model = network()
    optimizer = build("adamw", model)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    fresh = build("adamw", copy.deepcopy(model))
    fresh.load_state_dict(state)
    before = copy.deepcopy(fresh.state_dict()["state"])
    train(model, optimizer, 2)
    for index, values in fresh.state_dict()["state"].items():
        for key, value in values.items():
            assert torch.equal(value, before[index][key])


@pytest.mark.parametrize("mine", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_keeps_the_precision_it_was_saved_in(mine: torch.dtype, saved: torch.dtype) -> None:
    model = network()
    optimizer = build("adamw", model)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values["exp_avg"] = values["exp_avg"].to(saved)
        values["exp_avg_sq"] = values["exp_avg_sq"].to(saved)
    other = network(mine)
    fresh = build("adamw", other)
    fresh.load_state_dict(state)
    # float16 has too little range for the next second moment; float32 holds the same number.
    wider = torch.float32 if saved == torch.float16 else saved
    for index, param in enumerate(other.parameters()):
        loaded = fresh.state[param]
        assert loaded["exp_avg"].dtype == saved
        assert loaded["exp_avg_sq"].dtype == wider
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(loaded[key].to(saved), state["state"][index][key])
    train(other, fresh, 2)
    assert all(bool(param.isfinite().all()) for param in other.parameters())


@pytest.mark.parametrize("mine", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("saved", [torch.float64, torch.float32], ids=str)
def test_double_state_goes_with_double_parameters(mine: torch.dtype, saved: torch.dtype) -> None:
    model = network(saved)
    optimizer = build("adamw", model)
    train(model, optimizer, 2)
    other = network(mine)
    fresh = build("adamw", other)
    fresh.load_state_dict(optimizer.state_dict())
    assert {value["exp_avg"].dtype for value in fresh.state.values()} == {mine}
    train(other, fresh, 1)


def test_complex_state() -> None:
    params = [nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))]
    optimizer = ebbtide.torch.AdamW(params)
    params[0].grad = torch.randn(3, 4, dtype=torch.complex64)
    optimizer.step()
    fresh = ebbtide.torch.AdamW(params)
    fresh.load_state_dict(optimizer.state_dict())
    assert torch.equal(fresh.state[params[0]]["exp_avg"], optimizer.state[params[0]]["exp_avg"])


def test_a_contiguous_checkpoint_fits_a_channels_last_model() -> None:
    def convolution(memory_format: torch.memory_format) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 2).to(memory_format=memory_format)
        return model, ebbtide.torch.AdamW(model.named_parameters())

    def steps(model: nn.Module, optimizer: Any) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 3, 4, 4)).square().sum().backward()
            optimizer.step()

    model, optimizer = convolution(torch.contiguous_format)
    steps(model, optimizer)
    other, fresh = convolution(torch.channels_last)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    steps(model, optimizer)
    steps(other, fresh)
    assert_equal_weights(other, weights(model), ulp=4)


def old_state_dict() -> tuple[dict[str, Any], list[nn.Parameter]]:
    """As torch 1.0 wrote it: ids of objects, counts as numbers, none of the newer keys."""
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))]
    ids = [139872345678912, 139872345679000]
    group = {"lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.5, "params": ids}
    state = {
        index: {
            "step": 7,
            "exp_avg": torch.full_like(param, 0.5).detach(),
            "exp_avg_sq": torch.full_like(param, 0.25).detach(),
        }
        for index, param in zip(ids, params, strict=True)
    }
    return {"state": state, "param_groups": [{**group, "amsgrad": False}]}, params


def test_files_of_torch_1_load() -> None:
    state, params = old_state_dict()
    optimizer = ebbtide.torch.AdamW(params, lr=0.5, maximize=True)
    optimizer.load_state_dict(state)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["base_lr"]) == (0.01, (0.9, 0.99), 0.5)
    assert group["maximize"]
    assert torch.is_tensor(optimizer.state[params[0]]["step"])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [int(values["step"]) for values in optimizer.state.values()] == [8, 8]


def test_empty_momentum_buffers_of_old_files_load() -> None:
    model = network()
    optimizer = build("sgd-momentum", model)
    train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["momentum_buffer"] = None
    fresh = build("sgd-momentum", model)
    fresh.load_state_dict(state)
    assert "momentum_buffer" not in fresh.state[next(model.parameters())]
    train(model, fresh, 1)


def test_parameters_without_state_stay_without() -> None:
    model = network()
    optimizer = build("adamw", model)
    model[2].requires_grad_(False)  # type: ignore[index]
    train(model, optimizer, 2)
    fresh = build("adamw", model)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state.keys() == optimizer.state.keys()
    assert len(fresh.state) == 4


def test_what_belongs_to_no_parameter_is_carried_along() -> None:
    model = network()
    optimizer = build("adamw", model)
    train(model, optimizer, 1)
    optimizer.state["ema"] = 0.5
    fresh = build("adamw", model)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state["ema"] == 0.5


@pytest.mark.parametrize("which", ["adamw", "sgd"])
@pytest.mark.parametrize("key", ["rho", "lr_decay", "momentum_decay", "lambd"])
def test_what_their_owner_keeps_beside_makes_it_no_other_optimizers_state(
    which: str, key: str
) -> None:
    model = network()
    optimizer = build(which, model)
    optimizer.param_groups[0][key] = 0.05
    train(model, optimizer, 1)
    for state in optimizer.state.values():
        state["prev"] = torch.ones(1)
    fresh = build(which, model)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0][key] == 0.05


@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)])
def test_names_of_either_side_survive(named: tuple[bool, bool]) -> None:
    model = network()
    optimizer = build("adamw", model, named=named[0])
    train(model, optimizer, 1)
    fresh = build("adamw", model, named=named[1])
    fresh.load_state_dict(optimizer.state_dict())
    names = [name for name, _ in model.named_parameters()]
    assert fresh.state_dict()["param_groups"][0]["param_names"] == names


def test_a_scheduler_goes_on_where_it_was() -> None:
    def run(stop: int | None) -> tuple[nn.Module, list[float]]:
        model = network()
        optimizer = build("adamw", model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        rates = []
        for step in range(6):
            if step == stop:
                saved = through_a_file(
                    {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                )
                optimizer = build("adamw", model)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
                schedule.load_state_dict(saved["schedule"])
                optimizer.load_state_dict(saved["optimizer"])
            train(model, optimizer, 1, first=step)
            schedule.step()
            rates.append(schedule.get_last_lr()[0])
        return model, rates

    straight, rates = run(None)
    resumed, rates_too = run(3)
    assert rates == rates_too
    assert_equal_weights(resumed, weights(straight))
