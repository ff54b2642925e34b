"""What `test_mesh_ranks.py` runs on four ranks, and by torch alone: a mesh of two dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import ebbtide.torch
from tests.devices import HostReads
from tests.rank_tasks import Numbers, whole
from tests.triton_tasks import refuse, stepped_by

CLIP = 0.05
WORDS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
STEPS = 3


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))


def extras() -> Numbers:
    return {"plain": torch.ones(3), "copied": torch.ones(7), "row": torch.ones(1, 4)}


def spread(layout: str) -> dict[str, nn.Parameter]:
    """The parameters of the model, and the extras, as shards, copies and plain ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    model: nn.Module = model_of()
    if layout == "hybrid":
        model = fully_shard(model, mesh=mesh)
    else:
        parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        model = fully_shard(model, mesh=mesh["outer"])
    named = dict(model.named_parameters())
    if layout == "mixed":
        values, copied = extras(), [Replicate(), Replicate()]
        values["copied"] = distribute_tensor(values["copied"], mesh, copied)
        # Of its one row two of the ranks hold nothing, and no other parameter is spread so.
        values["row"] = distribute_tensor(values["row"], mesh["inner"], [Shard(0)])
        named |= {name: nn.Parameter(value) for name, value in values.items()}
    return named


def gradients(named: dict[str, nn.Parameter], step: int, options: dict[str, Any]) -> None:
    """Give every parameter its part of a gradient; of the second one is infinite for skipping."""
    from torch.distributed.tensor import distribute_tensor

    generator = torch.Generator().manual_seed(step)
    for name, param in named.items():
        grad = torch.randn(param.shape, generator=generator)
        if name == "0.weight" and step == 1 and options.get("nonfinite") == "skip":
            grad[-1, -1] = float("inf")
        mesh: Any = getattr(param, "device_mesh", None)
        if mesh is not None:
            placements = param.placements  # type: ignore[attr-defined]
            grad = distribute_tensor(grad, mesh, placements, src_data_rank=None)
        param.grad = grad


def by_torch(layout: str, options: dict[str, Any]) -> tuple[list[float], Numbers]:
    """The norms of whole gradients, and what torch makes of the parameters in one process."""
    named = dict(model_of().named_parameters())
    if layout == "mixed":
        named |= {name: nn.Parameter(value) for name, value in extras().items()}
    optimizer = torch.optim.AdamW(named.values(), **WORDS)
    norms = []
    for step in range(STEPS):
        gradients(named, step, options)
        grads = [param.grad for param in named.values() if param.grad is not None]
        norms.append(math.sqrt(sum(float(grad.double().square().sum()) for grad in grads)))
        if math.isfinite(norms[-1]):
            nn.utils.clip_grad_norm_(named.values(), CLIP)
            optimizer.step()
    return norms, {name: param.detach() for name, param in named.items()}


def clipped(
    rank: int, backend: str, layout: str, options: dict[str, Any]
) -> tuple[list[float], int, int, Numbers]:
    """Steps; returns norms, steps skipped, host's reads in the last step, whole parameters."""
    norms, reads = [], HostReads()
    with stepped_by(backend) as patch:
        named = spread(layout)
        optimizer = ebbtide.torch.AdamW(named.items(), clip_grad_norm=CLIP, **WORDS, **options)
        if backend == "triton":
            refuse("judge_plan", patch)
        for step in range(STEPS):
            gradients(named, step, options)
            with reads:
                reads.count = 0
                optimizer.step()
            norms.append(optimizer.last_grad_norm)
            if step == 0 and backend == "triton":
                refuse("Planner", patch)
        skipped = optimizer.skipped_steps
    return norms, skipped, reads.count, {name: whole(param) for name, param in named.items()}


def scaled(rank: int, backend: str, clip: float | None) -> list[tuple[bool, bool, int]]:
    """Two steps under a loss scaler, which finds something in the second, on the last rank alone.

    Returns:
        Of each step, whether it was dropped, left everything as it was, and what the host read.
    """
    seen = []
    with stepped_by(backend):
        named = spread("mixed")
        optimizer = ebbtide.torch.AdamW(named.items(), fused=True, clip_grad_norm=clip, **WORDS)
        for step in range(2):
            gradients(named, step, {})
            optimizer.grad_scale = torch.tensor(2.0)
            optimizer.found_inf = torch.tensor(float(step == 1 and rank == 3))
            before = {name: whole(param) for name, param in named.items()}
            with HostReads() as reads:
                optimizer.step()
            same = all(torch.equal(before[name], whole(param)) for name, param in named.items())
            seen.append((bool(optimizer.last_step_skipped), same, reads.count))
    return seen
