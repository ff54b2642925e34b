"""Say what decays and why, and what that does over a run."""

from __future__ import annotations

import statistics
from typing import Any, overload

import torch

from ebbtide.convert import DEAD_BELOW
from ebbtide.forecast import RunForecast, forecast_groups
from ebbtide.groups import GroupTable
from ebbtide.schedules import Schedule
from ebbtide.torch.groups import explain_groups
from ebbtide.torch.scales import gradient_scales
from ebbtide.torch.scheduler import Scheduler

__all__ = ["explain"]


@overload
def explain(subject: Any, model: Any = None) -> GroupTable: ...


@overload
def explain(
    subject: Any,
    model: Any = None,
    *,
    total_steps: int,
    steps_per_epoch: float | None = None,
    schedule: Schedule | Scheduler | None = None,
    weight_decay_schedule: Schedule | None = None,
) -> RunForecast: ...


def explain(
    subject: Any,
    model: Any = None,
    *,
    total_steps: int | None = None,
    steps_per_epoch: float | None = None,
    schedule: Schedule | Scheduler | None = None,
    weight_decay_schedule: Schedule | None = None,
) -> GroupTable | RunForecast:
    """Explain parameter groups, or what an optimizer will do over a run.

    Without `total_steps` the answer is a table: parameter, shape, group, decay, reason. With it
    the answer is a forecast of every group: timescale, share of the initial weights kept,
    equilibrium, and a verdict. Both print themselves and have `to_json()`; the forecast has
    `plot()` too.

    Args:
        subject: What `param_groups` returned, or an optimizer, ours or torch's.
        model: For the table, the model, so that reasons can name its modules.
        total_steps: Length of the run in steps; asks for the forecast.
        steps_per_epoch: Steps of an epoch, to have times in epochs as well.
        schedule: Multiplier of the learning rate, or the `Scheduler` that drives the optimizer.
        weight_decay_schedule: Multiplier of the weight decay.

    Raises:
        TypeError: A forecast is asked of what is no optimizer.
        ValueError: A schedule is given without `total_steps`, or twice.

    Example:
        >>> from ebbtide.schedules import Cosine
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))], lr=1e-3)
        >>> seen = explain(optimizer, total_steps=1500, schedule=Cosine(1500))
        >>> seen.groups[0].verdict, f"{seen.groups[0].kept_share:.4f}"
        ('inert', '0.9925')
    """
    if total_steps is None:
        if any(given is not None for given in (steps_per_epoch, schedule, weight_decay_schedule)):
            raise ValueError("a forecast needs total_steps, the length of the run")
        return explain_groups(subject, model)
    if not isinstance(subject, torch.optim.Optimizer):
        raise TypeError(
            f"a forecast needs an optimizer, which has learning rates; got {type(subject).__name__}"
        )
    if isinstance(schedule, Scheduler):
        if weight_decay_schedule is not None and schedule.weight_decay is not None:
            raise ValueError("the Scheduler drives the weight decay: leave the schedule out")
        weight_decay_schedule = weight_decay_schedule or schedule.weight_decay
        schedule = schedule.lr
    return forecast_groups(
        subject.param_groups,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        schedule=schedule,
        weight_decay_schedule=weight_decay_schedule,
        gradient_scales=[_median_of_live(scales) for scales in gradient_scales(subject)],
    )


def _median_of_live(scales: list[float]) -> float | None:
    live = [scale for scale in scales if scale >= DEAD_BELOW]
    return statistics.median(live) if live else None
