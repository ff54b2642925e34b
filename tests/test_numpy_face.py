"""The NumPy face: any layout, refusals by name, non-finite gradients, copies."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.numpy import SGD, Adam, AdamW
from tests.tolerances import GRAD_NORM

Array = np.ndarray[Any, Any]
CANARY = 12345.0


def every(name: str, array: Array) -> bool:
    return True


KINDS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda p, **o: AdamW(p, lr=0.1, weight_decay=0.1, decay_mask=every, **o),
    "AMSGrad": lambda p, **o: Adam(p, lr=0.1, amsgrad=True, **o),
    "SGD": lambda p, **o: SGD(p, lr=0.1, weight_decay=0.1, decay_mask=every, **o),
    "momentum": lambda p, **o: SGD(p, lr=0.1, momentum=0.9, nesterov=True, **o),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Buffer:
    """Memory full of canaries, and a view of it that a step may write."""

    def __init__(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: Any) -> None:
        low = sum(min((n - 1) * s, 0) for n, s in zip(shape, stride, strict=True) if n)
        high = sum(max((n - 1) * s, 0) for n, s in zip(shape, stride, strict=True) if n)
        self.memory = np.full(high - low + 40, CANARY, dtype)
        self.view = self.shaped(self.memory, shape, stride, 7 - low)

    @staticmethod
    def shaped(memory: Array, shape: tuple[int, ...], stride: tuple[int, ...], at: int) -> Array:
        strides = [s * memory.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(memory[at:], shape, strides)

    def assert_canaries_live(self) -> None:
        at = (
            self.view.__array_interface__["data"][0] - self.memory.ctypes.data
        ) // self.memory.itemsize
        taken = np.zeros(self.memory.shape, bool)
        stride = tuple(s // self.memory.itemsize for s in self.view.strides)
        self.shaped(taken, self.view.shape, stride, at)[...] = True
        assert (self.memory[~taken] == CANARY).all()


def values(shape: tuple[int, ...], dtype: Any, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_like_contiguous(kind: str, array: Array, grad: Array, steps: int = 3) -> None:
    plain = np.array(array, order="C")
    ours, reference = KINDS[kind]({"w": array}), KINDS[kind]({"w": plain})
    for seed in range(steps):
        grad[...] = values(array.shape, array.dtype, seed)
        ours.step({"w": grad})
        reference.step({"w": np.array(grad, order="C")})
    if array.dtype == np.float16:  # random bits go by the place in memory
        ulp = np.maximum(np.spacing(np.abs(plain)), np.float16(2.0**-14))
        assert (np.abs(array.astype(float) - plain) <= 2 * steps * ulp.astype(float)).all()
    else:
        np.testing.assert_array_equal(array, plain)


@st.composite
def strides(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Draw strides in any order of dimensions, with gaps, and some of them backwards."""
    stride, step = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        step *= draw(st.sampled_from([1, 1, 1, 2, 3])) if shape[dim] > 1 else 1
        stride[dim] = step * draw(st.sampled_from([1, 1, 1, -1]))
        step *= max(shape[dim], 1)
    return tuple(stride)


@each_kind
@given(data=st.data(), dtype=st.sampled_from(["f2", "f4", "f8"]))
def test_any_layout_steps_like_a_contiguous_copy(kind: str, data: Any, dtype: str) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
    buffer = Buffer(shape, data.draw(strides(shape)), dtype)
    buffer.view[...] = values(shape, dtype, 99)
    grad = Buffer(shape, data.draw(strides(shape)), dtype)
    assert_like_contiguous(kind, buffer.view, grad.view)
    buffer.assert_canaries_live()
    grad.assert_canaries_live()


NAMED: dict[str, Callable[[Array], Array]] = {
    "Fortran": np.asfortranarray,
    "transposed": lambda m: m.T,
    "every other row": lambda m: m[::2],
    "backwards": lambda m: m[::-1],
    "a slice of a stack": lambda m: m.reshape(2, 4, 12)[1],
    "0-dim": lambda m: m[2:3, 3:4].reshape(()),
    "empty": lambda m: m[:0],
    "broken alignment": lambda m: (
        np.frombuffer(bytearray(m.nbytes + 1), np.uint8)[1:].view(m.dtype).reshape(m.shape)
    ),
}


@each_kind
@pytest.mark.parametrize("layout", NAMED)
def test_named_layouts(kind: str, layout: str) -> None:
    array = NAMED[layout](values((8, 12), "f4", 7))
    array[...] = values(array.shape, "f4", 8)
    assert_like_contiguous(kind, array, np.empty(array.shape, "f4"))
    misaligned = NAMED["broken alignment"](np.empty(array.shape, "f4"))
    assert_like_contiguous(kind, array, misaligned)


@each_kind
def test_a_broadcast_gradient_is_read_rightly(kind: str) -> None:
    arrays = [np.full((4, 3), 2.0, np.float32) for _ in range(2)]
    grads = [np.broadcast_to(np.float32(1.0), (4, 3)), np.ones((4, 3), np.float32)]
    for array, grad in zip(arrays, grads, strict=True):
        KINDS[kind]([array]).step([grad])
    np.testing.assert_array_equal(*arrays)


def test_names_counts_and_emptiness() -> None:
    optimizer = AdamW({"w": np.ones((2, 2))})
    with pytest.raises(ValueError, match=r"gradients for unknown arrays: \['v'\]"):
        optimizer.step({"v": np.ones((2, 2))})
    with pytest.raises(ValueError, match="2 gradients for 1 arrays"):
        optimizer.step([np.ones((2, 2))] * 2)
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW({})
    with pytest.raises(TypeError, match="got a single array"):
        AdamW(np.ones((2, 2)))
    with pytest.warns(UserWarning, match="saw no gradients"):
        optimizer.step({})
    optimizer.step({"w": None})
    assert optimizer.state == {}


@each_kind
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 2])
def test_raise_leaves_the_elements_untouched(kind: str, value: float, step: int) -> None:
    arrays, clean = {"w": np.ones((3, 2)), "b": np.ones(3)}, {"w": np.ones((3, 2)), "b": np.ones(3)}
    ours, reference = KINDS[kind](arrays), KINDS[kind](clean)
    for _ in range(step):
        for optimizer, owned in ((ours, arrays), (reference, clean)):
            optimizer.step({name: np.ones_like(array) for name, array in owned.items()})
    before = arrays["w"].copy()
    grads = {"w": np.ones((3, 2)), "b": np.ones(3)}
    reference.step(grads)
    grads["w"] = grads["w"].copy()
    grads["w"][1, 1] = value
    with pytest.raises(FloatingPointError, match=rf"at step {step + 1} in 'w' \(1 of 6\)"):
        ours.step(grads)
    good = np.ones((3, 2), bool)
    good[1, 1] = False
    np.testing.assert_array_equal(arrays["b"], clean["b"])
    np.testing.assert_array_equal(arrays["w"][good], clean["w"][good])
    assert arrays["w"][1, 1] == before[1, 1]


@each_kind
def test_skip_drops_the_whole_step(kind: str) -> None:
    arrays = {"w": np.ones((3, 2)), "b": np.ones(3)}
    optimizer = KINDS[kind](arrays, nonfinite="skip")
    good = {name: np.ones_like(array) for name, array in arrays.items()}
    bad = {**good, "b": np.array([1.0, math.nan, 1.0])}
    optimizer.step(bad)
    assert (optimizer.last_step_skipped, optimizer.skipped_steps) == (True, 1)
    assert optimizer.state == {}
    optimizer.step(good)
    assert not optimizer.last_step_skipped
    before = copy.deepcopy((arrays, optimizer.state))
    optimizer.step(bad)
    assert optimizer.skipped_steps == 2
    np.testing.assert_equal((arrays, optimizer.state), before)


@each_kind
@pytest.mark.parametrize("norm", [0.5, 1e9])
def test_clipping_by_the_global_norm(kind: str, norm: float) -> None:
    arrays, others = ({"w": np.ones((3, 2)), "b": np.ones(3)} for _ in range(2))
    clipping, plain = KINDS[kind](arrays, clip_grad_norm=norm), KINDS[kind](others)
    for seed in range(4):
        grads = {name: values(array.shape, "f8", seed) for name, array in arrays.items()}
        total = math.sqrt(sum(float(np.square(grad).sum()) for grad in grads.values()))
        clipping.step(grads)
        assert clipping.last_grad_norm == pytest.approx(total, **GRAD_NORM)
        scale = min(1.0, norm / (total + 1e-6))
        plain.step({name: scale * grad for name, grad in grads.items()})
    for name in arrays:
        np.testing.assert_allclose(arrays[name], others[name], rtol=1e-12, atol=1e-12)


def test_raise_with_clipping_clips_the_finite_elements_by_their_own_norm() -> None:
    arrays, clean = {"w": np.ones((3, 2))}, {"w": np.ones((3, 2))}
    ours, reference = (SGD(each, lr=1.0, clip_grad_norm=0.5) for each in (arrays, clean))
    grad = values((3, 2), "f8", 0)
    spoilt, zeroed = grad.copy(), grad.copy()
    spoilt[2, 0], zeroed[2, 0] = math.inf, 0.0
    with pytest.raises(FloatingPointError, match="1 of 6"):
        ours.step({"w": spoilt})
    reference.step({"w": zeroed})
    assert ours.last_grad_norm == pytest.approx(reference.last_grad_norm, **GRAD_NORM)
    np.testing.assert_allclose(arrays["w"], clean["w"], rtol=1e-14)


@each_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_independent_and_step_on(kind: str, copied: Callable[[Any], Any]) -> None:
    array, grad = np.ones((3, 2)), np.full((3, 2), 0.5)
    optimizer = KINDS[kind if kind != "AdamW" else "AMSGrad"]({"w": array})
    optimizer.step({"w": grad})
    optimizer.step({"w": grad})
    twin = copied(optimizer)
    other = twin.param_groups[0]["params"]["w"]
    optimizer.step({"w": grad})
    assert not np.array_equal(array, other)
    twin.step({"w": grad})
    np.testing.assert_array_equal(array, other)


@each_kind
def test_state_that_is_replaced_or_laid_out_otherwise_is_noticed(kind: str) -> None:
    array, plain = np.ones((3, 4)), np.ones((3, 4))
    ours, reference = KINDS[kind]({"w": array}), KINDS[kind]({"w": plain})
    for seed in range(4):
        grad = values((3, 4), "f8", seed)
        ours.step({"w": grad})
        reference.step({"w": grad})
        for key, value in ours.state.get("w", {}).items():
            ours.state["w"][key] = np.asfortranarray(value) if key != "step" else value.copy()
    np.testing.assert_array_equal(array, plain)
    for key in [key for key in ours.state.get("w", {}) if key != "step"]:
        ours.state["w"][key] = np.zeros(4)
        with pytest.raises(ValueError, match=rf"state '{key}' of 'w' has shape \(4,\)"):
            ours.step({"w": values((3, 4), "f8", 9)})
        ours.state["w"][key] = np.zeros((3, 4))


def test_hyperparameters_may_change_between_steps() -> None:
    array, plain = np.ones((3, 2)), np.ones((3, 2))
    ours, grad = SGD({"w": array}, lr=0.1), np.ones((3, 2))
    for momentum in (0.0, 0.9, 0.5, 0.0):
        ours.param_groups[0]["momentum"] = momentum
        ours.step({"w": grad})
        ours.step({"w": grad})
    buffer = None
    for momentum in (0.0, 0.0, 0.9, 0.9, 0.5, 0.5, 0.0, 0.0):
        direction = grad
        if momentum:
            buffer = grad if buffer is None else momentum * buffer + grad
            direction = buffer
        plain -= 0.1 * direction
    np.testing.assert_allclose(array, plain, rtol=1e-12)
    ours.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1.0 \(param group 0\)"):
        ours.step({"w": grad})


def test_float16_is_rounded_stochastically_and_keeps_its_state_in_float32() -> None:
    for kind in (AdamW, SGD):
        array = np.ones((100, 100), np.float16)
        options = {"decay_policy": "decoupled"} if kind is SGD else {}
        optimizer = kind({"w": array}, lr=1e-3, weight_decay=0.1, seed=3, **options)
        for _ in range(100):
            optimizer.step({"w": np.zeros((100, 100), np.float16)})
        assert array.mean(dtype=float) == pytest.approx((1 - 1e-4) ** 100, rel=2e-4)
        assert all(v.dtype == np.float32 for v in optimizer.state["w"].values())
        assert optimizer.state["w"]["step"] == 100


def test_a_number_replaced_by_an_array_is_read_in_every_step() -> None:
    """Also for arrays without decay, which have scalars of their own."""
    arrays = {"w": np.zeros((2, 2)), "b": np.zeros(2)}
    optimizer = AdamW(arrays, lr=0.125, weight_decay=0.0)
    for _ in range(2):
        optimizer.step({name: np.ones_like(array) for name, array in arrays.items()})
    lr = optimizer.param_groups[0]["lr"] = np.array(0.125)
    optimizer.step({name: np.ones_like(array) for name, array in arrays.items()})
    lr.fill(0.0)
    optimizer.step({name: np.ones_like(array) for name, array in arrays.items()})
    for array in arrays.values():
        np.testing.assert_allclose(array, -0.375)
