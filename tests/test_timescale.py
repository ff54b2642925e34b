"""What decay does over a run, against numbers worked out by hand and against simulation."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.schedules import WSD, Constant, Cosine, Linear, Schedule
from ebbtide.timescale import (
    bias_correction_factor,
    default_warmup,
    ema_coefficients,
    equilibrium_rms,
    half_life_steps,
    kept_share,
    late_first_step,
    rms_after,
    rotation_per_step,
    timescale_steps,
    total_decay,
    weight_bound,
)
from ebbtide.weight_decay import decay_share

STEPS = 10_000


@pytest.mark.parametrize(("lr", "weight_decay", "steps"), [(1e-3, 0.01, 1e5), (3e-4, 0.1, 33_333)])
def test_timescale(lr: float, weight_decay: float, steps: float) -> None:
    assert timescale_steps(lr * weight_decay) == pytest.approx(steps, rel=1.1e-5)


@pytest.mark.parametrize(
    ("policy", "schedule", "kappa", "kept"),
    [
        ("decoupled", Constant(), 1.0000, 0.36786),
        ("decoupled", Cosine(STEPS), 0.50005, 0.606489),
        ("decoupled", Linear(STEPS), 0.50005, 0.606490),
        ("decoupled", WSD(500, 7500, 2000), 0.8751, 0.41680),
        ("corrected", Cosine(STEPS), 0.37505, 0.687246),
    ],
)
def test_total_decay_and_kept_share(
    policy: str, schedule: Schedule, kappa: float, kept: float
) -> None:
    shares = [
        decay_share(policy, lr=1e-3 * schedule(t), base_lr=1e-3, weight_decay=0.1)
        for t in range(STEPS)
    ]
    assert total_decay(shares) == pytest.approx(kappa, abs=1e-9)
    assert kept_share(shares) == pytest.approx(kept, abs=6e-7 if kept > 0.5 else 5e-6)


@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=200))
def test_kept_share_is_the_product(shares: list[float]) -> None:
    product = math.prod(1 - share for share in shares)
    assert kept_share(shares) == pytest.approx(product, rel=1e-12)
    assert kept_share(shares) <= math.exp(-total_decay(shares)) * (1 + 1e-12)


def test_kept_share_changes_sign_with_the_weight() -> None:
    assert kept_share([1.5, 0.5]) == pytest.approx(-0.25)


@given(st.lists(st.floats(0, 1), max_size=100))
def test_ema_coefficients_sum_to_one_and_begin_with_what_is_kept(shares: list[float]) -> None:
    coefficients = ema_coefficients(shares)
    assert math.fsum(coefficients) == pytest.approx(1.0, rel=1e-12)
    assert coefficients[0] == pytest.approx(math.prod(1 - share for share in shares), abs=1e-15)


def test_ema_coefficients_are_what_the_recursion_does() -> None:
    rng = random.Random(0)
    shares = [rng.uniform(0, 0.3) for _ in range(50)]
    targets = [rng.gauss(0, 1) for _ in range(51)]
    theta = targets[0]
    for share, target in zip(shares, targets[1:], strict=True):
        theta = (1 - share) * theta + share * target
    weighted = sum(c * x for c, x in zip(ema_coefficients(shares), targets, strict=True))
    assert weighted == pytest.approx(theta, rel=1e-12)


@pytest.mark.parametrize(
    ("lr", "weight_decay", "rms", "rotation"),
    [
        (1e-3, 0.1, 0.070711, 3.24443e-3),
        (3e-4, 0.1, 0.038730, 1.77705e-3),
        (1e-3, 0.01, 0.223607, 1.02598e-3),
    ],
)
def test_equilibrium(lr: float, weight_decay: float, rms: float, rotation: float) -> None:
    assert equilibrium_rms(lr, lr * weight_decay) == pytest.approx(rms, abs=5e-7)
    assert rotation_per_step(lr * weight_decay, 0.9) == pytest.approx(rotation, abs=5e-9)


def test_rotation_of_sgd_is_that_of_the_paper() -> None:
    lr, l2, momentum = 0.1, 5e-4, 0.9
    share = lr * l2 / (1 - momentum)
    paper = math.sqrt(2 * lr * l2 / (1 + momentum))
    assert rotation_per_step(share, momentum) == pytest.approx(paper, rel=1e-12)


def test_squared_norm_halves_in_half_the_half_life() -> None:
    steps = half_life_steps(1e-3 * 0.1)
    assert steps / 2 == pytest.approx(3466, abs=0.5)
    assert (1 - 1e-4) ** steps == pytest.approx(0.5, rel=1e-12)


def test_rms_approaches_the_equilibrium() -> None:
    lr, share, steps = 1e-3, 1e-3, 20_000
    for initial in (0.0, 0.2):
        seen = rms_after(initial, [lr] * steps, [share] * steps)
        assert seen == pytest.approx(equilibrium_rms(lr, share), rel=1e-3)


def test_rms_under_a_schedule_is_kept_by_corrected_decay() -> None:
    lrs = [1e-3 * Cosine(STEPS)(t) for t in range(STEPS)]
    decoupled = [lr * 0.8 for lr in lrs]
    corrected = [lr * lr / 1e-3 * 0.8 for lr in lrs]
    start = equilibrium_rms(1e-3, 0.8e-3)
    assert rms_after(start, lrs, decoupled) < 0.6 * start
    assert rms_after(start, lrs, corrected) == pytest.approx(start, rel=1e-3)


def adam_on_noise(lr: float, share: float, seed: int, weights: int, steps: int) -> list[float]:
    """Return the weights of Adam with decay on gradients that are pure noise."""
    rng, finals = random.Random(seed), []
    for _ in range(weights):
        theta, m, v = rng.gauss(0, 0.1), 0.0, 0.0
        for t in range(1, steps + 1):
            g = rng.gauss(0, 1)
            m = 0.9 * m + 0.1 * g
            v = 0.99 * v + 0.01 * g * g
            theta *= 1 - share
            theta -= lr * m / (1 - 0.9**t) / (math.sqrt(v / (1 - 0.99**t)) + 1e-8)
        finals.append(theta)
    return finals


def test_equilibrium_rms_is_that_of_a_simulation() -> None:
    lr, share = 0.01, 0.01
    finals = adam_on_noise(lr, share, seed=1, weights=1500, steps=400)
    seen = math.sqrt(math.fsum(theta * theta for theta in finals) / len(finals))
    # 1,500 weights know their RMS to 1/√3000 = 1.8 %; three of those.
    assert seen == pytest.approx(equilibrium_rms(lr, share), rel=0.055)


def test_weight_bound_holds_where_every_gradient_agrees() -> None:
    lr, weight_decay, theta = 1e-2, 4.0, 0.0
    for _ in range(2000):
        theta -= lr * (1.0 + weight_decay * theta)
    assert abs(theta) == pytest.approx(weight_bound(lr, lr * weight_decay), rel=1e-12)
    assert weight_bound(1e-3, 1e-4) == pytest.approx(10.0)


@pytest.mark.parametrize(("beta2", "steps"), [(0.999, 2000), (0.99, 200), (0.95, 40)])
def test_default_warmup(beta2: float, steps: float) -> None:
    assert default_warmup(beta2) == pytest.approx(steps, rel=1e-12)
    assert default_warmup(beta2, total_steps=100) == 10.0
    assert default_warmup(beta2, total_steps=100, most=0.05) == 5.0


@pytest.mark.parametrize(
    ("betas", "step", "rho"),
    [
        ((0.9, 0.999), 1, 0.316),
        ((0.9, 0.999), 12, 0.152),
        ((0.9, 0.999), 100, 0.309),
        ((0.9, 0.999), 1000, 0.795),
        ((0.95, 0.95), 1, 4.47),
        ((0.95, 0.95), 10, 1.58),
        ((0.95, 0.95), 50, 1.04),
    ],
)
def test_bias_correction_factor(betas: tuple[float, float], step: int, rho: float) -> None:
    digits = 3 if rho < 1 else 2
    assert round(bias_correction_factor(step, betas), digits) == rho


def test_bias_correction_factor_is_smallest_at_the_twelfth_step() -> None:
    factors = [bias_correction_factor(t) for t in range(1, 200)]
    assert factors.index(min(factors)) + 1 == 12


@pytest.mark.parametrize(("step", "size"), [(1, 1.0), (1000, 2.515), (10**6, 3.162)])
def test_late_parameter_takes_too_long_a_first_step(step: int, size: float) -> None:
    assert late_first_step(step) == pytest.approx(size, abs=5e-4)
    m, v = 0.1 * 2.0, 0.001 * 4.0
    by_hand = m / (1 - 0.9**step) / math.sqrt(v / (1 - 0.999**step))
    assert late_first_step(step) == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("share", [-1e-9, math.nan, math.inf])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    for formula in (timescale_steps, half_life_steps):
        with pytest.raises(ValueError, match="share"):
            formula(share)


def test_without_decay_nothing_is_forgotten() -> None:
    assert timescale_steps(0) == half_life_steps(0) == math.inf
    assert equilibrium_rms(1e-3, 0) == weight_bound(1e-3, 0) == math.inf
    assert kept_share([0.0] * 10) == 1.0


@pytest.mark.parametrize("betas", [(1.0, 0.999), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan)])
def test_betas_out_of_range_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="beta"):
        bias_correction_factor(5, betas)


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="from 1"):
        bias_correction_factor(0)
