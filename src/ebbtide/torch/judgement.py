"""What of the gradients is applied: skipping, unscaling, clipping, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ebbtide.backends import torch_ops
from ebbtide.backends.torch_ops import Verdict
from ebbtide.plan import Backend, Plan, clip_scale
from ebbtide.torch import ranks
from ebbtide.torch.rows import Planner
from ebbtide.torch.tensors import grad_of

if TYPE_CHECKING:
    from ebbtide.torch.base import Optimizer

__all__ = ["judge_plan", "looks_first", "loss_scale", "scaler_found_inf"]


def looks_first(optimizer: Optimizer) -> bool:
    """Tell whether a step must have seen all gradients before it begins."""
    return optimizer._clip_grad_norm is not None or optimizer._nonfinite == "skip"


def judge_plan(
    optimizer: Optimizer, planner: Planner, new_backend: Callable[[], Backend]
) -> Verdict:
    """Decide what of the gradients of a new plan is applied.

    Args:
        optimizer: Its options decide, and what a GradScaler left in `found_inf` and `grad_scale`.
        planner: Holds the plan; nothing of it has been committed.
        new_backend: Makes a backend that knows nothing of the state, which is not there yet.
    """
    rows = planner.tensors
    alone = not any(planner.plan.rows()) and not any(planner.launched.rows())
    on_device = rows and alone and all(row.capturable for row in rows)
    if on_device and not optimizer._meshes:  # sums over ranks wait for the device
        return _judge_on_device(optimizer, [row.grad for row in rows])
    if scaler_found_inf(optimizer):
        return Verdict(apply=False)
    scale = 1.0 / loss_scale(optimizer)
    if not looks_first(optimizer):
        return Verdict(scale)
    total = _sum_squares(optimizer, planner, new_backend)
    if optimizer.nonfinite == "raise" and not math.isfinite(total):
        total = _sum_squares(optimizer, planner, None)  # the others are clipped by their own norm
    return _clipped(optimizer, total, scale)


def _clipped(optimizer: Optimizer, total: float, scale: float) -> Verdict:
    total *= scale * scale
    norm = math.sqrt(total) if total >= 0 else math.nan
    if optimizer.nonfinite == "skip" and not math.isfinite(total):
        return Verdict(apply=False, norm=norm)
    return Verdict(scale * clip_scale(total, optimizer.clip_grad_norm), norm=norm)


def _judge_on_device(optimizer: Optimizer, grads: list[torch.Tensor]) -> Verdict:
    """Decide without waiting for the device."""
    grad_scale, found_inf = (getattr(optimizer, key, None) for key in ("grad_scale", "found_inf"))
    scale: Any = 1.0 if grad_scale is None else 1.0 / grad_scale
    apply: Any = True if found_inf is None else found_inf == 0
    if not looks_first(optimizer):
        return Verdict(scale, apply)
    total = torch_ops.sum_squares(grads, finite_only=optimizer.nonfinite == "raise")
    norm = total.sqrt() * scale
    if optimizer.nonfinite == "skip":
        apply = torch.isfinite(norm) & apply
    if optimizer.clip_grad_norm is not None:
        scale = scale * (optimizer.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    return Verdict(scale, apply, norm)


def _sum_squares(
    optimizer: Optimizer, planner: Planner, new_backend: Callable[[], Backend] | None
) -> float:
    """Return the sum of squares of the gradients over all ranks; of the finite ones if `None`."""
    entries = planner.plan.entries
    tensors = {id(entries[entry][0]): grad for entry, grad in planner.grads.items()}

    def of_part(part: Plan) -> float:
        grads = [tensors[id(param)] for param, *_ in part.entries if id(param) in tensors]
        total = 0.0
        if new_backend is None:
            grads += [grad_of(row) for _, _, row in part.rows() if row.numel]
        else:
            backend = new_backend()
            backend.load(part)
            total = backend.sum_squares(part)
        if grads:
            total += float(torch_ops.sum_squares(grads, finite_only=new_backend is None))
        return total

    if not optimizer._meshes:
        return of_part(planner.plan)
    return ranks.sum_squares(planner.plan, of_part)


def loss_scale(optimizer: Optimizer) -> float:
    """Return by how much a GradScaler has multiplied the gradients."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def scaler_found_inf(optimizer: Optimizer) -> bool:
    """Tell whether a GradScaler has found, on any rank, a gradient that is not finite."""
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None:
        return False
    return ranks.any_rank(bool(found_inf != 0), optimizer._meshes)
