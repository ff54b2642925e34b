"""Tensors whose numbers lie elsewhere, or nowhere: stepped by their own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from ebbtide.torch import SGD, AdamW
from tests.tolerances import TORCH_FLOAT32

each_kind = pytest.mark.parametrize("kind", [AdamW, SGD])


class Wrapped(Tensor):
    """A tensor subclass with memory that no pointer shows; what is computed from it is plain."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.where.self:  # as in libraries that know arithmetic alone
            raise NotImplementedError(func)
        plain = tree_map_only(Wrapped, lambda each: each.inner, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        return args[0] if func._schema.name.endswith("_") else out


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
@each_kind
def test_tensor_subclasses_are_stepped_through_their_own_operations(
    kind: Any, nonfinite: str
) -> None:
    inner, plain = ([torch.ones(4), torch.ones(2, 3)] for _ in range(2))
    options: dict[str, Any] = {"momentum": 0.9} if kind is SGD else {}
    options["nonfinite"] = nonfinite
    for params in ([Wrapped(each) for each in inner], plain):
        for param in params:
            param.grad = torch.full_like(param, 2.0)
        optimizer = kind(params, lr=0.1, **options)
        optimizer.step()
        optimizer.step()
    for mine, other in zip(inner, plain, strict=True):
        torch.testing.assert_close(mine, other, **TORCH_FLOAT32)


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"clip_grad_norm": 1.0}])
@each_kind
def test_a_step_of_tensors_that_only_stand_for_others(kind: Any, options: dict[str, Any]) -> None:
    """As tools that trace a training step, or add up its memory, take it."""
    with FakeTensorMode():
        model = nn.Linear(3, 2)
        optimizer = kind(model.parameters(), **options)
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    for param in model.parameters():
        for value in optimizer.state[param].values():
            assert isinstance(value, FakeTensor)
            assert value.shape in (param.shape, ())
