"""Where Triton's kernels are tried: in its interpreter, and on a GPU with `-m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ebbtide.torch
from ebbtide import _core

INTERPRETER, GPU = "cpu", "cuda"
DEVICES = [
    pytest.param(INTERPRETER, id="interpreter"),
    pytest.param(GPU, id="gpu", marks=pytest.mark.gpu),
]


def contracts() -> bool:
    """Tell whether `tl.fma` rounds once where the tests run; older interpreters round twice."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return not triton.knobs.runtime.interpret or version >= (3, 9)


@contextmanager
def on(device: str) -> Iterator[None]:
    """Run Triton's kernels on a device, and the compiled core with the same contraction.

    The interpreter computes with NumPy, which warns of what kernels do without a word.
    """
    if device == GPU:
        import triton

        assert torch.cuda.is_available(), "pytest -m gpu needs a GPU"
        assert not triton.knobs.runtime.interpret, "the kernels are interpreted: pytest -m gpu"
    before = _core.instruction_set()
    _core.set_instruction_set("avx2" if contracts() else "baseline")
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setenv("EBBTIDE_BACKEND", "triton" if device == INTERPRETER else "cpu")
        yield
    _core.set_instruction_set(before)


@contextmanager
def by_the_core() -> Iterator[None]:
    """Have tensors on the CPU stepped by the compiled core, inside of `on`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBBTIDE_BACKEND", "cpu")
        yield


class HostReads(TorchDispatchMode):
    """Counts how often the host asks for a number that a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Run:
    """One optimizer stepped along gradients that depend on nothing but a seed.

    Args:
        kind: Name of a class of `ebbtide.torch`.
        shapes: Of the parameters.
        device: Where they lie.
        dtype: Of the parameters and gradients.
        groups: Hyperparameters of the group that each parameter is in; none: one group.
        words: Of the optimizer.
    """

    def __init__(
        self,
        kind: str,
        shapes: list[tuple[int, ...]],
        device: str,
        dtype: torch.dtype = torch.float32,
        groups: list[dict[str, Any]] | None = None,
        **words: Any,
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.device = device
        self.params = [self.random(shape).to(device, dtype).requires_grad_() for shape in shapes]
        named: Any = [(f"w{index}", param) for index, param in enumerate(self.params)]
        if groups is not None:
            pairs = zip(named, groups, strict=True)
            named = [{"params": [each], **group} for each, group in pairs]
        self.optimizer = getattr(ebbtide.torch, kind)(named, **words)

    def random(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return normal numbers, of which some are zero and some large."""
        value = torch.randn(shape, generator=self.generator)
        scale = 10.0 ** torch.randint(-3, 2, shape, generator=self.generator)
        return torch.where(torch.rand(shape, generator=self.generator) < 0.1, 0.0, value * scale)

    def grads(self) -> None:
        """Give every parameter its next gradient."""
        for param in self.params:
            param.grad = self.random(tuple(param.shape)).to(param.device, param.dtype)

    def step(self, steps: int = 1) -> Run:
        """Take steps."""
        for _ in range(steps):
            self.grads()
            self.optimizer.step()
        return self

    @property
    def backend(self) -> Any:
        """Triton's backend of the optimizer."""
        return self.optimizer._devices.backend

    def numbers(self) -> dict[str, torch.Tensor]:
        """Return the parameters and all state, on the CPU."""
        found = {}
        for index, param in enumerate(self.params):
            found[f"w{index}"] = param.detach().cpu()
            for key, value in self.optimizer.state[param].items():
                found[f"w{index}.{key}"] = value.cpu()
        return found


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Assert that two runs ended with equal parameters and state."""
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key
