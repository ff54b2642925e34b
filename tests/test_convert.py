"""The conversions against worked numbers, and against the optimizers they claim to match."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.convert import (
    CONVENTIONS,
    RESCALE_RULES,
    Recipe,
    adam_l2_to_adamw,
    batch_passes,
    convert_weight_decay,
    for_schedule,
    from_normalized,
    from_timescale,
    rescale,
    sgd_recipe_to_adamw,
    to_normalized,
)
from ebbtide.schedules import Constant, Cosine, Linear


@pytest.mark.parametrize(
    ("value", "source", "target", "options", "expected"),
    [
        (0.1, "decoupled", "independent", {"lr": 1e-3}, 1e-4),
        (1e-4, "independent", "decoupled", {"lr": 1e-3}, 0.1),
        (1e-5, "independent", "decoupled", {"lr": 1e-3}, 0.01),
        (5e-4, "sgd_l2", "decoupled", {"lr": 0.1, "momentum": 0.9}, 5e-3),
        (5e-4, "sgd_l2", "independent", {"lr": 0.1, "momentum": 0.9}, 5e-4),
        (5e-4, "sgd_l2", "decoupled", {"lr": 0.1}, 5e-4),
        (5e-4, "sgd_l2", "decoupled", {"lr": 0.1, "momentum": 0.9, "dampening": 0.9}, 5e-4),
        (5e-3, "decoupled", "sgd_l2", {"lr": 0.1, "momentum": 0.9}, 5e-4),
        (0.1, "decoupled", "constant", {"lr": 1e-3, "match": "peak"}, 1e-4),
        (0.1, "corrected", "decoupled", {"lr": 1e-3, "match": "peak"}, 0.1),
        (0.3, "decoupled", "decoupled", {"lr": 1e-3}, 0.3),
        (0.0, "decoupled", "independent", {"lr": 1e-3}, 0.0),
    ],
)
def test_conventions_by_hand(
    value: float, source: str, target: str, options: dict[str, Any], expected: float
) -> None:
    converted = convert_weight_decay(value, source, target, **options)
    assert converted.value == pytest.approx(expected, rel=1e-12)
    assert float(converted) == converted.value


@given(
    st.floats(1e-6, 10),
    st.sampled_from(sorted(CONVENTIONS)),
    st.sampled_from(sorted(CONVENTIONS)),
    st.floats(1e-6, 1),
    st.floats(0, 0.99),
)
def test_conversion_there_and_back(
    value: float, source: str, target: str, lr: float, momentum: float
) -> None:
    there = convert_weight_decay(value, source, target, lr=lr, momentum=momentum, match="peak")
    back = convert_weight_decay(there.value, target, source, lr=lr, momentum=momentum, match="peak")
    assert back.value == pytest.approx(value, rel=1e-12)


def test_same_total_decay_is_the_same_sum_of_shares() -> None:
    schedule, steps, lr = Cosine(1000), 1000, 1e-3
    converted = convert_weight_decay(
        0.1, "decoupled", "constant", lr=lr, match="total", schedule=schedule, total_steps=steps
    )
    kappa = sum(lr * schedule(t) * 0.1 for t in range(steps))
    assert converted.value * steps == pytest.approx(kappa, rel=1e-12)
    corrected = convert_weight_decay(
        0.1, "decoupled", "corrected", lr=lr, match="total", schedule=schedule, total_steps=steps
    )
    squares = sum(lr * schedule(t) ** 2 * corrected.value for t in range(steps))
    assert squares == pytest.approx(kappa, rel=1e-12)


def test_what_to_match_is_never_chosen_silently() -> None:
    with pytest.raises(ValueError, match=r"peak.*total"):
        convert_weight_decay(0.1, "decoupled", "constant", lr=1e-3)
    with pytest.raises(ValueError, match="needs the schedule"):
        convert_weight_decay(0.1, "decoupled", "constant", lr=1e-3, match="total")


def sgd(l2: float, decay: float, momentum: float, schedule: Callable[[float], float]) -> float:
    """Return how θ ends under SGD with L2 and with decoupled decay, on a quadratic loss."""
    theta, buffer = 1.0, 0.0
    for t in range(600):
        lr = 0.02 * schedule(t)
        grad = 0.3 * (theta - 0.5) + 0.2 * math.sin(1.3 * t)
        buffer = momentum * buffer + grad + l2 * theta
        theta = theta * (1 - lr * decay) - lr * buffer
    return theta


@pytest.mark.parametrize("schedule", [Constant(), Cosine(600)], ids=repr)
def test_sgd_l2_and_sgdw_end_together_only_with_the_momentum_factor(
    schedule: Callable[[float], float],
) -> None:
    l2, momentum = 0.05, 0.9
    converted = convert_weight_decay(l2, "sgd_l2", "decoupled", lr=0.02, momentum=momentum)
    assert not converted.exact
    reference = sgd(l2, 0.0, momentum, schedule)
    with_factor = abs(sgd(0.0, converted.value, momentum, schedule) - reference)
    without_factor = abs(sgd(0.0, l2, momentum, schedule) - reference)
    assert with_factor < 0.03 * without_factor


def test_sgd_l2_and_sgdw_are_one_without_momentum() -> None:
    converted = convert_weight_decay(0.05, "sgd_l2", "decoupled", lr=0.02)
    assert converted.exact
    one, other = sgd(0.05, 0.0, 0.0, Cosine(600)), sgd(0.0, converted.value, 0.0, Cosine(600))
    assert one == pytest.approx(other, rel=1e-12)


def test_sgd_recipe_to_adamw() -> None:
    with_momentum = sgd_recipe_to_adamw(1e-4, sgd_lr=0.1, momentum=0.9, adamw_lr=1e-3)
    without = sgd_recipe_to_adamw(1e-4, sgd_lr=0.1, adamw_lr=1e-3)
    assert with_momentum.value == pytest.approx(0.1, rel=1e-12)
    assert without.value == pytest.approx(0.01, rel=1e-12)
    assert not with_momentum.exact


def test_adam_l2_to_adamw_divides_by_the_median() -> None:
    converted = adam_l2_to_adamw(0.0064, [0.004, 0.010, 0.02, 0.010, 0.005])
    assert converted.value == pytest.approx(0.64, rel=1e-12)
    assert converted.single_value
    assert converted.live_share == 1.0
    assert "No single value" not in str(converted)


def test_adam_l2_to_adamw_says_when_no_single_value_matches() -> None:
    scales = [10.0 ** (-4 + 3 * i / 100) for i in range(101)]
    converted = adam_l2_to_adamw(0.01, scales)
    assert not converted.single_value
    assert not converted.exact
    assert "No single value matches" in str(converted)
    assert converted.low == pytest.approx(0.01 / scales[95], rel=1e-12)
    assert converted.high == pytest.approx(0.01 / scales[5], rel=1e-12)
    assert converted.low < converted.value < converted.high


@pytest.mark.parametrize(("spread", "single"), [(9.9, True), (10.1, False)])
def test_adam_l2_to_adamw_draws_the_line_at_ten_times(spread: float, single: bool) -> None:
    scales = [0.001] * 50 + [0.001 * spread] * 50
    assert adam_l2_to_adamw(0.01, scales).single_value is single


def test_adam_l2_to_adamw_leaves_dead_weights_out() -> None:
    converted = adam_l2_to_adamw(0.01, [0.0] * 900 + [1e-9] * 50 + [0.01] * 50)
    assert converted.value == pytest.approx(1.0, rel=1e-12)
    assert converted.live_share == 0.05


@pytest.mark.parametrize("scales", [[], [0.0, 1e-12], [0.1, math.nan], [-0.1]])
def test_adam_l2_to_adamw_refuses_scales_that_say_nothing(scales: list[float]) -> None:
    with pytest.raises(ValueError, match=r"√v̂|root_v_hats"):
        adam_l2_to_adamw(0.01, scales)


@pytest.mark.parametrize(
    ("normalized", "dataset_size", "epochs", "expected"),
    [
        (0.025, 50_000, 100, 1.26491e-4),
        (0.025, 50_000, 1800, 2.98142e-5),
        (0.05, 50_000, 100, 2.52982e-4),
        (0.05, 50_000, 1800, 5.96285e-5),
        (0.025, 1_281_167, 100, 2.49886e-5),
    ],
)
def test_normalised_weight_decay(
    normalized: float, dataset_size: int, epochs: int, expected: float
) -> None:
    passes = batch_passes(dataset_size=dataset_size, batch_size=128, epochs=epochs)
    converted = from_normalized(normalized, passes=passes)
    assert converted.value == pytest.approx(expected, rel=4e-6)
    assert to_normalized(converted.value, passes=passes).value == pytest.approx(normalized)
    decoupled = convert_weight_decay(converted.value, "independent", "decoupled", lr=1e-3)
    assert decoupled.value == pytest.approx(1000 * expected, rel=4e-6)


def test_weight_decay_from_a_timescale() -> None:
    epoch, lr = 50_000 / 128, 1e-3
    base = from_timescale(100 * epoch, lr=lr).value
    assert base == pytest.approx(0.0256, rel=1e-12)
    assert from_timescale(100 * 4 * epoch, lr=lr).value == pytest.approx(base / 4)
    assert from_timescale(100 * epoch / 4, lr=lr).value == pytest.approx(base * 4)
    assert from_timescale(100 * epoch, lr=2 * lr).value == pytest.approx(base / 2)


def test_weight_decay_for_another_schedule_keeps_the_total() -> None:
    converted = for_schedule(0.1, old=Constant(), new=Cosine(10_000), total_steps=10_000)
    assert converted.value == pytest.approx(0.2, rel=2e-4)
    kappa = sum(1e-3 * Cosine(10_000)(t) * converted.value for t in range(10_000))
    assert kappa == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(ValueError, match="0 throughout"):
        for_schedule(0.1, old=Constant(), new=Constant(0.0), total_steps=10)


SMALL = Recipe(lr=3e-4, weight_decay=0.1)


@pytest.mark.parametrize(
    ("recipe", "rule", "factor", "lr", "weight_decay"),
    [
        (SMALL, "batch-fixed-lr", 4, 3e-4, 0.4),
        (SMALL, "batch-sqrt", 4, 6e-4, 0.2),
        (SMALL, "batch-linear", 4, 1.2e-3, 0.1),
        (Recipe(1e-3, 0.0256), "data-epochs", 4, 1e-3, 0.0064),
        (SMALL, "data-sde", 4, 1.5e-4, 0.05),
        (SMALL, "data-normalized", 4, 3e-4, 0.05),
        (Recipe(1e-3, 0.1265), "run-normalized", 18, 1e-3, 0.1265 / 4.242640687),
        (SMALL, "run-epochs", 18, 3e-4, 0.1),
        (SMALL, "run-share", 18, 3e-4, 0.1 / 18),
        (SMALL, "run-sde", 4, 1.5e-4, 0.05),
        (Recipe(1e-3, 0.1), "width-mup", 4, 2.5e-4, 0.4),
        (Recipe(1e-3, 0.1), "width-sqrt", 4, 2.5e-4, 0.2),
        (Recipe(1e-3, 1e-4, decay_policy="independent"), "width-mup", 4, 2.5e-4, 1e-4),
        (Recipe(1e-3, 1e-4, decay_policy="independent"), "batch-sqrt", 4, 2e-3, 4e-4),
    ],
)
def test_rules_by_hand(
    recipe: Recipe, rule: str, factor: float, lr: float, weight_decay: float
) -> None:
    rescaled = rescale(recipe, rule, factor).recipe
    assert rescaled.lr == pytest.approx(lr, rel=1e-9)
    assert rescaled.weight_decay == pytest.approx(weight_decay, rel=1e-9)


def test_square_root_rule_changes_betas_and_eps_too() -> None:
    rescaled = rescale(SMALL, "batch-sqrt", 4).recipe
    assert rescaled.betas == (0.6, 0.996)
    assert rescaled.eps == pytest.approx(5e-9, rel=1e-12)


@pytest.mark.parametrize(("factor", "beta"), [(10, "β1"), (10.0, "β1"), (20, "β1"), (1000, "β1")])
def test_rule_is_refused_where_it_breaks(factor: float, beta: str) -> None:
    with pytest.raises(ValueError, match=f"breaks at factor {factor:g}: 1 - {beta}"):
        rescale(SMALL, "batch-sqrt", factor)
    assert rescale(SMALL, "batch-sqrt", 9.99).recipe.betas[0] == pytest.approx(0.001)


def test_rule_is_refused_where_a_shorter_run_breaks_it() -> None:
    with pytest.raises(ValueError, match="1 - β1"):
        rescale(SMALL, "run-sde", 0.1)


@pytest.mark.parametrize("policy", ["decoupled", "independent", "corrected"])
def test_rule_is_refused_where_a_step_would_leave_nothing(policy: str) -> None:
    recipe = Recipe(lr=0.5, weight_decay=0.1, decay_policy=policy)
    breaks = 10 if policy == "independent" else 20
    with pytest.raises(ValueError, match=f"breaks at factor {breaks}: a step would remove 1 of"):
        rescale(recipe, "batch-fixed-lr", breaks)
    rescale(recipe, "batch-fixed-lr", breaks - 1)


@pytest.mark.parametrize("rule", sorted(RESCALE_RULES))
@pytest.mark.parametrize("policy", ["decoupled", "independent", "corrected"])
def test_total_decay_changes_by_what_the_rule_says(rule: str, policy: str) -> None:
    recipe = Recipe(lr=3e-4, weight_decay=0.1, betas=(0.95, 0.99), decay_policy=policy)
    exponent = 0.7 if rule == "width-power" else None
    rescaled = rescale(recipe, rule, 3, exponent=exponent)

    def share(settings: Recipe) -> float:
        lr = 1.0 if policy == "independent" else settings.lr
        return lr * settings.weight_decay

    kappa_ratio = share(rescaled.recipe) / share(recipe) * rescaled.steps_factor
    assert rescaled.total_decay_factor == pytest.approx(kappa_ratio, rel=1e-12)


KEEP_TOTAL_DECAY = ["batch-fixed-lr", "batch-sqrt", "batch-linear", "data-epochs", "data-sde"]


@pytest.mark.parametrize("rule", [*KEEP_TOTAL_DECAY, "run-share", "run-sde", "width-mup"])
def test_these_rules_keep_the_total_decay(rule: str) -> None:
    recipe = Recipe(lr=3e-4, weight_decay=0.1, betas=(0.95, 0.99))
    assert rescale(recipe, rule, 3).total_decay_factor == 1.0


def test_width_with_a_power_of_ones_own() -> None:
    recipe = Recipe(1e-3, 0.1)
    by_power = rescale(recipe, "width-power", 4, exponent=0.5).recipe
    assert by_power == rescale(recipe, "width-sqrt", 4).recipe
    with pytest.raises(ValueError, match="needs the exponent"):
        rescale(recipe, "width-power", 4)
    with pytest.raises(ValueError, match="its own exponent"):
        rescale(recipe, "width-mup", 4, exponent=0.5)


def test_unknown_names_are_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="decoupled, independent"):
        convert_weight_decay(0.1, "pytorch", "independent", lr=1e-3)
    with pytest.raises(ValueError, match="batch-sqrt"):
        rescale(SMALL, "batch", 4)
    with pytest.raises(ValueError, match="decay_policy"):
        Recipe(1e-3, 0.1, decay_policy="l2")


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: convert_weight_decay(-1, "decoupled", "independent", lr=1), "weight_decay"),
        (lambda: convert_weight_decay(0.1, "decoupled", "independent", lr=0), "lr"),
        (lambda: convert_weight_decay(0.1, "sgd_l2", "decoupled", lr=1, momentum=1), "momentum"),
        (lambda: sgd_recipe_to_adamw(1e-4, sgd_lr=0.1, adamw_lr=0), "adamw_lr"),
        (lambda: batch_passes(dataset_size=0, batch_size=1, epochs=1), "dataset_size"),
        (lambda: from_normalized(0.1, passes=0), "passes"),
        (lambda: from_timescale(0, lr=1), "steps"),
        (lambda: from_timescale(1, lr=1), "steps must be a finite number above 1"),
        (lambda: from_timescale(10, lr=math.nan), "lr"),
        (lambda: rescale(SMALL, "batch-sqrt", 0), "factor"),
        (lambda: Recipe(lr=0, weight_decay=0.1), "lr"),
        (lambda: Recipe(lr=1, weight_decay=0.1, betas=(0.9, 1)), "beta2"),
        (lambda: for_schedule(0.1, old=Constant(), new=Linear(5), total_steps=0), "total_steps"),
    ],
)
def test_number_out_of_range_is_refused_by_name(build: Callable[[], object], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        build()


def test_results_become_json() -> None:
    converted = json.loads(adam_l2_to_adamw(0.01, [0.01]).to_json())
    assert converted["value"] == 1.0
    assert converted["single_value"] is True
    rescaled = json.loads(rescale(SMALL, "batch-sqrt", 4).to_json())
    assert rescaled["recipe"]["betas"] == [0.6, 0.996]
    assert rescaled["rule"] == "batch-sqrt"
