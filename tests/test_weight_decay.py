"""The policies against the algorithms of the papers, written here a second time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.schedules import WSD, Cosine, CosineRestarts, CycleNormalized, Warmup
from ebbtide.weight_decay import DECAY_POLICIES, decay_share, l2_coefficient

BASE_LR = 1e-3


def test_the_policies_are_these_four() -> None:
    assert DECAY_POLICIES == ("l2", "decoupled", "independent", "corrected")


@pytest.mark.parametrize(
    ("policy", "share"),
    [("l2", 0.0), ("decoupled", 2e-5), ("independent", 0.02), ("corrected", 4e-6)],
)
def test_share_of_one_step_by_hand(policy: str, share: float) -> None:
    got = decay_share(policy, lr=2e-4, base_lr=1e-3, weight_decay=0.1)
    assert got == pytest.approx(share, rel=1e-15)


@pytest.mark.parametrize("policy", DECAY_POLICIES)
@given(
    weight_decay=st.floats(0, 1e4), base_lr=st.floats(1e-12, 1e4), zero=st.sampled_from([0.0, -0.0])
)
def test_nothing_decays_at_learning_rate_zero(
    policy: str, weight_decay: float, base_lr: float, zero: float
) -> None:
    assert decay_share(policy, lr=zero, base_lr=base_lr, weight_decay=weight_decay) == 0.0


@pytest.mark.parametrize("policy", DECAY_POLICIES)
def test_nothing_decays_without_weight_decay(policy: str) -> None:
    assert decay_share(policy, lr=1e-3, base_lr=1e-3, weight_decay=0.0) == 0.0


@pytest.mark.parametrize("policy", ["independent", "corrected"])
@pytest.mark.parametrize("base_lr", [0.0, -1e-3, math.nan])
@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_base_lr_must_be_above_zero_where_it_is_read(
    policy: str, base_lr: float, lr: float
) -> None:
    with pytest.raises(ValueError, match="base_lr"):
        decay_share(policy, lr=lr, base_lr=base_lr, weight_decay=0.1)


@pytest.mark.parametrize("policy", ["l2", "decoupled"])
def test_base_lr_is_not_read_elsewhere(policy: str) -> None:
    share = decay_share(policy, lr=1e-3, base_lr=0.0, weight_decay=0.1)
    assert share == decay_share(policy, lr=1e-3, base_lr=7.0, weight_decay=0.1)


def test_unknown_policy_is_refused_with_the_valid_ones() -> None:
    valid = "l2, decoupled, independent, corrected"
    with pytest.raises(ValueError, match=valid):
        decay_share("decopled", lr=1e-3, base_lr=1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match=valid):
        l2_coefficient("cautious", weight_decay=0.1)


def test_only_l2_reaches_the_gradient() -> None:
    coefficients = [l2_coefficient(policy, weight_decay=0.3) for policy in DECAY_POLICIES]
    assert coefficients == [0.3, 0.0, 0.0, 0.0]


def adamw_of_the_paper(
    grads: list[float], alpha: float, decay: float, eta: Callable[[int], float]
) -> list[float]:
    """Take Algorithm 2 of Loshchilov & Hutter 2019, line by line, from θ = 1."""
    theta, m, v, path = 1.0, 0.0, 0.0, []
    for t, g in enumerate(grads, start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
        eta_t = eta(t - 1)
        theta = theta - eta_t * (alpha * m_hat / (math.sqrt(v_hat) + 1e-8) + decay * theta)
        path.append(theta)
    return path


def adamw_by_share(
    grads: list[float], policy: str, weight_decay: float, eta: Callable[[int], float]
) -> list[float]:
    """Take the same steps as a backend does: the share first, then Adam's step."""
    theta, m, v, path = 1.0, 0.0, 0.0, []
    for t, g in enumerate(grads, start=1):
        lr = BASE_LR * eta(t - 1)
        theta *= 1 - decay_share(policy, lr=lr, base_lr=BASE_LR, weight_decay=weight_decay)
        m += 0.1 * (g - m)
        v = 0.999 * v + 0.001 * g * g
        denominator = math.sqrt(v) / math.sqrt(1 - 0.999**t) + 1e-8
        theta -= lr / (1 - 0.9**t) * m / denominator
        path.append(theta)
    return path


GRADS = [math.sin(0.7 * t) + 0.3 * math.cos(2.9 * t * t) for t in range(400)]

SCHEDULES = [Cosine(400), Warmup(40, Cosine(360)), WSD(40, 260, 100), CosineRestarts(50, 2)]


@pytest.mark.parametrize("eta", SCHEDULES, ids=repr)
def test_independent_is_algorithm_2_of_the_paper(eta: Callable[[int], float]) -> None:
    paper = adamw_of_the_paper(GRADS, BASE_LR, 1e-2, eta)
    assert adamw_by_share(GRADS, "independent", 1e-2, eta) == pytest.approx(paper, abs=1e-13)


@pytest.mark.parametrize("eta", SCHEDULES, ids=repr)
def test_decoupled_is_the_paper_with_lambda_times_alpha(eta: Callable[[int], float]) -> None:
    paper = adamw_of_the_paper(GRADS, BASE_LR, BASE_LR * 10.0, eta)
    assert adamw_by_share(GRADS, "decoupled", 10.0, eta) == pytest.approx(paper, abs=1e-13)


def test_adamwr_recomputes_lambda_in_every_cycle() -> None:
    restarts, theta_paper = CosineRestarts(50, 2), 1.0
    normalised, theta = CycleNormalized(restarts), 1.0
    cycle_start, cycle = 0, 50
    for t in range(350):
        if t == cycle_start + cycle:
            cycle_start, cycle = t, 2 * cycle
        eta = 0.5 + 0.5 * math.cos(math.pi * (t - cycle_start) / cycle)
        theta_paper -= eta * 0.05 * math.sqrt(1 / cycle) * theta_paper
        theta *= 1 - decay_share(
            "independent",
            lr=BASE_LR * restarts(t),
            base_lr=BASE_LR,
            weight_decay=0.05 * normalised(t),
        )
    assert theta == pytest.approx(theta_paper, rel=1e-13)


@pytest.mark.parametrize("eta", SCHEDULES, ids=repr)
def test_sgd_without_momentum_l2_is_decay(eta: Callable[[int], float]) -> None:
    # Proposition 1, in PyTorch's units, where the share is lr·λ on both sides.
    l2, decayed = 1.0, 1.0
    for t, grad in enumerate(GRADS):
        lr = 0.1 * eta(t)
        l2 -= lr * (grad + l2_coefficient("l2", weight_decay=0.05) * l2)
        decayed *= 1 - decay_share("decoupled", lr=lr, base_lr=0.1, weight_decay=0.05)
        decayed -= lr * grad
    assert decayed == pytest.approx(l2, abs=1e-12)


def test_corrected_decay_follows_the_square_of_the_schedule() -> None:
    shares = [
        decay_share("corrected", lr=BASE_LR * Cosine(100)(t), base_lr=BASE_LR, weight_decay=0.1)
        for t in range(100)
    ]
    squares = [BASE_LR * 0.1 * Cosine(100)(t) ** 2 for t in range(100)]
    assert shares == pytest.approx(squares, rel=1e-14)
