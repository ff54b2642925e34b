"""A warning shows the user's line, however many frames of ours and of torch's lie between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import ebbtide.numpy
from ebbtide.torch import SGD, Adam, AdamW

each_class = pytest.mark.parametrize("kind", [Adam, AdamW, SGD])


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


def assert_shown_here(match: str, act: Callable[[], Any]) -> None:
    with pytest.warns(UserWarning, match=match) as said:
        act()
    assert [Path(each.filename) for each in said] == [Path(__file__)]


@each_class
def test_of_a_constructor(kind: Any) -> None:
    class Own(kind):  # type: ignore[misc]
        pass

    lost = {"lr": 1e-6, "weight_decay": 1e-3, "decay_policy": "decoupled"}
    for maker in (kind, Own):
        assert_shown_here("most of it is lost", lambda maker=maker: maker([parameter()], **lost))
    optimizer = kind([parameter()])
    group = {"params": [parameter()], **lost}
    assert_shown_here("most of it is lost", lambda: optimizer.add_param_group(group))


@each_class
def test_of_a_step(kind: Any) -> None:
    plain, hooked, scheduled = (kind([parameter()]) for _ in range(3))
    hooked.register_step_post_hook(lambda *_: None)
    StepLR(scheduled, 1)
    for optimizer in (plain, hooked, scheduled):
        assert_shown_here("saw no gradients", optimizer.step)


def test_of_a_state_that_is_loaded() -> None:
    param, fresh = parameter(), AdamW([parameter()]).state_dict()
    optimizer = AdamW([param])
    param.grad = torch.ones(2)
    optimizer.step()
    assert_shown_here("holds no moments", lambda: optimizer.load_state_dict(fresh))


def test_over_numpy_arrays() -> None:
    optimizer = ebbtide.numpy.AdamW({"w": np.ones((2, 2))})
    assert_shown_here("saw no gradients", lambda: optimizer.step({}))
