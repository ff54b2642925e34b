"""State of the NumPy face: flat files, torch and back, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

import ebbtide.numpy
import ebbtide.torch
from ebbtide.checkpoint import CheckpointError, flatten, unflatten, write_file

Array = np.ndarray[Any, Any]
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {"weight_decay": 0.1}),
    "amsgrad": ("AdamW", {"amsgrad": True, "decay_policy": "independent"}),
    "adam": ("Adam", {"weight_decay": 0.1}),
    "sgd": ("SGD", {"momentum": 0.9}),
}
EVERY = pytest.mark.parametrize("which", list(OPTIMIZERS))
SHAPES = {"w": (4, 3), "b": (3,), "c": (2, 3)}


def arrays(dtype: Any = np.float64, order: str = "C") -> dict[str, Array]:
    rng = np.random.default_rng(0)
    made = {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}
    return {name: np.array(array, order=order) for name, array in made.items()}  # type: ignore[call-overload]


def build(which: str, params: Any, **changes: Any) -> Any:
    kind, options = OPTIMIZERS[which]
    options = {"lr": 0.01, "decay_mask": lambda name, array: True, **options, **changes}
    return getattr(ebbtide.numpy, kind)(params, **options)


def build_torch(which: str, params: Any, *, face: Any = ebbtide.torch) -> Any:
    kind, options = OPTIMIZERS[which]
    if face is torch.optim:
        options = {k: v for k, v in options.items() if k != "decay_policy"}
    return getattr(face, kind)(list(params.items()), lr=0.01, **options)


def gradient(shape: tuple[int, ...], step: int) -> Array:
    return np.random.default_rng([step, *shape]).normal(size=shape)


def train(optimizer: Any, params: dict[str, Any], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        grads = {name: gradient(tuple(p.shape), step) for name, p in params.items()}
        if isinstance(optimizer, torch.optim.Optimizer):
            for name, param in params.items():
                param.grad = torch.tensor(grads[name], dtype=param.dtype)
            optimizer.step()
        else:
            optimizer.step({n: g.astype(params[n].dtype) for n, g in grads.items()})


def tensors(params: dict[str, Array]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor(array)) for name, array in params.items()}


def through_npz(state_dict: dict[str, Any], path: Path) -> dict[str, Any]:
    write_file(path, lambda file: np.savez(file, **flatten(state_dict)))
    with np.load(path) as flat:
        return unflatten(flat)


def through_safetensors(state_dict: dict[str, Any], path: Path) -> dict[str, Any]:
    flat = flatten(state_dict)
    metadata = {"param_groups": flat.pop("param_groups")}
    face = (
        safetensors.torch if any(torch.is_tensor(v) for v in flat.values()) else safetensors.numpy
    )
    face.save_file(flat, path, metadata=metadata)
    with safetensors.safe_open(path, "np") as file:
        return unflatten({**{k: file.get_tensor(k) for k in [*file.keys()]}, **file.metadata()})


@EVERY
@pytest.mark.parametrize("through", [through_npz, through_safetensors])
@pytest.mark.parametrize("order", ["C", "F"])
def test_resuming_from_a_flat_file_equals_going_on(
    which: str, through: Any, order: str, tmp_path: Path
) -> None:
    params = arrays(order=order)
    optimizer = build(which, params)
    train(optimizer, params, 3)
    state = through(optimizer.state_dict(), tmp_path / "state")
    resumed = {name: params[name].copy(order="K") for name in reversed(params)}
    fresh = build(which, resumed, lr=0.5)
    fresh.load_state_dict(state)
    for each, values in ((optimizer, params), (fresh, resumed)):
        train(each, values, 2, first=3)
    for name, array in params.items():
        np.testing.assert_array_equal(resumed[name], array)


# float64: both faces run the same kernel, so there is no tolerance.
@EVERY
@pytest.mark.parametrize("through", [None, through_npz, through_safetensors])
def test_the_faces_continue_each_other(which: str, through: Any, tmp_path: Path) -> None:
    params, alone = arrays(), arrays()
    own = build(which, alone)
    train(own, alone, 6)

    optimizer = build(which, params)
    train(optimizer, params, 2)
    there = tensors(params)
    across = build_torch(which, there)
    state = optimizer.state_dict()
    across.load_state_dict(through(state, tmp_path / "there") if through else state)
    train(across, there, 2, first=2)

    back = {name: param.detach().numpy().copy() for name, param in there.items()}
    last = build(which, back)
    state = across.state_dict()
    last.load_state_dict(through(state, tmp_path / "back") if through else state)
    train(last, back, 2, first=4)
    for name, array in alone.items():
        np.testing.assert_array_equal(back[name], array)
        for key, value in own.state[name].items():
            np.testing.assert_array_equal(last.state[name][key], value)


@EVERY
def test_torchs_own_state_loads(which: str) -> None:
    params = arrays()
    there = tensors(params)
    theirs = build_torch(which, there, face=torch.optim)
    train(theirs, there, 3)
    optimizer = build(which, {name: p.detach().numpy().copy() for name, p in there.items()})
    optimizer.load_state_dict(theirs.state_dict())
    for name, param in there.items():
        for key, value in theirs.state[param].items():
            np.testing.assert_array_equal(optimizer.state[name][key], value.numpy())


def test_bfloat16_state_becomes_float32() -> None:
    params = tensors(arrays(np.float32))
    theirs = build_torch(
        "adamw", {n: nn.Parameter(p.detach().bfloat16()) for n, p in params.items()}
    )
    train(theirs, dict(zip(SHAPES, theirs.param_groups[0]["params"], strict=True)), 1)
    optimizer = build("adamw", arrays(np.float32))
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.state["w"]["exp_avg"].dtype == np.float32


def test_arrays_in_a_list_have_positions_for_names() -> None:
    params = arrays()
    optimizer = build("adamw", list(params.values()))
    optimizer.step([gradient(array.shape, 0) for array in params.values()])
    there = tensors(params)
    across = build_torch("adamw", there)
    across.load_state_dict(optimizer.state_dict())
    assert torch.equal(
        across.state[there["b"]]["exp_avg"], torch.tensor(optimizer.state["1"]["exp_avg"])
    )


def test_grouping_may_change() -> None:
    params = arrays()
    optimizer = build("adamw", params)
    train(optimizer, params, 2)
    split = [
        {"params": {"b": params["b"]}, "weight_decay": 0.0},
        {"params": {"c": params["c"], "w": params["w"]}},
    ]
    fresh = build("adamw", split, lr=0.5)
    with pytest.warns(UserWarning, match=r"moved between groups \(2\)"):
        fresh.load_state_dict(optimizer.state_dict())
    assert [(g["lr"], g["weight_decay"]) for g in fresh.param_groups] == [(0.01, 0.0), (0.01, 0.1)]
    for name in params:
        np.testing.assert_array_equal(
            fresh.state[name]["exp_avg"], optimizer.state[name]["exp_avg"]
        )
    train(fresh, params, 1)


def poison(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg_sq"][0, 0] = np.nan


def turn_negative(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg_sq"][0, 0] = -2.0


def forget_steps(state: dict[str, Any]) -> None:
    del state["state"][0]["step"]


def count_backwards(state: dict[str, Any]) -> None:
    state["state"][0]["step"] = np.float32(-1)


def count_for_ever(state: dict[str, Any]) -> None:
    state["state"][0]["step"] = np.float32(np.inf)


def transpose(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].T


def rename(state: dict[str, Any]) -> None:
    state["param_groups"][0]["param_names"][0] = "first"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (poison, "'w' has exp_avg_sq that holds NaN"),
        (turn_negative, "'w' has exp_avg_sq that holds the negative value -2"),
        (forget_steps, "'w' lacks step"),
        (count_backwards, "'w' has taken -1.0 steps"),
        (count_for_ever, "'w' has taken inf steps"),
        (transpose, r"'w' saved \(3, 4\), here \(4, 3\)"),
        (rename, "(?s)missing.*'w'.*unexpected.*'first'"),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_changes(damage: Any, message: str) -> None:
    params = arrays()
    optimizer = build("adamw", params)
    train(optimizer, params, 2)
    state = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, 1)
    damage(state)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(state)
    np.testing.assert_equal(optimizer.state_dict(), before)
    with pytest.warns(UserWarning, match="what does not fit"):
        optimizer.load_state_dict(state, strict=False)
    assert "w" not in optimizer.state
    train(optimizer, params, 1)


def test_another_optimizers_state_is_refused() -> None:
    params = arrays()
    optimizer = build("sgd", params)
    train(optimizer, params, 1)
    with pytest.raises(CheckpointError, match="this is SGD state, and this optimizer is AdamW"):
        build("adamw", params).load_state_dict(optimizer.state_dict())


def test_keep_keeps_this_optimizers_values() -> None:
    params = arrays()
    optimizer = build("adamw", params)
    train(optimizer, params, 1)
    fresh = build("adamw", params, lr=0.5, weight_decay=0.25)
    fresh.load_state_dict(optimizer.state_dict(), keep=("lr",))
    (group,) = fresh.param_groups
    assert (group["lr"], group["base_lr"], group["weight_decay"]) == (0.5, 0.5, 0.1)


@pytest.mark.parametrize("saved", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("mine", [np.float16, np.float32, np.float64])
def test_state_keeps_the_precision_it_was_saved_in(mine: Any, saved: Any) -> None:
    params = arrays(np.float32)
    optimizer = build("adamw", params)
    train(optimizer, params, 1)
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            values[key] = values[key].astype(saved)
    params = arrays(mine)
    fresh = build("adamw", params)
    fresh.load_state_dict(state)
    expected = saved
    if np.float64 in (mine, saved):  # float16 would lose what is small
        expected = np.float32 if mine == np.float16 else mine
    assert fresh.state["w"]["exp_avg"].dtype == expected
    assert fresh.state["w"]["exp_avg_sq"].dtype == (
        np.float32 if expected == np.float16 else expected
    )
    train(fresh, params, 1)
