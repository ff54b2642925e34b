"""A planned step is taken: by the kernels, and by torch operations for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ebbtide.backends import torch_ops
from ebbtide.backends.torch_ops import TensorRow, Verdict
from ebbtide.plan import Outcome
from ebbtide.rules import Scalars
from ebbtide.torch.rows import Planner

if TYPE_CHECKING:
    from ebbtide.torch.base import Optimizer

__all__ = ["run_plan"]


def run_plan(optimizer: Optimizer, planner: Planner, verdict: Verdict) -> Outcome:
    """Take the step of a new plan: the first write.

    Args:
        optimizer: Whose step it is.
        planner: Holds what was planned, and checked.
        verdict: What of the gradients is applied.
    """
    planner.commit()
    backend, plan = optimizer._backend, planner.plan
    keys = backend.load(plan)
    hosted = [row for row in planner.tensors if not _reads_on_device(optimizer, row)]
    wanted = dict.fromkeys([*keys, *((row.group, row.next_step()) for row in hosted)])
    buckets = optimizer._buckets(list(wanted))
    untouched: list[tuple[int, int]] = []
    if keys:
        scale = float(verdict.scale)
        outcome = backend.run(plan, buckets, grad_scale=scale, guard=optimizer._guards)
        untouched += outcome.untouched
    if any(planner.launched.rows()):
        optimizer._devices.run(optimizer, planner, float(verdict.scale))
    for target, copy in planner.staged:
        target.copy_(copy)
    if planner.tensors:
        scalars = dict(zip(wanted, (bucket.scalars for bucket in buckets), strict=True))
        untouched += _run_tensors(optimizer, planner.tensors, scalars, verdict)
    return Outcome(sorted(untouched))


def _run_tensors(
    optimizer: Optimizer,
    rows: list[TensorRow],
    scalars: Mapping[tuple[int, int], Scalars],
    verdict: Verdict,
) -> list[tuple[int, int]]:
    def scalars_of(row: TensorRow) -> Scalars:
        step = row.next_step()
        if _reads_on_device(optimizer, row):
            group = optimizer.param_groups[row.group]
            return torch_ops.tensor_scalars(optimizer._rule, group, step)
        return scalars[row.group, step]

    counted = not any(row.capturable for row in rows)
    return torch_ops.run(
        optimizer._rule, rows, scalars_of, verdict, guard=optimizer._guards, counted=counted
    )


def _reads_on_device(optimizer: Optimizer, row: TensorRow) -> bool:
    """Whether a row's scalars are computed from tensors, without reading those."""
    group = optimizer.param_groups[row.group]
    values = (group["lr"], group["weight_decay"], *group.get("betas", ()))
    return row.counts_on_device or any(
        isinstance(value, torch.Tensor) and (value.requires_grad or not value.is_cpu)
        for value in values
    )
