"""Checks that several tests make, and that must fail on a mutant (`test_mutants.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np

import ebbtide.numpy
from tests.cases import Case, gradients, optimizer_of, reference_trajectory, start
from tests.tolerances import FLOAT32_AGAINST_FLOAT64

Array = np.ndarray[Any, Any]


def stepped(case: Case, param: Array, grads: list[Array], **options: Any) -> Any:
    """Step `param` in place on the NumPy face; returns the optimizer."""
    options.setdefault("decay_mask", lambda name, array: True)
    optimizer = optimizer_of(ebbtide.numpy, case, {"w": param}, **options)
    for grad in grads:
        optimizer.step({"w": grad})
    return optimizer


def state_arrays(optimizer: Any) -> list[Array]:
    """Return the state of "w" in the order of the reference's tuples."""
    keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
    state = optimizer.state.get("w", {})  # plain SGD keeps none
    return [state[key] for key in keys if key in state]


def assert_float64_is_the_reference(case: Case, shape: tuple[int, ...] = (3, 11)) -> None:
    """Assert equality, bit for bit, with `reference.py`."""
    param, grads = start(shape, 1), gradients(shape, case.steps, 2)
    expected = np.array(reference_trajectory(case, param, grads)).T
    optimizer = stepped(case, param, grads)
    for ours, theirs in zip([param, *state_arrays(optimizer)], expected, strict=True):
        np.testing.assert_array_equal(ours.ravel(), theirs)


def assert_float32_is_near(case: Case, shape: tuple[int, ...] = (5, 31)) -> None:
    """Assert that float32 stays within the tolerance of the float64 trajectory."""
    grads32 = [grad.astype(np.float32) for grad in gradients(shape, case.steps, 3)]
    param32 = start(shape, 4).astype(np.float32)
    param64 = param32.astype(np.float64)
    stepped(case, param32, grads32)
    stepped(case, param64, [grad.astype(np.float64) for grad in grads32])
    np.testing.assert_allclose(param32, param64, **FLOAT32_AGAINST_FLOAT64)


def assert_layout_does_not_matter(case: Case) -> None:
    """Assert that a transposed array and gradient step like contiguous ones."""
    shape = (6, 10)
    param, grads = start(shape, 5), gradients(shape, case.steps, 6)
    plain = param.copy()
    stepped(case, plain, grads)
    mixed = np.asfortranarray(param)
    stepped(case, mixed, grads)
    np.testing.assert_array_equal(mixed, plain)
    gaps = np.zeros((12, 20))
    gaps[::2, ::2] = param
    stepped(case, gaps[::2, ::2], [np.asfortranarray(grad) for grad in grads])
    np.testing.assert_array_equal(gaps[::2, ::2], plain)
    assert not gaps[1::2].any(), "wrote between the elements of a view"
    assert not gaps[:, 1::2].any(), "wrote between the elements of a view"
