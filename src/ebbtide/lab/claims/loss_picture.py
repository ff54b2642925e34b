"""The picture of a loss that rises from 1.2 to 1.8 under Adam, and what is beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ebbtide.lab.claims.bench import PLAIN, Bench
from ebbtide.lab.claims.claim import Claim, Evidence, Number, Verdict, graded
from ebbtide.lab.optimizers import OPTIMIZERS
from ebbtide.lab.pictures import Curve, CurvePanel, draw_curves
from ebbtide.lab.report import Picture, Table
from ebbtide.lab.stack import StackedMLP
from ebbtide.lab.statistics import bootstrap_mean
from ebbtide.lab.tasks import Cell, Outcomes
from ebbtide.lab.training import Course, Parts, StackTraining
from ebbtide.schedules import Constant

__all__ = ["CLAIMS"]

_START_LOSS = 1.2
_SIZES = (64, 64, 10)
_WARM_UP_STEPS = 400


@dataclass(frozen=True)
class _Side:
    """One optimizer going on from the common start."""

    key: str
    label: str
    optimizer: str
    weight_decay: float


_SIDES = (
    _Side("coupled", "Adam + L2, λ 0.1", "adam", 0.1),
    _Side("decoupled", "AdamW, λ 0.1", "adamw", 0.1),
    _Side("fair", "Adam + L2, λ 0.001", "adam", 0.001),
)


def _measure(bench: Bench) -> Evidence:
    seeds = bench.effort.seeds
    steps = 400 if bench.effort.quick else 1400
    parts = PLAIN.data(seeds)
    start = _trained_to(_START_LOSS, seeds, parts)
    begun = start.loss(parts.train.inputs, parts.train.labels)[:, 0]
    outcomes = {side.key: _go_on(bench, side, start, parts, steps) for side in _SIDES}
    ends = {key: found.train_loss[:, 0, -1] for key, found in outcomes.items()}
    curves = [
        Curve(side.label, outcomes[side.key].steps, outcomes[side.key].train_loss[:, 0])
        for side in _SIDES
    ]
    rows = [
        (
            side.label,
            *(f"{value:.2f}" for value in outcomes[side.key].train_loss[:, 0].mean(axis=0)),
        )
        for side in _SIDES
    ]
    columns = ("Training loss", *(f"step {step}" for step in outcomes["fair"].steps))
    panel = CurvePanel("Training loss from the same start", "cross-entropy (nats)", curves)
    return Evidence(
        {
            "start": Number("training loss at the start", bootstrap_mean(begun), ".2f"),
            **{
                side.key: Number(f"{side.label}, at the end", bootstrap_mean(ends[side.key]), ".2f")
                for side in _SIDES
            },
        },
        tables=[Table(columns, rows)],
        pictures=[
            Picture("loss-picture", draw_curves([panel]), "Bands are one deviation over seeds.")
        ],
    )


def _trained_to(loss: float, seeds: Sequence[int], parts: Parts) -> StackedMLP:
    """Return each seed's network when its training loss first falls to a value."""
    course = Course(_WARM_UP_STEPS, PLAIN.batch_size, Constant())
    adam = OPTIMIZERS["adam"]
    training = StackTraining(adam, [Cell(1e-3, 0.0)], seeds, parts, sizes=_SIZES, course=course)
    reached = StackedMLP(seeds, 1, _SIZES)
    waiting = np.ones(len(seeds), bool)
    for step in range(_WARM_UP_STEPS):
        losses = training.model.loss(parts.train.inputs, parts.train.labels)[:, 0]
        arrived = waiting & (losses <= loss)
        for kept, current in (
            (reached.weights, training.model.weights), (reached.biases, training.model.biases)
        ):  # fmt: skip
            for mine, theirs in zip(kept, current, strict=True):
                mine[arrived] = theirs[arrived]
        waiting &= ~arrived
        if not waiting.any():
            break
        training.step(step)
    return reached


def _go_on(bench: Bench, side: _Side, start: StackedMLP, parts: Parts, steps: int) -> Outcomes:
    seeds = bench.effort.seeds
    model = StackedMLP(seeds, 1, _SIZES)
    for mine, theirs in zip(
        (*model.weights, *model.biases), (*start.weights, *start.biases), strict=True
    ):
        mine[...] = theirs
    course = Course(steps, PLAIN.batch_size, Constant())
    spec, cell = OPTIMIZERS[side.optimizer], Cell(1e-3, side.weight_decay)
    training = StackTraining(spec, [cell], seeds, parts, sizes=_SIZES, course=course, model=model)
    return training.run(curve_points=8, tick=bench.tick)


LOSS_PICTURE = Claim(
    name="loss-picture",
    title="The loss rises from 1.2 to 1.8 under Adam and falls under AdamW",
    claim="From a training loss of 1.2, Adam with weight decay climbs to 1.8 while AdamW falls.",
    source="A picture in introductory texts on AdamW",
    experiment=f"A network on noisy digits is trained to a training loss of {_START_LOSS}. From "
    "there Adam + L2 and AdamW go on with the same λ of 0.1 and lr 0.001. Beside them Adam + L2 "
    "with λ 0.001, which means the same: an L2 term is divided by √v̂, here about 0.01.",
    prediction="The picture comes out, and is a matter of units: with λ 0.001 Adam + L2 falls as "
    "AdamW does.",
    expected=Verdict.CONDITION,
    rule="Not confirmed unless, with the same λ, the loss of Adam + L2 ends above the start and "
    "AdamW's below (intervals). Then with a condition if Adam + L2 with λ 0.001 ends below the "
    "start as well, else confirmed.",
    measure=_measure,
    judge=lambda e: (
        graded(e["fair"].high >= e["start"].low, partly=True)
        if e["coupled"].low > e["start"].high and e["decoupled"].high < e["start"].low
        else Verdict.NOT_CONFIRMED
    ),
    readings={
        Verdict.CONFIRMED: "From {start}, Adam + L2 ends at {coupled}, AdamW at {decoupled}, and "
        "Adam + L2 with λ 0.001 at {fair}.",
        Verdict.CONDITION: "With the same λ the picture comes out: from {start}, Adam + L2 ends at "
        "{coupled}, AdamW at {decoupled}. It compares units, not methods: with λ 0.001 Adam + L2 "
        "ends at {fair}.",
        Verdict.NOT_CONFIRMED: "From {start}, Adam + L2 ends at {coupled}, AdamW at {decoupled}.",
    },
    steps=(3 * 20 * 1400, 3 * 5 * 400),
)

CLAIMS = (LOSS_PICTURE,)
