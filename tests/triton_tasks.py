"""What `test_triton_ranks.py` runs on each rank: shards stepped by Triton, and by the core."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import ebbtide.torch
import ebbtide.torch.base
from tests.devices import INTERPRETER, by_the_core, on
from tests.rank_tasks import Numbers, numbers_of, sharded


@contextmanager
def stepped_by(backend: str) -> Iterator[pytest.MonkeyPatch]:
    with on(INTERPRETER), pytest.MonkeyPatch.context() as patch:
        if backend == "triton":
            yield patch
        else:
            with by_the_core():
                yield patch


def model_on(shape: tuple[int, ...]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    names = ("replicate", "shard")[-len(shape) :]
    return sharded(nn.Linear(37, 5), init_device_mesh("cpu", shape, mesh_dim_names=names))


def gradients(model: nn.Module, step: int) -> None:
    """Give every parameter a gradient; one shard lies beside another one's at every step."""
    inputs = torch.randn(4, 37, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(inputs).square().mean().backward()


def spoil(model: nn.Module, rank: int, shape: tuple[int, ...] = (2,)) -> None:
    """Make an element of a gradient infinite, on one rank, or on both where they are replicas."""
    if rank == 1 or shape == (2, 1):
        grad: Any = next(model.parameters()).grad
        grad._local_tensor.view(-1)[3] = float("inf")


def refuse(what: str, patch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError(f"{what} was called")

    patch.setattr(ebbtide.torch.base, what, refused)


def decided(
    rank: int, backend: str, shape: tuple[int, ...], options: dict[str, Any]
) -> tuple[float, int, Numbers]:
    """Three steps, the second with a gradient that is not finite where steps may be skipped."""
    with stepped_by(backend) as patch:
        model = model_on(shape)
        optimizer = ebbtide.torch.AdamW(model.named_parameters(), lr=0.01, **options)
        if backend == "triton":
            refuse("judge_plan", patch)
        for step in range(3):
            gradients(model, step)
            if step == 1 and options.get("nonfinite") == "skip":
                spoil(model, rank, shape)
            optimizer.step()
            if step == 0 and backend == "triton":
                refuse("Planner", patch)
        return optimizer.last_grad_norm, optimizer.skipped_steps, numbers_of(model, optimizer)


def raised(rank: int, backend: str) -> tuple[list[str], Numbers]:
    """Four steps, a gradient of the second not finite on one rank; what each of them raised."""
    said = []
    with stepped_by(backend) as patch:
        model = model_on((2,))
        optimizer = ebbtide.torch.AdamW(model.named_parameters(), lr=0.01)
        for step in range(4):
            gradients(model, step)
            if step == 1:
                spoil(model, rank)
            try:
                optimizer.step()
                said.append("")
            except FloatingPointError as error:
                said.append(str(error))
            if step == 0 and backend == "triton":
                refuse("Planner", patch)
        assert optimizer.last_step_skipped is False
        return said, numbers_of(model, optimizer)


def asked(rank: int) -> str:
    """What reading `last_step_skipped` raises after a step that was not finite on one rank."""
    with stepped_by("triton"):
        model = model_on((2,))
        optimizer = ebbtide.torch.AdamW(model.named_parameters(), lr=0.01)
        gradients(model, 0)
        spoil(model, rank)
        optimizer.step()
        try:
            _ = optimizer.last_step_skipped
        except FloatingPointError as error:
            return str(error)
        return ""
