"""Four ranks in two dimensions: one norm over parameters that are spread in several ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import mesh_tasks
from tests.rank_pool import RankPool
from tests.tolerances import GRAD_NORM, TORCH_FLOAT32


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.stop()


# "hybrid": one dimension holds copies, the other shards. "tensor": rows and columns are spread over
# one, all of it again over the other. "mixed": beside these, parameters that some ranks do not have
# or that all ranks have whole, as DTensors and without.
@pytest.mark.parametrize("layout", ["hybrid", "tensor", "mixed"])
@pytest.mark.parametrize("backend", ["core", "triton"])
@pytest.mark.parametrize("nonfinite", ["skip", pytest.param("propagate", marks=pytest.mark.slow)])
def test_every_element_counts_once_and_no_device_is_waited_for(
    ranks: RankPool, nonfinite: str, backend: str, layout: str
) -> None:
    options: dict[str, Any] = {"nonfinite": nonfinite}
    expected, theirs = mesh_tasks.by_torch(layout, options)
    for norms, skipped, reads, ours in ranks.run(mesh_tasks.clipped, backend, layout, options):
        assert norms == pytest.approx(expected, **GRAD_NORM)
        assert skipped == (nonfinite == "skip")
        assert (reads == 0) == (backend == "triton")
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, **TORCH_FLOAT32)


@pytest.mark.parametrize(("words", "launches"), [({}, 2), ({"fused": True}, 3)], ids=str)
def test_without_a_norm_rows_that_are_spread_in_several_ways_share_their_launches(
    ranks: RankPool, words: dict[str, Any], launches: int
) -> None:
    """One for each dtype; a scaler's word takes one more. The norm asked for later is right."""
    expected, _ = mesh_tasks.by_torch("mixed", {})
    for found, norm in ranks.run(mesh_tasks.launched, words):
        assert found == [launches, launches]
        assert norm == pytest.approx(expected[-1], **GRAD_NORM)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("layout", ["mixed", "crossed"])
@pytest.mark.parametrize("backend", ["core", "triton"])
def test_what_a_loss_scaler_finds_on_one_rank_drops_the_step_on_all(
    ranks: RankPool, backend: str, layout: str, clip: float | None
) -> None:
    for first, second in ranks.run(mesh_tasks.scaled, backend, layout, clip):
        assert first[:2] == (False, False)
        assert second[:2] == (True, True)
        assert (first[2] == second[2] == 0) == (backend == "triton")
