"""What `DecayMonitor` leaves out, refuses, and finds in odd layouts and shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from ebbtide.torch import AdamW, DecayMonitor, decay_in_force, step_in_backward
from tests.test_monitor import parameter, steps


def test_parameters_without_a_gradient_are_left_out() -> None:
    weight, frozen = parameter(30, 4), parameter(9)
    optimizer = AdamW([weight, frozen], lr=0.1, weight_decay=0.01)
    monitor = DecayMonitor(optimizer, per_param=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert "decay/group0/param0/realised_share" in monitor.last
    assert not any("param1" in key for key in monitor.last)


def test_what_cannot_be_measured_is_left_out() -> None:
    """Empty groups and parameters, and those that start at zero."""
    weight, empty = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(0))
    groups = [{"params": []}, {"params": [empty]}, {"params": [weight]}]
    optimizer = AdamW(groups, lr=0.01)
    monitor = DecayMonitor(optimizer)
    weight.grad, empty.grad = torch.ones(3), torch.ones(0)
    optimizer.step()
    assert "decay/group0/param_rms" not in monitor.last
    assert "decay/group1/param_rms" not in monitor.last
    assert "decay/group2/update_rms" in monitor.last
    assert "decay/group2/realised_share" not in monitor.last
    assert "decay/group2/update_to_weight" not in monitor.last


def test_steps_inside_backward_leave_the_settings() -> None:
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    handle = step_in_backward(model, optimizer)
    monitor = DecayMonitor(optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert monitor.last == pytest.approx(
        {
            "decay/skipped_steps": 0,
            "decay/group0/lr": 0.01,
            "decay/group0/weight_decay": 0.1,
            "decay/group0/share": 0.001,
            "decay/group0/timescale_steps": 1000,
        }
    )
    handle.remove()


def test_layouts_other_than_by_rows() -> None:
    base = parameter(10, 12)
    views = [
        nn.Parameter(base.detach().t()),
        nn.Parameter(base.detach().clone()[:, ::2]),
        nn.Parameter(parameter(2, 3, 4, 5).detach().to(memory_format=torch.channels_last)),
    ]
    optimizer = AdamW(views, lr=0.01, weight_decay=0.1)
    steps(optimizer, 1)
    monitor = DecayMonitor(optimizer, per_param=True, samples=20)
    steps(optimizer, 1, seed=9)
    for index in range(3):
        ratio = monitor.last[f"decay/group0/param{index}/realised_to_expected"]
        assert ratio == pytest.approx(1, rel=1e-6)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two, of which this process is one and the other does not exist."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW])
def test_distributed_parameters_are_measured_on_the_local_shard(kind: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    local = parameter(6, 4).detach()
    weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
    optimizer = kind([weight], lr=0.01, weight_decay=0.1)
    monitor = DecayMonitor(optimizer)
    rms = float(local.square().mean().sqrt())
    grad = DTensor.from_local(parameter(6, 4, seed=3).detach(), mesh, [Shard(0)], run_check=False)
    weight.grad = grad
    optimizer.step()
    assert monitor.last["decay/group0/param_rms"] == pytest.approx(rms)
    assert monitor.last["decay/group0/realised_to_expected"] == pytest.approx(1, rel=1e-6)


def test_refusals() -> None:
    weight = parameter(2)
    with pytest.raises(TypeError, match="not Adagrad"):
        DecayMonitor(torch.optim.Adagrad([weight]))
    for value in (0, 2.5, "10"):
        for name in ("every", "samples"):
            with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
                DecayMonitor(AdamW([weight]), **{name: value})  # type: ignore[arg-type]


def test_decay_in_force_names_every_group() -> None:
    groups = [
        {"params": [parameter(3, 2)], "weight_decay": 0.1, "name": "decay"},
        {"params": [parameter(3)], "weight_decay": 0.0},
    ]
    assert decay_in_force(AdamW(groups, lr=1e-3, weight_decay=0.3)) == [
        "decay (1 tensors, 6 numbers): lr 0.001, weight_decay 0.1 (decoupled) removes 0.0001 of a "
        "parameter in a step, timescale 10,000 steps",
        "group1 (1 tensors, 3 numbers): lr 0.001, no weight decay",
        "weight_decay=0.3 was the optimizer's argument or default; no group uses it",
    ]
    assert decay_in_force(torch.optim.Adam([parameter(3)], weight_decay=0.1)) == [
        "group0 (1 tensors, 3 numbers): lr 0.001, weight_decay 0.1 as L2, in the gradient"
    ]
    assert decay_in_force(AdamW([parameter(3)], lr=0.0, weight_decay=0.1)) == [
        "group0 (1 tensors, 3 numbers): lr 0, weight_decay 0.1 (decoupled), nothing removed while "
        "lr is 0"
    ]
