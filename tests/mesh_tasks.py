"""What `test_mesh_ranks.py` runs on four ranks, and by torch alone: a mesh of two dimensions."""

from __future__ import annotations

import math
from itertools import pairwise
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
    # The last ones are spread as others are, but take launches of their own.
    wide = {"wide": torch.ones(5).double(), "wide row": torch.ones(1, 3).double()}
    return {"plain": torch.ones(3), "copied": torch.ones(7), "row": torch.ones(1, 4)} | wide


def spread(layout: str) -> dict[str, nn.Parameter]:
    """The parameters of the model, and the extras, as shards, copies and plain ones.

    "crossed": shards of two meshes, neither of which holds all ranks.
    """
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
    if layout == "crossed":
        return {
            name: nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh[name], [Shard(0)]))
            for name in ("inner", "outer")
        }
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
        for name in ("row", "wide row"):
            values[name] = distribute_tensor(values[name], mesh["inner"], [Shard(0)])
        named |= {name: nn.Parameter(value) for name, value in values.items()}
    return named


def gradients(named: dict[str, nn.Parameter], step: int, options: dict[str, Any]) -> None:
    """Give every parameter its part of a gradient; of the second one is infinite for skipping."""
    from torch.distributed.tensor import distribute_tensor

    generator = torch.Generator().manual_seed(step)
    for name, param in named.items():
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
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


def launched(rank: int, words: dict[str, Any]) -> tuple[list[int], float]:
    """Three steps, clipped in the last; returns launches of the others, and the last norm."""
    launches = [0]
    with stepped_by("triton"):
        named = spread("mixed")
        optimizer = ebbtide.torch.AdamW(named.items(), **WORDS, **words)
        for step in range(STEPS):
            gradients(named, step, {})
            optimizer.clip_grad_norm = CLIP if step == STEPS - 1 else None
            if words:  # as a loss scaler leaves it
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
            optimizer.step()
            launches.append(optimizer._devices.backend.launches)  # type: ignore[union-attr]
        norm = optimizer.last_grad_norm
    assert isinstance(norm, float)
    return [after - before for before, after in pairwise(launches[:-1])], norm


def scaled(
    rank: int, backend: str, layout: str, clip: float | None
) -> list[tuple[bool, bool, int]]:
    """Two steps under a loss scaler, which finds something in the second, on the last rank alone.

    Returns:
        Of each step, whether it was dropped, left everything as it was, and what the host read.
    """
    seen = []
    with stepped_by(backend):
        named = spread(layout)
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
