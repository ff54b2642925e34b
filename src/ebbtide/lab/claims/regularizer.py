"""Claims about what decay does to the weights: its strength, its limits and its units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ebbtide.lab.claims.bench import PLAIN, Bench
from ebbtide.lab.claims.claim import Claim, Evidence, Number, Verdict, exact, graded
from ebbtide.lab.claims.streams import Array, distance, noisy_quadratic, trajectory
from ebbtide.lab.optimizers import OPTIMIZERS
from ebbtide.lab.report import Table
from ebbtide.lab.statistics import bootstrap_mean
from ebbtide.lab.tasks import Cell
from ebbtide.reference import AdamState, adam
from ebbtide.schedules import Linear

__all__ = ["CLAIMS"]

_SCALES = np.array([0.03, 0.1, 0.3, 1.0])


def _equilibrium_rms(family: str, bench: Bench, replicate: int, policy: str) -> Array:
    """Return the root mean square weight under pure noise of each of `_SCALES`.

    Every parameter's gradient is noise of its scale; what holds the weights back is decay alone.
    """
    count, steps = 400, 3000
    scales = np.repeat(_SCALES, count)
    generator = np.random.default_rng([bench.effort.seed, 13, replicate])
    options = {"lr": 3e-3, "weight_decay": 0.5, "decay_policy": policy}
    noise = generator.normal(0, 1, (steps, scales.size)) * scales
    path = trajectory(
        family, np.zeros(scales.size), lambda _, step: noise[step], steps=steps, options=options
    )
    late = path[steps // 2 :: 100].reshape(-1, _SCALES.size, count)
    return np.asarray(np.sqrt((late**2).mean(axis=(0, 2))))


def _measure_effective(bench: Bench) -> Evidence:
    slopes: dict[str, list[float]] = {"l2": [], "decoupled": []}
    levels: dict[str, list[Array]] = {"l2": [], "decoupled": []}
    for replicate in range(bench.effort.replicates(10)):
        for policy, found in slopes.items():
            rms = _equilibrium_rms("Adam", bench, replicate, policy)
            levels[policy].append(rms)
            found.append(float(np.polyfit(np.log(_SCALES), np.log(rms), 1)[0]))
    means = {policy: np.mean(found, axis=0) for policy, found in levels.items()}
    law = np.sqrt(3e-3 * _SCALES / (2 * 0.5))
    rows = [
        (f"{s:g}", f"{l2:.4f}", f"{predicted:.4f}", f"{decoupled:.4f}", f"{law[-1]:.4f}")
        for s, l2, predicted, decoupled in zip(
            _SCALES, means["l2"], law, means["decoupled"], strict=True
        )
    ]
    columns = ("Gradient size s", "Adam + L2", "√(lr·s/2λ)", "AdamW", "√(lr/2λ)")
    return Evidence(
        {
            "l2": Number("slope of log RMS over log s, Adam + L2", bootstrap_mean(slopes["l2"])),
            "adamw": Number("the same, AdamW", bootstrap_mean(slopes["decoupled"])),
            "small": exact(
                "RMS weight at s = 0.03, AdamW over Adam + L2, same λ",
                float(means["decoupled"][0] / means["l2"][0]),
            ),
        },
        tables=[Table(columns, rows, "Root mean square weight under noise of size s")],
    )


EFFECTIVE = Claim(
    name="effective-decay",
    title="Large gradients shrink L2's effective decay",
    claim="In Adam with L2, weights with large gradients are decayed less than others.",
    source="Loshchilov & Hutter 2019, section 2, arXiv:1711.05101",
    experiment="1,600 weights get pure noise of size 0.03 to 1 for 3,000 steps; decay alone holds "
    "them back. A weight's root mean square at the end tells how strong its decay is: decayed at "
    "the rate r it settles at √(lr²/2r).",
    prediction="The L2 term is divided by √v̂ = s, so r = lr·λ/s and the weights settle at "
    "√(lr·s/2λ), a slope of 1/2; under AdamW at √(lr/2λ) for every s. For s below 1 that makes L2 "
    "the stronger of the two at the same λ.",
    expected=Verdict.CONDITION,
    rule="Not confirmed unless the interval of L2's slope lies within 0.45 to 0.55 and AdamW's "
    "within ± 0.05. Then confirmed if L2 is no stronger than AdamW at the same λ anywhere, with a "
    "condition if it is (weights more than 5 % smaller).",
    measure=_measure_effective,
    judge=lambda e: (
        graded(e["small"].value < 1.05, partly=True)
        if 0.45 < e["l2"].low < e["l2"].high < 0.55
        and -0.05 < e["adamw"].low < e["adamw"].high < 0.05
        else Verdict.NOT_CONFIRMED
    ),
    readings={
        Verdict.CONFIRMED: "The weights grow as s to the {l2} under L2, and as {adamw} under "
        "AdamW.",
        Verdict.CONDITION: "True in comparison: under L2 weights settle in proportion to s to the "
        "power {l2}, under AdamW {adamw}. But at the same λ L2 is the stronger one wherever √v̂ is "
        "below 1, which is usual: at s = 0.03 AdamW's weights are {small} times as large.",
        Verdict.NOT_CONFIRMED: "The slopes are {l2} for L2 and {adamw} for AdamW.",
    },
)


def _measure_big(bench: Bench) -> Evidence:
    del bench
    lr, weight_decay, steps = 1e-3, 0.1, 1000
    rows, first, removed = [], {}, {}
    for start in (10.0, 1.0, 0.1):
        coupled, decoupled = AdamState(start), AdamState(start)
        for step in range(1, steps + 1):
            coupled = adam(coupled, 0.0, step=step, lr=lr, l2=weight_decay)
            decoupled = adam(decoupled, 0.0, step=step, lr=lr, decay=lr * weight_decay)
            if step == 1:
                first[start] = (start - coupled.param) / lr
        removed[start] = 1 - coupled.param / start
        rows.append((f"{start:g}", f"{coupled.param:.4f}", f"{decoupled.param:.4f}"))
    return Evidence(
        {
            "step_big": exact("first step of a weight of 10, over lr", first[10.0]),
            "step_small": exact("first step of a weight of 0.1, over lr", first[0.1]),
            "big": exact("share of a weight of 10 gone after 1,000 steps", removed[10.0], ".1%"),
            "small": exact("share of a weight of 1 gone", removed[1.0], ".1%"),
            "adamw": exact("share gone under AdamW", 1 - (1 - lr * weight_decay) ** steps, ".1%"),
        },
        tables=[Table(("Weight at the start", "Adam + L2", "AdamW"), rows,
                      "After 1,000 steps without gradient, lr 0.001, λ 0.1")],
    )  # fmt: skip


BIG = Claim(
    name="big-weights",
    title="L2 in Adam lets big weights off",
    claim="A large weight makes λθ large, which enters v and makes the step smaller: big weights "
    "hardly decay.",
    source="Introductory texts on AdamW",
    experiment="Weights of 10, 1 and 0.1 get 1,000 steps without any gradient, lr 0.001 and λ 0.1, "
    "under Adam + L2 and under AdamW.",
    prediction="The step does not shrink with the weight; it saturates at lr, as for any gradient. "
    "So the share removed falls as 1/θ, and weights below 1/λ = 10 lose more than under AdamW.",
    expected=Verdict.CONDITION,
    rule="Confirmed if the first step of the weight of 10 is under half that of the weight of 0.1. "
    "With a condition if it is not, but the share removed is under half that of the weight of 1. "
    "Else not confirmed.",
    measure=_measure_big,
    judge=lambda e: graded(
        e["step_big"].value < 0.5 * e["step_small"].value,
        e["big"].value < 0.5 * e["small"].value,
    ),
    readings={
        Verdict.CONFIRMED: "The step shrinks: {step_big} of lr against {step_small}.",
        Verdict.CONDITION: "The step does not shrink, it saturates: {step_big} of lr for a weight "
        "of 10 and {step_small} for one of 0.1. So the share removed falls with the weight ({big} "
        "against {small}), and below 1/λ L2 takes more than AdamW's {adamw}.",
        Verdict.NOT_CONFIRMED: "The weight of 10 loses {big}, the weight of 1 {small}.",
    },
)


def _ridge_problem() -> tuple[Array, Array]:
    """Return the diabetes data, columns with mean 0 and mean square 1, as (X, y)."""
    from sklearn.datasets import load_diabetes

    inputs, target = load_diabetes(return_X_y=True)
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    return inputs, (target - target.mean()) / target.std()


def _least_squares(family: str, weight_decay: float, policy: str, steps: int) -> Array:
    """Return the weights after full-batch training with the lr falling to zero."""
    inputs, target = _ridge_problem()
    gram, moment = inputs.T @ inputs / len(target), inputs.T @ target / len(target)
    options = {"lr": 0.02, "weight_decay": weight_decay, "decay_policy": policy, "eps": 1e-12}
    start = np.zeros(len(moment))
    path = trajectory(
        family,
        start,
        lambda theta, _: gram @ theta - moment,
        steps=steps,
        schedule=Linear(steps),
        options=options,
    )
    return np.asarray(path[-1])


def _measure_ridge(bench: Bench) -> Evidence:
    steps = 5_000 if bench.effort.quick else 20_000
    inputs, target = _ridge_problem()
    gram, moment = inputs.T @ inputs / len(target), inputs.T @ target / len(target)
    rows, gaps = [], []
    for weight_decay in (0.01, 0.1, 1.0):
        ridge = np.linalg.solve(gram + weight_decay * np.eye(len(moment)), moment)
        found = [
            _least_squares("Adam", weight_decay, policy, steps) for policy in ("l2", "decoupled")
        ]
        gaps.append([float(np.abs(end - ridge).max() / np.abs(ridge).max()) for end in found])
        rows.append((f"{weight_decay:g}", *(f"{gap:.2g}" for gap in gaps[-1])))
    coupled, decoupled = zip(*gaps, strict=True)
    return Evidence(
        {
            "l2": exact("Adam + L2, largest gap", max(coupled)),
            "adamw": exact("AdamW, smallest gap", min(decoupled)),
        },
        tables=[Table(("λ", "Adam + L2", "AdamW"), rows,
                      "Distance from the ridge solution, as a share of its largest weight")],
    )  # fmt: skip


RIDGE = Claim(
    name="ridge",
    title="Adam + L2 minimises the regularised loss, AdamW another one",
    claim="Adam + L2 finds the minimum of loss plus λ/2·‖θ‖² as any optimizer does; AdamW does "
    "not.",
    source="Follows from the definitions; Xie & Li 2024, arXiv:2404.04454",
    experiment="Linear regression on scikit-learn's diabetes data, all rows at once, the lr "
    "falling to zero. The minimum of the loss with an L2 term, ridge regression, is known in "
    "closed form.",
    prediction="Adam + L2 arrives there to rounding; AdamW ends elsewhere, since its decay is not "
    "the slope of any fixed penalty on this path.",
    expected=Verdict.CONFIRMED,
    rule="Confirmed if the largest gap of Adam + L2 over three λ is at most 1e-6 of the largest "
    "weight and the smallest of AdamW above 1e-2; else not confirmed.",
    measure=_measure_ridge,
    judge=lambda e: graded(e["l2"].value <= 1e-6 and e["adamw"].value > 1e-2),
    readings={
        Verdict.CONFIRMED: "Adam + L2 lands on the ridge solution ({l2}), AdamW does not ({adamw} "
        "at least): as an objective nothing is wrong with L2 in Adam.",
        Verdict.NOT_CONFIRMED: "The gaps are {l2} at most for Adam + L2 and {adamw} at least for "
        "AdamW.",
    },
)


def _measure_bound(bench: Bench) -> Evidence:
    del bench
    from scipy.optimize import lsq_linear

    steps = 40_000
    inputs, target = _ridge_problem()
    rows, tops, gaps = [], [], []
    for weight_decay in (4.0, 10.0):
        found = _least_squares("AdamW", weight_decay, "decoupled", steps)
        box = lsq_linear(inputs, target, bounds=(-1 / weight_decay, 1 / weight_decay)).x
        tops.append(float(np.abs(found).max()) * weight_decay)
        gaps.append(float(np.abs(found - box).max()) * weight_decay)
        rows.append((f"{weight_decay:g}", f"{tops[-1] / weight_decay:.4f}", f"{1 / weight_decay:g}",
                     f"{gaps[-1]:.2g}"))  # fmt: skip
    return Evidence(
        {
            "top": exact("largest weight over 1/λ, the larger of two runs", max(tops), ".4g"),
            "low": exact("the smaller of two runs", min(tops), ".4g"),
            "gap": exact("distance from the bounded minimum, in units of 1/λ", max(gaps)),
        },
        tables=[Table(("λ", "Largest weight", "1/λ", "Gap to the bounded minimum · λ"), rows)],
    )


BOUND = Claim(
    name="linf-bound",
    title="AdamW keeps every weight below 1/λ",
    claim="With the whole batch AdamW converges to the minimum of the loss among weights no larger "
    "than 1/λ.",
    source="Xie & Li 2024, arXiv:2404.04454",
    experiment="The same regression under AdamW with λ 4 and 10, the lr falling to zero; beside it "
    "the minimum with every weight bounded by 1/λ, found by a solver made for that.",
    prediction="The largest weight reaches 1/λ and none exceeds it; the weights are those of the "
    "bounded minimum within a few percent of 1/λ.",
    expected=Verdict.CONFIRMED,
    rule="Confirmed if the largest weight is within 2 % of 1/λ in both runs and all weights are "
    "within 5 % of 1/λ of the bounded minimum; with a condition if only the first holds; else not "
    "confirmed.",
    measure=_measure_bound,
    judge=lambda e: graded(
        0.98 < e["low"].value <= e["top"].value < 1.02 and e["gap"].value < 0.05,
        0.98 < e["low"].value <= e["top"].value < 1.02,
    ),
    readings={
        Verdict.CONFIRMED: "The largest weight ends at {low} and {top} times 1/λ, and the weights "
        "are within {gap} of 1/λ of the bounded minimum.",
        Verdict.CONDITION: "The bound holds ({low} and {top} times 1/λ), but the weights are {gap} "
        "of 1/λ away from the bounded minimum.",
        Verdict.NOT_CONFIRMED: "The largest weight ends at {low} and {top} times 1/λ.",
    },
)


def _measure_loss_scale(bench: Bench) -> Evidence:
    start, gradient = noisy_quadratic(seed=bench.effort.seed)

    def path(factor: float, policy: str, weight_decay: float) -> Array:
        options = {
            "lr": 0.02, "weight_decay": weight_decay, "decay_policy": policy, "eps": 1e-30
        }  # fmt: skip
        return trajectory(
            "Adam", start, lambda theta, t: factor * gradient(theta, t), steps=400, options=options
        )

    shifts, rows = _best_decays(bench)
    return Evidence(
        {
            "adamw": exact("AdamW, gap when the loss is multiplied by 1000",
                           distance(path(1, "decoupled", 0.1), path(1000, "decoupled", 0.1))),
            "l2": exact("Adam + L2, the same",
                        distance(path(1, "l2", 0.1), path(1000, "l2", 0.1))),
            "both": exact("Adam + L2, loss and λ multiplied by 1000",
                          distance(path(1, "l2", 0.1), path(1000, "l2", 100.0))),
            "shift_l2": exact("factor by which the best λ of Adam + L2 moves on digits",
                              shifts["adam"], ",.0f"),
            "shift_adamw": exact("the same for AdamW", shifts["adamw"], ",.3g"),
        },
        tables=[Table(("Loss multiplied by", "Best λ, Adam + L2", "Best λ, AdamW"), rows,
                      "Digits, validation accuracy; the lr is 0.01")],
    )  # fmt: skip


def _best_decays(bench: Bench) -> tuple[dict[str, float], list[tuple[str, ...]]]:
    """Return by how much the best λ moves when the loss grows 10,000 times, and a table."""
    factors = (0.01, 1.0, 100.0)
    grids = {"adam": 10.0 ** np.arange(-6, 2), "adamw": 10.0 ** np.arange(-3, 2)}
    jobs = [
        (replace(bench.digits(PLAIN), loss_scale=factor), OPTIMIZERS[name],
         [Cell(1e-2, float(value)) for value in grid])
        for factor in factors
        for name, grid in grids.items()
    ]  # fmt: skip
    found = iter(bench.train(jobs))
    best: dict[str, list[float]] = {"adam": [], "adamw": []}
    for _ in factors:
        for name, grid in grids.items():
            scores = np.nan_to_num(next(found).validation.mean(axis=0))
            best[name].append(float(grid[int(scores.argmax())]))
    rows: list[tuple[str, ...]] = [
        (f"{factor:g}", f"{l2:g}", f"{adamw:g}")
        for factor, l2, adamw in zip(factors, best["adam"], best["adamw"], strict=True)
    ]
    return {name: values[-1] / values[0] for name, values in best.items()}, rows


LOSS_SCALE = Claim(
    name="loss-scale",
    title="AdamW's λ does not depend on the size of the loss, L2's does",
    claim="AdamW is robust in λ where Adam + L2 is not.",
    source="Zhuang et al. 2022 (scale-freeness), arXiv:2202.00089; popular in a stronger form",
    experiment="The loss is multiplied by 1000, as between the mean and the sum over a batch, and "
    "the run repeated with everything else the same. Then on digits the best λ in powers of ten is "
    "searched for a loss multiplied by 0.01, 1 and 100.",
    prediction="AdamW's run does not change at all (ε aside) and its best λ stays. Adam + L2's run "
    "changes, and its best λ moves by the factor of the loss, 10,000.",
    expected=Verdict.CONFIRMED,
    rule="Confirmed if AdamW's gap is at most 1e-12 and its best λ moves by at most 10, while "
    "L2's gap is above 1e-3 and its best λ moves by at least 1000; with a condition if only the "
    "gaps are so; else not confirmed.",
    measure=_measure_loss_scale,
    judge=lambda e: graded(
        e["adamw"].value <= 1e-12
        and e["l2"].value > 1e-3
        and 0.1 <= e["shift_adamw"].value <= 10
        and e["shift_l2"].value >= 999,
        e["adamw"].value <= 1e-12 and e["l2"].value > 1e-3,
    ),
    readings={
        Verdict.CONFIRMED: "AdamW's run is unchanged ({adamw}) and Adam + L2's is not ({l2}) "
        "unless λ is multiplied too ({both}). When the loss grows 10,000 times, L2's best λ moves "
        "by {shift_l2}, AdamW's by {shift_adamw}.",
        Verdict.CONDITION: "The runs behave so ({adamw} against {l2}), but the best λ moves by "
        "{shift_l2} for L2 and {shift_adamw} for AdamW.",
        Verdict.NOT_CONFIRMED: "AdamW's run changes by {adamw}, Adam + L2's by {l2}.",
    },
    steps=(3 * 13 * 20 * 1000, 3 * 13 * 5 * 300),
)

CLAIMS = (EFFECTIVE, BIG, RIDGE, BOUND, LOSS_SCALE)
