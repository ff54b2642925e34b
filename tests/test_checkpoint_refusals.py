"""What loading a state dict refuses, keeps and warns of."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import ebbtide.numpy
import ebbtide.torch
from ebbtide.torch import CheckpointError
from tests.checkpoints import (
    build,
    network,
    train,
    unchanged,
)


def broken(**changes: Any) -> Any:
    """A way to damage the state of the first parameter, given by key."""

    def damage(state_dict: dict[str, Any]) -> None:
        for key, change in changes.items():
            values = state_dict["state"][0]
            values[key] = change(values[key]) if callable(change) else change
            if values[key] is None:
                del values[key]

    return damage


def with_element(value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[1] = value
        return tensor

    return change


def rename(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["param_names"][0] = "first.weight"


def negative_rate(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = -1.0


DAMAGES = {
    "NaN in v": (broken(exp_avg_sq=with_element(float("nan"))), "'0.weight' has exp_avg_sq.* NaN"),
    "negative v": (broken(exp_avg_sq=with_element(-1.0)), "'0.weight' has exp_avg_sq.* -1"),
    "infinite m": (broken(exp_avg=with_element(float("inf"))), "'0.weight' has exp_avg .*infinity"),
    "no v": (broken(exp_avg_sq=None), "'0.weight' lacks exp_avg_sq"),
    "no step": (broken(step=None), "'0.weight' lacks step"),
    "nothing": (
        broken(step=None, exp_avg=None, exp_avg_sq=None),
        "lacks step, exp_avg, exp_avg_sq",
    ),
    "NaN steps": (broken(step=torch.tensor(float("nan"))), "'0.weight' has taken nan steps"),
    "shape": (broken(exp_avg=torch.zeros(5, 8)), r"'0.weight' saved \(5, 8\), here \(8, 5\)"),
    "shape of v": (broken(exp_avg_sq=torch.zeros(5, 8)), r"'0.weight' has exp_avg_sq of shape"),
    "codes": (broken(exp_avg=torch.zeros(8, 5, dtype=torch.int8)), "exp_avg of dtype torch.int8"),
    "name": (rename, "(?s)missing.*'0.weight'.*unexpected.*'first.weight'"),
    "lr": (negative_rate, "Invalid learning rate: -1"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_state_is_refused_and_nothing_changes(damage: str) -> None:
    model = network()
    optimizer = build("adamw", model)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 1)
    change, message = DAMAGES[damage]
    change(state)
    with unchanged(optimizer), pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(state)


def test_not_strict_takes_what_fits() -> None:
    model = network()
    optimizer = build("adamw", model)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    DAMAGES["no v"][0](state)
    rename_last = state["param_groups"][0]["param_names"]
    rename_last[-1] = "head.bias"
    fresh = build("adamw", model)
    with pytest.warns(UserWarning, match="(?s)missing.*'2.bias'.*unexpected.*'head.bias'.*refused"):
        fresh.load_state_dict(state, strict=False)
    named = dict(model.named_parameters())
    assert {name for name in named if not fresh.state.get(named[name])} == {"0.weight", "2.bias"}
    assert torch.equal(
        fresh.state[named["2.weight"]]["exp_avg"], optimizer.state[named["2.weight"]]["exp_avg"]
    )
    train(model, fresh, 1)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("saved", "mine", "message"),
    [
        ("sgd", "adamw", "this is SGD state, and this optimizer is AdamW"),
        ("sgd-momentum", "adam", "this is SGD state, and this optimizer is Adam"),
        ("adamw", "sgd-momentum", "this is Adam state, and this optimizer is SGD"),
    ],
)
def test_another_optimizers_state_is_refused(
    saved: str, mine: str, message: str, strict: bool
) -> None:
    model = network()
    theirs = build(saved, model, ours=False)
    train(model, theirs, 1)
    optimizer = build(mine, model)
    with unchanged(optimizer), pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(theirs.state_dict(), strict=strict)


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "Adamax", "NAdam", "Adadelta", "ASGD"])
def test_torchs_other_optimizers_are_told_apart(name: str) -> None:
    model = network()
    theirs = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    train(model, theirs, 1)
    for which in ("adamw", "sgd-momentum"):
        with pytest.raises(CheckpointError, match=name):
            build(which, model).load_state_dict(theirs.state_dict())


def test_what_is_no_optimizers_state_is_refused() -> None:
    model = network()
    with pytest.raises(CheckpointError, match=r"no optimizer's state.*'0\.bias'"):
        build("adamw", model).load_state_dict(model.state_dict())
    for face in (build("adamw", model), ebbtide.numpy.AdamW({"w": np.ones((2, 2))})):
        for what, name in (("a.pt", "str"), (None, "NoneType")):
            with pytest.raises(CheckpointError, match=f"no optimizer's state but a {name}; a file"):
                face.load_state_dict(what)  # type: ignore[arg-type]


def test_unnamed_groups_of_other_sizes_are_refused_in_torchs_words() -> None:
    model = network()
    optimizer = build("adamw", model, named=False)
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    for params, words in (
        (
            list(model.parameters())[:3],
            "parameter group that doesn't match the size of optimizer's",
        ),
        ([{"params": [p]} for p in model.parameters()], "different number of parameter groups"),
    ):
        fresh = ebbtide.torch.AdamW(params)
        with pytest.raises(ValueError, match=words):
            fresh.load_state_dict(state, strict=False)


def test_adam_state_keeps_adamws_decay_and_says_so() -> None:
    model = network()
    theirs = build("adam", model, ours=False)
    train(model, theirs, 1)
    optimizer = build("adamw", model)
    with pytest.warns(UserWarning, match="kind 'l2' and keeps 'decoupled'"):
        optimizer.load_state_dict(theirs.state_dict())
    (group,) = optimizer.param_groups
    assert group["decay_policy"] == "decoupled"
    assert group["decoupled_weight_decay"]
    assert group["weight_decay"] == 0.1


def test_the_policy_and_its_base_travel() -> None:
    model = network()
    params = list(model.named_parameters())
    optimizer = ebbtide.torch.AdamW(params, lr=0.01, decay_policy="independent", seed=7)
    optimizer.param_groups[0]["lr"] = 0.005
    fresh = ebbtide.torch.AdamW(params, lr=0.5)
    with pytest.warns(UserWarning, match="no moments"):
        fresh.load_state_dict(optimizer.state_dict())
    (group,) = fresh.param_groups
    assert (group["lr"], group["base_lr"], group["seed"]) == (0.005, 0.01, 7)
    assert group["decay_policy"] == "independent"
    theirs = torch.optim.AdamW(params, lr=0.25)
    with pytest.warns(UserWarning, match="no moments"):
        fresh.load_state_dict(theirs.state_dict())
    (group,) = fresh.param_groups
    assert (group["lr"], group["base_lr"], group["decay_policy"]) == (0.25, 0.01, "independent")


def test_the_runs_choices_are_not_taken_from_the_file() -> None:
    model = network()
    theirs = torch.optim.AdamW(model.named_parameters(), foreach=True, lr=0.3)
    train(model, theirs, 1)
    state = theirs.state_dict()
    state["param_groups"][0].update(capturable=True, differentiable=True)
    optimizer = ebbtide.torch.AdamW(model.named_parameters(), fused=True)
    optimizer.load_state_dict(state)
    (group,) = optimizer.param_groups
    assert (group["foreach"], group["fused"]) == (None, True)
    assert (group["capturable"], group["differentiable"]) == (False, False)
    assert group["lr"] == 0.3


def test_keep_keeps_this_optimizers_values() -> None:
    model = network()
    optimizer = build("adamw", model)
    train(model, optimizer, 1)
    fresh = ebbtide.torch.AdamW(model.named_parameters(), lr=0.5, weight_decay=0.25, eps=1e-3)
    fresh.load_state_dict(optimizer.state_dict(), keep=("lr", "weight_decay"))
    (group,) = fresh.param_groups
    assert (group["lr"], group["base_lr"], group["weight_decay"]) == (0.5, 0.5, 0.25)
    assert group["eps"] == 1e-8
    with unchanged(fresh), pytest.raises(ValueError, match="keep='learning_rate'"):
        fresh.load_state_dict(optimizer.state_dict(), keep=("learning_rate",))


def test_a_state_without_moments_says_that_they_are_gone() -> None:
    model = network()
    optimizer = build("adamw", model)
    start = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(start)  # what trainers do before the first step
    train(model, optimizer, 2)
    with pytest.warns(UserWarning, match="no moments: the optimizer starts at its first step"):
        optimizer.load_state_dict(start)
    assert not optimizer.state


def test_hooks_run_in_torchs_order() -> None:
    model = network()
    optimizer = build("adamw", model)
    train(model, optimizer, 1)
    seen: list[str] = []

    def double_rate(_: object, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre")
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] *= 2
        return changed

    optimizer.register_load_state_dict_pre_hook(double_rate)
    optimizer.register_load_state_dict_post_hook(
        lambda loaded: seen.append(f"post {loaded.param_groups[0]['lr']}")
    )
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert seen == ["pre", "post 0.02"]
    assert state["param_groups"][0]["lr"] == 0.01
    with pytest.raises(CheckpointError):
        optimizer.load_state_dict({**state, "state": {0: {"step": 1}}})
    assert seen == ["pre", "post 0.02", "pre"]
