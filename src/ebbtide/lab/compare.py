"""`ebbtide compare`: from a request to its experiment, and from the results to a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebbtide.lab.conclusions import advantages, difference_words, effects, join, range_words
from ebbtide.lab.experiment import ArmResult, Experiment, OptimizerResult
from ebbtide.lab.export import as_json, csv_files, to_bytes
from ebbtide.lab.folder import RESULTS, replace_folder
from ebbtide.lab.grid import format_value, parse_grid
from ebbtide.lab.optimizers import choose_optimizers
from ebbtide.lab.pictures import (
    Curve,
    CurvePanel,
    DotRow,
    Draw,
    HeatMap,
    HeatMaps,
    draw_curves,
    draw_dots,
    draw_heat_maps,
)
from ebbtide.lab.report import Picture, Report, Section, Table, picture_files, render
from ebbtide.lab.statistics import Interval, paired_difference
from ebbtide.lab.tasks import Metric, load_task

__all__ = [
    "COMMAND",
    "Request",
    "decay_sentence",
    "loss_sentence",
    "metric_sentence",
    "result_rows",
    "write_report",
]

COMMAND = "compare"
RESULT_COLUMNS = ("Optimizer", "Best lr", "Best weight decay", "Validation", "Test", "Against")


@dataclass(frozen=True)
class Request:
    """What the user asked to compare; `None` where the default should do.

    Attributes:
        task: Name of the task, or `FILE.py:FUNCTION`.
        optimizers: Names, comma-separated.
        lr: Grid of learning rates in AdamW's units.
        weight_decay: Grid of weight decays in AdamW's units.
        seeds: Number of paired test seeds.
        seed: Where the seeds begin.
        quick: Whether a small grid and short runs are enough.
        metric: Which of the numbers that the user's function returns counts.
        maximize: Whether more of it is better.
    """

    task: str = "digits"
    optimizers: str = "sgd,sgdw,adam,adamw"
    lr: str | None = None
    weight_decay: str | None = None
    seeds: int | None = None
    seed: int = 0
    quick: bool = False
    metric: str | None = None
    maximize: bool = False

    def experiment(self) -> Experiment:
        """Return the experiment.

        Raises:
            InputError: Something asked for does not exist or makes no sense.
        """
        specs = choose_optimizers(self.optimizers)
        task = load_task(self.task, quick=self.quick, metric=self.metric, maximize=self.maximize)
        lr = task.search.lr if self.lr is None else self.lr
        weight_decay = task.search.weight_decay if self.weight_decay is None else self.weight_decay
        lrs = parse_grid(lr, name="lr")
        weight_decays = parse_grid(weight_decay, name="weight decay", allow_zero=True)
        test_seeds = self.seeds or task.search.seeds
        # A thousand seeds apart, so that neighbouring values of `seed` share none.
        first = 1000 * self.seed
        return Experiment(
            task=task,
            specs=specs,
            lrs=lrs,
            weight_decays=weight_decays,
            selection_seeds=tuple(range(first, first + min(4, max(2, test_seeds // 2)))),
            test_seeds=tuple(range(first + 500, first + 500 + test_seeds)),
        )


def write_report(experiment: Experiment, arms: tuple[ArmResult, ...], folder: Path) -> None:
    """Write the report, its pictures and the numbers to a folder."""
    report = _report(experiment, arms)
    files = {"report.html": render(report), **picture_files(report), **csv_files(arms)}
    content = {"command": COMMAND, "files": sorted([*files, RESULTS]), **as_json(experiment, arms)}
    replace_folder(folder, {**files, RESULTS: to_bytes(content)})


def result_rows(arm: ArmResult) -> list[tuple[str, ...]]:
    """Return a row of text for each optimizer, under `RESULT_COLUMNS`."""
    return [_result_row(arm, result) for result in arm.results]


def _result_row(arm: ArmResult, result: OptimizerResult) -> tuple[str, ...]:
    metric = arm.arm.metric
    validation = float(result.grid.mean[result.grid.best])
    if result is arm.reference:
        against = "reference"
    elif np.isnan(arm.advantage(result).mean):
        against = "unknown"
    else:
        # The other way round than `advantage`, whose sign is the reference's.
        interval = paired_difference(result.chosen.test[:, 0], arm.reference.chosen.test[:, 0])
        against = difference_words(interval, unit="", decimals=metric.decimals).replace("  ", " ")
    return (
        result.spec.label,
        format_value(result.best.lr),
        format_value(result.best.weight_decay),
        f"{validation:.{metric.decimals}f} {metric.unit}".rstrip(),
        _test_words(result, metric),
        against,
    )


def _test_words(result: OptimizerResult, metric: Metric) -> str:
    values = result.chosen.test[:, 0]
    if np.isnan(values).any():
        return f"diverged under {np.isnan(values).sum()} of {len(values)} seeds"
    mean, decimals = result.test(), metric.decimals
    words = f"{mean.mean:.{decimals}f} {metric.unit} ({range_words(mean, decimals=decimals)})"
    return " ".join(words.split())


def _report(experiment: Experiment, arms: tuple[ArmResult, ...]) -> Report:
    labels = [spec.label for spec in experiment.specs]
    return Report(
        title=f"{experiment.task.title}: {_versus(labels)}",
        lead=f"{experiment.task.description} In brackets: 95 % intervals over "
        f"{len(experiment.test_seeds)} paired seeds.",
        findings=[(arm.arm.title, metric_sentence(arm)) for arm in arms],
        sections=[_section(arm) for arm in arms],
        method=_method(experiment),
        facts=_facts(experiment),
    )


def _versus(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{len(labels)} optimizers compared"


def _section(arm: ArmResult) -> Section:
    metric, name = arm.arm.metric, arm.arm.name
    columns = [*RESULT_COLUMNS[:-1], f"Test against {arm.reference.spec.label}"]
    return Section(
        title=arm.arm.title,
        text=arm.arm.description,
        notes=[*_edge_notes(arm), *_divergence_notes(arm), *_seed_notes(arm)],
        tables=[
            Table(
                columns,
                result_rows(arm),
                f"Best settings by validation, and test {metric.name} with 95 % intervals over "
                f"{arm.reference.test().count} paired seeds",
            )
        ],
        pictures=[
            Picture(f"{name}-test", _dots(arm), metric_sentence(arm)),
            Picture(f"{name}-heat", draw_heat_maps(_heat_maps(arm)), decay_sentence(arm)),
            *_curve_pictures(arm),
        ],
    )


def _curve_pictures(arm: ArmResult) -> list[Picture]:
    """Return the picture of the losses; none where an optimizer's were not measured."""
    if not all(result.chosen.steps.size for result in arm.results):
        return []
    return [Picture(f"{arm.arm.name}-curves", draw_curves(_curves(arm)), loss_sentence(arm))]


def metric_sentence(arm: ArmResult) -> str:
    """Say where the reference's test metric stands against the others'."""
    metric = arm.arm.metric
    if not arm.others():
        return _lone_sentence(arm.reference.spec.label, metric, arm.reference.test())
    found = {other.spec.label: arm.advantage(other) for other in arm.others()}
    label, quantity = arm.reference.spec.label, f"test {metric.name}"
    said = advantages(label, quantity, found, unit=_points(metric), decimals=metric.decimals)
    return " ".join(said.split())  # a user's metric has no unit


def _lone_sentence(label: str, metric: Metric, interval: Interval) -> str:
    span = range_words(interval, decimals=metric.decimals)
    mean = f"{interval.mean:.{metric.decimals}f} {metric.unit}".rstrip()
    return f"{label}'s test {metric.name} is {mean} (95 % interval {span})."


def decay_sentence(arm: ArmResult) -> str:
    """Say what weight decay did for each optimizer."""
    metric = arm.arm.metric
    gains = {r.spec.label: gain for r in arm.results if (gain := r.gain_from_decay()) is not None}
    if not gains:
        cells = [f"{r.spec.label}'s at lr {format_value(r.best.lr)}" for r in arm.results]
        return f"The best cells lie where the frames are: {', '.join(cells)}."
    # A best cell without decay would be compared with itself.
    without = [result.spec.label for result in arm.results if result.best.weight_decay == 0]
    decayed = {label: gain for label, gain in gains.items() if label not in without}
    said = effects(
        "Weight decay", f"test {metric.name}", decayed,
        unit=_points(metric), decimals=metric.decimals,
    ) if decayed else ""  # fmt: skip
    if without:
        said += f" {join(without)} did best without weight decay, by the validation data."
    return " ".join(said.split())


def loss_sentence(arm: ArmResult) -> str:
    """Say where the reference's test loss ends against the others'."""
    ends = {result.spec.label: result.chosen.test_loss[:, 0, -1] for result in arm.results}
    reference, name = arm.reference.spec.label, arm.reference.chosen.test_loss_name
    if len(ends) == 1:
        return f"{reference}'s {name} ends at {ends[reference].mean():.2f}."
    found = {
        label: paired_difference(ends[reference], end)
        for label, end in ends.items()
        if label != reference
    }
    unit = "nats" if arm.arm.metric.unit else ""
    said = advantages(reference, f"{name} at the end", found, unit=unit, decimals=2)
    return " ".join(said.split())


def _points(metric: Metric) -> str:
    return "points" if metric.unit == "%" else metric.unit


def _seed_notes(arm: ArmResult) -> list[str]:
    tests = np.array([result.chosen.test[:, 0] for result in arm.results])
    if tests.shape[1] < 2 or (tests != tests[:, :1]).any():
        return []
    return [
        "Every seed gave the same numbers, and the intervals say nothing: is settings.seed used?"
    ]


def _edge_notes(arm: ArmResult) -> list[str]:
    return [
        f"{result.spec.label}'s best cell lies on the edge of its grid ({', '.join(edges)}): a "
        "wider grid may find a better one."
        for result in arm.results
        if (edges := result.grid.edges())
    ]


def _divergence_notes(arm: ArmResult) -> list[str]:
    lost = [int(result.grid.diverged.sum()) for result in arm.results]
    if not any(lost):
        return []
    counts = [f"{r.spec.label} {n}" for r, n in zip(arm.results, lost, strict=True) if n]
    return [
        "Hatched cells diverged under at least one seed, or would remove a whole parameter in one "
        f"step: {', '.join(counts)}."
    ]


def _heat_maps(arm: ArmResult) -> HeatMaps:
    metric = arm.arm.metric
    panels = [
        HeatMap(
            result.spec.label,
            result.grid.lrs,
            result.grid.weight_decays,
            result.grid.mean,
            result.grid.diverged,
            result.grid.best,
        )
        for result in arm.results
    ]
    label = f"validation {_with_unit(metric)}"
    return HeatMaps(panels, label, metric.higher_is_better, decimals=max(0, metric.decimals - 1))


def _curves(arm: ArmResult) -> list[CurvePanel]:
    def panel(title: str, part: str) -> CurvePanel:
        curves = [
            Curve(r.spec.label, r.chosen.steps, getattr(r.chosen, part)[:, 0]) for r in arm.results
        ]
        log = not any(bool((curve.values <= 0).any()) for curve in curves)
        return CurvePanel(title, arm.arm.loss_name, curves, log=log)

    test = panel(arm.reference.chosen.test_loss_name.capitalize(), "test_loss")
    if np.isnan(arm.reference.chosen.train_loss).all():
        return [test]
    return [panel("Training loss", "train_loss"), test]


def _dots(arm: ArmResult) -> Draw:
    metric = arm.arm.metric
    rows = [DotRow(r.spec.label, r.chosen.test[:, 0], r.test()) for r in arm.results]
    return draw_dots(rows, x_label=f"test {_with_unit(metric)}")


def _with_unit(metric: Metric) -> str:
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def _method(experiment: Experiment) -> list[str]:
    cells = len(experiment.lrs) * len(experiment.weight_decays)
    units = [
        f"{s.label}: lr x {s.lr_unit:g}, weight decay x {s.weight_decay_unit:g}"
        for s in experiment.specs
    ]
    updates = [f"{s.label}: {s.update}" for s in experiment.specs]
    return [
        f"Every optimizer searches {cells} cells: {len(experiment.lrs)} learning rates by "
        f"{len(experiment.weight_decays)} weight decays, with "
        f"{len(experiment.selection_seeds)} seeds each. The heat maps show the mean over them.",
        "The grids lie where settings have about the same effect, in AdamW's units: "
        + "; ".join(units) + ".",
        "The cell with the best validation mean at the end of training is trained anew under "
        f"{len(experiment.test_seeds)} other seeds, and only those runs are tested; the best cell "
        "without weight decay likewise.",
        "A seed fixes data, start and order for every optimizer, and differences are taken seed "
        "by seed. Intervals hold the truth in 95 of 100 cases: expanded percentile bootstrap "
        "(Hesterberg 2015), or Student's for fewer than eight seeds. "
        "A difference counts as seen when its interval excludes zero.",
        experiment.task.diverged,
        "Bands in the curves are one standard deviation over the seeds.",
        "One step, with g the gradient, θ a parameter and λ the weight decay. "
        + ". ".join(updates) + ".",
    ]  # fmt: skip


def _facts(experiment: Experiment) -> Mapping[str, str]:
    from importlib.metadata import version

    return {
        "ebbtide": version("ebbtide"),
        "numpy": version("numpy"),
        "scikit-learn": version("scikit-learn"),
        "selection seeds": ", ".join(map(str, experiment.selection_seeds)),
        "test seeds": ", ".join(map(str, experiment.test_seeds)),
        f"{experiment.task.unit} in all": f"{experiment.total_steps():,}",
        **experiment.task.facts,
    }
