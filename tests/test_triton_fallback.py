"""Where Triton's kernels do not go: torch operations step there, right, and it is said once."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ebbtide.torch.tensors
from ebbtide.backends.triton import support
from ebbtide.torch import AdamW
from tests.tolerances import TORCH_FLOAT32

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine with a recent GPU and Triton; nothing has been said yet."""
    monkeypatch.delenv("EBBTIDE_BACKEND", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.6.0")
    for cached in (support.obstacle, ebbtide.torch.tensors._say):
        cached.cache_clear()
    yield
    for cached in (support.obstacle, ebbtide.torch.tensors._say):
        cached.cache_clear()


def missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_recent_gpu_is_stepped_by_the_kernels() -> None:
    assert support.obstacle(CUDA) is None


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_accelerators_are_not(kind: str) -> None:
    assert support.obstacle(torch.device(kind)) == "the kernels are for NVIDIA GPUs"


@pytest.mark.parametrize(
    ("module", "name", "value", "said"),
    [
        (torch.version, "hip", "6.2", "the kernels are for NVIDIA GPUs"),
        (importlib.metadata, "version", missing, "Triton is not installed"),
        (importlib.metadata, "version", lambda _: "3.5.1", "Triton 3.5 is older than 3.6"),
        (importlib.metadata, "version", lambda _: "2.10.0+x", "Triton 2.10 is older than 3.6"),
        (torch.cuda, "get_device_capability", lambda _: (7, 5),
         "compute capability 7.5 is below 8.0"),
    ],
    ids=lambda each: each if isinstance(each, str) else None,
)  # fmt: skip
def test_what_keeps_the_kernels_away_is_named(
    module: Any, name: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value)
    assert support.obstacle(CUDA) == said


def test_torch_operations_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBBTIDE_BACKEND", "torch")
    assert support.obstacle(CUDA) == "EBBTIDE_BACKEND=torch asks for it"


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on another accelerator; its memory is the CPU's."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    device = property(lambda self: torch.device("mps"))  # type: ignore[assignment]

    def to(self, *_: Any) -> Elsewhere:
        return self


def stepped(*, elsewhere: bool, **words: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator) for shape in [(40, 5), (3,), ()]]
    if elsewhere:
        params = [param.as_subclass(Elsewhere) for param in params]
    optimizer = AdamW(params, lr=0.02, weight_decay=0.1, **words)
    for _ in range(3):
        for param in params:
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.as_subclass(type(param))
        optimizer.step()
    return [param.as_subclass(torch.Tensor) for param in params]


@pytest.mark.parametrize("words", [{}, {"amsgrad": True}, {"clip_grad_norm": 0.1}], ids=str)
def test_torch_operations_step_what_lies_elsewhere_and_say_so_once(words: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = [stepped(elsewhere=True, **words) for _ in range(2)]
    assert [str(each.message) for each in said] == [
        "parameters on 'mps' are stepped by torch operations, several for each: the kernels are "
        "for NVIDIA GPUs"
    ]
    assert said[0].filename == __file__
    for mine, theirs in zip(ours[0], stepped(elsewhere=False, **words), strict=True):
        torch.testing.assert_close(mine, theirs, **TORCH_FLOAT32)


def test_low_bit_state_is_refused_there_by_name() -> None:
    param = torch.zeros(64, 64).as_subclass(Elsewhere)
    param.grad = torch.ones(64, 64).as_subclass(Elsewhere)
    optimizer = AdamW([("w", param)], state_format="8bit")
    with (
        pytest.warns(RuntimeWarning, match="torch operations"),
        pytest.raises(
            RuntimeError, match=r"parameter 'w' cannot be kept .*: it is stepped by torch"
        ),
    ):
        optimizer.step()
    assert not optimizer.state
