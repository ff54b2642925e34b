"""`ebbtide convert`: weight decay between conventions, optimizers, schedules and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ebbtide.cli_science.common import (
    SCHEDULE_HELP,
    Betas,
    Dampening,
    Decay,
    JsonOption,
    Lr,
    Momentum,
    Steps,
    input_errors,
    pair,
    show,
    table,
)
from ebbtide.lab.errors import InputError

__all__ = [
    "adam_l2",
    "change_schedule",
    "convert",
    "decay",
    "normalized",
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


@convert.command()
def decay(
    weight_decay: Decay,
    source: Annotated[str, typer.Option("--from", help="Convention it is in.")],
    target: Annotated[str, typer.Option("--to", help="Convention it shall be in.")],
    lr: Lr,
    momentum: Momentum = 0.0,
    dampening: Dampening = 0.0,
    match: Annotated[str | None, typer.Option(help="peak or total, where they differ.")] = None,
    schedule: Annotated[str | None, typer.Option(help="For total: " + SCHEDULE_HELP)] = None,
    steps: Annotated[int | None, typer.Option(help="For total: length of the run.")] = None,
    warmup: Annotated[int, typer.Option(help="For total: steps of warmup.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Between conventions: decoupled, independent, corrected, constant, sgd_l2."""
    from ebbtide.convert import convert_weight_decay
    from ebbtide.schedules import parse_schedule

    with input_errors():
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
    show(converted, as_json)


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

    with input_errors():
        converted = sgd_recipe_to_adamw(
            weight_decay, sgd_lr=sgd_lr, adamw_lr=adamw_lr, momentum=momentum, dampening=dampening
        )
    show(converted, as_json)


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

    with input_errors():
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
    lr: Annotated[float | None, typer.Option(help="To have λ decoupled, for this lr.")] = None,
    inverse: Annotated[bool, typer.Option("--inverse", help="From λ to λ_norm.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Between the paper's normalised λ_norm and the independent λ, or with --lr the decoupled."""
    from ebbtide.convert import (
        batch_passes,
        convert_weight_decay,
        from_normalized,
        to_normalized,
    )

    with input_errors():
        passes = batch_passes(dataset_size=dataset_size, batch_size=batch_size, epochs=epochs)
        if inverse:
            if lr is not None:
                weight_decay = convert_weight_decay(
                    weight_decay, "decoupled", "independent", lr=lr
                ).value
            converted = to_normalized(weight_decay, passes=passes)
        else:
            converted = from_normalized(weight_decay, passes=passes)
            if lr is not None:
                converted = convert_weight_decay(converted.value, "independent", "decoupled", lr=lr)
    show(converted, as_json)


@convert.command("timescale")
def timescale_to_decay(
    lr: Lr,
    steps: Annotated[float | None, typer.Option(help="Timescale in steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Timescale in epochs.")] = None,
    steps_per_epoch: Annotated[float | None, typer.Option(help="Steps of an epoch.")] = None,
    as_json: JsonOption = False,
) -> None:
    """From a timescale to the decoupled weight decay that has it."""
    from ebbtide.convert import from_timescale

    if steps is None:
        if epochs is None or steps_per_epoch is None:
            raise InputError("give the timescale as --steps, or as --epochs and --steps-per-epoch")
        steps = epochs * steps_per_epoch
    elif epochs is not None:
        raise InputError("give the timescale as --steps or as --epochs, not both")
    with input_errors():
        converted = from_timescale(steps, lr=lr)
    show(converted, as_json)


@convert.command("schedule")
def change_schedule(
    weight_decay: Decay,
    old: Annotated[str, typer.Option(help="Schedule until now: " + SCHEDULE_HELP)],
    new: Annotated[str, typer.Option(help="Schedule from now on.")],
    steps: Steps,
    as_json: JsonOption = False,
) -> None:
    """From one schedule of the learning rate to another, with as much decay in total."""
    from ebbtide.convert import for_schedule
    from ebbtide.schedules import parse_schedule

    with input_errors():
        converted = for_schedule(
            weight_decay,
            old=parse_schedule(old, total_steps=steps),
            new=parse_schedule(new, total_steps=steps),
            total_steps=steps,
        )
    show(converted, as_json)


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

    with input_errors():
        recipe = Recipe(lr, weight_decay, pair(betas), eps, policy)
        rescaled = rescale_recipe(recipe, rule, factor, exponent=exponent)
    show(rescaled, as_json)


@convert.command()
def rules() -> None:
    """List the rules of `convert rescale`, what each keeps and where it comes from."""
    from ebbtide.convert import RESCALE_RULES

    rows = [
        (name, rule.meaning, _powers(rule.lr), _powers(rule.weight_decay), rule.source)
        for name, rule in RESCALE_RULES.items()
    ]
    table("", ["rule", "factor, and what is kept", "lr ×", "λ ×", "source"], rows)


def _powers(power: float | None) -> str:
    return "factor^exponent" if power is None else "1" if power == 0 else f"factor^{power:g}"


def _read_scales(source: Path) -> Sequence[Sequence[float]]:
    if not source.is_file():
        raise InputError(f"{source} is not a file")
    try:
        if source.suffix == ".npy":
            import numpy as np

            scales = np.load(source, allow_pickle=False)
            return [scales.astype(np.float64, casting="same_kind").ravel().tolist()]
        if source.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            from ebbtide.torch.scales import gradient_scales_of_file

            return gradient_scales_of_file(source)
        return [[float(word) for word in source.read_text(encoding="utf-8").split()]]
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise InputError(f"cannot read √v̂ from {source}: {error}") from None
