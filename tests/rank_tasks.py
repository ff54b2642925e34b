"""What `test_ranks.py` runs on each rank, and alone for comparison.

Every rank sees the same batch, so that the mean of the gradients over two ranks is the gradient
itself, bit for bit, and the steps can be compared exactly with those of one process.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import ebbtide.torch
import ebbtide.torch.rows

# Rows of 5 and 37 elements: shards of 4 and 3 rows begin inside a block of 128.
SIZES = (5, 7, 37, 3)
# Matrices large enough for low-bit state, their rows no multiple of 128 and uneven over two ranks.
WIDE = (65, 127, 33)
Numbers = dict[str, torch.Tensor]


def model_of(
    dtype: torch.dtype = torch.float32, seed: int = 0, sizes: tuple[int, ...] = SIZES
) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers).to(dtype)


def sizes_for(options: dict[str, Any]) -> tuple[int, ...]:
    return WIDE if "state_format" in options else SIZES


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with different decay, by name."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 0.3},
        {"params": [(n, p) for n, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]


def optimizer_of(kind: str, model: nn.Module, **options: Any) -> Any:
    options.setdefault("lr", 1e-2)
    return getattr(ebbtide.torch, kind)(groups_of(model), **options)


def sharded(model: nn.Module, mesh: Any = None) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh)  # type: ignore[no-any-return]


def train(model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    weight = next(model.parameters())
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, weight.shape[1], generator=generator).to(weight.dtype)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def numbers_of(model: nn.Module, optimizer: Any) -> Numbers:
    """Every parameter and state array, whole, by name."""
    numbers = {}
    for name, param in model.named_parameters():
        name = name.removeprefix("module.")
        numbers[name] = whole(param)
        for key, value in optimizer.state.get(param, {}).items():
            numbers[f"{name}/{key}"] = whole(value)
    return numbers


def alone(kind: str, dtype: torch.dtype, steps: int, options: dict[str, Any]) -> Numbers:
    model = model_of(dtype, sizes=sizes_for(options))
    optimizer = optimizer_of(kind, model, **options)
    train(model, optimizer, steps)
    return numbers_of(model, optimizer)


def data_parallel(rank: int, kind: str, steps: int, options: dict[str, Any]) -> Numbers:
    model = nn.parallel.DistributedDataParallel(model_of(sizes=sizes_for(options)))
    optimizer = optimizer_of(kind, model, **options)
    train(model, optimizer, steps)
    return numbers_of(model, optimizer)


def partitioned(rank: int, kind: str, steps: int, options: dict[str, Any]) -> Numbers:
    """Each rank steps a part of the parameters and sends it to the others."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(model_of())
    groups = [{**each, "params": [p for _, p in each["params"]]} for each in groups_of(model)]
    optimizer: Any = ZeroRedundancyOptimizer(
        groups, optimizer_class=getattr(ebbtide.torch, kind), lr=1e-2, **options
    )
    train(model, optimizer, steps)
    optimizer.consolidate_state_dict(to=0)
    states = [optimizer.state_dict() if rank == 0 else None]
    torch.distributed.broadcast_object_list(states)
    again: Any = ZeroRedundancyOptimizer(
        groups, optimizer_class=getattr(ebbtide.torch, kind), lr=1e-2, **options
    )
    again.load_state_dict(states[0])
    train(model, again, steps, first=steps)
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def fully_sharded(
    rank: int, kind: str, dtype: torch.dtype, steps: int, options: dict[str, Any]
) -> Numbers:
    model = sharded(model_of(dtype, sizes=sizes_for(options)))
    optimizer = optimizer_of(kind, model, **options)
    train(model, optimizer, steps)
    return numbers_of(model, optimizer)


def by_torch_operations(rank: int, dtype: torch.dtype) -> Numbers:
    """As where the kernels do not go, another device for instance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ebbtide.torch.rows, "_is_for_kernels", lambda *_: False)
        return fully_sharded(rank, "AdamW", dtype, 3, {"clip_grad_norm": 10.0})


def plain_gradient(rank: int) -> str:
    model = sharded(model_of())
    optimizer = optimizer_of("AdamW", model)
    for param in model.parameters():
        param.grad = torch.ones(param.shape)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def run_code(rank: int, code: str, names: dict[str, Any]) -> None:
    exec(code, names)


def clipped(rank: int, shape: tuple[int, ...]) -> tuple[float, Numbers]:
    from torch.distributed.device_mesh import init_device_mesh

    names = ("replicate", "shard")[-len(shape) :]
    model = sharded(model_of(), init_device_mesh("cpu", shape, mesh_dim_names=names))
    optimizer = optimizer_of("AdamW", model, clip_grad_norm=0.05)
    train(model, optimizer, 3)
    return optimizer.last_grad_norm, numbers_of(model, optimizer)


def poisoned(rank: int, nonfinite: str) -> dict[str, Any]:
    """One element of the last row, so of rank 1, has no finite gradient."""
    model = sharded(model_of())
    optimizer = optimizer_of("AdamW", model, nonfinite=nonfinite)
    train(model, optimizer, 2)
    before = numbers_of(model, optimizer)
    weight = dict(model.named_parameters())["0.weight"]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    if rank == 1:
        weight.grad.to_local()[-1, -1] = float("nan")  # type: ignore[union-attr, attr-defined]
    message = ""
    try:
        optimizer.step()
    except FloatingPointError as error:
        message = str(error)
    return {
        "message": message,
        "skipped": optimizer.last_step_skipped,
        "before": before,
        "after": numbers_of(model, optimizer),
    }


def materialised(rank: int, kind: str, dtype: torch.dtype) -> tuple[Numbers, Numbers, set[str]]:
    """What asking for the state before the first step does to the parameters."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = sharded(model_of(dtype))
    optimizer = optimizer_of(kind, model, decay_policy="independent")
    before = {name: whole(param) for name, param in model.named_parameters()}
    state = get_optimizer_state_dict(model, optimizer)
    after = {name: whole(param) for name, param in model.named_parameters()}
    keys = {key for values in state["state"].values() for key in values}  # type: ignore[union-attr]
    return before, after, keys


def save_distributed(
    rank: int, folder: str, dtype: torch.dtype, flatten: bool, options: dict[str, Any]
) -> Numbers:
    """Train, save, train on; returns the numbers at the end."""
    model = sharded(model_of(dtype, sizes=sizes_for(options)))
    optimizer = optimizer_of("AdamW", model, **options)
    train(model, optimizer, 2)
    write(folder, model, optimizer, flatten)
    train(model, optimizer, 2, first=2)
    return numbers_of(model, optimizer)


def resume_distributed(
    rank: int, folder: str, dtype: torch.dtype, flatten: bool, options: dict[str, Any]
) -> Numbers:
    model = sharded(model_of(dtype, seed=1, sizes=sizes_for(options)))
    optimizer = optimizer_of("AdamW", model, lr=0.5, **options)
    return resumed(folder, model, optimizer, flatten)


def resume_alone(
    folder: str, dtype: torch.dtype, flatten: bool, options: dict[str, Any]
) -> Numbers:
    model = model_of(dtype, seed=1, sizes=sizes_for(options))
    return resumed(folder, model, optimizer_of("AdamW", model, lr=0.5, **options), flatten)


def write(folder: str, model: nn.Module, optimizer: Any, flatten: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    parts = get_state_dict(model, optimizer, options=options)
    dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=folder)


def resumed(folder: str, model: nn.Module, optimizer: Any, flatten: bool) -> Numbers:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    content = dict(
        zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True)
    )
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
        options=options,
    )
    train(model, optimizer, 2, first=2)
    return numbers_of(model, optimizer)


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict that further steps do not change."""
    arrays = {k: {n: v.clone() for n, v in each.items()} for k, each in state["state"].items()}
    return {**state, "state": arrays}


def gathered(rank: int, steps: int, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """The whole state on every rank, by way of torch's own gathering."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model = sharded(model_of(dtype, sizes=sizes_for(options)))
    optimizer = optimizer_of("AdamW", model, **options)
    train(model, optimizer, steps)
    return get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )


def scattered(
    rank: int, weights: Numbers, state: dict[str, Any], way: str, options: dict[str, Any]
) -> Numbers:
    """Load a whole state into shards: directly, or by torch's functions from rank 0."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    model = model_of(weights["0.weight"].dtype, sizes=sizes_for(options))
    model.load_state_dict(weights)
    model = sharded(model)  # type: ignore[assignment]
    optimizer = optimizer_of("AdamW", model, lr=0.5, **options)
    if way == "load_state_dict":
        optimizer.load_state_dict(state)
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=way == "broadcast")
        given = state if rank == 0 or way == "full" else {}
        set_optimizer_state_dict(model, optimizer, given, options=options)
    train(model, optimizer, 2, first=2)
    return numbers_of(model, optimizer)


def refused_on_one(rank: int) -> tuple[str, bool]:
    """State that is broken in the shard of rank 1 only."""
    model = sharded(model_of())
    optimizer = optimizer_of("AdamW", model)
    train(model, optimizer, 2)
    state = copied(optimizer.state_dict())
    if rank == 1:
        state["state"][0]["exp_avg_sq"].to_local()[0] = -1.0
    before = numbers_of(model, optimizer)
    message = ""
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        message = str(error)
    after = numbers_of(model, optimizer)
    return message, all(torch.equal(before[name], after[name]) for name in before)


def partial_gradient(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A replicated parameter whose gradient is left as one addend on each rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(3, 5), mesh, [Replicate()]))
    optimizer = ebbtide.torch.SGD([param], lr=1.0)
    for _ in range(2):
        addend = torch.full((3, 5), float(rank + 1))
        param.grad = DTensor.from_local(addend, mesh, [Partial()], run_check=False)
        optimizer.step()
    return whole(param), torch.ones(3, 5) - 2 * 3.0


def columns(rank: int, dtype: torch.dtype) -> tuple[Numbers, Numbers]:
    """Shards by columns, stepped beside the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(3)
    values = torch.randn(4, 7).to(dtype)
    param = nn.Parameter(distribute_tensor(values, mesh, [Shard(1)]))
    plain = nn.Parameter(values.clone())
    for each in (param, plain):
        optimizer = ebbtide.torch.AdamW([("w", each)], lr=0.1)
        for step in range(3):
            grad = torch.randn(4, 7, generator=torch.Generator().manual_seed(step)).to(dtype)
            each.grad = grad if each is plain else distribute_tensor(grad, mesh, [Shard(1)])
            optimizer.step()
    return {"w": whole(param)}, {"w": whole(plain)}


def columns_in_eight_bits(rank: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(64, 64), mesh, [Shard(1)]))
    optimizer = ebbtide.torch.AdamW([("w", param)], state_format="8bit")
    param.grad = distribute_tensor(torch.ones(64, 64), mesh, [Shard(1)])
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""
