"""Any layout of parameter, gradient and state: right, or refused by name before any write.

Every buffer lies in a larger one whose other elements are canaries.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ebbtide.torch import SGD, Adam, AdamW

CANARY = 12345.0
KINDS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda params: AdamW(params, lr=0.1, weight_decay=0.1),
    "AMSGrad": lambda params: Adam(params, lr=0.1, amsgrad=True),
    "SGD": lambda params: SGD(params, lr=0.1, weight_decay=0.1),
    "momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


class Buffer:
    """Memory full of canaries, and a view of it that a step may write.

    Args:
        shape: Of the view.
        stride: In elements.
        offset: First element of the view.
    """

    def __init__(
        self, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, dtype: torch.dtype
    ) -> None:
        reach = sum((n - 1) * s for n, s in zip(shape, stride, strict=True) if n > 0)
        self.memory = torch.full((offset + reach + 40,), CANARY, dtype=dtype)
        self.view = self.memory.as_strided(shape, stride, offset)

    def assert_canaries_live(self) -> None:
        taken = torch.zeros(self.memory.shape, dtype=torch.bool)
        taken.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(
            True
        )
        assert bool((self.memory[~taken] == CANARY).all())


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    real = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=real, generator=generator).to(dtype)


def assert_like_contiguous(kind: str, param: Tensor, grad: Tensor, steps: int = 3) -> Any:
    """Step `param` in its layout with gradients in theirs, and a contiguous copy beside it."""
    plain = param.detach().clone(memory_format=torch.contiguous_format)
    ours, reference = KINDS[kind]([("w", param)]), KINDS[kind]([("w", plain)])
    for seed in range(steps):
        value = values(tuple(param.shape), param.dtype, seed)
        grad.copy_(value)
        param.grad, plain.grad = grad, value.clone()
        ours.step()
        reference.step()
    if param.dtype in (torch.bfloat16, torch.float16):
        # Random bits go by the place in memory, so only the number of units may differ: one.
        ulp = torch.finfo(param.dtype).eps * plain.abs().clamp(min=0.1).float()
        assert bool(((param - plain).abs().float() <= 2 * steps * ulp).all())
    else:
        assert torch.equal(param, plain)
    return ours


def strides(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return strides, in any order of dimensions, with or without gaps."""
    order = draw(st.permutations(range(len(shape))))
    stride, step = [0] * len(shape), 1
    for dim in order:
        step = step * draw(st.sampled_from([1, 1, 1, 2, 3])) if shape[dim] > 1 else step
        stride[dim] = step
        step = step * max(shape[dim], 1)
    return tuple(stride)


@st.composite
def layouts(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Draw shape, strides and offset of a view that does not overlap itself."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    return shape, strides(draw, shape), draw(st.integers(0, 5))


@each_kind
@given(param=layouts(), dtype=st.sampled_from(DTYPES), data=st.data())
def test_any_layout_steps_like_a_contiguous_copy(
    kind: str, param: Any, dtype: torch.dtype, data: st.DataObject
) -> None:
    shape, stride, offset = param
    buffer = Buffer(shape, stride, offset, dtype)
    buffer.view.copy_(values(shape, dtype, 99))
    grad = Buffer(shape, strides(data.draw, shape), data.draw(st.integers(0, 3)), dtype)
    assert_like_contiguous(kind, buffer.view.requires_grad_(False), grad.view)
    buffer.assert_canaries_live()
    grad.assert_canaries_live()


NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda m: m[:6, :8].t(),
    "every other row": lambda m: m[::2],
    "every other column": lambda m: m[:, ::2],
    "columns of a wider matrix": lambda m: m[:, 3:5],
    "misaligned": lambda m: m.view(-1)[1:],
    "0-dim": lambda m: m[2, 3],
    "empty": lambda m: m[:0],
    "permuted": lambda m: m.view(4, 2, 12).permute(2, 0, 1),
    "channels_last": lambda m: m.view(2, 4, 3, 4).contiguous(memory_format=torch.channels_last),
    "one element wide": lambda m: m[:, 5:6],
    "misaligned by a byte": lambda m: misaligned(m),
}


@each_kind
@pytest.mark.parametrize("layout", NAMED)
def test_named_layouts(kind: str, layout: str) -> None:
    param = NAMED[layout](values((8, 12), torch.float32, 7))
    assert_like_contiguous(kind, param, torch.empty(param.shape))


def misaligned(like: Tensor) -> Tensor:
    memory = bytearray(like.numel() * like.element_size() + 1)
    flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=1)
    return flat.view(like.shape).copy_(like)


LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda g: g[:1].expand(g.shape),
    "transposed": lambda g: g.t().contiguous().t(),
    "strided": lambda g: torch.stack([g, g + 1], -1)[..., 0],
    "imaginary part of a conjugate": lambda g: torch.complex(torch.zeros_like(g), -g).conj().imag,
    "misaligned": misaligned,
}


@each_kind
@pytest.mark.parametrize("how", LAZY)
@pytest.mark.parametrize("shape", [(4, 3), (1, 1)], ids=str)
def test_gradients_that_lie_otherwise_than_they_read(
    kind: str, how: str, shape: tuple[int, int]
) -> None:
    """In the first step, which is planned, and in later ones, for which the plan is remembered."""
    params = [torch.full(shape, 2.0) for _ in range(2)]
    optimizers = [KINDS[kind]([param]) for param in params]
    for step in range(5):
        grad = LAZY[how](values(shape, torch.float32, step))
        params[0].grad = grad if step != 1 else grad.clone(memory_format=torch.contiguous_format)
        params[1].grad = grad.clone(memory_format=torch.contiguous_format)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(*params)


@each_kind
def test_a_scalar_parameter_with_the_lazy_negative_that_autograd_gives_it(kind: str) -> None:
    scalar, weight = torch.ones((), requires_grad=True), torch.tensor(1.0 + 2.0j)
    optimizer = KINDS[kind]([scalar])
    plain = torch.ones(())
    reference = KINDS[kind]([plain])
    for _ in range(3):
        optimizer.zero_grad()
        (torch.complex(torch.ones(()), scalar).conj() * weight).imag.backward()
        assert scalar.grad is not None
        assert scalar.grad.is_neg()
        plain.grad = scalar.grad.resolve_neg()
        optimizer.step()
        reference.step()
    assert torch.equal(scalar.detach(), plain)


@each_kind
def test_conjugate_gradients_and_parameters(kind: str) -> None:
    start = values((3, 4), torch.complex64, 1)
    plain, lazy = start.clone(), start.conj().resolve_conj().conj()
    assert lazy.is_conj()
    optimizers = [KINDS[kind]([param]) for param in (plain, lazy)]
    for step in range(4):
        grad = values((3, 4), torch.complex64, 2 + step)
        plain.grad, lazy.grad = grad.clone(), grad.conj().resolve_conj().conj()
        for optimizer in optimizers:
            optimizer.step()
    assert lazy.is_conj()
    assert torch.equal(lazy.resolve_conj(), plain)


@each_kind
def test_the_conjugate_gradients_that_autograd_gives(kind: str) -> None:
    start, weight = values((3, 4), torch.complex64, 1), values((3, 4), torch.complex64, 2)
    param, plain = start.clone().requires_grad_(), start.clone()
    optimizers = [KINDS[kind]([each]) for each in (param, plain)]
    for step in range(4):
        optimizers[0].zero_grad()
        lazily = step > 1  # once the plan is remembered
        product = param.conj() * weight if lazily else param * weight
        product.real.sum().backward()
        assert param.grad is not None
        assert param.grad.is_conj() == lazily or not lazily
        plain.grad = param.grad.resolve_conj().clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(param.detach(), plain)


@each_kind
def test_state_laid_out_otherwise_than_the_parameter(kind: str) -> None:
    """As after `model.to(memory_format=torch.channels_last)` in mid-training."""
    start, grads = values((4, 3, 2, 5), torch.float32, 1), values((4, 4, 3, 2, 5), torch.float32, 2)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [KINDS[kind]([param]) for param in params]
    for step, grad in enumerate(grads):
        if step == 2:
            params[1].data = params[1].data.contiguous(memory_format=torch.channels_last)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    assert params[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(*params)


def test_views_that_interleave_are_stepped_and_views_that_overlap_are_not() -> None:
    memory = torch.zeros(6, 8)
    halves = [("left", memory[:, :3]), ("right", memory[:, 3:8])]
    for _, half in halves:
        half.grad = torch.ones_like(half)
    SGD(halves, lr=1.0).step()
    assert torch.equal(memory, -torch.ones(6, 8))
    both = [("left", memory[:, :4]), ("right", memory[:, 3:])]
    for _, half in both:
        half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match="parameters 'left' and 'right' share memory"):
        SGD(both, lr=1.0).step()
    assert torch.equal(memory, -torch.ones(6, 8))


REFUSED: dict[str, tuple[Tensor, str]] = {
    "expanded": (torch.zeros(3, 1).expand(3, 4), "elements of parameter 'w' share memory"),
    "overlapping": (
        torch.zeros(10).as_strided((3, 4), (2, 1)),
        "elements of parameter 'w' share memory",
    ),
}


@each_kind
@pytest.mark.parametrize("layout", REFUSED)
def test_what_cannot_be_stepped_is_refused_by_name_before_anything_is_written(
    kind: str, layout: str
) -> None:
    param, message = REFUSED[layout]
    good = torch.nn.Parameter(torch.ones(2))
    good.grad = torch.ones(2)
    bad = param.detach().requires_grad_()
    bad.grad = torch.ones(bad.shape)
    optimizer = KINDS[kind]([("good", good), ("w", bad)])
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(good.detach(), torch.ones(2))
    assert optimizer.state_dict()["state"] == {}


@each_kind
def test_one_parameter_as_two_tensors_is_refused(kind: str) -> None:
    one = torch.ones(4)
    two = one.view(2, 2)
    one.grad, two.grad = torch.ones(4), torch.ones(2, 2)
    with pytest.raises(ValueError, match="parameters 'one' and 'two' share memory"):
        KINDS[kind]([("one", one), ("two", two)]).step()
    assert torch.equal(one, torch.ones(4))


@each_kind
def test_state_of_another_shape_is_refused_by_name(kind: str) -> None:
    param = torch.ones(4, 3)
    optimizer = KINDS[kind]([("w", param)])
    param.grad = torch.ones(4, 3)
    optimizer.step()
    state = optimizer.state[param]
    keys = [key for key in state if key != "step"]
    for key in keys:
        state[key] = torch.zeros(3)  # would broadcast
        before = param.clone()
        with pytest.raises(
            RuntimeError, match=f"state '{key}' of parameter 'w' is .* shape \\(3,\\)"
        ):
            optimizer.step()
        assert torch.equal(param, before)
        state[key] = torch.zeros(4, 3)
    assert keys or kind == "SGD"


def gibibytes_free() -> float:
    found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) / 2**20 if found else 0.0


@pytest.mark.slow
@pytest.mark.skipif("gibibytes_free() < 12", reason="needs 9 GiB")
def test_more_than_two_to_the_31_elements() -> None:
    count = 2**31 + 5
    param = torch.zeros(count, dtype=torch.bfloat16)
    param.grad = torch.ones(count, dtype=torch.bfloat16)
    SGD([param], lr=1.0).step()
    param.grad = None
    assert sum(int((part == -1).sum()) for part in param.split(2**26)) == count
