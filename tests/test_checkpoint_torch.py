"""State dicts between ours and torch's, by name, all or nothing."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import ebbtide.torch
from ebbtide.torch import CheckpointError


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


def test_what_belongs_to_no_parameter_is_carried_along() -> None:
    model = network()
    optimizer = build("adamw", model)
    train(model, optimizer, 1)
    optimizer.state["ema"] = 0.5
    fresh = build("adamw", model)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state["ema"] == 0.5


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
