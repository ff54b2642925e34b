"""Claims about the update itself: its formulas, its limits and its bias correction."""

from __future__ import annotations

import math

import numpy as np

from ebbtide.lab.claims.bench import Bench
from ebbtide.lab.claims.claim import Claim, Evidence, Number, Verdict, exact, graded
from ebbtide.lab.claims.published import adam_as_published, rmsprop, sgdw_as_published
from ebbtide.lab.claims.streams import Array, distance, noisy_quadratic, trajectory
from ebbtide.lab.report import Table
from ebbtide.lab.statistics import bootstrap_mean
from ebbtide.reference import AdamState, adam
from ebbtide.schedules import Cosine

__all__ = ["CLAIMS"]

_EQUAL = 1e-12
_STEPS = 200


def _measure_formulas(bench: Bench) -> Evidence:
    start, gradient = noisy_quadratic(seed=bench.effort.seed)
    settings = {"lr": 0.05, "weight_decay": 0.02, "decay_policy": "independent"}
    ours = trajectory(
        "AdamW", start, gradient, steps=_STEPS, schedule=Cosine(_STEPS), options=settings
    )
    coupled = trajectory(
        "Adam", start, gradient, steps=_STEPS, options={"lr": 0.05, "weight_decay": 0.02}
    )
    momentum = {**settings, "lr": 0.02, "momentum": 0.9}
    sgdw = trajectory("SGD", start, gradient, steps=_STEPS, options=momentum)

    def published(slip: str = "", l2: float = 0.0, decay: float = 0.02) -> Array:
        schedule = Cosine(_STEPS) if decay else None
        return adam_as_published(
            start, gradient, steps=_STEPS, alpha=0.05, l2=l2, decay=decay, schedule=schedule,
            slip=slip,
        )  # fmt: skip

    algorithm1 = sgdw_as_published(
        start, gradient, steps=_STEPS, alpha=0.02, momentum=0.9, decay=0.02
    )
    slips = {
        "bias": "bias correction left out",
        "square": "v averages |g| instead of g²",
        "schedule": "the schedule's η taken for 1",
    }
    rows = [(said, f"{distance(ours, published(slip)):.2g}") for slip, said in slips.items()]
    penalty = distance(coupled, published("penalty", l2=0.02, decay=0))
    rows.append(("the L2 term is the slope of λ/2·θ instead of λ/2·θ²", f"{penalty:.2g}"))
    return Evidence(
        {
            "adamw": exact("AdamW, largest gap", distance(ours, published())),
            "adam": exact("Adam + L2, largest gap", distance(coupled, published(l2=0.02, decay=0))),
            "sgdw": exact("SGDW, largest gap", distance(sgdw, algorithm1)),
        },
        tables=[Table(("Slip seen in retellings", "Gap it makes"), rows)],
    )


FORMULAS = Claim(
    name="formulas",
    title="The formulas are the published ones",
    claim="AdamW is Algorithm 2 and SGDW Algorithm 1 of the paper, with moments, bias correction "
    "and a decay that neither moment sees.",
    source="Loshchilov & Hutter 2019, Algorithms 1 and 2, arXiv:1711.05101",
    experiment="Both algorithms, written from the paper without Ebbtide, and Ebbtide's classes "
    f"take {_STEPS} steps in float64 on a noisy quadratic of 20 parameters, AdamW under a cosine. "
    "The gap is the largest difference on the way, as a share of the largest movement.",
    prediction="Equal but for rounding.",
    expected=Verdict.CONFIRMED,
    rule="Confirmed if all three gaps are at most 1e-12, else not confirmed.",
    measure=_measure_formulas,
    judge=lambda e: graded(max(e[k].value for k in ("adam", "adamw", "sgdw")) <= _EQUAL),
    readings={
        Verdict.CONFIRMED: "Ebbtide takes the steps of the published algorithms: the largest gap "
        "is {adamw} for AdamW, {adam} for Adam + L2 and {sgdw} for SGDW.",
        Verdict.NOT_CONFIRMED: "The runs differ: AdamW by {adamw}, Adam + L2 by {adam}, SGDW by "
        "{sgdw} of the way.",
    },
)


def _measure_rmsprop(bench: Bench) -> Evidence:
    start, gradient = noisy_quadratic(seed=bench.effort.seed)
    options = {"lr": 0.01, "betas": (0.0, 0.99)}
    ours = trajectory("Adam", start, gradient, steps=_STEPS, options=options)
    corrected, plain = (
        rmsprop(start, gradient, steps=_STEPS, lr=0.01, beta=0.99, corrected=corrected)
        for corrected in (True, False)
    )
    first = float(np.abs((plain[1] - plain[0]) / (ours[1] - ours[0])).mean())
    return Evidence(
        {
            "corrected": exact("gap to RMSProp with bias correction", distance(ours, corrected)),
            "plain": exact("gap to RMSProp without", distance(ours, plain)),
            "first": exact("first step of RMSProp without, against Adam's", first),
        }
    )


RMSPROP = Claim(
    name="rmsprop",
    title="Adam with β1 = 0 is RMSProp with bias correction",
    claim="Adam without a first moment is RMSProp with bias correction.",
    source="Kingma & Ba 2015, section 5, arXiv:1412.6980",
    experiment=f"Adam with betas (0, 0.99) and an RMSProp written apart take {_STEPS} steps in "
    "float64 on a noisy quadratic; RMSProp once with its average divided by 1 - βᵗ, once without.",
    prediction="Equal with the correction. Without it RMSProp's first step is 1/√(1 - 0.99) = 10 "
    "times as long.",
    expected=Verdict.CONFIRMED,
    rule="Confirmed if the gap with correction is at most 1e-12 and the gap without is above "
    "1e-3, so that the correction is part of the truth; else not confirmed.",
    measure=_measure_rmsprop,
    judge=lambda e: graded(e["corrected"].value <= _EQUAL and e["plain"].value > 1e-3),
    readings={
        Verdict.CONFIRMED: "The two are equal ({corrected}); plain RMSProp differs by {plain}, "
        "since its first step is {first} times as long.",
        Verdict.NOT_CONFIRMED: "The gap is {corrected} with bias correction and {plain} without.",
    },
)


def _measure_momentum(bench: Bench) -> Evidence:
    """Compare the late steps of Adam at β2 → 1 with a moving average of the gradient."""
    seed, steps, lr = bench.effort.seed, 2000, 1e-3
    scales = np.geomspace(0.01, 1, 20)
    stream = np.random.default_rng([seed, 9]).normal(0.5, 1, (steps, 20)) * scales
    options = {"lr": lr, "betas": (0.9, 1 - 1e-9), "eps": 0.0}
    path = trajectory(
        "Adam", np.zeros(20), lambda _, step: stream[step], steps=steps, options=options
    )
    average, moves = np.zeros(20), []
    for gradient in stream:
        average = 0.9 * average + 0.1 * gradient
        moves.append(-average)
    late = slice(steps // 2, None)
    adams, momentum = np.diff(path, axis=0)[late], np.stack(moves)[late]
    common, own = (_left_over(adams, momentum, axis) for axis in (None, 0))
    return Evidence(
        {
            "common": exact("left over with one factor for all", common, ".1%"),
            "own": exact("left over with a factor for each parameter", own, ".1%"),
        }
    )


def _left_over(first: Array, second: Array, axis: int | None) -> float:
    """Return the share of `first` that the best multiple of `second` does not explain."""
    factor = (first * second).sum(axis=axis) / (second * second).sum(axis=axis)
    return math.sqrt(float(((first - factor * second) ** 2).sum() / (first * first).sum()))


MOMENTUM = Claim(
    name="momentum-limit",
    title="Adam with β2 → 1 is SGD with momentum",
    claim="As β2 approaches 1 the second moment no longer changes, and Adam becomes SGD with "
    "momentum.",
    source="Common reading of Kingma & Ba 2015, arXiv:1412.6980",
    experiment="Adam with betas (0.9, 1 - 1e-9) takes 2,000 steps on random gradients whose size "
    "differs between parameters by up to 100. Its steps from 1,000 on are compared with those of "
    "momentum: how much of them is left over when momentum is multiplied by one factor for all "
    "parameters, or by a factor for each.",
    prediction="v̂ becomes the plain mean of g² so far, which settles: a factor for each parameter "
    "explains nearly all, a common one does not.",
    expected=Verdict.CONDITION,
    rule="Confirmed if a common factor leaves at most 5 %; with a condition if a factor for each "
    "parameter leaves at most 5 %; else not confirmed.",
    measure=_measure_momentum,
    judge=lambda e: graded(e["common"].value <= 0.05, e["own"].value <= 0.05),
    readings={
        Verdict.CONFIRMED: "One common factor leaves {common} of Adam's steps.",
        Verdict.CONDITION: "It is momentum with a step size of its own for each parameter: that "
        "leaves {own} of Adam's steps unexplained, one common factor {common}.",
        Verdict.NOT_CONFIRMED: "Even with a factor for each parameter {own} is left over.",
    },
)


def _measure_correction(bench: Bench) -> Evidence:
    count = bench.effort.replicates(200)
    ratios = np.array([_mean_restored(bench.effort.seed, i) for i in range(count)])
    rows = []
    for name, betas in (("(0.9, 0.999)", (0.9, 0.999)), ("(0.95, 0.95)", (0.95, 0.95))):
        factors = _step_factors(betas, 1000)
        rows.append((name, *(f"{factors[t - 1]:.3g}" for t in (1, 10, 100, 1000))))
    usual, equal = (_step_factors(betas, 1)[0] for betas in ((0.9, 0.999), (0.95, 0.95)))
    return Evidence(
        {
            "corrected": Number("m̂ in step 3 over the true mean", bootstrap_mean(ratios[:, 0])),
            "uncorrected": Number("m in step 3 over the true mean", bootstrap_mean(ratios[:, 1])),
            "usual": exact("first step without correction / with, betas (0.9, 0.999)", usual),
            "equal": exact("the same, betas (0.95, 0.95)", equal),
        },
        tables=[
            Table(
                ("betas", "step 1", "10", "100", "1000"),
                rows,
                "Length of a step without bias correction over that with it",
            )
        ],
    )


def _mean_restored(seed: int, replicate: int) -> tuple[float, float]:
    """Return the first moment in step 3 over the true mean gradient, corrected and not.

    The moment is read off θ: with ε so large that it is the whole denominator, a step is
    lr/ε times the moment.
    """
    stream = np.random.default_rng([seed, 10, replicate]).normal(1, 1, (3, 500))
    found = []
    for correction in (True, False):
        options = {"lr": 1e12, "eps": 1e12, "bias_correction": correction}
        path = trajectory(
            "Adam", np.zeros(500), lambda _, step: stream[step], steps=3, options=options
        )
        found.append(float(-(path[3] - path[2]).mean()))
    return found[0], found[1]


def _step_factors(betas: tuple[float, float], steps: int) -> list[float]:
    """Return step lengths without over with bias correction, for a constant gradient."""
    without, corrected = (_step_lengths(betas, steps, correction) for correction in (False, True))
    return [a / b for a, b in zip(without, corrected, strict=True)]


def _step_lengths(betas: tuple[float, float], steps: int, correction: bool) -> list[float]:
    state, lengths = AdamState(0.0), []
    for step in range(1, steps + 1):
        after = adam(
            state, 1.0, step=step, lr=1.0, betas=betas, eps=0.0, bias_correction=correction
        )
        lengths.append(state.param - after.param)
        state = after
    return lengths


BIAS_CORRECTION = Claim(
    name="bias-correction",
    title="Bias correction restores the true mean and makes early steps larger",
    claim="The moments start at zero; bias correction restores their true mean early on, and "
    "without it the first steps are too small.",
    source="Common account of Kingma & Ba 2015, section 3; the sign: Laing & Orvieto 2025, "
    "arXiv:2511.20516",
    experiment="The first moment after 3 steps of random gradients with mean 1, corrected and "
    "not; and the length of steps without correction over that with it, for a constant gradient, "
    "which is (1 - β1ᵗ)/√(1 - β2ᵗ).",
    prediction="The mean is restored: 1 against 1 - 0.9³ = 0.271. But v starts at zero too: "
    "without correction the first step is 0.1/√0.001 = 3.16 times as long for the usual betas, and "
    "0.05/√0.05 = 0.22 times for betas (0.95, 0.95). The sign depends on the betas.",
    expected=Verdict.CONDITION,
    rule="Not confirmed unless the interval of the corrected mean lies within 1 % of 1. Confirmed "
    "if steps without correction are shorter for both pairs of betas, with a condition if for one.",
    measure=_measure_correction,
    judge=lambda e: (
        graded(
            max(e["usual"].value, e["equal"].value) < 1,
            min(e["usual"].value, e["equal"].value) < 1,
        )
        if e["corrected"].low > 0.99 and e["corrected"].high < 1.01
        else Verdict.NOT_CONFIRMED
    ),
    readings={
        Verdict.CONFIRMED: "The mean is restored ({corrected} against {uncorrected}), and the "
        "first step without correction is {usual} and {equal} times as long.",
        Verdict.CONDITION: "The mean is restored ({corrected} against {uncorrected} without), but "
        "which way the step changes depends on the betas: without correction the first step is "
        "{usual} times as long for (0.9, 0.999) and {equal} times for (0.95, 0.95).",
        Verdict.NOT_CONFIRMED: "The corrected mean is {corrected}; the first step without "
        "correction is {usual} and {equal} times as long.",
    },
)


def _measure_late(bench: Bench) -> Evidence:
    del bench
    lr = 1e-3
    rows, sizes = [], {}
    for late in (1, 10, 100, 1000, 10_000, 100_000):
        state = adam(AdamState(0.0), 1.0, step=late + 1, lr=lr, eps=0.0)
        sizes[late] = abs(state.param) / lr
        rows.append((f"{late + 1:,}", f"{sizes[late]:.3f}"))
    ours = _late_in_ebbtide(lr, 1000)
    return Evidence(
        {
            "shared": exact("first step over lr, shared count, after 1,000 steps", sizes[1000]),
            "largest": exact("the same after 100,000 steps", sizes[100_000]),
            "own": exact("first step over lr, Ebbtide's own count", ours, ".6g"),
        },
        tables=[Table(("Joins at step", "First step / lr with a shared count"), rows)],
    )


def _late_in_ebbtide(lr: float, late: int) -> float:
    """Return the first step of an array that gets its first gradient late, over lr."""
    import ebbtide.numpy

    early, joining = np.zeros(1), np.zeros(1)
    arrays = {"early": early, "joining": joining}
    optimizer = ebbtide.numpy.Adam(arrays, lr=lr, eps=0.0)
    for _ in range(late):
        optimizer.step({"early": np.ones(1)})
    optimizer.step({"early": np.ones(1), "joining": np.ones(1)})
    return float(abs(joining[0])) / lr


LATE = Claim(
    name="late-parameter",
    title="One step count is enough for all parameters",
    claim="State may be created when a parameter first gets a gradient, with one step count for "
    "all.",
    source="Textbook implementations of Adam that keep one global t",
    experiment="A parameter gets its first gradient after 1,000 steps of the others. Its first "
    "step, which should be lr long, with the shared count and with Ebbtide's own count.",
    prediction="(1 - β1)/√((1 - β2)/(1 - β2ᵗ)) = 2.515 times lr at step 1,001, up to 3.162 later; "
    "1 with a count of its own.",
    expected=Verdict.NOT_CONFIRMED,
    rule="Confirmed if the step with the shared count is within 1 % of lr, else not confirmed.",
    measure=_measure_late,
    judge=lambda e: graded(abs(e["shared"].value - 1) < 0.01),
    readings={
        Verdict.CONFIRMED: "The first step is {shared} times lr.",
        Verdict.NOT_CONFIRMED: "A shared count makes the first step of a parameter that joins late "
        "{shared} times lr, and {largest} times later on; with a count of its own it is {own}.",
    },
)


def _measure_constant(bench: Bench) -> Evidence:
    lr, steps = 1e-3, 400
    sizes = np.array([1e-3, 1.0, 1e3])
    options = {"lr": lr, "eps": 0.0}
    path = trajectory("Adam", np.zeros(3), lambda *_: sizes, steps=steps, options=options)
    constant = np.abs(np.diff(path, axis=0)) / lr
    runs = range(bench.effort.replicates(20))
    drift, walk = zip(*(_noisy_moves(bench.effort.seed, run) for run in runs), strict=True)
    return Evidence(
        {
            "shortest": exact("shortest step over lr, constant gradient", constant.min(), ".6g"),
            "longest": exact("longest step over lr, constant gradient", constant.max(), ".6g"),
            "drift": Number("mean step over lr, noise as large as the mean", bootstrap_mean(drift)),
            "walk": Number("root mean square step over lr, noise alone", bootstrap_mean(walk)),
        }
    )


def _noisy_moves(seed: int, replicate: int) -> tuple[float, float]:
    """Return the mean step with noise as large as the mean, and the RMS step with noise alone.

    Both over lr, of 2,000 parameters after 400 steps.
    """
    noise = np.random.default_rng([seed, 11, replicate]).normal(0, 1, (800, 2000))
    options = {"lr": 1e-3, "eps": 0.0, "betas": (0.9, 0.99)}

    def moves(mean: float) -> Array:
        path = trajectory(
            "Adam", np.zeros(2000), lambda _, t: mean + noise[t], steps=800, options=options
        )
        return np.asarray(np.diff(path, axis=0)[400:] / 1e-3)

    return abs(float(moves(1.0).mean())), math.sqrt(float((moves(0.0) ** 2).mean()))


CONSTANT = Claim(
    name="constant-gradient",
    title="Constant gradients step by lr, noisy ones by less",
    claim="Whatever the size of the gradient, Adam moves by lr a step while it stays the same, "
    "and by less the noisier it is.",
    source="Kingma & Ba 2015, section 2.1, arXiv:1412.6980",
    experiment="Constant gradients of 0.001, 1 and 1000 for 400 steps; then random gradients with "
    "mean 1 and deviation 1, and with mean 0, 2,000 parameters each.",
    prediction="1 for constant gradients; 1/√2 = 0.71 of lr on average where noise equals the "
    "mean; √((1 - β1)/(1 + β1)) = 0.23 of lr in the root mean square for noise alone.",
    expected=Verdict.CONFIRMED,
    rule="Confirmed if all steps under constant gradients are within 1e-6 of lr and both intervals "
    "of the noisy ones lie below 1; else not confirmed.",
    measure=_measure_constant,
    judge=lambda e: graded(
        abs(e["shortest"].value - 1) < 1e-6
        and abs(e["longest"].value - 1) < 1e-6
        and max(e["drift"].high, e["walk"].high) < 1
    ),
    readings={
        Verdict.CONFIRMED: "Constant gradients of any size step by lr ({shortest} to {longest}); "
        "with noise as large as the mean the mean step is {drift} of lr, and noise alone moves by "
        "{walk}.",
        Verdict.NOT_CONFIRMED: "Constant gradients step by {shortest} to {longest} of lr, noisy "
        "ones by {drift} and {walk}.",
    },
)

CLAIMS = (FORMULAS, RMSPROP, MOMENTUM, BIAS_CORRECTION, LATE, CONSTANT)
