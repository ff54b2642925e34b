"""What changes in a param group between steps is noticed, whatever was remembered of it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ebbtide.rules import ADAM, SGD
from ebbtide.torch import SGD as TorchSGD
from ebbtide.torch import AdamW, step_in_backward
from ebbtide.torch.base import Optimizer

Change = Callable[[Optimizer, int], None]


def lower_lr(optimizer: Optimizer, step: int) -> None:
    optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)


def decay_more(optimizer: Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1 * step


def write_into_a_list_of_betas(optimizer: Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    if step == 0:
        group["betas"] = [0.5, 0.9]
    group["betas"][0] = 0.1 * step


def write_into_a_tensor_lr(optimizer: Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    if step == 0:
        group["lr"] = torch.tensor(0.1)
    group["lr"].mul_(0.9)


def write_into_tensor_betas(optimizer: Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    if step == 0:
        group["betas"] = (torch.tensor(0.5), torch.tensor(0.9))
    group["betas"][0].fill_(0.1 * step)


def make_numbers_tensors_of_equal_value(optimizer: Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    for key in ("lr", "weight_decay", "eps"):
        if isinstance(group[key], Tensor):
            group[key].mul_(0.9)
        elif step > 0:
            group[key] = torch.tensor(group[key], dtype=torch.float64)


def make_a_beta_a_tensor_of_equal_value(optimizer: Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["betas"][0], Tensor):
        group["betas"][0].mul_(0.9)
    elif step > 0:
        group["betas"] = (torch.tensor(group["betas"][0]), group["betas"][1])


def make_lr_an_array_of_equal_value(optimizer: Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], np.ndarray):
        group["lr"] *= 0.9
    elif step > 0:
        group["lr"] = np.array(group["lr"])


def replace_the_group(optimizer: Optimizer, step: int) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.1 / (step + 1)}


def replace_all_groups(optimizer: Optimizer, step: int) -> None:
    optimizer.param_groups = [{**group, "eps": 10.0**-step} for group in optimizer.param_groups]


def make_it_another_mapping(optimizer: Optimizer, step: int) -> None:
    optimizer.param_groups[0] = OrderedDict(optimizer.param_groups[0], lr=0.1 / (step + 1))


def put_params_into_a_tuple(optimizer: Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    group["params"] = tuple(group["params"]) if step % 2 else list(group["params"])


def take_a_key_out_and_put_it_back(optimizer: Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    group["lr"] = group.pop("lr") * 0.5


def climb(optimizer: Optimizer, step: int) -> None:
    optimizer.param_groups[0]["maximize"] = step % 2 == 1


def correct_no_bias(optimizer: Optimizer, step: int) -> None:
    optimizer.param_groups[0]["bias_correction"] = step % 2 == 0


def swap_groups(optimizer: Optimizer, step: int) -> None:
    optimizer.param_groups.reverse()


def drop_a_group(optimizer: Optimizer, step: int) -> None:
    if step >= 2 and len(optimizer.param_groups) == 2:
        optimizer.param_groups.pop()


def set_the_count(optimizer: Optimizer, step: int) -> None:
    for state in list(optimizer.state.values())[::2]:
        state["step"].fill_(10.0**step)


CHANGES = [
    lower_lr, decay_more, write_into_a_list_of_betas, write_into_a_tensor_lr,
    write_into_tensor_betas, make_numbers_tensors_of_equal_value,
    make_a_beta_a_tensor_of_equal_value, make_lr_an_array_of_equal_value, replace_the_group,
    replace_all_groups, make_it_another_mapping, put_params_into_a_tuple,
    take_a_key_out_and_put_it_back, climb, correct_no_bias, swap_groups, drop_a_group,
    set_the_count,
]  # fmt: skip


def trained(change: Change, *, remembers: bool, schedule: int = 1) -> list[Tensor]:
    """Step eight times, changing something before every `schedule`-th step."""
    params = [nn.Parameter(torch.linspace(0.5, 1.5, 20 + i)) for i in range(4)]
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.05}]
    optimizer = AdamW(groups, weight_decay=0.1)
    for step in range(8):
        if step % schedule == 0:
            change(optimizer, step)
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, math.sin(step + i))
        if not remembers:
            optimizer._reset()
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("schedule", [1, 3])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_steps_as_in_an_optimizer_that_remembers_nothing(
    change: Change, schedule: int
) -> None:
    quick = trained(change, remembers=True, schedule=schedule)
    assert all(map(torch.equal, quick, trained(change, remembers=False, schedule=schedule)))
    unchanged = trained(lambda *_: None, remembers=True)
    moves = change is not put_params_into_a_tuple and change is not swap_groups
    assert all(map(torch.equal, quick, unchanged)) != moves


@pytest.mark.parametrize("policy", ["l2", "decoupled", "independent", "corrected"])
def test_a_schedule_steps_under_every_policy_as_fresh_values_do(policy: str) -> None:
    def stepped(*, remembers: bool) -> Tensor:
        param = nn.Parameter(torch.linspace(0.5, 1.5, 33))
        optimizer = AdamW([param], lr=0.1, weight_decay=0.2, decay_policy=policy)
        for step in range(8):
            optimizer.param_groups[0]["lr"] = [0.1, 0.07, 0, 0.03, 0.0, np.float32(0.2), 0.09][
                step % 7
            ]
            param.grad = torch.full((33,), math.cos(step))
            if not remembers:
                optimizer._reset()
            optimizer.step()
        return param.detach()

    assert torch.equal(stepped(remembers=True), stepped(remembers=False))


@pytest.mark.parametrize("lr", [-0.1, math.inf, math.nan, 10.0, "0.1", True, None])
def test_a_bad_learning_rate_in_mid_course_is_refused(lr: object) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW([param], lr=0.1, weight_decay=0.1)
    for step in range(4):
        param.grad = torch.ones(3)
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["lr"] = lr
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=r"learning rate|share must be below 1"):
            optimizer.step()
    assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 200.0])
def test_a_tensor_whose_number_goes_bad_is_refused(value: float) -> None:
    param = nn.Parameter(torch.ones(4))
    lr = torch.tensor(0.1)
    optimizer = AdamW([param], lr=lr)
    param.grad = torch.ones(4)
    optimizer.step()
    before = param.detach().clone()
    lr.fill_(value)
    with pytest.raises(ValueError, match=r"lr|learning rate"):
        optimizer.step()
    assert torch.equal(param, before)
    lr.fill_(0.1)
    optimizer.step()
    assert not torch.equal(param, before)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_begins_anew_where_its_buffer_does(momentum: float) -> None:
    def stepped(*, remembers: bool) -> Tensor:
        param = nn.Parameter(torch.ones(9))
        optimizer = TorchSGD([param], lr=0.1, momentum=momentum, dampening=0.5)
        for step in range(6):
            param.grad = torch.full((9,), 1.0 + step)
            if not remembers:
                optimizer._reset()
            if step == 3:
                optimizer.state.clear()
            optimizer.step()
        return param.detach()

    assert torch.equal(stepped(remembers=True), stepped(remembers=False))


@pytest.mark.parametrize("count", [-1.0, -5.0, math.nan])
def test_a_count_that_is_none_is_refused(count: float) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW([param])
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    before = param.detach().clone()
    optimizer.state[param]["step"].fill_(count)
    with pytest.raises((ValueError, ArithmeticError)):
        optimizer.step()
    assert torch.equal(param.detach(), before)


def test_a_group_that_is_refused_is_refused_until_it_is_mended() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()
    good = optimizer.param_groups[0]["betas"]
    optimizer.param_groups[0]["betas"] = (0.9, 1.5)
    before = param.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match="Invalid beta parameter at index 1"):
            optimizer.step()
    assert torch.equal(param.detach(), before)
    optimizer.param_groups[0]["betas"] = good
    optimizer.step()
    assert not torch.equal(param.detach(), before)


def test_amsgrad_switched_on_is_noticed_inside_backward() -> None:
    def state_keys(*, inside: bool) -> list[list[str]]:
        model = nn.Linear(3, 2)
        optimizer = AdamW(model.parameters())
        if inside:
            step_in_backward(model, optimizer)
        for step in range(4):
            optimizer.param_groups[0]["amsgrad"] = step >= 2
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return [list(state) for state in optimizer.state.values()]

    assert state_keys(inside=True) == state_keys(inside=False)


def test_a_recipe_at_other_rates_is_that_of_the_group_with_them() -> None:
    common = {"lr": 0.1, "cautious": True, "maximize": True, "seed": 3}
    adam = {"betas": (0.8, 0.95), "eps": 1e-6, "bias_correction": True}
    sgd = {"momentum": 0.9, "dampening": 0.5, "nesterov": False}
    for rule, own in ((ADAM, adam), (SGD, sgd)):
        group = {**common, **own}
        moved = rule.prepare(group, 0.01, 0.0).at_rates(0.2, 0.02, 0.3)
        fresh = rule.prepare({**group, "lr": 0.2}, 0.02, 0.3)
        for step in (1, 2, 1000):
            assert moved(step) == fresh(step)
