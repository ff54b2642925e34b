"""What the NumPy face refuses, by name, before anything is written."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from ebbtide.numpy import AdamW
from tests.test_numpy_face import KINDS, Array, each_kind


def masked() -> Array:
    return np.ma.masked_array(np.zeros(3), [True, False, False])


def read_only() -> Array:
    array = np.zeros(3)
    array.flags.writeable = False
    return array


BAD_ARRAYS: dict[str, tuple[Any, type[Exception], str]] = {
    "list": ([1.0, 2.0], TypeError, "array 'w' is a list, not a NumPy array"),
    "integers": (np.zeros(3, int), TypeError, "array 'w' has dtype int64"),
    "bools": (np.zeros(3, bool), TypeError, "array 'w' has dtype bool"),
    "complex": (np.zeros(3, complex), TypeError, "array 'w' has dtype complex128"),
    "big-endian": (np.zeros(3, ">f4"), TypeError, "array 'w' has dtype >f4"),
    "objects": (np.zeros(3, object), TypeError, "array 'w' has dtype object"),
    "longdouble": (np.zeros(3, np.longdouble), TypeError, "array 'w' has dtype float128"),
    "masked": (masked(), TypeError, "array 'w' is masked"),
    "read-only": (read_only(), ValueError, "array 'w' is read-only"),
    "expanded": (
        np.lib.stride_tricks.as_strided(np.zeros(3), (4, 3), (0, 8)),
        ValueError,
        "elements of array 'w' share memory",
    ),
    "overlapping": (
        np.lib.stride_tricks.as_strided(np.zeros(10), (3, 4), (16, 8)),
        ValueError,
        "elements of array 'w' share memory",
    ),
    "field": (
        np.zeros(3, [("a", "f4"), ("b", "f8")])["b"],
        ValueError,
        "as a field of a structured array has",
    ),
}


@each_kind
@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_what_cannot_be_stepped_is_refused_by_name(kind: str, what: str) -> None:
    array, error, message = BAD_ARRAYS[what]
    with pytest.raises(error, match=message):
        KINDS[kind]({"w": array})


BAD_GRADS: dict[str, tuple[Any, type[Exception], str]] = {
    "list": ([0.0, 0.0, 0.0], TypeError, "gradient of 'w' is a list"),
    "dtype": (np.zeros(3, np.float32), TypeError, "gradient of 'w' has dtype float32, the array"),
    "shape": (
        np.zeros((3, 1)),
        ValueError,
        r"gradient of 'w' has shape \(3, 1\), the array \(3,\)",
    ),
    "masked": (masked(), TypeError, "gradient of 'w' is masked"),
}


@each_kind
@pytest.mark.parametrize("what", BAD_GRADS)
@pytest.mark.parametrize("step", [0, 2])
def test_a_gradient_that_does_not_fit_is_refused_before_anything_is_written(
    kind: str, what: str, step: int
) -> None:
    arrays = {"b": np.ones(2), "w": np.ones(3)}
    optimizer = KINDS[kind](arrays)
    for _ in range(step):
        optimizer.step({name: np.ones_like(array) for name, array in arrays.items()})
    before = copy.deepcopy((arrays, optimizer.state))
    grad, error, message = BAD_GRADS[what]
    with pytest.raises(error, match=message):
        optimizer.step({"b": np.ones(2), "w": grad})
    np.testing.assert_equal((arrays, optimizer.state), before)


@each_kind
def test_arrays_that_share_memory_are_refused_and_those_that_interleave_are_not(kind: str) -> None:
    memory = np.ones((6, 8))
    halves = {"left": memory[:, :3], "right": memory[:, 3:]}
    optimizer = KINDS[kind](halves)
    optimizer.step({name: np.ones_like(half) for name, half in halves.items()})
    assert (memory != 1).all()
    before = memory.copy()
    both = {"left": memory[:, :4], "right": memory[:, 3:]}
    with pytest.raises(ValueError, match="'left' and 'right' share memory"):
        KINDS[kind](both).step({name: np.ones_like(half) for name, half in both.items()})
    np.testing.assert_array_equal(memory, before)


def test_an_array_listed_twice_is_refused() -> None:
    array = np.ones((2, 2))
    with pytest.raises(ValueError, match="'0' and '1' share memory"):
        AdamW([array, array]).step([np.ones((2, 2)), np.ones((2, 2))])
    with pytest.raises(ValueError, match="array 'w' appears in more than one place"):
        AdamW([{"params": {"w": array}}, {"params": {"w": array}}])


@each_kind
def test_an_array_made_read_only_is_noticed(kind: str) -> None:
    """Parameters are refused; state that must not be written is copied."""
    array, grad = np.ones((3, 2), np.float32), np.ones((3, 2), np.float32)
    optimizer = KINDS[kind]({"w": array})
    for _ in range(3):
        optimizer.step({"w": grad})
    array.flags.writeable = False
    before, state = array.copy(), {k: v.copy() for k, v in optimizer.state.get("w", {}).items()}
    with pytest.raises(ValueError, match="array 'w' is read-only"):
        optimizer.step({"w": grad})
    assert np.array_equal(array, before)
    for key, value in state.items():
        assert np.array_equal(optimizer.state["w"][key], value)
    array.flags.writeable = True
    kept = dict(optimizer.state.get("w", {}))
    for value in kept.values():
        value.flags.writeable = False
    optimizer.step({"w": np.broadcast_to(np.float32(1.0), (3, 2))})
    assert (array < before).all()
    for key, value in kept.items():
        assert np.array_equal(value, state[key])
        assert not np.array_equal(optimizer.state["w"][key], value)


@each_kind
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({0: np.ones((2, 2))}, "the name of an array must be a string, got 0"),
        (np.ones((2, 2)), "must be a mapping or a list of arrays, got a single array"),
        ([{"params": np.ones((2, 2))}], "must be a mapping or a list of arrays, got a single"),
    ],
)
def test_parameters_without_names_or_a_list_are_refused(
    kind: str, params: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        KINDS[kind](params)


@pytest.mark.parametrize("mask", [True, ["w"]])
def test_a_decay_mask_of_another_kind_is_refused(mask: Any) -> None:
    with pytest.raises(TypeError, match="decay_mask must be a mapping from names to bools, or"):
        AdamW({"w": np.ones((2, 2))}, decay_mask=mask)
