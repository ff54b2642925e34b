"""Parameters spread over processes: local shards, their place in the whole, sums over ranks.

A DTensor is known by its `_local_tensor`, so that nothing of `torch.distributed` is imported where
there is none. Every rank of a mesh must call the functions that reduce, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ebbtide.plan import Plan

__all__ = [
    "Way",
    "any_rank",
    "distributed",
    "largest",
    "local_grad",
    "local_of",
    "meshes_of",
    "over_shards",
    "placed",
    "shard_offset",
    "sharded_like",
    "sum_squares",
    "way_of",
]

Way = tuple[Any, tuple[int, ...]]  # a mesh, and those of its dimensions that shards are spread over


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the shard this process holds of a distributed tensor, or the tensor itself.

    `data_ptr()` of a DTensor is 0, without an error.
    """
    local: torch.Tensor | None = getattr(tensor, "_local_tensor", None)
    return tensor if local is None else local


def distributed(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "_local_tensor")


def sharded_like(
    local: torch.Tensor, param: torch.Tensor, shape: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Return a local array as a DTensor placed as the parameter is; itself for a plain one.

    Args:
        local: This process's part.
        param: The parameter, or an array placed as it is.
        shape: Of the whole array, where it is not the parameter's.
    """
    if not distributed(param):
        return local
    from torch.distributed.tensor import DTensor

    placement: Any = param
    return DTensor.from_local(
        local,
        placement.device_mesh,
        placement.placements,
        run_check=False,
        shape=param.shape if shape is None else torch.Size(shape),
        stride=param.stride() if shape is None else _contiguous(shape),
    )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def local_grad(name: str, param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a gradient, placed as the parameter is.

    Tensor parallelism can leave a gradient as partial sums; they are added up over the ranks here.

    Raises:
        RuntimeError: One of the two is distributed and the other is not.
    """
    if distributed(param) != distributed(grad):
        which = ("a DTensor", "a plain tensor")
        mine, theirs = which if distributed(param) else which[::-1]
        raise RuntimeError(f"parameter {name!r} is {mine}, its gradient {theirs}")
    if distributed(param) and _layout(param) != _layout(grad):
        grad = grad.redistribute(*_layout(param))  # type: ignore[attr-defined]
    return local_of(grad)


def shard_offset(param: torch.Tensor) -> int:
    """Return the index, in the whole parameter, of the first element of this process's shard.

    Exact for shards by rows (the first dimension), which are one piece of the whole.
    """
    if not distributed(param) or local_of(param).numel() == 0:
        return 0
    chunk: Any = param
    offsets = chunk.__create_chunk_list__()[0].offsets
    return sum(offset * math.prod(param.shape[dim + 1 :]) for dim, offset in enumerate(offsets))


def placed(name: str, saved: torch.Tensor, param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy a saved array into the layout, device and placement of its parameter.

    Of a whole array each rank takes its shard, without communication. An array of another shape
    than the parameter's becomes contiguous.

    Raises:
        ValueError: A sharded array for a parameter that is not, or on another mesh.
    """
    mine, shard = local_of(param.detach()), _shard(name, saved, param)
    like = mine if shard.shape == mine.shape else shard.contiguous()
    copy = torch.empty_like(like, dtype=dtype, device=mine.device).copy_(shard)
    return sharded_like(copy, param, tuple(saved.shape))


def _shard(name: str, saved: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    if not distributed(param):
        if distributed(saved) and local_of(saved).shape != saved.shape:
            raise ValueError(
                f"the saved state of {name!r} is one of several shards; gather it first, with "
                "get_optimizer_state_dict(..., options=StateDictOptions(full_state_dict=True))"
            )
        return local_of(saved)
    mesh, placements = _layout(param)
    if not distributed(saved):
        from torch.distributed.tensor import distribute_tensor

        return local_of(distribute_tensor(saved, mesh, placements, src_data_rank=None))
    if _layout(saved) == (mesh, placements):
        return local_of(saved)
    if _layout(saved)[0] != mesh:
        raise ValueError(f"the saved state of {name!r} is distributed over another mesh")
    return local_of(saved.redistribute(mesh, placements))  # type: ignore[attr-defined]


def _layout(tensor: Any) -> tuple[Any, Any]:
    return tensor.device_mesh, tuple(tensor.placements)


def meshes_of(params: Iterable[torch.Tensor]) -> list[Any]:
    """List the meshes that parameters are spread over, each once; empty without DTensors."""
    return list(dict.fromkeys(_layout(param)[0] for param in params if distributed(param)))


def way_of(param: torch.Tensor) -> Way | None:
    """Return the way in which a parameter is spread; `None` where every rank holds all of it.

    Tensor parallelism and FSDP2 together make a `_StridedShard`, whose `is_shard()` says no.
    """
    if not distributed(param):
        return None
    mesh, placements = _layout(param)
    dims = tuple(dim for dim, each in enumerate(placements) if not each.is_replicate())
    return (mesh, dims) if dims else None


def over_shards(value: torch.Tensor, way: Way | None) -> torch.Tensor:
    """Return the sum of a value over all shards; what every rank holds counts once."""
    return value if way is None else _reduced(value, way[0], "SUM", way[1])


def largest(value: torch.Tensor, meshes: Iterable[Any]) -> torch.Tensor:
    """Return the largest value of any rank of the meshes."""
    for mesh in meshes:
        value = _reduced(value, mesh, "MAX", range(mesh.ndim))
    return value


def _reduced(value: torch.Tensor, mesh: Any, op: str, dims: Iterable[int]) -> torch.Tensor:
    """Return a tensor reduced over dimensions of a mesh; the host waits where the mesh is its own.

    Args:
        value: Of the same shape on every rank; left as it is.
        mesh: A device mesh.
        op: A name of `torch.distributed.ReduceOp`.
        dims: Of the mesh.
    """
    there = value.device.type == mesh.device_type  # then the GPU that it is on, whatever is current
    total = value.clone() if there else value.to(mesh.device_type)
    for dim in dims:
        how = getattr(torch.distributed.ReduceOp, op)
        torch.distributed.all_reduce(total, how, group=mesh.get_group(dim))
    return total.to(value.device)


def any_rank(flag: bool, meshes: Sequence[Any]) -> bool:
    """Tell whether the flag is set on any rank of the meshes."""
    if not meshes:
        return flag
    value = torch.tensor([float(flag)], device=meshes[0].device_type)
    return bool(largest(value, meshes).item())


def sum_squares(plan: Plan, compute: Callable[[Plan], float]) -> float:
    """Return the sum of squares of all gradients, shards of other ranks included.

    What every rank holds (plain parameters, replicated placements) counts once.

    Args:
        plan: Rows of local shards.
        compute: Sums the squares of the rows of a plan.
    """
    parts: dict[Way | None, Plan] = {}
    for entry in plan.entries:
        parts.setdefault(way_of(entry[0]), Plan(plan.rule)).entries.append(entry)
    return math.fsum(_over_shards(compute(part), way) for way, part in parts.items())


def _over_shards(total: float, way: Way | None) -> float:
    if way is None:
        return total
    value = torch.tensor([total], dtype=torch.float64, device=way[0].device_type)
    return float(over_shards(value, way).item())
