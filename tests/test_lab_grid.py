"""Grids: what the command line accepts, and the one line it answers otherwise."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.lab.errors import InputError
from ebbtide.lab.grid import parse_grid
from ebbtide.lab.optimizers import OPTIMIZERS, choose_optimizers, scaled_grid


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("0.1", (0.1,)),
        ("1e-4..1e-1:4", (1e-4, 1e-3, 1e-2, 1e-1)),
        ("0.3,0.1,0.3", (0.1, 0.3)),
        (" 1 , 2..8:3 ", (1.0, 2.0, 4.0, 8.0)),
        ("0,1e-3", (0.0, 1e-3)),
    ],
)
def test_grid_is_read(text: str, points: tuple[float, ...]) -> None:
    assert parse_grid(text, name="weight decay", allow_zero=True) == points


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no point"),
        (" , ", "has no point"),
        ("a", "'a' in the lr grid is no number"),
        ("1..2", "says no number of points"),
        ("1..2:x", "says no number of points"),
        ("1..2:1", "must have 2 to 1000 points"),
        ("1..2:1001", "must have 2 to 1000 points"),
        ("2..1:3", "must run from above 0"),
        ("0..1:3", "must run from above 0"),
        ("1..inf:3", "must run from above 0"),
        ("0", "holds 0; it must be more than 0"),
        ("-1", "holds -1"),
        ("nan", "holds nan"),
        ("inf", "holds inf"),
        ("1..2..3:4", "no number and no range"),
    ],
)
def test_bad_grid_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        parse_grid(text, name="lr")
    assert "\n" not in str(caught.value)


@given(low=st.floats(1e-8, 1.0), factor=st.floats(1.001, 1e6), count=st.integers(2, 40))
def test_range_has_its_ends_and_equal_ratios(low: float, factor: float, count: int) -> None:
    points = parse_grid(f"{low!r}..{low * factor!r}:{count}", name="lr")
    assert (points[0], points[-1], len(points)) == (low, low * factor, count)
    ratios = [math.log(b / a) for a, b in pairwise(points)]
    assert max(ratios) - min(ratios) < 1e-9


def test_optimizers_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown optimizer 'rmsprop'"):
        choose_optimizers("adam,rmsprop")
    with pytest.raises(InputError, match="no optimizer named"):
        choose_optimizers(" , ")


def test_grids_of_all_optimizers_have_the_same_size() -> None:
    sizes = {
        tuple(map(len, scaled_grid(spec, [1e-3, 1e-2], [0.0, 0.1, 1.0])))
        for spec in OPTIMIZERS.values()
    }
    assert sizes == {(2, 3)}


def test_a_cell_that_removes_everything_cannot_run() -> None:
    assert not OPTIMIZERS["adamw"].can_run(0.1, 10.0)
    assert not OPTIMIZERS["sgdw"].can_run(1.0, 1.0)
    assert OPTIMIZERS["adamw"].can_run(0.1, 9.9)
    # An L2 term goes through the gradient and removes no fixed share.
    assert OPTIMIZERS["adam"].can_run(0.1, 10.0)
    assert OPTIMIZERS["sgd"].can_run(1.0, 1.0)
