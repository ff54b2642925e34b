"""What `DecayMonitor` says against steps whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ebbtide.torch import SGD, Adam, AdamW, DecayMonitor

Optimizer = torch.optim.Optimizer


def parameter(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def steps(optimizer: Optimizer, count: int, *, seed: int = 1) -> None:
    """Take steps with gradients that lean on the parameter, as those of a regulariser do."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for group in optimizer.param_groups:
            for param in group["params"]:
                noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                param.grad = (noise + 0.1 * param.detach().abs()).to(param.dtype)
        optimizer.step()


# Each removes a share known beforehand under lr 0.01, after lr fell from 0.02.
DECAYING: dict[str, tuple[Callable[[Any], Optimizer], float]] = {
    "decoupled": (lambda p: AdamW(p, lr=0.02, weight_decay=0.1), 0.001),
    "independent": (
        lambda p: AdamW(p, lr=0.02, weight_decay=0.1, decay_policy="independent"), 0.05
    ),
    "corrected": (lambda p: AdamW(p, lr=0.02, weight_decay=0.1, decay_policy="corrected"), 5e-4),
    "amsgrad": (lambda p: AdamW(p, lr=0.02, weight_decay=0.1, amsgrad=True), 0.001),
    "maximize": (lambda p: AdamW(p, lr=0.02, weight_decay=0.1, maximize=True), 0.001),
    "uncorrected": (lambda p: AdamW(p, lr=0.02, weight_decay=0.1, bias_correction=False), 0.001),
    "clipped": (lambda p: AdamW(p, lr=0.02, weight_decay=0.1, clip_grad_norm=0.5), 0.001),
    "SGDW": (lambda p: SGD(p, lr=0.02, weight_decay=0.1, decay_policy="decoupled"), 0.001),
    "SGDW clipped": (
        lambda p: SGD(
            p, lr=0.02, weight_decay=0.1, decay_policy="decoupled", clip_grad_norm=0.5
        ), 0.001,
    ),
    "SGDW momentum": (
        lambda p: SGD(p, lr=0.02, weight_decay=0.1, momentum=0.9, decay_policy="decoupled"), 0.001
    ),
    "SGDW nesterov": (
        lambda p: SGD(
            p, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True, maximize=True,
            decay_policy="decoupled",
        ), 0.001,
    ),
    "torch": (lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, foreach=False), 0.001),
    "torch foreach": (
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, foreach=True), 0.001
    ),
    "torch fused": (lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True), 0.001),
    "torch tensor lr": (
        lambda p: torch.optim.AdamW(
            p, lr=torch.tensor(0.02, dtype=torch.float64), weight_decay=0.1
        ),
        0.001,
    ),
}  # fmt: skip


def halve_lr(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] / 2


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_in_double_precision_the_measured_decay_is_the_expected_one(
    name: str, dtype: torch.dtype
) -> None:
    make, share = DECAYING[name]
    if dtype.is_complex and name == "torch fused":
        dtype = torch.float64  # torch refuses complex numbers there
    optimizer = make([parameter(60, 40, dtype=dtype), parameter(40, dtype=dtype, seed=2)])
    steps(optimizer, 2)
    halve_lr(optimizer)
    monitor = DecayMonitor(optimizer, samples=1000)
    steps(optimizer, 1, seed=3)
    seen = {key.removeprefix("decay/group0/"): value for key, value in monitor.last.items()}
    assert seen["lr"] == pytest.approx(0.01)
    assert seen["share"] == pytest.approx(share)
    assert seen["timescale_steps"] == pytest.approx(1 / share)
    assert seen["expected_share"] == pytest.approx(share)
    assert seen["realised_share"] == pytest.approx(share, rel=1e-6)
    assert seen["realised_to_expected"] == pytest.approx(1, rel=1e-6)
    assert seen["realised_error"] < 1e-6 * share
    assert seen["lost_to_rounding"] == pytest.approx(0, abs=1e-6)
    assert seen["unmoved"] == 0


L2 = {
    "Adam": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "torch Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: SGD(p, lr=0.01, weight_decay=0.1),
    "SGD nesterov": lambda p: SGD(p, lr=0.01, weight_decay=0.1, momentum=0.5, nesterov=True),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1, momentum=0.5),
}


@pytest.mark.parametrize("name", L2)
def test_under_l2_the_share_is_named_and_the_update_still_found(name: str) -> None:
    optimizer = L2[name]([parameter(60, 40)])
    steps(optimizer, 3)
    monitor = DecayMonitor(optimizer)
    steps(optimizer, 1)
    last = monitor.last
    if "SGD" in name:
        momentum = optimizer.param_groups[0]["momentum"]
        assert last["decay/group0/share"] == pytest.approx(0.001 / (1 - momentum))
        assert "decay/group0/equilibrium_rms" not in last
    else:
        (state,) = optimizer.state.values()
        typical = float((state["exp_avg_sq"] / (1 - 0.999**4)).sqrt().flatten().median())
        assert last["decay/group0/share"] == pytest.approx(0.001 / typical, rel=1e-3)
        expected = math.sqrt(0.01 * typical / 0.2)  # √(lr·s/2λ)
        assert last["decay/group0/equilibrium_rms"] == pytest.approx(expected, rel=1e-3)
    assert "decay/group0/realised_share" not in last
    assert last["decay/group0/lost_to_rounding"] == pytest.approx(0, abs=1e-9)


def test_cautious_decay_is_expected_where_it_reaches() -> None:
    weight = parameter(80, 50)
    optimizer = AdamW([weight], lr=0.01, weight_decay=0.1, cautious=True)
    monitor = DecayMonitor(optimizer, every=1)
    steps(optimizer, 5)
    last = monitor.last
    assert last["decay/group0/share"] == pytest.approx(0.001)
    assert 3e-4 < last["decay/group0/expected_share"] < 7e-4
    assert last["decay/group0/realised_share"] == pytest.approx(
        last["decay/group0/expected_share"], rel=1e-6
    )
    assert last["decay/group0/lost_to_rounding"] == pytest.approx(0, abs=1e-9)
    assert "decay/group0/rms_to_equilibrium" not in last


def test_values_of_a_step_done_by_hand() -> None:
    weight = nn.Parameter(torch.full((4, 4), 2.0, dtype=torch.float64))
    weight.data[0] = -2.0
    optimizer = SGD([weight], lr=0.1, weight_decay=0.5, decay_policy="decoupled")
    monitor = DecayMonitor(optimizer)
    weight.grad = torch.ones(4, 4, dtype=torch.float64)
    optimizer.step()
    assert monitor.last == pytest.approx(
        {
            "decay/skipped_steps": 0.0,
            "decay/group0/lr": 0.1,
            "decay/group0/weight_decay": 0.5,
            "decay/group0/share": 0.05,
            "decay/group0/timescale_steps": 20.0,
            "decay/group0/expected_share": 0.05,
            "decay/group0/realised_share": 0.05,
            "decay/group0/realised_error": 0.0,
            "decay/group0/realised_to_expected": 1.0,
            "decay/group0/realised_to_expected_error": 0.0,
            "decay/group0/update_rms": 0.1,
            "decay/group0/param_rms": 2.0,
            "decay/group0/update_to_weight": 0.05,
            "decay/group0/lost_to_rounding": 0.0,
            "decay/group0/unmoved": 0.0,
        },
        abs=1e-12,
    )
    assert all(type(value) is float for value in monitor.last.values())


def test_the_equilibrium_is_where_noise_leads() -> None:
    weight = parameter(100, 40, dtype=torch.float32)
    optimizer = AdamW([weight], lr=0.05, weight_decay=0.4)
    generator = torch.Generator().manual_seed(0)
    monitor = DecayMonitor(optimizer, every=300)
    for _ in range(301):
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    assert monitor.last["decay/group0/equilibrium_rms"] == pytest.approx(0.25)
    assert 0.9 < monitor.last["decay/group0/rms_to_equilibrium"] < 1.1


@pytest.mark.parametrize("kind", ["loop", "foreach", "fused"])
def test_torch_loses_in_bfloat16_what_we_keep(kind: str) -> None:
    """lr·λ = 0.001 is under half of the spacing of bfloat16 numbers, 2⁻⁹."""
    how = {} if kind == "loop" else {kind: True}
    options = {"lr": 1e-3, "weight_decay": 1.0}
    theirs = torch.optim.AdamW([parameter(200, 200, dtype=torch.bfloat16)], **options, **how)
    mine = AdamW([parameter(200, 200, dtype=torch.bfloat16)], **options)
    seen = []
    for optimizer in (theirs, mine):
        monitor = DecayMonitor(optimizer, every=1)
        steps(optimizer, 5)
        seen.append(monitor.last)
    ratio, error, lost, unmoved = (
        [last[f"decay/group0/{key}"] for last in seen]
        for key in (
            "realised_to_expected", "realised_to_expected_error", "lost_to_rounding", "unmoved"
        )
    )  # fmt: skip
    assert max(error) < 0.05
    assert abs(ratio[1] - 1) < 4 * error[1]
    assert ratio[0] < 0.1
    assert lost[0] > 0.9
    assert abs(lost[1]) < 0.05
    assert unmoved[0] > 0.8


def test_an_update_that_is_lost_is_not_taken_for_decay() -> None:
    """The update points along the parameter, so that it could pass for decay; nothing moves."""
    weight = parameter(300, 300, dtype=torch.bfloat16)
    start = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=1.0)
    monitor = DecayMonitor(optimizer)
    weight.grad = weight.detach().clone()
    optimizer.step()
    moved = float((weight.detach() != start).double().mean())
    assert moved < 0.01
    last = monitor.last
    assert abs(last["decay/group0/realised_to_expected"]) < 0.01
    assert last["decay/group0/unmoved"] > 0.99
    assert last["decay/group0/lost_to_rounding"] > 0.99


def test_a_sample_stands_for_the_whole() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(500, 400) * torch.linspace(0.1, 3, 400))  # by column
    optimizer = AdamW([weight, parameter(3)], lr=1e-3, weight_decay=0.1)
    monitor = DecayMonitor(optimizer, samples=5000)
    exact = math.sqrt(
        sum(float(p.detach().double().square().sum()) for p in optimizer.param_groups[0]["params"])
        / (500 * 400 + 3)
    )
    steps(optimizer, 1)
    assert monitor.last["decay/group0/param_rms"] == pytest.approx(exact, rel=0.03)
    assert monitor.last["decay/group0/realised_to_expected"] == pytest.approx(1, rel=0.01)


def test_only_every_so_many_steps_are_measured_and_passed_on() -> None:
    seen: list[tuple[dict[str, float], int]] = []
    scalars: list[tuple[str, float, int]] = []

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            scalars.append((tag, scalar_value, global_step))

    optimizer = AdamW([parameter(5)], lr=0.01)
    monitor = DecayMonitor(optimizer, every=3)
    monitor.log_to(lambda values, step: seen.append((values, step))).log_to_tensorboard(Writer())
    assert monitor.last == {}
    steps(optimizer, 8)
    assert [step for _, step in seen] == [1, 4, 7]
    assert monitor.steps == 8
    assert monitor.last == seen[-1][0]
    assert monitor.last is not seen[-1][0]
    assert scalars == [(key, value, step) for values, step in seen for key, value in values.items()]
    monitor.remove()
    steps(optimizer, 3)
    assert (monitor.steps, len(seen)) == (8, 3)


def test_watching_changes_no_bit() -> None:
    weights = [parameter(33, 7, dtype=torch.bfloat16) for _ in range(2)]
    watched, alone = (AdamW([weight], lr=1e-3, weight_decay=0.1) for weight in weights)
    DecayMonitor(watched, every=2)
    steps(watched, 5)
    steps(alone, 5)
    assert torch.equal(*weights)


def test_parameters_are_named_on_request() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)).double()
    named = [*model.named_parameters()]
    groups = [
        {"params": named[:2], "weight_decay": 0.1, "name": "first/layer"},
        {"params": named[2:], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=0.01)
    monitor = DecayMonitor(optimizer, per_param=True)
    steps(optimizer, 1)
    keys = {key for key in monitor.last if key.endswith(("realised_share", "update_to_weight"))}
    assert keys == {
        "decay/first.layer/realised_share",
        "decay/first.layer/update_to_weight",
        "decay/first.layer/0.weight/realised_share",
        "decay/first.layer/0.weight/update_to_weight",
        "decay/first.layer/0.bias/realised_share",
        "decay/first.layer/0.bias/update_to_weight",
        "decay/group1/update_to_weight",
        "decay/group1/1.weight/update_to_weight",
        "decay/group1/1.bias/update_to_weight",
    }
    assert monitor.last["decay/group1/share"] == 0.0
    assert "decay/group1/timescale_steps" not in monitor.last


def test_groups_of_one_name_are_told_apart() -> None:
    groups = [{"params": [parameter(2, seed=i)], "name": "same"} for i in range(2)]
    optimizer = AdamW(groups, lr=0.01)
    monitor = DecayMonitor(optimizer)
    steps(optimizer, 1)
    assert {"decay/same/lr", "decay/same.1/lr"} <= set(monitor.last)


def test_clipped_and_skipped_steps_are_counted() -> None:
    weight = parameter(4)
    optimizer = AdamW([weight], lr=0.01, nonfinite="skip", clip_grad_norm=1.0)
    monitor = DecayMonitor(optimizer, every=4)
    for size in (math.nan, 0.1, 3.0, 3.0, math.inf, 0.1):
        weight.grad = torch.full((4,), size, dtype=torch.float64)
        optimizer.step()
    # The first and the fifth step were skipped, so the second and the sixth are the samples.
    assert monitor.last["decay/skipped_steps"] == 2
    assert monitor.last["decay/clip_rate"] == pytest.approx(2 / 4)
    assert monitor.last["decay/grad_norm"] == pytest.approx(0.2)
    assert monitor.last["decay/group0/lost_to_rounding"] == pytest.approx(0, abs=1e-9)


def test_after_a_step_that_raised_the_next_is_measured() -> None:
    weight = parameter(4)
    optimizer = AdamW([weight], lr=0.01)
    monitor = DecayMonitor(optimizer, every=10)
    weight.grad = torch.full((4,), math.nan, dtype=torch.float64)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert monitor.last == {}
    steps(optimizer, 1)
    assert "decay/group0/realised_share" in monitor.last


def test_a_closure_makes_the_gradient_inside_the_step() -> None:
    weight = parameter(30, 4)
    optimizer = SGD([weight], lr=0.1, weight_decay=0.01, decay_policy="decoupled")
    monitor = DecayMonitor(optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.sin().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert monitor.last["decay/group0/realised_to_expected"] == pytest.approx(1, rel=1e-6)
