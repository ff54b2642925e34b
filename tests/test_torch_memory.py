"""Memory that is moved or given back between steps: noticed, or refused by name."""

from __future__ import annotations

import pytest
import torch

from ebbtide.torch import AdamW


def _params(count: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(16, 16, generator=generator)) for _ in range(count)]


def _offload(state: list[torch.Tensor]) -> None:
    """Give the memory of all tensors back and take other for them, as offloading does."""
    kept = [tensor.clone() for tensor in state]
    for tensor in state:
        tensor.untyped_storage().resize_(0)
    for tensor, values in zip(reversed(state), reversed(kept), strict=True):
        tensor.untyped_storage().resize_(values.numel() * values.element_size())
        tensor.copy_(values)


@pytest.mark.parametrize("count", [1, 2, 20])
def test_state_whose_storage_is_taken_anew_is_followed(count: int) -> None:
    ours, theirs = _params(count), _params(count)
    optimizers = (AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, foreach=False))
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(16, 16, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        state = optimizers[0].state.values()
        _offload([each[key] for each in state for key in ("exp_avg", "exp_avg_sq")])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("what", ["parameter", "gradient", "exp_avg", "step"])
def test_memory_that_was_given_back_is_refused_by_name(what: str, steps: int) -> None:
    params = _params(3)
    optimizer = AdamW([(f"w{i}", param) for i, param in enumerate(params)])
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(max(steps, what in ("exp_avg", "step"))):
        optimizer.step()
    known = {"parameter": params[1].data, "gradient": params[1].grad, **optimizer.state[params[1]]}
    freed = known[what]
    before = params[0].detach().clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"'w1' has been given back: its storage holds 0 bytes"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_a_count_may_be_a_number() -> None:
    (param,) = _params(1)
    optimizer = AdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["step"] = 1.0
    optimizer.step()
    assert optimizer.state[param]["step"] == 2
