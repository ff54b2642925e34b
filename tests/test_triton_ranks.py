"""Shards that GPUs step: ranks decide and raise together, and no host waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import triton_tasks
from tests.rank_pool import RankPool
from tests.rank_tasks import Numbers
from tests.tolerances import GRAD_NORM, TRITON_CLIPPED


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.stop()


def assert_close(ours: Numbers, expected: Numbers) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, **TRITON_CLIPPED)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize(
    "options", [{"clip_grad_norm": 0.05}, {"clip_grad_norm": 0.05, "nonfinite": "skip"}], ids=str
)
def test_ranks_decide_together_on_their_devices(
    ranks: RankPool, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    ours = ranks.run(triton_tasks.decided, "triton", shape, options)
    theirs = ranks.run(triton_tasks.decided, "core", shape, options)
    for (norm, skipped, numbers), (their_norm, their_skipped, expected) in zip(
        ours, theirs, strict=True
    ):
        assert norm == pytest.approx(their_norm, **GRAD_NORM)
        assert skipped == their_skipped == ("nonfinite" in options)
        assert_close(numbers, expected)


def test_what_is_not_finite_on_one_rank_is_raised_on_all_in_the_next_step(ranks: RankPool) -> None:
    (first, numbers), (second, others) = ranks.run(triton_tasks.raised, "triton")
    (core, expected), _ = ranks.run(triton_tasks.raised, "core")
    assert [bool(each) for each in first] == [False, False, True, False]
    assert first[2] == core[1] == "non-finite gradient on another rank, which names it"
    assert "step 2 in 'weight' (1 of" in second[2]
    assert second[:2] == [*second[3:], ""]
    for name, value in expected.items():
        assert torch.equal(numbers[name], value), name
        assert torch.equal(others[name], value), name


def test_asking_after_a_step_raises_on_every_rank(ranks: RankPool) -> None:
    first, second = ranks.run(triton_tasks.asked)
    assert first == "non-finite gradient on another rank, which names it"
    assert "step 1 in 'weight' (1 of" in second
