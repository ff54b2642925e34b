"""Non-finite gradients and clipping: what is applied, what is left untouched, what is said."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ebbtide.torch import SGD, AdamW
from tests.tolerances import GRAD_NORM

KINDS = {
    "AdamW": lambda params, **options: AdamW(params, lr=0.1, **options),
    "amsgrad": lambda params, **options: AdamW(params, lr=0.1, amsgrad=True, **options),
    "SGD": lambda params, **options: SGD(params, lr=0.1, weight_decay=0.1, **options),
    "momentum": lambda params, **options: SGD(params, lr=0.1, momentum=0.9, **options),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_value = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
# "ops": by torch operations instead of the kernels.
each_path = pytest.mark.parametrize("differentiable", [False, True], ids=["kernels", "ops"])

Named = list[tuple[str, torch.Tensor]]


def named(dtype: torch.dtype = torch.float32) -> Named:
    torch.manual_seed(0)
    return [("w", torch.randn(5, 4).to(dtype)), ("b", torch.randn(7).to(dtype))]


def set_grads(params: Named, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    for _, param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def memory(optimizer: Any, params: Named) -> list[torch.Tensor]:
    """Copy everything that a step may write."""
    return [
        value.detach().clone()
        for _, param in params
        for value in (param, *optimizer.state.get(param, {}).values())
    ]


@each_kind
@each_value
@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [0, 2], ids=["first step", "third step"])
def test_raise_leaves_the_elements_untouched_and_completes_the_step(
    kind: str, value: float, differentiable: bool, dtype: torch.dtype, step: int
) -> None:
    params, clean = named(dtype), named(dtype)
    ours = KINDS[kind](params, differentiable=differentiable)
    reference = KINDS[kind](clean, differentiable=differentiable)
    for index in range(step):
        set_grads(params, index)
        set_grads(clean, index)
        ours.step()
        reference.step()
    set_grads(params, step)
    set_grads(clean, step)
    weight = params[0][1]
    before = [weight.clone(), *(v.clone() for v in ours.state.get(weight, {}).values())]
    weight.grad[1, 2] = value
    weight.grad[4, 3] = value
    with pytest.raises(FloatingPointError, match=rf"at step {step + 1} in 'w' \(2 of 20\); those"):
        ours.step()
    reference.step()
    bad = torch.zeros(5, 4, dtype=torch.bool)
    bad[1, 2] = bad[4, 3] = True
    assert torch.equal(params[1][1], clean[1][1])
    assert torch.equal(weight[~bad], clean[0][1][~bad])
    assert torch.equal(weight[bad], before[0][bad])
    for key, now in ours.state[weight].items():
        expected = reference.state[clean[0][1]][key]
        if key == "step":
            assert now == expected
        else:
            assert torch.equal(now[~bad], expected[~bad])
            assert bool(torch.isfinite(now).all())
    set_grads(params, 9)
    ours.step()  # and training goes on


def test_the_message_names_parameters_counts_and_step_but_not_without_end() -> None:
    params = [(f"layer.{i}", torch.zeros(3)) for i in range(20)]
    for index, (_, param) in enumerate(params):
        param.grad = torch.full((3,), math.nan if index else 1.0)
    with pytest.raises(FloatingPointError) as raised:
        AdamW(params).step()
    message = str(raised.value)
    assert "'layer.1' (3 of 3), 'layer.2' (3 of 3)" in message
    assert "and 11 more parameters" in message
    assert "layer.0" not in message
    unnamed = AdamW([{"params": [torch.zeros(2)]}, {"params": [params[1][1]]}])
    with pytest.raises(FloatingPointError, match=r"in \"param_groups\[1\]\['params'\]\[0\]\""):
        unnamed.step()


@each_kind
@each_value
@each_path
def test_skip_drops_the_whole_step(kind: str, value: float, differentiable: bool) -> None:
    params = named()
    optimizer = KINDS[kind](params, nonfinite="skip", differentiable=differentiable)
    set_grads(params)
    params[0][1].grad[0, 0] = value
    optimizer.step()  # even the first, when there is no state yet
    assert (optimizer.last_step_skipped, optimizer.skipped_steps) == (True, 1)
    assert optimizer.state_dict()["state"] == {}
    set_grads(params)
    optimizer.step()
    assert (optimizer.last_step_skipped, optimizer.skipped_steps) == (False, 1)
    assert optimizer.last_grad_norm is not None
    assert math.isfinite(optimizer.last_grad_norm)
    before = memory(optimizer, params)
    for count in (2, 3):
        set_grads(params, count)
        params[1][1].grad[3] = value
        versions = [param._version for _, param in params]
        optimizer.step()
        assert (optimizer.last_step_skipped, optimizer.skipped_steps) == (True, count)
        assert not math.isfinite(optimizer.last_grad_norm)
        assert [param._version for _, param in params] == versions
    assert all(map(torch.equal, before, memory(optimizer, params)))
    set_grads(params, 5)
    optimizer.step()
    assert not optimizer.last_step_skipped
    assert optimizer.skipped_steps == 3


@each_kind
@each_value
@each_path
def test_propagate_does_as_torch(kind: str, value: float, differentiable: bool) -> None:
    params = named()
    optimizer = KINDS[kind](params, nonfinite="propagate", differentiable=differentiable)
    set_grads(params)
    params[0][1].grad[0, 0] = value
    optimizer.step()
    optimizer.step()
    assert not bool(torch.isfinite(params[0][1][0, 0]))
    assert bool(torch.isfinite(params[0][1].view(-1)[1:]).all())
    assert optimizer.skipped_steps == 0


@each_path
def test_a_gradient_too_large_to_square_is_not_silent(differentiable: bool) -> None:
    """torch's second moment becomes infinite, and the weight rests for thousands of steps."""
    param = torch.ones(3)
    optimizer = AdamW([param], weight_decay=0, differentiable=differentiable)
    param.grad = torch.tensor([1.0, 1e20, 1e30])
    with pytest.raises(FloatingPointError, match=r"too large to square.*\(1 of 3\)"):
        optimizer.step()
    assert bool((param[:2] < 1).all())
    assert param[2] == 1
    clipped = AdamW([param], clip_grad_norm=1.0, differentiable=differentiable)
    clipped.step()
    assert clipped.last_grad_norm == pytest.approx(1e30)


@each_kind
@each_path
@pytest.mark.parametrize("norm", [0.5, 1e-3, 1e9])
def test_clipping_is_that_of_torch_and_leaves_the_gradients_alone(
    kind: str, differentiable: bool, norm: float
) -> None:
    params, others = named(torch.float64), named(torch.float64)
    groups = [{"params": [each]} for each in params]  # the norm is over all groups
    clipping = KINDS[kind](groups, clip_grad_norm=norm, differentiable=differentiable)
    plain = KINDS[kind]([{"params": [each]} for each in others], differentiable=differentiable)
    for step in range(4):
        set_grads(params, step)
        set_grads(others, step)
        before = [param.grad.clone() for _, param in params]
        clipping.step()
        assert all(torch.equal(a, param.grad) for a, (_, param) in zip(before, params, strict=True))
        total = nn.utils.clip_grad_norm_([param for _, param in others], norm)
        plain.step()
        assert clipping.last_grad_norm == pytest.approx(float(total), **GRAD_NORM)
    for (_, param), (_, other) in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@each_path
def test_the_norm_is_right_to_1e_7(dtype: torch.dtype, differentiable: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    params = [torch.zeros(size) for size in (1, 127, 128, 129, 70_001, 300_000)]
    params = [param.to(dtype) for param in params]
    for index, param in enumerate(params):
        scale = 10.0 ** (index - 3)
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(dtype)
    optimizer = SGD(params, lr=0.0, clip_grad_norm=1.0, differentiable=differentiable)
    exact = math.sqrt(math.fsum(x * x for p in params for x in p.grad.double().tolist()))
    for _ in range(2):  # planned, then remembered
        optimizer.step()
        assert optimizer.last_grad_norm == pytest.approx(exact, **GRAD_NORM)


def test_the_norm_does_not_depend_on_the_cut_into_tensors_beyond_rounding() -> None:
    grad = torch.randn(1000, dtype=torch.float64)
    norms = []
    for sizes in ([1000], [1, 999], [500, 500], [10] * 100):
        params = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        for param, part in zip(params, grad.split(sizes), strict=True):
            param.grad = part.clone()
        optimizer = SGD(params, clip_grad_norm=1.0)
        optimizer.step()
        norms.append(optimizer.last_grad_norm)
    assert norms == pytest.approx([norms[0]] * 4, **GRAD_NORM)


@each_kind
@each_path
def test_raise_with_clipping_clips_the_finite_elements_by_their_own_norm(
    kind: str, differentiable: bool
) -> None:
    params, clean = named(torch.float64), named(torch.float64)
    ours = KINDS[kind](params, clip_grad_norm=0.5, differentiable=differentiable)
    reference = KINDS[kind](clean, clip_grad_norm=0.5, differentiable=differentiable)
    for step in range(3):
        set_grads(params, step)
        set_grads(clean, step)
        if step == 1:
            params[0][1].grad[1, 1] = math.nan
            clean[0][1].grad[1, 1] = 0.0
            with pytest.raises(FloatingPointError, match=r"'w' \(1 of 20\)"):
                ours.step()
        else:
            ours.step()
        reference.step()
        if step == 1:
            assert ours.last_grad_norm == pytest.approx(reference.last_grad_norm, **GRAD_NORM)
    good = torch.ones(5, 4, dtype=torch.bool)
    good[1, 1] = False
    assert torch.equal(params[1][1], clean[1][1])
    torch.testing.assert_close(params[0][1][good], clean[0][1][good], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("value", "expected"), [(math.inf, 0.0), (math.nan, math.nan)])
def test_propagate_with_clipping_scales_as_torch(value: float, expected: float) -> None:
    param, other = torch.ones(3), torch.ones(3)
    param.grad = other.grad = None
    param.grad, other.grad = torch.tensor([1.0, value, 2.0]), torch.tensor([1.0, value, 2.0])
    SGD([param], lr=1.0, clip_grad_norm=1.0, nonfinite="propagate").step()
    nn.utils.clip_grad_norm_([other], 1.0)
    torch.optim.SGD([other], lr=1.0).step()
    assert torch.equal(param.isnan(), other.isnan())
    assert torch.equal(param.nan_to_num(), other.nan_to_num())


@each_path
def test_options_may_change_between_steps(differentiable: bool) -> None:
    params = named()
    optimizer = AdamW(params, differentiable=differentiable)
    set_grads(params)
    optimizer.step()
    assert optimizer.last_grad_norm is None
    optimizer.clip_grad_norm = 1.0
    optimizer.step()
    assert optimizer.last_grad_norm is not None
    optimizer.clip_grad_norm = None
    optimizer.nonfinite = "skip"
    params[0][1].grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.last_step_skipped
    optimizer.nonfinite = "propagate"
    optimizer.step()
    assert bool(params[0][1].isnan().any())
