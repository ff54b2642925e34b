"""The oracle ladder: reference.py → the core in double, bit for bit → float32 near it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide import _core
from tests.cases import Case, gradients, matrix, start
from tests.checks import (
    assert_float32_is_near,
    assert_float64_is_the_reference,
    assert_layout_does_not_matter,
    state_arrays,
    stepped,
)

CASES = list(matrix())
SETS = _core.instruction_sets()


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run under each instruction set that this machine has."""
    before = _core.instruction_set()
    _core.set_instruction_set(request.param)
    yield request.param
    _core.set_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the number of threads back after a test that sets it."""
    yield
    _core.set_threads(0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_float64_equals_the_reference_bit_for_bit(case: Case) -> None:
    assert_float64_is_the_reference(case)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_float32_stays_near_float64(case: Case) -> None:
    assert_float32_is_near(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_does_not_matter(case: Case) -> None:
    assert_layout_does_not_matter(case)


def _float32(case: Case, size: int) -> list[np.ndarray]:
    grads = [g.astype(np.float32) for g in gradients((size,), 3, 7)]
    param = start((size,), 8).astype(np.float32)
    optimizer = stepped(case, param, grads)
    return [param, *state_arrays(optimizer)]


@pytest.mark.parametrize("rule", ["adam", "amsgrad", "sgd-nesterov"])
@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads(rule: str) -> None:
    results = []
    for count in (1, 2, 3, 7):
        _core.set_threads(count)
        results.append(_float32(Case(rule, "decoupled"), 100_003))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_builds_with_fma_agree_bit_for_bit() -> None:
    with_fma = [name for name in SETS if name != "baseline"]
    before = _core.instruction_set()
    results = []
    for name in with_fma:
        _core.set_instruction_set(name)
        results.append(_float32(Case("adam", "decoupled"), 1003))
    _core.set_instruction_set(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    rule=st.sampled_from(["adam", "amsgrad", "sgd", "sgd-momentum"]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_a_concatenation_steps_like_its_parts(
    sizes: list[int], rule: str, dtype: type[np.floating]
) -> None:
    case = Case(rule, "decoupled", steps=3)
    total = sum(sizes)
    grads = [g.astype(dtype) for g in gradients((total,), 3, 9)]
    whole = start((total,), 10).astype(dtype)
    parts = np.split(whole.copy(), np.cumsum(sizes)[:-1])
    stepped(case, whole, grads)
    for i, part in enumerate(parts):
        stepped(case, part, [np.split(g, np.cumsum(sizes)[:-1])[i].copy() for g in grads])
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(order=st.permutations(range(40)), rule=st.sampled_from(["adam", "sgd-momentum"]))
def test_permuting_parameters_permutes_results(order: list[int], rule: str) -> None:
    case = Case(rule, "l2", steps=3)
    grads = [g.astype(np.float32) for g in gradients((40,), 3, 11)]
    param = start((40,), 12).astype(np.float32)
    shuffled = param[order].copy()
    stepped(case, param, grads)
    stepped(case, shuffled, [g[order].copy() for g in grads])
    np.testing.assert_array_equal(shuffled, param[order])


def test_gradients_are_never_written() -> None:
    grads = gradients((4, 9), 5, 13)
    copies = [grad.copy() for grad in grads]
    stepped(Case("adam", "l2", maximize=True), start((4, 9), 14), grads)
    for grad, copy in zip(grads, copies, strict=True):
        np.testing.assert_array_equal(grad, copy)


def test_nothing_outside_the_arrays_is_written() -> None:
    canary = np.float32(123.25)
    buffer = np.full(1000, canary, np.float32)
    inside = buffer[301:698]
    inside[:] = 1.0
    grads = [g.astype(np.float32) for g in gradients((397,), 4, 15)]
    stepped(Case("adam", "decoupled"), inside, grads)
    assert (buffer[:301] == canary).all()
    assert (buffer[698:] == canary).all()
    assert (inside != 1.0).all()


def test_subnormal_results_are_flushed_and_the_callers_mode_is_kept() -> None:
    tiny = np.float32(1e-42)
    param = np.zeros(64, np.float32)
    optimizer = stepped(Case("sgd-momentum", "none"), param, [np.full(64, tiny)])
    assert not optimizer.state["w"]["momentum_buffer"].any()
    assert tiny * np.float32(1.0) == tiny, "the caller's floating-point state was changed"
