"""The verbs `explain` and `convert`: the mathematics of weight decay on the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from ebbtide.lab.errors import InputError

if TYPE_CHECKING:
    from ebbtide.forecast import DecayForecast, RunForecast
    from ebbtide.schedules import Schedule

__all__ = [
    "adam_l2",
    "change_schedule",
    "convert",
    "decay",
    "explain",
    "normalized",
    "register",
    "rescale",
    "rules",
    "sgd_recipe",
    "timescale_to_decay",
]

convert = typer.Typer(
    name="convert",
    help="Convert a weight decay between conventions, optimizers, schedules and sizes.",
    no_args_is_help=True,
)

_SCHEDULE_HELP = (
    "constant, linear, cosine, polynomial:power=2, inverse-sqrt, wsd:decay=20%, "
    "restarts:first=10%,factor=2; settings as in cosine:end=0.1."
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Lr = Annotated[float, typer.Option(help="Learning rate before the schedule, its peak.")]
Decay = Annotated[float, typer.Argument(help="Weight decay to convert.")]
Momentum = Annotated[float, typer.Option(help="Momentum of SGD.")]
Dampening = Annotated[float, typer.Option(help="Dampening of SGD.")]
Betas = Annotated[str, typer.Option(help="β1,β2 of Adam.")]
Steps = Annotated[int, typer.Option(help="Length of the run in optimizer steps.")]


class _Printable(Protocol):
    def to_json(self) -> str: ...


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line.

    Args:
        app: The command line.
    """
    app.command()(explain)
    app.add_typer(convert)


def explain(
    lr: Lr,
    weight_decay: Annotated[float, typer.Option(help="λ in the convention of the policy.")],
    steps: Steps,
    schedule: Annotated[str, typer.Option(help=_SCHEDULE_HELP)] = "constant",
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
    with _input_errors():
        settings = DecaySettings(
            lr=lr,
            weight_decay=weight_decay,
            decay_policy=policy or default_policy,
            rule=rule,
            base_lr=base_lr,
            betas=_pair(betas),
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
        _table(group.title(), ["", ""], group.rows())
        _table("", ["step", "lr", "weight decay", "removed"], _moment_rows(group))
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


@convert.command()
def decay(
    weight_decay: Decay,
    source: Annotated[str, typer.Option("--from", help="Convention it is in.")],
    target: Annotated[str, typer.Option("--to", help="Convention it shall be in.")],
    lr: Lr,
    momentum: Momentum = 0.0,
    dampening: Dampening = 0.0,
    match: Annotated[str | None, typer.Option(help="peak or total, where they differ.")] = None,
    schedule: Annotated[str | None, typer.Option(help="For total: " + _SCHEDULE_HELP)] = None,
    steps: Annotated[int | None, typer.Option(help="For total: length of the run.")] = None,
    warmup: Annotated[int, typer.Option(help="For total: steps of warmup.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Between conventions: decoupled, independent, corrected, constant, sgd_l2."""
    from ebbtide.convert import convert_weight_decay
    from ebbtide.schedules import parse_schedule

    with _input_errors():
        multiplier = (
            parse_schedule(schedule, total_steps=steps, warmup_steps=warmup)
            if schedule is not None and steps is not None
            else None
        )
        converted = convert_weight_decay(
            weight_decay,
            source,
            target,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            match=match,
            schedule=multiplier,
            total_steps=steps,
        )
    _show(converted, as_json)


@convert.command()
def sgd_recipe(
    weight_decay: Decay,
    sgd_lr: Annotated[float, typer.Option(help="Learning rate of the SGD recipe.")],
    adamw_lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")],
    momentum: Momentum = 0.0,
    dampening: Dampening = 0.0,
    as_json: JsonOption = False,
) -> None:
    """From the L2 of an SGD recipe to AdamW."""
    from ebbtide.convert import sgd_recipe_to_adamw

    with _input_errors():
        converted = sgd_recipe_to_adamw(
            weight_decay, sgd_lr=sgd_lr, adamw_lr=adamw_lr, momentum=momentum, dampening=dampening
        )
    _show(converted, as_json)


@convert.command()
def adam_l2(
    weight_decay: Decay,
    source: Annotated[
        Path, typer.Argument(help="Checkpoint of a torch Adam (.pt), or √v̂ as text or .npy.")
    ],
    as_json: JsonOption = False,
) -> None:
    """From Adam with L2 to AdamW, by the √v̂ of a real run; one answer for each group."""
    from ebbtide.convert import adam_l2_to_adamw

    with _input_errors():
        groups = [adam_l2_to_adamw(weight_decay, scales) for scales in _read_scales(source)]
    if as_json:
        print("[" + ",\n".join(group.to_json() for group in groups) + "]")
        return
    for number, group in enumerate(groups):
        typer.echo(f"group {number}: {group}" if len(groups) > 1 else str(group))


@convert.command()
def normalized(
    weight_decay: Annotated[float, typer.Argument(help="λ_norm, or λ with --inverse.")],
    dataset_size: Annotated[int, typer.Option(help="Training examples.")],
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")],
    epochs: Annotated[float, typer.Option(help="Epochs of the run, or of the restart's cycle.")],
    inverse: Annotated[bool, typer.Option("--inverse", help="From λ to λ_norm.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Between the paper's normalised λ_norm and the independent λ."""
    from ebbtide.convert import batch_passes, from_normalized, to_normalized

    with _input_errors():
        passes = batch_passes(dataset_size=dataset_size, batch_size=batch_size, epochs=epochs)
        change = to_normalized if inverse else from_normalized
        converted = change(weight_decay, passes=passes)
    _show(converted, as_json)


@convert.command("timescale")
def timescale_to_decay(
    lr: Lr,
    steps: Annotated[float, typer.Option(help="Timescale in steps.")],
    as_json: JsonOption = False,
) -> None:
    """From a timescale to the decoupled weight decay that has it."""
    from ebbtide.convert import from_timescale

    with _input_errors():
        converted = from_timescale(steps, lr=lr)
    _show(converted, as_json)


@convert.command("schedule")
def change_schedule(
    weight_decay: Decay,
    old: Annotated[str, typer.Option(help="Schedule until now: " + _SCHEDULE_HELP)],
    new: Annotated[str, typer.Option(help="Schedule from now on.")],
    steps: Steps,
    as_json: JsonOption = False,
) -> None:
    """From one schedule of the learning rate to another, with as much decay in total."""
    from ebbtide.convert import for_schedule
    from ebbtide.schedules import parse_schedule

    with _input_errors():
        converted = for_schedule(
            weight_decay,
            old=parse_schedule(old, total_steps=steps),
            new=parse_schedule(new, total_steps=steps),
            total_steps=steps,
        )
    _show(converted, as_json)


@convert.command()
def rescale(
    rule: Annotated[str, typer.Option(help="Name of the rule; `convert rules` lists them.")],
    factor: Annotated[float, typer.Option(help="How much larger.")],
    lr: Lr,
    weight_decay: Annotated[float, typer.Option(help="Weight decay that works now.")],
    betas: Betas = "0.9,0.999",
    eps: Annotated[float, typer.Option(help="eps of Adam.")] = 1e-8,
    policy: Annotated[str, typer.Option(help="decoupled, independent, corrected.")] = "decoupled",
    exponent: Annotated[float | None, typer.Option(help="Power of λ, for width-power.")] = None,
    as_json: JsonOption = False,
) -> None:
    """To another batch size, data set, run length or width, by a rule that you name."""
    from ebbtide.convert import Recipe
    from ebbtide.convert import rescale as rescale_recipe

    with _input_errors():
        recipe = Recipe(lr, weight_decay, _pair(betas), eps, policy)
        rescaled = rescale_recipe(recipe, rule, factor, exponent=exponent)
    _show(rescaled, as_json)


@convert.command()
def rules() -> None:
    """List the rules of `convert rescale`, what each keeps and where it comes from."""
    from ebbtide.convert import RESCALE_RULES

    rows = [
        (name, rule.meaning, _powers(rule.lr), _powers(rule.weight_decay), rule.source)
        for name, rule in RESCALE_RULES.items()
    ]
    _table("", ["rule", "factor, and what is kept", "lr ×", "λ ×", "source"], rows)


def _powers(power: float | None) -> str:
    return "factor^exponent" if power is None else "1" if power == 0 else f"factor^{power:g}"


def _read_scales(source: Path) -> Sequence[Sequence[float]]:
    if not source.is_file():
        raise InputError(f"{source} is not a file")
    try:
        if source.suffix == ".npy":
            import numpy as np

            return [np.load(source, allow_pickle=False).ravel().tolist()]
        if source.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            from ebbtide.torch.scales import gradient_scales_of_file

            return gradient_scales_of_file(source)
        return [[float(word) for word in source.read_text(encoding="utf-8").split()]]
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"cannot read √v̂ from {source}: {error}") from None


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


def _pair(text: str) -> tuple[float, float]:
    try:
        beta1, beta2 = map(float, text.split(","))
    except ValueError:
        raise InputError(f"betas must be two numbers, as in 0.9,0.999; got {text!r}") from None
    return beta1, beta2


@contextmanager
def _input_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


def _show(result: _Printable, as_json: bool) -> None:
    typer.echo(result.to_json() if as_json else str(result))


def _table(title: str, columns: list[str], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", show_header=any(columns), box=None)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))
    # A pipe has no width to wrap to.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
