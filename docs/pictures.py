"""Draw the pictures of the documentation: `python docs/pictures.py [NAME ...]`.

Every picture is computed with the library and comes out the same each time. Without a name all
are drawn, in a few seconds, into docs/images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

from ebbtide.forecast import VERDICTS, judge
from ebbtide.numpy import SGD, Adam, AdamW
from ebbtide.reference import AdamState, SGDState, adam, sgd
from ebbtide.schedules import (
    WSD,
    Constant,
    Cosine,
    CosineRestarts,
    CycleNormalized,
    InverseSqrt,
    Linear,
    Polynomial,
    Schedule,
    Warmup,
)
from ebbtide.timescale import bias_correction_factor, ema_coefficients, equilibrium_rms
from ebbtide.weight_decay import decay_share

IMAGES = Path(__file__).parent / "images"


def everything(_name: str, _array: np.ndarray) -> bool:
    """Let all arrays decay; by default those below two dimensions do not."""
    return True


def family() -> None:
    """Draw the paths of the family down one valley, and the loss along them."""
    curvature = np.array([1.0, 30.0])
    start = (-4.0, 1.2)
    rmsprop = {"lr": 0.1, "betas": (0.0, 0.9), "bias_correction": False}
    moments = {"lr": 0.1, "betas": (0.9, 0.99)}
    members: dict[str, tuple[type, dict[str, object]]] = {
        "SGD": (SGDState, {"lr": 0.03}),
        "momentum": (SGDState, {"lr": 0.03, "momentum": 0.8}),
        "RMSProp": (AdamState, rmsprop),
        "Adam": (AdamState, moments),
        "AdamW": (AdamState, {**moments, "decay": 0.1 * 0.3}),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    x, y = np.meshgrid(np.linspace(-4.5, 1.5, 200), np.linspace(-1.5, 1.5, 200))
    left.contour(
        x, y, 0.5 * (x**2 + 30 * y**2), levels=np.logspace(-2, 2, 13).tolist(), colors="0.85"
    )
    for name, (kind, settings) in members.items():
        states = [kind(value) for value in start]
        path = [start]
        for t in range(1, 81):
            grads = [c * s.param for c, s in zip(curvature, states, strict=True)]
            count = {"step": t} if kind is AdamState else {}
            rule = adam if kind is AdamState else sgd
            states = [
                rule(state, grad, **settings, **count)
                for state, grad in zip(states, grads, strict=True)
            ]
            path.append((states[0].param, states[1].param))
        points = np.array(path)
        left.plot(*points.T, ".-", markersize=3, linewidth=1, label=name)
        right.semilogy(0.5 * (points**2 @ curvature), label=name)
    left.plot(0, 0, "k+", markersize=10)
    left.set(title="80 steps down a valley", xlabel="gentle direction", ylabel="steep direction")
    right.set(title="loss", xlabel="step", ylim=(1e-7, 100))
    right.legend()
    save(figure, "family")


def bias_correction() -> None:
    """Draw what bias correction does to the first moments and to the first steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    rng = np.random.default_rng(0)
    squares = (rng.standard_normal(300) ** 2).tolist()
    mean, plain, corrected = 0.0, [], []
    for t, square in enumerate(squares, start=1):
        mean = 0.99 * mean + 0.01 * square
        plain.append(mean)
        corrected.append(mean / (1 - 0.99**t))
    left.plot(plain, label="v")
    left.plot(corrected, label="v̂ = v/(1 - β2ᵗ)")
    left.axhline(1.0, color="0.5", linestyle=":", label="true mean of g²")
    left.set(title="running mean of g², β2 = 0.99", xlabel="step", ylim=(0, 2))
    left.legend()
    steps = np.unique(np.logspace(0, 4, 200).astype(int))
    for betas in ((0.9, 0.999), (0.9, 0.95), (0.95, 0.95)):
        lengths = [1 / bias_correction_factor(int(t), betas) for t in steps]
        right.loglog(steps, lengths, label=f"β = {betas}")
    right.axhline(1.0, color="0.5", linestyle=":")
    right.set(title="step without correction / step with it, 1/ρ(t)", xlabel="step")
    right.legend()
    save(figure, "bias_correction")


def policies() -> None:
    """Draw what each policy removes under a warmup and a cosine."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps, lr = 1000, 1e-3
    schedule = Warmup(100, Cosine(900))
    for policy, weight_decay in (("decoupled", 3.0), ("independent", 3e-3), ("corrected", 3.0)):
        shares = np.array(
            [
                decay_share(policy, lr=lr * schedule(t), base_lr=lr, weight_decay=weight_decay)
                for t in range(steps)
            ]
        )
        style = "--" if policy == "independent" else "-"
        label = f"{policy}, λ = {weight_decay:g}"
        left.plot(shares, style, label=label)
        right.plot(np.cumprod(1 - shares), style, label=label)
    constant = np.full(steps, 3e-3)
    left.plot(constant, ":", color="0.4", label="constant (no schedule)")
    right.plot(np.cumprod(1 - constant), ":", color="0.4", label="constant (no schedule)")
    left.set(title="share of a weight that a step removes", xlabel="step")
    right.set(title="what is left of an initial weight", xlabel="step", ylim=(0, 1))
    right.legend(fontsize="small")
    save(figure, "policies")


def zero_gradient() -> None:
    """Draw weights without a gradient, under AdamW and under Adam with L2."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    start = np.array([10.0, 1.0, 0.1])
    for build, style, label in ((AdamW, "C0-", "AdamW"), (Adam, "C3--", "Adam with L2")):
        weights = start.copy()
        optimizer = build([weights], lr=1e-3, weight_decay=0.1, decay_mask=everything)
        path = [weights.copy()]
        for _ in range(1500):
            optimizer.step([np.zeros(3)])
            path.append(weights.copy())
        lines = axes.semilogy(np.maximum(np.abs(path), 1e-4), style)
        lines[0].set_label(label)
    axes.set(title="gradient 0, lr 1e-3, λ = 0.1", xlabel="step", ylabel="weight", ylim=(1e-3, 20))
    axes.legend()
    save(figure, "zero_gradient")


def noise() -> None:
    """Draw the size of weights that only noise moves, by the scale of their gradient."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    scales = np.logspace(-2, 1, 7)
    lr, weight_decay = 1e-2, 0.5
    rng = np.random.default_rng(0)
    seen: dict[str, list[float]] = {"AdamW": [], "Adam with L2": []}
    for scale in scales:
        # The scale of the gradient is the scale of L2's penalty too, so each finds its balance.
        for name, build, decay in (
            ("AdamW", AdamW, weight_decay),
            ("Adam with L2", Adam, weight_decay / 10),
        ):
            weights = np.zeros(1000)
            optimizer = build([weights], lr=lr, weight_decay=decay, decay_mask=everything)
            share = lr * decay / (scale if build is Adam else 1.0)
            for _ in range(int(min(3 / share, 30_000))):
                optimizer.step([scale * rng.standard_normal(len(weights))])
            seen[name].append(float(np.sqrt(np.mean(weights**2))))
    axes.loglog(scales, seen["AdamW"], "o", color="C0", label="AdamW")
    axes.loglog(scales, [equilibrium_rms(lr, lr * weight_decay)] * len(scales), color="C0")
    axes.loglog(scales, seen["Adam with L2"], "o", color="C3", label="Adam with L2")
    law = [equilibrium_rms(lr, lr * weight_decay / 10 / scale) for scale in scales]
    axes.loglog(scales, law, color="C3")
    axes.set(
        title="weights moved by noise alone: points run, lines predicted",
        xlabel="scale of the gradient",
        ylabel="RMS of the weights",
    )
    axes.legend()
    save(figure, "noise")


def memory() -> None:
    """Draw what every step contributes to the final weights."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps, lr = 1000, 1e-3
    for weight_decay in (0.2, 1.0, 5.0):
        share = lr * weight_decay
        coefficients = ema_coefficients([share] * steps)
        label = f"λ = {weight_decay:g}: τ = {1 / share:,.0f}, {coefficients[0]:.0%} initial"
        left.plot(coefficients[1:], label=label)
    for schedule, name in (
        (Constant(), "constant"),
        (Cosine(steps), "cosine"),
        (Linear(steps), "linear"),
    ):
        shares = [lr * schedule(t) * 5.0 for t in range(steps)]
        right.plot(ema_coefficients(shares)[1:], label=name)
    left.set(title="weight of each step in the result, lr 1e-3", xlabel="step", ylabel="share")
    right.set(title="the same under schedules, λ = 5", xlabel="step")
    left.legend()
    right.legend()
    save(figure, "memory")


def verdicts() -> None:
    """Draw the verdict for every lr and weight decay, for two lengths of a run."""
    figure, both = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    lrs, decays = np.logspace(-5, -1, 201), np.logspace(-4, 2, 201)
    names = VERDICTS[:5]
    colors = ListedColormap(["#d9d9d9", "#fee8a8", "#8fce8f", "#f4a582", "#b2182b"])
    for axes, steps in zip(both, (1_500, 100_000), strict=True):
        grid = [
            [
                names.index(
                    judge(largest_share=lr * decay, total_decay=steps * lr * decay, steps=steps)[0]
                )
                for lr in lrs
            ]
            for decay in decays
        ]
        axes.pcolormesh(lrs, decays, grid, cmap=colors, vmin=0, vmax=4, shading="nearest")
        axes.loglog([1e-3], [0.01], "k*", markersize=12)
        axes.set(title=f"{steps:,} steps, constant lr", xlabel="learning rate")
    both[0].set_ylabel("weight decay λ (decoupled)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors(i)) for i in range(5)]
    handles.append(plt.Line2D([], [], color="k", marker="*", linestyle="", markersize=10))
    figure.legend(handles, [*names, "defaults of AdamW"], loc="outside lower center", ncols=6)
    save(figure, "verdicts")


def schedules() -> None:
    """Draw every schedule."""
    shapes: dict[str, Schedule] = {
        "Constant()": Constant(),
        "Linear(1000)": Linear(1000),
        "Cosine(1000)": Cosine(1000),
        "Polynomial(1000, power=3)": Polynomial(1000, power=3),
        "Warmup(100, InverseSqrt(100))": Warmup(100, InverseSqrt(100)),
        "Warmup(100, Cosine(900, end=0.1))": Warmup(100, Cosine(900, end=0.1)),
        "WSD(100, 600, 300)": WSD(100, 600, 300),
        "WSD(100, 600, 300, shape='sqrt')": WSD(100, 600, 300, shape="sqrt"),
        "CosineRestarts(125, 2, peak_decay=0.7)": CosineRestarts(125, 2, peak_decay=0.7),
    }
    figure, grid = plt.subplots(
        3, 3, figsize=(10, 6), layout="constrained", sharex=True, sharey=True
    )
    steps = np.arange(0, 1001)
    for (name, schedule), axes in zip(shapes.items(), grid.flat, strict=True):
        axes.plot(steps, [schedule(int(t)) for t in steps])
        axes.set_title(name, fontsize="small", family="monospace")
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    save(figure, "schedules")


def adamwr() -> None:
    """Draw learning rate and weight decay of AdamWR."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.2), layout="constrained", sharex=True)
    restarts = CosineRestarts(100, 2)
    normalised = CycleNormalized(restarts)
    steps = range(1500)
    top.plot(steps, [1e-3 * restarts(t) for t in steps])
    top.set(title="AdamWR: lr 1e-3, λ_norm = 0.05, cycles of 100, 200, 400, 800", ylabel="lr")
    bottom.plot(steps, [0.05 * normalised(t) for t in steps], "C1--", label="λ of the cycle")
    bottom.plot(steps, [0.05 * normalised(t) * restarts(t) for t in steps], "C1", label="removed")
    bottom.set(xlabel="step", ylabel="share", ylim=(0, None))
    bottom.legend()
    save(figure, "adamwr")


def momentum() -> None:
    """Draw SGD with L2 beside SGDW, with and without the factor of the momentum."""
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(400)
    runs = {
        "L2, λ = 0.05": ("l2", 0.05),
        "SGDW, λ = 0.05": ("decoupled", 0.05),
        "SGDW, λ = 0.05/(1 - 0.9)": ("decoupled", 0.5),
    }
    for (name, (policy, decay)), style in zip(runs.items(), ("-", "-", "--"), strict=True):
        weight = np.full((1, 1), 3.0)
        optimizer = SGD([weight], lr=0.02, momentum=0.9, weight_decay=decay, decay_policy=policy)
        path = [3.0]
        for value in noise:
            optimizer.step([0.05 * (weight - 1.0) + 0.02 * value])
            path.append(float(weight[0, 0]))
        axes.plot(path, style, label=name)
    axes.set(title="one weight, momentum 0.9, loss minimal at 1", xlabel="step", ylabel="weight")
    axes.legend()
    save(figure, "momentum")


def save(figure: plt.Figure, name: str) -> None:
    """Write a picture into the folder of the documentation."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    IMAGES.mkdir(exist_ok=True)
    # Without the version of matplotlib, so that a picture changes only when it looks different.
    figure.savefig(IMAGES / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


PICTURES: dict[str, Callable[[], None]] = {
    draw.__name__: draw
    for draw in (
        family,
        bias_correction,
        policies,
        zero_gradient,
        noise,
        momentum,
        memory,
        verdicts,
        schedules,
        adamwr,
    )
}


def main() -> None:
    """Draw the pictures that are named on the command line, or all."""
    names = sys.argv[1:] or list(PICTURES)
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        raise SystemExit(f"no picture {unknown[0]!r}; there are {', '.join(PICTURES)}")
    for name in names:
        PICTURES[name]()
        print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
