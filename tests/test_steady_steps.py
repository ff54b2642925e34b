"""What a steady training loop must not pay for: planning anew, and checking a whole group."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import ebbtide.numpy
from ebbtide.backends.cpu import available
from ebbtide.schedules import Cosine

pytestmark = pytest.mark.skipif(not available(), reason="needs the compiled core")

CASES = [
    ("AdamW", {}),
    ("Adam", {"weight_decay": 0.1}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "decay_policy": "decoupled"}),
]


def arrays() -> dict[str, Any]:
    return {"w": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)}


@pytest.mark.parametrize(("family", "options"), CASES)
def test_only_the_first_step_and_a_joining_array_are_planned(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = getattr(ebbtide.numpy, family)(arrays(), lr=0.1, **options)
    planned: list[int] = []
    plan = optimizer._plan_and_run
    note = lambda given: planned.append(step) or plan(given)  # noqa: E731
    monkeypatch.setattr(optimizer, "_plan_and_run", note)
    schedule = Cosine(10)
    for step in range(10):
        optimizer.param_groups[0]["lr"] = 0.1 * schedule(step)
        grads = arrays() if step >= 4 else {"w": arrays()["w"]}
        optimizer.step(grads)
    assert planned == [0, 4]


@pytest.mark.parametrize(("family", "options"), CASES)
@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("lr", math.nan, "learning rate"),
        ("lr", -0.1, "learning rate"),
        ("lr", math.inf, "learning rate"),
        ("lr", "0.1", "learning rate"),
        ("weight_decay", -1.0, "weight_decay"),
        ("weight_decay", True, "weight_decay"),
    ],
)
def test_a_bad_rate_between_steps_is_refused_before_anything_is_written(
    family: str, options: dict[str, Any], key: str, value: object, says: str
) -> None:
    params = arrays()
    optimizer = getattr(ebbtide.numpy, family)(params, lr=0.1, **options)
    optimizer.step(arrays())
    before = params["w"].copy()
    optimizer.param_groups[0][key] = value
    with pytest.raises((ValueError, TypeError), match=says):
        optimizer.step(arrays())
    assert (params["w"] == before).all()
    optimizer.param_groups[0][key] = 0.05
    optimizer.step(arrays())
    assert (params["w"] != before).all()


def test_a_share_of_the_whole_is_refused_between_steps() -> None:
    optimizer = ebbtide.numpy.AdamW(arrays(), lr=0.1, weight_decay=0.1)
    optimizer.step(arrays())
    optimizer.param_groups[0]["lr"] = 10.0
    with pytest.raises(ValueError, match="share must be below 1"):
        optimizer.step(arrays())


@pytest.mark.parametrize(("family", "options"), CASES)
def test_a_schedule_steps_as_fresh_values_do(family: str, options: dict[str, Any]) -> None:
    """Change lr and weight decay in place, and compare with a reader that has seen nothing."""
    quick, slow = arrays(), arrays()
    optimizers = [getattr(ebbtide.numpy, family)(p, lr=0.1, **options) for p in (quick, slow)]
    for step in range(6):
        rates = {"lr": 0.1 / (step + 1), "weight_decay": 0.01 * step}
        for optimizer in optimizers:
            optimizer.param_groups[0].update(rates)
        for reader in optimizers[1]._readers:
            reader._seen = reader._checked = None
        for optimizer in optimizers:
            optimizer.step(arrays())
        assert (quick["w"] == slow["w"]).all()
