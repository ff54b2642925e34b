"""Triton's kernels against the compiled core, bit for bit: every rule, policy, dtype and layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ebbtide.backends.triton import rules
from ebbtide.torch import AdamW
from tests.cases import POLICIES, RULES
from tests.devices import DEVICES, INTERPRETER, Run, assert_same_bits, by_the_core, on

# One whole tile with a rest; less than a block; one number; nothing.
SHAPES: list[tuple[int, ...]] = [(9, 129), (7,), (), (0, 3)]
POLICY_GROUPS = [*POLICIES.values(), {**POLICIES["decoupled"], "maximize": True}]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with on(request.param):
        yield request.param


def words_of(rule: str) -> tuple[str, dict[str, Any]]:
    kind = "SGD" if rule.startswith("sgd") else "Adam"
    return kind, {"lr": 0.02 if kind == "Adam" else 0.05, **RULES[rule]}


def both(
    kind: str, shapes: list[tuple[int, ...]], device: str, steps: int, **words: Any
) -> tuple[Run, Run]:
    """Step the same parameters on the device and by the compiled core."""
    ours = Run(kind, shapes, device, **words).step(steps)
    with by_the_core():
        theirs = Run(kind, shapes, INTERPRETER, **words).step(steps)
    assert theirs.backend is None
    return ours, theirs


@pytest.mark.parametrize("rule", RULES)
def test_every_policy_has_the_bits_of_the_cpu_in_one_launch(rule: str, device: str) -> None:
    kind, words = words_of(rule)
    shapes: list[tuple[int, ...]] = [(4, 5)] * len(POLICY_GROUPS)
    ours, theirs = both(kind, shapes, device, 3, groups=POLICY_GROUPS, **words)
    assert_same_bits(ours.numbers(), theirs.numbers())
    assert ours.backend.launches == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["adam", "amsgrad", "sgd", "sgd-nesterov"])
def test_every_dtype_has_the_bits_of_the_cpu_in_one_launch(
    rule: str, dtype: torch.dtype, device: str
) -> None:
    kind, words = words_of(rule)
    ours, theirs = both(kind, SHAPES, device, 3, dtype=dtype, weight_decay=0.1, **words)
    assert_same_bits(ours.numbers(), theirs.numbers())
    assert ours.backend.launches == 3


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_many_steps_have_the_bits_of_the_cpu(steps: int, device: str) -> None:
    ours, theirs = both("AdamW", [(130,)], device, steps, lr=0.01, weight_decay=0.1)
    assert_same_bits(ours.numbers(), theirs.numbers())


@pytest.mark.parametrize("wrong", ["_BETA2", "_EPS", "_DECAY", "_STEP_SIZE", "_EXP_AVG_WEIGHT"])
def test_a_kernel_that_reads_a_wrong_scalar_is_found(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on(INTERPRETER):
        monkeypatch.setattr(rules, wrong, rules._ONE_MINUS_BETA2)
        ours, theirs = both("AdamW", [(40,)], INTERPRETER, 2, lr=0.01, weight_decay=0.3, eps=1e-6)
    with pytest.raises(AssertionError):
        assert_same_bits(ours.numbers(), theirs.numbers())


def test_state_formats_may_be_mixed(device: str) -> None:
    """State keeps the dtype it was loaded in: float32 beside parameters of 16 bits."""

    def run(where: str) -> Run:
        run = Run("AdamW", [(200,), (3, 4)], where, torch.bfloat16, lr=0.01)
        run.step()
        for param in run.params:
            state = run.optimizer.state[param]
            state["exp_avg"] = state["exp_avg"].float()
            state["exp_avg_sq"] = state["exp_avg_sq"].half()
        return run.step(2)

    ours = run(device)
    with by_the_core():
        theirs = run(INTERPRETER)
    assert_same_bits(ours.numbers(), theirs.numbers())


def test_layouts_do_not_matter_and_nothing_beside_them_is_written(device: str) -> None:
    """Unaligned, transposed and strided parameters in one buffer, canaries between them."""

    def run(where: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        buffer = torch.full((6000,), 123.25)
        mask = torch.zeros(6000, dtype=torch.bool)
        grads = [torch.randn(size, generator=generator) for size in [(1300,), (40, 30), (20, 11)]]

        def views(whole: torch.Tensor) -> list[torch.Tensor]:
            return [
                whole[1:1301],
                whole[1500:2700].view(30, 40).T,
                whole[3000:3880].view(40, 22)[::2, ::2],
            ]

        for view, grad in zip(views(buffer), grads, strict=True):
            view.copy_(grad.flip(0))
        for view in views(mask):
            view.fill_(True)
        there = buffer.to(where)
        params = [view.requires_grad_() for view in views(there)]
        optimizer = AdamW(params, lr=0.01, weight_decay=0.1)
        for scale in (1.0, -0.5):
            for param, grad in zip(params, grads, strict=True):
                param.grad = (grad * scale).to(where)
            optimizer.step()
        assert (there.cpu()[~mask] == 123.25).all()
        assert (there.cpu()[mask] != 123.25).all()
        return there.detach().cpu()

    ours = run(device)
    with by_the_core():
        theirs = run(INTERPRETER)
    assert torch.equal(ours, theirs)


def test_gradients_are_never_written(device: str) -> None:
    run = Run("Adam", [(9, 129), (5,)], device, weight_decay=0.1, maximize=True)
    run.grads()
    before = [param.grad.clone() for param in run.params if param.grad is not None]
    run.optimizer.step()
    for param, grad in zip(run.params, before, strict=True):
        assert torch.equal(param.grad, grad)


def test_subnormal_numbers_are_flushed_as_on_the_cpu(device: str) -> None:
    def run(where: str) -> Run:
        run = Run("SGD", [(64,)], where, momentum=0.9, lr=1.0)
        run.params[0].data.fill_(1e-40)
        run.params[0].grad = torch.full((64,), 1e-42, device=where)
        run.optimizer.step()
        return run

    ours = run(device)
    with by_the_core():
        theirs = run(INTERPRETER)
    assert_same_bits(ours.numbers(), theirs.numbers())
    assert not ours.numbers()["w0.momentum_buffer"].any()
