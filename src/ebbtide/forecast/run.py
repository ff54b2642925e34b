"""The forecast itself: the shares of all steps of a run, summed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebbtide import timescale
from ebbtide.forecast.report import DecayForecast, Duration, Equilibrium, Moment, RunForecast
from ebbtide.forecast.settings import DecaySettings
from ebbtide.forecast.verdict import judge
from ebbtide.schedules import Constant, Schedule
from ebbtide.schedules._arithmetic import check_schedule

__all__ = ["EXACT_STEPS", "forecast", "forecast_groups"]

# Up to this many steps are summed one by one; a longer run by this many evenly spaced ones.
EXACT_STEPS = 200_000

_REPORTED_POINTS, _CURVE_POINTS = 5, 500


def forecast(
    settings: DecaySettings,
    *,
    total_steps: int,
    steps_per_epoch: float | None = None,
    schedule: Schedule | None = None,
    weight_decay_schedule: Schedule | None = None,
) -> DecayForecast:
    """Forecast what decay does over a run.

        d_t = share of a weight that step t removes, after both schedules
        κ   = Σ d_t,    kept = Π (1 - d_t),    τ = 1/max d_t

    Args:
        settings: Learning rate, weight decay, policy and rule of the group.
        total_steps: Length of the run, at least 1.
        steps_per_epoch: Steps of an epoch, above 0; adds epochs to the report.
        schedule: Multiplier of the learning rate at every step; None for none.
        weight_decay_schedule: Multiplier of the weight decay at every step; None for none.

    Raises:
        ValueError: A length is out of range, or a schedule returns a negative number.

    Example:
        >>> from ebbtide.schedules import Cosine
        >>> seen = forecast(
        ...     DecaySettings(lr=1e-3, weight_decay=0.1),
        ...     total_steps=10_000, schedule=Cosine(10_000),
        ... )
        >>> round(seen.total_decay, 5), round(seen.kept_share, 6), seen.verdict
        (0.50005, 0.606489, 'active')

    References:
        Wang & Aitchison 2024, arXiv:2405.13698; Kosson et al. 2023, arXiv:2305.17212; Xie & Li
        2024, arXiv:2404.04454. The limits of the verdicts are ours.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if steps_per_epoch is not None and not 0 < steps_per_epoch < math.inf:
        raise ValueError(f"steps_per_epoch must be above 0, got {steps_per_epoch}")
    for name, given in (("schedule", schedule), ("weight_decay_schedule", weight_decay_schedule)):
        if given is not None:
            check_schedule(name, given)
    run = _Run(
        settings,
        total_steps,
        steps_per_epoch,
        schedule or Constant(),
        weight_decay_schedule or Constant(),
    )
    sums = _sums(run)
    warmup = timescale.default_warmup(settings.betas[1]) if settings.rule == "adam" else None
    verdict, reason = _verdict(run, sums)
    share = sums.largest_share if sums else None
    return DecayForecast(
        settings=settings,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        largest_share=share,
        timescale=None if share is None else run.duration(timescale.timescale_steps(share)),
        half_life=None if share is None else run.duration(timescale.half_life_steps(share)),
        total_decay=sums.total_decay if sums else None,
        total_decay_lr_alone=sums.total_decay_lr_alone if sums else None,
        kept_share=sums.kept_share if sums else None,
        equilibrium=_equilibrium(settings, sums) if sums else None,
        default_warmup_steps=warmup,
        verdict=verdict,
        reason=reason,
        notes=tuple(_notes(run, sums, warmup)),
        moments=run.evenly_spaced(_REPORTED_POINTS),
        curve=run.evenly_spaced(_CURVE_POINTS),
    )


def forecast_groups(
    groups: Sequence[Mapping[str, Any]],
    *,
    total_steps: int,
    steps_per_epoch: float | None = None,
    schedule: Schedule | None = None,
    weight_decay_schedule: Schedule | None = None,
    gradient_scales: Sequence[float | None] | None = None,
) -> RunForecast:
    """Forecast every parameter group of an optimizer.

    Args:
        groups: The groups, ours or torch's.
        total_steps: Length of the run, at least 1.
        steps_per_epoch: Steps of an epoch.
        schedule: Multiplier of every group's learning rate.
        weight_decay_schedule: Multiplier of every group's weight decay.
        gradient_scales: Typical √v̂ of every group, where L2 runs under Adam.

    Example:
        >>> groups = [{"lr": 1e-3, "weight_decay": 0.1, "dampening": 0, "momentum": 0.9}]
        >>> forecast_groups(groups, total_steps=1000).groups[0].verdict
        'active'
    """
    scales = gradient_scales if gradient_scales is not None else [None] * len(groups)
    return RunForecast(
        tuple(
            forecast(
                DecaySettings.from_group(group, name=f"group {number}", gradient_scale=scale),
                total_steps=total_steps,
                steps_per_epoch=steps_per_epoch,
                schedule=schedule,
                weight_decay_schedule=weight_decay_schedule,
            )
            for number, (group, scale) in enumerate(zip(groups, scales, strict=True))
        )
    )


@dataclass(frozen=True)
class _Run:
    """One group under its schedules."""

    settings: DecaySettings
    total_steps: int
    steps_per_epoch: float | None
    lr_schedule: Schedule
    decay_schedule: Schedule

    @property
    def stride(self) -> float:
        return max(1.0, self.total_steps / EXACT_STEPS)

    def steps(self) -> Iterator[float]:
        middle = 0.5 * (self.stride - 1.0)
        for sample in range(min(self.total_steps, EXACT_STEPS)):
            yield sample * self.stride + middle

    def moment(self, step: float) -> Moment:
        lr_multiplier, decay_multiplier = self.lr_schedule(step), self.decay_schedule(step)
        for multiplier in (lr_multiplier, decay_multiplier):
            if not 0 <= multiplier < math.inf:
                raise ValueError(f"a schedule is {multiplier:g} at step {step:g}")
        lr = self.settings.lr * lr_multiplier
        weight_decay = self.settings.weight_decay * decay_multiplier
        return Moment(step, lr, weight_decay, self.settings.share(lr, weight_decay))

    def evenly_spaced(self, points: int) -> tuple[Moment, ...]:
        last = self.total_steps - 1
        steps = sorted({round(point * last / (points - 1)) for point in range(points)})
        return tuple(self.moment(step) for step in steps)

    def duration(self, steps: float) -> Duration:
        epochs = None if self.steps_per_epoch is None else steps / self.steps_per_epoch
        return Duration(steps, epochs, steps / self.total_steps)


@dataclass(frozen=True)
class _Sums:
    """What the steps of a run come to."""

    largest_share: float
    lr_there: float
    total_decay: float
    total_decay_lr_alone: float
    kept_share: float | None


def _sums(run: _Run) -> _Sums | None:
    """Return the sums over the run; None where the share of a step cannot be known."""
    shares, shares_lr_alone = [], []
    largest, lr_there = -1.0, 0.0
    for step in run.steps():
        moment = run.moment(step)
        lr_alone = run.settings.share(moment.lr, run.settings.weight_decay)
        if moment.share is None or lr_alone is None:
            return None
        shares.append(moment.share)
        shares_lr_alone.append(lr_alone)
        if moment.share > largest:
            largest, lr_there = moment.share, moment.lr
    return _Sums(
        largest_share=largest,
        lr_there=lr_there,
        total_decay=timescale.total_decay(shares) * run.stride,
        total_decay_lr_alone=timescale.total_decay(shares_lr_alone) * run.stride,
        kept_share=timescale.kept_share(shares) ** run.stride if largest < 1 else None,
    )


def _equilibrium(settings: DecaySettings, sums: _Sums) -> Equilibrium | None:
    if sums.kept_share is None or sums.largest_share == 0 or settings.rule == "other":
        return None
    adam, l2 = settings.rule == "adam", settings.decay_policy == "l2"
    momentum = settings.betas[0] if adam else settings.momentum
    return Equilibrium(
        # The size of SGD's step, and so its RMS, depends on the gradient.
        rms=timescale.equilibrium_rms(sums.lr_there, sums.largest_share) if adam else None,
        approach=1.0 - sums.kept_share**2,
        # Adam with L2 turns each neuron at its own rate.
        rotation_per_step=(
            None if adam and l2 else timescale.rotation_per_step(sums.largest_share, momentum)
        ),
        weight_bound=(
            timescale.weight_bound(sums.lr_there, sums.largest_share) if adam and not l2 else None
        ),
    )


def _verdict(run: _Run, sums: _Sums | None) -> tuple[str, str]:
    if sums is None:
        return "unknown", (
            "L2 reaches the weights divided by √v̂, which only a run can tell: give the gradient "
            "scale, or explain an optimizer that has stepped."
        )
    return judge(
        largest_share=sums.largest_share, total_decay=sums.total_decay, steps=run.total_steps
    )


def _notes(run: _Run, sums: _Sums | None, warmup: float | None) -> Iterator[str]:
    settings = run.settings
    if sums is not None and not isinstance(run.decay_schedule, Constant):
        yield (
            f"The schedules multiply: κ = {sums.total_decay:.4g}, where that of the learning rate "
            f"alone would give {sums.total_decay_lr_alone:.4g}."
        )
        if run.decay_schedule == run.lr_schedule:
            power = 3 if settings.decay_policy == "corrected" else 2
            yield f"One schedule drives both, so the decay falls as its power {power}."
    if settings.cautious:
        yield "Cautious decay skips weights that the step moves away from zero: κ is a limit."
    if sums is not None and settings.decay_policy == "l2" and settings.weight_decay > 0:
        yield "L2 is part of the gradient: the share that a step removes is approximate."
    if sums is not None and (run.steps_per_epoch or 0) * sums.largest_share > 1:
        yield "The timescale is under one epoch: examples are forgotten before all are seen."
    if sums is not None and 0 < sums.largest_share < 2.0**-25:
        yield "Each share is below half the spacing of float32, where plain arithmetic loses it."
    if warmup is not None and warmup > 0.1 * run.total_steps:
        yield f"The default warmup is over a tenth of the run, {0.1 * run.total_steps:,.0f} steps."
    if run.stride > 1:
        yield f"Summed over {EXACT_STEPS:,} evenly spaced steps of the {run.total_steps:,}."
