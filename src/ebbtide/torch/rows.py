"""From tensors to rows: state created, layouts checked, copies staged, addresses taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ebbtide.plan import BLOCK, Field, Format, Plan, Row, extents_of, layout_of, salt_of
from ebbtide.rules import Rule
from ebbtide.torch.ranks import distributed, local_grad, local_of, shard_offset, sharded_like

__all__ = ["Planner", "local_of"]

FORMATS = {
    torch.float32: Format.FLOAT32,
    torch.float64: Format.FLOAT64,
    torch.bfloat16: Format.BFLOAT16,
    torch.float16: Format.FLOAT16,
    torch.complex64: Format.FLOAT32,
    torch.complex128: Format.FLOAT64,
}
_LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass
class Planner:
    """Builds the plan of one step.

    Attributes:
        rule: The update rule.
        state: The optimizer's state; entries are created only by `commit`.
        staged: (tensor, copy) pairs to write back after the step.
    """

    rule: Rule
    state: Mapping[torch.Tensor, dict[str, Any]]
    plan: Plan = field(init=False)
    staged: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    created: list[tuple[torch.Tensor, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plan = Plan(self.rule)

    def add(self, param: torch.Tensor, name: str, index: int, group: Mapping[str, Any]) -> None:
        """Add one parameter, with its row if it has a gradient.

        Raises:
            RuntimeError, TypeError, ValueError: The parameter or its gradient cannot be stepped;
                it is named, and nothing has been written.
        """
        grad = param.grad
        if grad is None:
            self.plan.entries.append((param, index, None, None))
            return
        _check(name, param, grad)
        state = self._state_of(param, group)
        row = self._row(param, grad, name, state, group)
        self.plan.cacheable &= not row.keep
        self.plan.entries.append((param, index, row, state))

    def _state_of(self, param: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        state = self.state.get(param)
        keys = self.rule.state_keys(group)
        if state and all(state.get(key) is not None for key in keys):
            return state
        fresh: dict[str, Any] = dict(state or {})
        if self._counts(param) and "step" not in fresh:
            fresh["step"] = torch.tensor(0.0, dtype=_step_dtype(group))
        # bfloat16 for 16-bit parameters: torch's bytes, and the range that squares need.
        dtype = torch.bfloat16 if param.dtype in _LOW_PRECISION else param.dtype
        for key in keys:
            if fresh.get(key) is None:
                fresh[key] = torch.zeros_like(
                    param.detach(), dtype=dtype, memory_format=torch.preserve_format
                )
        self.created.append((param, fresh))
        return fresh

    def _counts(self, param: torch.Tensor) -> bool:
        return self.rule.counts_steps or param.dtype in _LOW_PRECISION

    def _row(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        name: str,
        state: dict[str, Any],
        group: Mapping[str, Any],
    ) -> Row:
        keys = self.rule.state_keys(group)
        mine, theirs = local_of(param.detach()), local_grad(name, param, grad)
        # Partial sums that were added up are a copy: the table must not look at them again.
        keep: list[object] = [] if theirs is local_of(grad) else [theirs]
        if layout_of(mine.shape, mine.stride()) != "dense":
            target, mine = mine, mine.clone(memory_format=torch.contiguous_format)
            self.staged.append((target, mine))
            keep.append(mine)
        for key in keys:
            if local_of(state[key]).stride() != mine.stride():
                state[key] = sharded_like(_relaid(state[key], mine), param)
        if theirs.is_conj() or theirs.is_neg() or _extents(theirs) != _extents(mine):
            theirs = torch.empty_like(mine, dtype=theirs.dtype).copy_(theirs)
            keep.append(theirs)
        step = state.get("step")
        low = param.dtype in _LOW_PRECISION
        offset = shard_offset(param) if low else 0
        numel = mine.numel() * (2 if mine.is_complex() else 1)
        return Row(
            name=name,
            numel=numel,
            param=_field(mine),
            grad=_field(theirs),
            state=tuple(_field(local_of(state[key])) for key in keys),
            extents=_extents(mine),
            stochastic=low,
            run_length=numel,
            lead=offset % BLOCK,
            first_block=offset // BLOCK,
            salt=salt_of(name),
            step_address=0 if step is None else step.data_ptr(),
            step_is_double=step is not None and step.dtype == torch.float64,
            count=0 if self.created and self.created[-1][0] is param else 1,
            local=distributed(param),
            keep=tuple(keep),
        )


def _check(name: str, param: torch.Tensor, grad: torch.Tensor) -> None:
    if grad.is_sparse:
        raise RuntimeError(
            f"parameter {name!r} has a sparse gradient: Adam does not support sparse gradients, "
            "please consider SparseAdam instead"
        )
    if param.is_meta:
        raise RuntimeError(f"parameter {name!r} is on the meta device: materialise it first")
    local = local_of(param)
    if layout_of(local.shape, local.stride()) == "overlapping":
        raise RuntimeError(
            f"elements of parameter {name!r} share memory (stride {tuple(local.stride())}): a "
            "step would update them more than once; clone it first"
        )


def _step_dtype(group: Mapping[str, Any]) -> torch.dtype:
    if group.get("fused") or torch.get_default_dtype() != torch.float64:
        return torch.float32
    return torch.float64


def _relaid(state: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the state in the layout of the parameter, as a step on flat memory needs it."""
    local = local_of(state)
    return torch.empty_like(like, dtype=local.dtype).copy_(local)


def _extents(tensor: torch.Tensor) -> tuple[int, ...]:
    if tensor.is_complex():
        return (*extents_of(tensor.shape, [2 * stride for stride in tensor.stride()]), 2, 1)
    return extents_of(tensor.shape, tensor.stride())


def _field(tensor: torch.Tensor) -> Field:
    return Field(tensor.data_ptr(), 0, FORMATS[tensor.dtype])
