"""`explain`: a table of the groups, or the forecast of a run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import ebbtide.torch
from ebbtide.convert import adam_l2_to_adamw
from ebbtide.schedules import Cosine, Linear
from ebbtide.torch.explain import explain
from ebbtide.torch.groups import param_groups
from ebbtide.torch.scales import gradient_scales
from ebbtide.torch.scheduler import Scheduler


def weight(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values))


def test_without_a_length_the_groups_are_listed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    groups = param_groups(model, weight_decay=0.1)
    for subject in (groups, torch.optim.AdamW(groups)):
        assert "0.weight" in str(explain(subject))
    assert json.loads(explain(groups).to_json())


def test_frozen_parameters_of_a_group_are_listed_as_such() -> None:
    codes = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.uint8), requires_grad=False)
    table = explain(ebbtide.torch.AdamW([("codes", codes), ("w", weight(1.0))]))
    row = next(row for row in table.rows if row.name == "codes")
    assert (row.frozen, row.reason, row.state_bytes) == (True, "takes no gradient", 0)


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.AdamW, ebbtide.torch.AdamW], ids=["torch", "ours"]
)
def test_with_a_length_every_group_is_forecast(optimizer_class: Any) -> None:
    optimizer = optimizer_class(
        [
            {"params": [weight(1.0)], "weight_decay": 0.1},
            {"params": [weight(1.0)], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    seen = explain(optimizer, total_steps=10_000, steps_per_epoch=500, schedule=Cosine(10_000))
    assert seen.groups[0].total_decay == pytest.approx(0.50005, abs=1e-6)
    assert [group.verdict for group in seen.groups] == ["active", "inert"]
    assert seen.groups[0].timescale == pytest.approx((10_000, 20, 1.0))


def test_policies_of_ours_are_known() -> None:
    shares = {}
    for policy in ("decoupled", "independent", "corrected"):
        optimizer = ebbtide.torch.AdamW(
            [weight(1.0)], lr=1e-3, base_lr=2e-3, weight_decay=0.01, decay_policy=policy
        )
        shares[policy] = explain(optimizer, total_steps=10).groups[0].largest_share
    assert shares == pytest.approx({"decoupled": 1e-5, "independent": 5e-3, "corrected": 5e-6})


def test_the_scheduler_that_drives_the_optimizer_serves_as_schedule() -> None:
    optimizer = torch.optim.AdamW([weight(1.0)], lr=1e-3, weight_decay=0.1)
    scheduler = Scheduler(optimizer, lr=Cosine(100), weight_decay=Linear(100))
    for _ in range(60):
        optimizer.param_groups[0]["params"][0].grad = torch.zeros(1)
        optimizer.step()
    seen = explain(optimizer, total_steps=100, schedule=scheduler).groups[0]
    kappa = sum(1e-4 * Cosine(100)(t) * Linear(100)(t) for t in range(100))
    assert seen.total_decay == pytest.approx(kappa, rel=1e-12)
    with pytest.raises(ValueError, match="drives the weight decay"):
        explain(optimizer, total_steps=100, schedule=scheduler, weight_decay_schedule=Linear(100))


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.Adam, ebbtide.torch.Adam], ids=["torch", "ours"]
)
def test_l2_under_adam_is_judged_by_the_second_moment_of_the_run(optimizer_class: Any) -> None:
    param = weight(0.0, 0.0, 0.0, 0.0)
    optimizer = optimizer_class([param], lr=1e-3, weight_decay=1e-3)
    assert explain(optimizer, total_steps=100).groups[0].verdict == "unknown"
    param.grad = torch.tensor([0.0, 0.01, 0.02, 0.04])
    optimizer.step()
    # √v̂ after the first step is |g|; the dead weight is left out of the median.
    seen = explain(optimizer, total_steps=100).groups[0]
    assert seen.largest_share == pytest.approx(1e-3 * 1e-3 / 0.02, rel=1e-6)
    assert seen.settings.gradient_scale == pytest.approx(0.02, rel=1e-6)


def test_gradient_scales_correct_the_bias_and_serve_the_conversion() -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(200, 300)), torch.nn.Parameter(torch.zeros(50))]
    optimizer = torch.optim.Adam([{"params": params}, {"params": [weight(0.0)]}])
    for _ in range(30):
        for param in params:
            param.grad = 0.01 * torch.randn_like(param)
        optimizer.step()
    scales = gradient_scales(optimizer)
    assert scales[1] == []
    assert 10_000 < len(scales[0]) < 40_000
    assert math.isclose(sum(s * s for s in scales[0]) / len(scales[0]), 1e-4, rel_tol=0.02)
    assert gradient_scales(optimizer.state_dict()) == scales
    converted = adam_l2_to_adamw(1e-3, scales[0])
    assert converted.value == pytest.approx(0.1, rel=0.05)
    assert converted.single_value


def test_misuse_is_refused() -> None:
    optimizer = torch.optim.AdamW([weight(1.0)])
    with pytest.raises(ValueError, match="needs total_steps"):
        explain(optimizer, schedule=Cosine(10))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="needs an optimizer"):
        explain([{"params": [weight(1.0)]}], total_steps=10)
    with pytest.raises(TypeError, match="must be a schedule, a function of the step, got 'cosine'"):
        explain(optimizer, total_steps=10, schedule="cosine")  # type: ignore[call-overload]
    for model in (torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))):
        with pytest.raises(TypeError, match=r"of a model: explain\(param_groups\(model"):
            explain(model)
