"""What theory says weight decay does, on the optimizers themselves; nothing here is tuned."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ebbtide.numpy
from ebbtide.schedules import Cosine, CosineRestarts, Schedule, Warmup
from ebbtide.timescale import (
    bias_correction_factor,
    equilibrium_rms,
    late_first_step,
    rotation_per_step,
    weight_bound,
)

Array = NDArray[np.float64]


def everything(name: str, array: Array) -> bool:
    """Let all arrays decay; by default those below two dimensions do not."""
    return True


AdamW = partial(ebbtide.numpy.AdamW, decay_mask=everything)
Adam = partial(ebbtide.numpy.Adam, decay_mask=everything)
SGD = partial(ebbtide.numpy.SGD, decay_mask=everything)
each_build = pytest.mark.parametrize("build", [AdamW, Adam, SGD], ids=["AdamW", "Adam", "SGD"])
SCHEDULES = [Cosine(300), Warmup(50, Cosine(250)), CosineRestarts(40, 2)]


def features() -> tuple[Array, Array]:
    """Return a regression problem whose columns have scales from 0.03 to 30."""
    rng = np.random.default_rng(0)
    scales = 10.0 ** rng.uniform(-1.5, 1.5, 8)
    x = rng.standard_normal((64, 8)) * scales
    return x, x @ rng.standard_normal(8) + rng.standard_normal(64)


def train(
    optimizer: Any,
    theta: Array,
    gradient: Callable[[Array], Array],
    steps: int,
    schedule: Schedule | None = None,
) -> Array:
    group = optimizer.param_groups[0]
    peak = group["lr"]
    for t in range(steps):
        if schedule is not None:
            group["lr"] = peak * schedule(t)
        optimizer.step([gradient(theta)])
    return theta


def least_squares(loss_scale: float = 1.0) -> Callable[[Array], Array]:
    x, y = features()
    return lambda theta: loss_scale * x.T @ (x @ theta - y) / len(y)


def test_adamw_does_not_see_the_scale_of_the_loss() -> None:
    ends = []
    for loss_scale in (1.0, 1000.0):
        theta = np.zeros(8)
        optimizer = AdamW([theta], lr=1e-2, weight_decay=0.5, eps=1e-30)
        ends.append(train(optimizer, theta, least_squares(loss_scale), 300))
    assert ends[0] == pytest.approx(ends[1], rel=1e-12)


def test_adam_with_l2_sees_the_scale_of_the_loss_unless_l2_scales_with_it() -> None:
    ends = []
    for loss_scale, weight_decay in ((1.0, 0.5), (1000.0, 0.5), (1000.0, 500.0)):
        theta = np.zeros(8)
        optimizer = Adam([theta], lr=1e-2, weight_decay=weight_decay, eps=1e-30)
        ends.append(train(optimizer, theta, least_squares(loss_scale), 300))
    assert ends[2] == pytest.approx(ends[0], rel=1e-12)
    assert np.abs(ends[1] - ends[0]).max() > 0.05


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@each_build
def test_decoupled_is_independent_with_lambda_times_lr(
    build: Callable[..., Any], schedule: Schedule
) -> None:
    ends = []
    lr = 1e-3
    for policy, weight_decay in (("decoupled", 3.0), ("independent", 3.0 * lr)):
        theta = np.full(8, 0.5)
        optimizer = build([theta], lr=lr, weight_decay=weight_decay, decay_policy=policy)
        ends.append(train(optimizer, theta, least_squares(), 300, schedule))
    assert ends[0] == pytest.approx(ends[1], rel=1e-12)


def test_every_group_divides_by_its_own_base_lr() -> None:
    arrays = [np.ones(3) for _ in range(3)]
    optimizer = AdamW(
        [
            {"params": [arrays[0]]},
            {"params": [arrays[1]], "lr": 1e-4},
            {"params": [arrays[2]], "lr": 4e-5, "base_lr": 1e-3},
        ],
        lr=1e-3,
        weight_decay=0.02,
        decay_policy="independent",
    )
    schedule, kept = Warmup(5, Cosine(15)), np.ones(3)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for t in range(20):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(t)
        optimizer.step([np.zeros(3)] * 3)
        kept *= 1 - 0.02 * schedule(t) * np.array([1.0, 1.0, 0.04])
    assert [array[0] for array in arrays] == pytest.approx(kept, rel=1e-13)


def test_without_decay_adamw_is_adam_bit_for_bit() -> None:
    ends = []
    for build in (AdamW, Adam):
        theta = np.full(8, 0.5)
        optimizer = build([theta], lr=1e-2, weight_decay=0.0)
        ends.append(train(optimizer, theta, least_squares(), 100))
    assert np.array_equal(ends[0], ends[1])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_sgd_l2_is_sgdw_without_momentum(schedule: Schedule) -> None:
    ends = []
    for policy in ("l2", "decoupled"):
        theta = np.full(8, 0.5)
        optimizer = SGD([theta], lr=1e-3, weight_decay=0.3, decay_policy=policy)
        ends.append(train(optimizer, theta, least_squares(), 300, schedule))
    assert ends[0] == pytest.approx(ends[1], abs=1e-12)


def test_adam_with_l2_finds_the_ridge_solution_and_adamw_does_not() -> None:
    x, y = features()
    ridge = np.linalg.solve(x.T @ x / len(y) + 0.1 * np.eye(8), x.T @ y / len(y))
    ends = []
    for build in (Adam, AdamW):
        theta = np.zeros(8)
        optimizer = build([theta], lr=0.02, weight_decay=0.1)
        ends.append(train(optimizer, theta, least_squares(), 20_000, Cosine(20_000)))
    assert np.abs(ends[0] - ridge).max() < 1e-6
    assert np.abs(ends[1] - ridge).max() > 0.05


@pytest.mark.parametrize("weight_decay", [4.0, 10.0])
def test_adamw_keeps_weights_below_one_over_lambda(weight_decay: float) -> None:
    theta = np.zeros(8)
    optimizer = AdamW([theta], lr=1e-3, weight_decay=weight_decay)
    train(optimizer, theta, least_squares(), 20_000, Cosine(20_000))
    bound = weight_bound(1e-3, 1e-3 * weight_decay)
    # Adam's step exceeds lr for a while wherever a gradient grows.
    assert np.abs(theta).max() <= bound * 1.01
    assert np.abs(theta).max() >= bound * 0.98


def rms_on_noise(optimizer: Any, theta: Array, scale: float, steps: int) -> float:
    rng = np.random.default_rng(3)
    for _ in range(steps):
        optimizer.step([scale * rng.standard_normal(len(theta))])
    return math.sqrt(float(np.mean(theta * theta)))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_noise_balances_adamw_at_one_size_for_all_gradients(scale: float) -> None:
    lr, weight_decay, theta = 2e-3, 1.0, np.zeros(5000)
    optimizer = AdamW([theta], lr=lr, weight_decay=weight_decay)
    rms = rms_on_noise(optimizer, theta, scale, steps=2500)
    # 5,000 weights know their RMS to 1 %.
    assert rms == pytest.approx(math.sqrt(lr / (2 * weight_decay)), rel=0.03)
    assert equilibrium_rms(lr, lr * weight_decay) == pytest.approx(
        math.sqrt(lr / (2 * weight_decay))
    )


@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_noise_balances_adam_with_l2_by_the_root_of_the_gradient(scale: float) -> None:
    lr, weight_decay, theta = 2e-3, 1.0, np.zeros(5000)
    optimizer = Adam([theta], lr=lr, weight_decay=weight_decay)
    share = lr * weight_decay / scale
    rms = rms_on_noise(optimizer, theta, scale, steps=int(4 / share))
    assert rms == pytest.approx(math.sqrt(lr * scale / (2 * weight_decay)), rel=0.03)
    assert equilibrium_rms(lr, share) == pytest.approx(math.sqrt(lr * scale / (2 * weight_decay)))


def test_zero_gradient_shows_that_l2_under_adam_saturates() -> None:
    start = np.array([10.0, 1.0, 0.1])
    decoupled, l2 = start.copy(), start.copy()
    adamw = AdamW([decoupled], lr=1e-3, weight_decay=0.1)
    adam = Adam([l2], lr=1e-3, weight_decay=0.1)
    for _ in range(1000):
        adamw.step([np.zeros(3)])
        adam.step([np.zeros(3)])
    assert decoupled == pytest.approx([9.0483, 0.9048, 0.0905], abs=5e-5)
    assert l2 == pytest.approx([9.022, 0.2577, 0.0], abs=6e-4)


def test_weight_vectors_turn_at_the_predicted_rate() -> None:
    lr, weight_decay, rng = 0.01, 0.5, np.random.default_rng(4)
    theta = 0.1 * rng.standard_normal(5000)
    optimizer = AdamW([theta], lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    angles = []
    for t in range(1200):
        before = theta.copy()
        optimizer.step([rng.standard_normal(len(theta))])
        if t >= 1000:
            cosine = before @ theta / np.linalg.norm(before) / np.linalg.norm(theta)
            angles.append(math.acos(min(cosine, 1.0)))
    predicted = rotation_per_step(lr * weight_decay, 0.9)
    assert float(np.mean(angles)) == pytest.approx(predicted, rel=0.03)


def test_fixed_preconditioner_turns_decay_into_a_scaled_penalty() -> None:
    # Proposition 3 in the form of its proof, penalty (λ'/2)·‖θ·√s‖²; the main text prints
    # λ'/(2·α), which is another path.
    lr, decay, s = 0.05, 0.02, np.array([0.3, 1.0, 4.0])

    def gradient(theta: Array) -> Array:
        return np.array([1.0, 2.0, 3.0]) * theta - 1.0

    decayed, penalised, printed = np.ones(3), np.ones(3), np.ones(3)
    for _ in range(200):
        decayed = (1 - decay) * decayed - lr / s * gradient(decayed)
        penalised = penalised - lr / s * (gradient(penalised) + decay / lr * s * penalised)
        printed = printed - lr / s * (gradient(printed) + decay / lr**2 * s * printed)
    assert penalised == pytest.approx(decayed, abs=1e-13)
    assert np.abs(printed - decayed).max() > 0.1


def test_parameter_that_joins_late_takes_a_first_step_of_one_lr() -> None:
    early, late = np.zeros(1), np.zeros(1)
    optimizer = Adam({"early": early, "late": late}, lr=1e-3)
    for _ in range(1000):
        optimizer.step({"early": np.ones(1)})
    optimizer.step({"early": np.ones(1), "late": np.full(1, 7.0)})
    assert abs(late[0]) / 1e-3 == pytest.approx(1.0, rel=1e-6)
    # With one count for all parameters it would have been this.
    assert late_first_step(1001) == pytest.approx(2.515, abs=1e-3)


def test_bias_correction_scales_the_first_step() -> None:
    for betas in ((0.9, 0.999), (0.95, 0.95)):
        theta = np.zeros(1)
        optimizer = Adam([theta], lr=1e-3, betas=betas, bias_correction=False)
        optimizer.step([np.full(1, 5.0)])
        without = 1 / bias_correction_factor(1, betas)
        assert abs(theta[0]) / 1e-3 == pytest.approx(without, rel=1e-6)


def test_no_gradient_is_not_a_zero_gradient() -> None:
    skipped, decayed = np.ones(2), np.ones(2)
    optimizer = AdamW({"skipped": skipped, "decayed": decayed}, lr=1e-2, weight_decay=0.5)
    for _ in range(10):
        optimizer.step({"decayed": np.zeros(2)})
    assert skipped.tolist() == [1.0, 1.0]
    assert decayed == pytest.approx([(1 - 5e-3) ** 10] * 2, rel=1e-12)
