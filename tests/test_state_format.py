"""Which format the state of a parameter is kept in, and its bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.groups import (
    is_embedding_of_group,
    master_format_for,
    moments_of_group,
    state_bytes,
    state_format_for,
)


@pytest.mark.parametrize(
    ("shape", "requested", "dtype", "embedding", "expected"),
    [
        ((64, 64), "8bit", "float32", False, "8bit"),
        ((64, 64), "8bit", "bfloat16", False, "8bit"),
        ((64, 63), "8bit", "float32", False, "float32"),
        ((4096,), "8bit", "float32", False, "float32"),
        ((64, 64), "bfloat16", "float32", False, "bfloat16"),
        ((64,), "bfloat16", "bfloat16", False, "float32"),
        ((64, 64), "8bit", "float32", True, "float32"),
        ((64,), None, "bfloat16", False, "bfloat16"),
        ((64, 64), None, "float16", True, "bfloat16"),
        ((64, 64), None, "float32", False, "float32"),
        ((64, 64), "8bit", "float64", False, "float64"),
        ((64, 64), None, "complex64", False, "complex64"),
    ],
)
def test_state_format_follows_the_whole_parameter(
    shape: tuple[int, ...], requested: str | None, dtype: str, embedding: bool, expected: str
) -> None:
    found = state_format_for(shape, requested=requested, dtype=dtype, embedding=embedding)
    assert found == expected


def test_embeddings_take_low_bit_state_where_asked() -> None:
    wanted = {"requested": "8bit", "embedding": True, "low_bit_embeddings": True}
    assert state_format_for((64, 64), **wanted) == "8bit"  # type: ignore[arg-type]


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="Invalid state_format: '4bit'; one of float32, bfloat16"):
        state_format_for((4, 4), requested="4bit")
    with pytest.raises(ValueError, match="Invalid master_format: '16bit'"):
        master_format_for("bfloat16", "16bit")


def test_a_group_that_lists_its_embeddings_decides_against_the_name() -> None:
    group = {"embeddings": "shared.weight,wpe.weight"}
    assert is_embedding_of_group("wpe.weight", (4, 4), group)
    assert not is_embedding_of_group("wte.weight", (4, 4), group)
    assert is_embedding_of_group("wte.weight", (4, 4), {})


@pytest.mark.parametrize(
    ("group", "moments"),
    [
        ({}, 2), ({"betas": (0.9, 0.999)}, 2), ({"betas": (0.9, 0.999), "amsgrad": True}, 3),
        ({"momentum": 0.9}, 1), ({"momentum": 0}, 0),
    ],
)  # fmt: skip
def test_moments_are_counted_from_the_group(group: dict[str, object], moments: int) -> None:
    assert moments_of_group(group) == moments


@given(rows=st.integers(1, 300), columns=st.integers(1, 600), parts=st.integers(1, 5))
def test_shards_by_rows_take_the_bytes_of_the_whole(rows: int, columns: int, parts: int) -> None:
    cuts = [rows * part // parts for part in range(parts + 1)]
    shards = [(b - a) * columns for a, b in itertools.pairwise(cuts)]
    for state_format in ("float32", "bfloat16", "8bit"):
        whole = state_bytes((rows, columns), state_format)
        assert sum(state_bytes((rows, columns), state_format, 2, n) for n in shards) == whole
