"""`ebbtide explain`: what an lr, a weight decay and a schedule do over a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ebbtide.cli_science.common import (
    SCHEDULE_HELP,
    Betas,
    Dampening,
    JsonOption,
    Lr,
    Momentum,
    Steps,
    input_errors,
    pair,
    table,
)
from ebbtide.lab.errors import InputError

if TYPE_CHECKING:
    from ebbtide.forecast import DecayForecast, RunForecast
    from ebbtide.schedules import Schedule

__all__ = ["explain"]


def explain(
    lr: Lr,
    weight_decay: Annotated[float, typer.Option(help="λ in the convention of the policy.")],
    steps: Steps,
    schedule: Annotated[str, typer.Option(help=SCHEDULE_HELP)] = "constant",
    weight_decay_schedule: Annotated[
        str | None, typer.Option(help="Schedule of the weight decay, on top of the policy.")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Steps of linear warmup before the schedule.")] = 0,
    steps_per_epoch: Annotated[float | None, typer.Option(help="Steps of an epoch.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, sgd or sgdw.")] = "adamw",
    policy: Annotated[
        str | None,
        typer.Option(help="l2, decoupled, independent or corrected; that of the optimizer."),
    ] = None,
    base_lr: Annotated[float | None, typer.Option(help="Where it is not --lr.")] = None,
    betas: Betas = "0.9,0.999",
    momentum: Momentum = 0.9,
    dampening: Dampening = 0.0,
    cautious: Annotated[bool, typer.Option("--cautious", help="Cautious decay.")] = False,
    gradient_scale: Annotated[
        float | None, typer.Option(help="Typical √v̂, for L2 under Adam.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what an lr, a weight decay and a schedule do over a run, with a verdict."""
    from ebbtide.forecast import DecaySettings, RunForecast, forecast
    from ebbtide.schedules import parse_schedule

    rule, default_policy = _optimizer(optimizer)
    with input_errors():
        settings = DecaySettings(
            lr=lr,
            weight_decay=weight_decay,
            decay_policy=policy or default_policy,
            rule=rule,
            base_lr=base_lr,
            betas=pair(betas),
            momentum=momentum if rule == "sgd" else 0.0,
            dampening=dampening if rule == "sgd" else 0.0,
            cautious=cautious,
            gradient_scale=gradient_scale,
            name=optimizer,
        )
        decay_schedule: Schedule | None = None
        if weight_decay_schedule is not None:
            decay_schedule = parse_schedule(weight_decay_schedule, total_steps=steps)
        seen = forecast(
            settings,
            total_steps=steps,
            steps_per_epoch=steps_per_epoch,
            schedule=parse_schedule(schedule, total_steps=steps, warmup_steps=warmup),
            weight_decay_schedule=decay_schedule,
        )
    _explained(RunForecast((seen,)), plot, as_json)


def _explained(run: RunForecast, plot: Path | None, as_json: bool) -> None:
    if plot is not None:
        try:
            run.plot(plot)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot write the picture {plot}: {error}") from None
    if as_json:
        print(run.to_json())
        return
    for group in run.groups:
        table(group.title(), ["", ""], group.rows())
        table("", ["step", "lr", "weight decay", "removed"], _moment_rows(group))
    if plot is not None:
        typer.echo(f"Picture: {plot.resolve()}")


def _moment_rows(group: DecayForecast) -> list[tuple[str, ...]]:
    return [
        (
            f"{moment.step:,.0f}",
            f"{moment.lr:.4g}",
            f"{moment.weight_decay:.4g}",
            "not known" if moment.share is None else f"{moment.share:.4g}",
        )
        for moment in group.moments
    ]


def _optimizer(name: str) -> tuple[str, str]:
    known = {
        "adamw": ("adam", "decoupled"),
        "adam": ("adam", "l2"),
        "sgd": ("sgd", "l2"),
        "sgdw": ("sgd", "decoupled"),
    }
    if name not in known:
        raise InputError(f"unknown optimizer {name!r}; choose from {', '.join(known)}")
    return known[name]
