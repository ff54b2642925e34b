"""Checkpoints of low-bit state: exact here, ordinary elsewhere, whole or refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import ebbtide.numpy
from ebbtide.torch import SGD, AdamW, CheckpointError
from ebbtide.torch.storage import joined, plain

FORMATS: list[dict[str, Any]] = [
    {"state_format": "8bit"},
    {"state_format": "8bit", "amsgrad": True, "master_format": "24bit"},
    {"state_format": "8bit", "master_format": "32bit", "decay_policy": "independent"},
    {"state_format": "bfloat16", "master_format": "24bit"},
]


def params_of(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = {
        "matrix": torch.randn(64, 200, generator=generator),
        "kernel": torch.randn(8, 16, 8, 8, generator=generator).contiguous(
            memory_format=torch.channels_last
        ),
        "bias": torch.randn(7, generator=generator),
    }
    return {name: nn.Parameter(value.to(dtype)) for name, value in values.items()}


def train(optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                grad = torch.randn(param.shape, generator=generator) + 0.1
                param.grad = torch.empty_like(param).copy_(grad)
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_a_compact_state_resumes_bit_for_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params, resumed = params_of(dtype), params_of(dtype)
    optimizer = AdamW(params.items(), lr=1e-2, **options)
    train(optimizer, 3, seed=1)
    for name, param in params.items():
        resumed[name].data.copy_(param)
    other = AdamW(resumed.items(), lr=0.5, **options)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for each in (optimizer, other):
        train(each, 3, seed=2)
    for name, param in params.items():
        assert torch.equal(param, resumed[name])
        state = other.state[resumed[name]]
        assert state.keys() == optimizer.state[param].keys()
        for key, value in optimizer.state[param].items():
            assert torch.equal(state[key], value), key


def test_torch_loads_a_portable_state_and_refuses_a_compact_one() -> None:
    params = params_of(torch.float32)
    ours = AdamW(params.items(), state_format="8bit")
    train(ours, 3, seed=1)
    theirs = torch.optim.AdamW(params.items())
    theirs.load_state_dict(through_a_file(ours.state_dict(portable=True)))
    for param in params.values():
        decoded = plain(ours.state[param])
        assert decoded["exp_avg"].dtype == torch.float32
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(theirs.state[param][key], decoded[key])
    train(theirs, 1, seed=2)
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        train(theirs, 1, seed=2)


def test_a_state_of_torch_goes_through_eight_bits_and_back() -> None:
    params = params_of(torch.float32)
    theirs = torch.optim.AdamW(params.items())
    train(theirs, 5, seed=1)
    ours = AdamW(params.items(), state_format="8bit")
    ours.load_state_dict(theirs.state_dict())
    assert "exp_avg_codes" in ours.state[params["matrix"]]
    back = torch.optim.AdamW(params.items())
    back.load_state_dict(ours.state_dict(portable=True))
    for param in params.values():
        first, second = (
            each.state[param]["exp_avg"] / (each.state[param]["exp_avg_sq"].sqrt() + 1e-12)
            for each in (theirs, back)
        )
        assert (first - second).norm() <= 0.025 * first.norm()
        assert (back.state[param]["exp_avg_sq"] > 0).all()


def test_eight_bits_load_into_float32_and_the_other_way_round() -> None:
    params = params_of(torch.bfloat16)
    low = AdamW(params.items(), state_format="8bit", master_format="24bit")
    train(low, 3, seed=1)
    high = AdamW(params.items(), state_format="float32", master_format="32bit")
    high.load_state_dict(low.state_dict())
    matrix = params["matrix"]
    assert high.param_groups[0]["state_format"] == "float32"  # the run's choice, not the file's
    assert torch.equal(high.state[matrix]["exp_avg"], plain(low.state[matrix])["exp_avg"])
    wide = joined(high.state[matrix]["residual"])
    assert torch.equal(wide, low.state[matrix]["residual"].to(torch.int16) << 8)
    low.load_state_dict(high.state_dict())
    again = low.state[matrix]
    assert torch.equal(again["residual"].to(torch.int16) << 8, wide)
    moments = plain(again)["exp_avg"]
    error = (moments - high.state[matrix]["exp_avg"]).norm()
    assert error < 0.01 * moments.norm()


def broken(key: str, change: Any) -> dict[str, Any]:
    optimizer = AdamW(params_of(torch.bfloat16).items(), state_format="8bit", master_format="24bit")
    train(optimizer, 1, seed=1)
    state = through_a_file(optimizer.state_dict())
    state["state"][0][key] = change(state["state"][0][key])
    return state


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("exp_avg_scale", lambda x: x * float("nan"), "negative or not finite"),
        ("exp_avg_scale", lambda x: x - 1, "negative or not finite"),
        ("exp_avg_scale", lambda x: x + 3e38, "larger than any"),
        ("exp_avg_scale", lambda x: x[:, :1], "shape"),
        ("exp_avg_codes", lambda x: x.float(), "dtype torch.float32"),
        ("exp_avg_sq_scale", lambda x: x[..., :1], "shape"),
        (
            "exp_avg_sq_scale",
            lambda x: x | torch.tensor([255, 127], dtype=x.dtype),
            "infinite numbers",
        ),
        ("exp_avg_sq_scale", lambda x: torch.full_like(x, 255), "infinite numbers"),
        ("residual", lambda x: x.short(), "dtype torch.int16"),
        ("residual", lambda x: x[1:], "shape"),
    ],
)
def test_what_cannot_be_decoded_is_refused_and_nothing_changes(
    key: str, change: Any, words: str
) -> None:
    params = params_of(torch.bfloat16)
    optimizer = AdamW(params.items(), state_format="8bit", master_format="24bit")
    train(optimizer, 2, seed=3)
    before = through_a_file(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=words) as caught:
        optimizer.load_state_dict(broken(key, change))
    assert "'matrix'" in str(caught.value)
    after = optimizer.state_dict()
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(after["state"][index][name], value)


def test_residuals_that_torch_has_cast_are_left_out() -> None:
    params = params_of(torch.bfloat16)
    options: dict[str, Any] = {"master_format": "32bit"}
    ours = AdamW(params.items(), **options)
    train(ours, 2, seed=1)
    theirs = torch.optim.AdamW(params.items())
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    train(theirs, 2, seed=2)
    again = AdamW(params.items(), **options)
    with pytest.warns(UserWarning, match="the residuals of 3 parameters are left out"):
        again.load_state_dict(through_a_file(theirs.state_dict()))
    for param in params.values():
        moments = theirs.state[param]
        assert "residual" not in again.state[param]
        assert torch.equal(again.state[param]["exp_avg"], moments["exp_avg"])
        assert torch.equal(again.state[param]["exp_avg_sq"], moments["exp_avg_sq"])
    train(again, 1, seed=3)
    assert again.state[params["matrix"]]["residual"].dtype == torch.uint8


def test_codes_without_their_scale_are_refused() -> None:
    state = broken("exp_avg_codes", lambda x: x)
    del state["state"][0]["exp_avg_sq_scale"]
    optimizer = AdamW(params_of(torch.bfloat16).items(), state_format="8bit")
    with pytest.raises(CheckpointError, match="no scale beside it"):
        optimizer.load_state_dict(state)


def test_arrays_load_a_portable_state_and_refuse_a_compact_one() -> None:
    params = params_of(torch.float32)
    optimizer = AdamW(params.items(), state_format="8bit")
    train(optimizer, 2, seed=1)
    arrays = {name: param.detach().numpy() for name, param in params.items()}
    other = ebbtide.numpy.AdamW(arrays)
    with pytest.raises(CheckpointError, match="portable=True"):
        other.load_state_dict(optimizer.state_dict())
    other.load_state_dict(optimizer.state_dict(portable=True))
    assert (other.state["matrix"]["exp_avg_sq"] > 0).all()


def test_momentum_goes_with_a_residual() -> None:
    low = {"w": nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))}
    high = {"w": nn.Parameter(torch.ones(64, 64))}
    formats = {"state_format": "float32", "master_format": "32bit"}
    optimizers = [
        SGD(low.items(), lr=1e-3, momentum=0.9, **formats),  # type: ignore[arg-type]
        SGD(high.items(), lr=1e-3, momentum=0.9),
    ]
    for step in range(4):
        low["w"].grad = torch.full((64, 64), 0.5 + step, dtype=torch.bfloat16)
        high["w"].grad = low["w"].grad.float()
        for optimizer in optimizers:
            optimizer.step()
        if step == 1:
            fresh = SGD(low.items(), lr=1.0, momentum=0.9, **formats)  # type: ignore[arg-type]
            fresh.load_state_dict(optimizers[0].state_dict())
            optimizers[0] = fresh
    residual = joined(optimizers[0].state[low["w"]]["residual"]).int()
    bits = (low["w"].detach().view(torch.int16).int() << 16) + residual
    assert torch.equal(bits.view(torch.float32), high["w"])
