"""The forecast of a run: its numbers, its verdicts, and what it says about itself."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebbtide.forecast import (
    EXACT_STEPS,
    VERDICTS,
    DecayForecast,
    DecaySettings,
    forecast,
    forecast_groups,
)
from ebbtide.numpy import SGD, AdamW
from ebbtide.schedules import WSD, Constant, Cosine, CosineRestarts, Reciprocal, Schedule, Warmup
from ebbtide.weight_decay import DECAY_POLICIES, decay_share

ADAMW = DecaySettings(lr=1e-3, weight_decay=0.1)
GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1, "decay_policy": "decoupled"}


def at(settings: DecaySettings = ADAMW, *, total_steps: int = 10_000) -> DecayForecast:
    return forecast(settings, total_steps=total_steps)


def test_forecast_of_a_plain_run_by_hand() -> None:
    seen = forecast(ADAMW, total_steps=10_000, steps_per_epoch=500)
    assert seen.timescale is not None
    assert seen.timescale == pytest.approx((10_000, 20, 1.0))
    assert seen.half_life is not None
    assert seen.half_life.steps == pytest.approx(6931, abs=0.5)
    assert seen.total_decay == pytest.approx(1.0)
    assert seen.kept_share == pytest.approx(0.36786, abs=5e-6)
    assert seen.equilibrium is not None
    assert seen.equilibrium.rms == pytest.approx(0.070711, abs=5e-7)
    assert seen.equilibrium.rotation_per_step == pytest.approx(3.24443e-3, abs=5e-9)
    assert seen.equilibrium.approach == pytest.approx(1 - 0.36786**2, abs=1e-5)
    assert seen.equilibrium.weight_bound == pytest.approx(10.0)
    assert seen.default_warmup_steps == pytest.approx(2000)
    assert seen.verdict == "active"


@pytest.mark.parametrize("policy", ["decoupled", "independent", "corrected"])
@pytest.mark.parametrize("decay_schedule", [None, Cosine(1000), Constant(0.5)], ids=repr)
@pytest.mark.parametrize("schedule", [None, Warmup(100, Cosine(900)), WSD(9, 900, 91)], ids=repr)
def test_forecast_sums_every_step(
    policy: str, schedule: Schedule | None, decay_schedule: Schedule | None
) -> None:
    weight_decay = 1e-4 if policy == "independent" else 0.1
    settings = DecaySettings(lr=1e-3, weight_decay=weight_decay, decay_policy=policy)
    seen = forecast(
        settings, total_steps=1000, schedule=schedule, weight_decay_schedule=decay_schedule
    )
    kept, kappa = 1.0, 0.0
    for t in range(1000):
        share = decay_share(
            policy,
            lr=1e-3 * (schedule or Constant())(t),
            base_lr=1e-3,
            weight_decay=weight_decay * (decay_schedule or Constant())(t),
        )
        kept, kappa = kept * (1 - share), kappa + share
    assert seen.total_decay == pytest.approx(kappa, rel=1e-12)
    assert seen.kept_share == pytest.approx(kept, rel=1e-12)


@pytest.mark.parametrize(
    ("kappa", "verdict"),
    [
        (0.0, "inert"),
        (0.0499, "inert"),
        (0.0501, "weak"),
        (0.299, "weak"),
        (0.301, "active"),
        (9.99, "active"),
        (10.01, "short memory"),
        (99.0, "short memory"),
    ],
)
@pytest.mark.parametrize("policy", ["decoupled", "independent", "corrected"])
def test_verdict_follows_the_total_decay(policy: str, kappa: float, verdict: str) -> None:
    lr = 0.01
    weight_decay = kappa / 1000 if policy == "independent" else kappa / 1000 / lr
    seen = at(DecaySettings(lr, weight_decay, policy), total_steps=1000)
    assert seen.verdict == verdict
    assert seen.verdict in VERDICTS
    assert seen.reason.endswith(".")


@pytest.mark.parametrize(("weight_decay", "word"), [(100.0, "single step"), (1500.0, "sign")])
def test_verdict_refuses_what_one_step_would_destroy(weight_decay: float, word: str) -> None:
    seen = at(DecaySettings(lr=1e-3, weight_decay=weight_decay), total_steps=100)
    assert seen.verdict == "refused"
    assert word in seen.reason
    assert at(DecaySettings(1e-3, 99.0), total_steps=100).verdict != "refused"


def test_defaults_of_adamw_are_inert_in_a_short_run() -> None:
    assert at(DecaySettings(lr=1e-3, weight_decay=0.01), total_steps=1500).verdict == "inert"


def test_l2_of_sgd_is_summed_over_its_momentum() -> None:
    settings = DecaySettings(0.1, 5e-4, "l2", rule="sgd", momentum=0.9)
    seen = at(settings)
    assert seen.largest_share == pytest.approx(5e-4)
    assert seen.equilibrium is not None
    assert seen.equilibrium.rms is None
    assert seen.equilibrium.weight_bound is None
    assert seen.default_warmup_steps is None
    damped = dataclasses.replace(settings, dampening=0.9)
    assert at(damped).largest_share == pytest.approx(5e-5)


def test_l2_of_adam_is_unknown_without_the_gradient_scale() -> None:
    settings = DecaySettings(1e-3, 1e-3, "l2")
    unknown = at(settings)
    assert unknown.verdict == "unknown"
    assert unknown.total_decay is unknown.timescale is unknown.equilibrium is None
    assert "not known" in str(unknown)
    known = at(dataclasses.replace(settings, gradient_scale=0.01))
    assert known.largest_share == pytest.approx(1e-3 * 1e-3 / 0.01)
    assert known.equilibrium is not None
    assert known.equilibrium.rms == pytest.approx(math.sqrt(1e-3 * 0.01 / (2 * 1e-3)))
    assert at(DecaySettings(1e-3, 0.0, "l2")).verdict == "inert"


def test_both_schedules_multiply_and_the_report_says_so() -> None:
    cosine = Cosine(10_000)
    seen = forecast(ADAMW, total_steps=10_000, schedule=cosine, weight_decay_schedule=cosine)
    assert seen.total_decay == pytest.approx(0.37505, abs=1e-5)
    assert seen.total_decay_lr_alone == pytest.approx(0.50005, abs=1e-5)
    notes = " ".join(seen.notes)
    assert "κ = 0.3751" in notes
    assert "0.5001" in notes
    assert "power 2" in notes


def test_reciprocal_decay_schedule_gives_constant_decay() -> None:
    cosine = Cosine(1000)
    seen = forecast(
        ADAMW,
        total_steps=1000,
        schedule=cosine,
        weight_decay_schedule=Reciprocal(cosine, most=1e9),
    )
    assert seen.total_decay == pytest.approx(1000 * 1e-4, rel=1e-12)


def test_notes_name_what_to_watch() -> None:
    cautious = at(dataclasses.replace(ADAMW, cautious=True))
    assert any("Cautious" in note for note in cautious.notes)
    forgetful = forecast(DecaySettings(1e-2, 1.0), total_steps=1000, steps_per_epoch=500)
    assert any("under one epoch" in note for note in forgetful.notes)
    assert any("warmup" in note for note in at(total_steps=1000).notes)
    assert not any("warmup" in note for note in at(total_steps=100_000).notes)


def test_long_run_is_sampled_and_says_so() -> None:
    steps = 10 * EXACT_STEPS
    seen = forecast(
        DecaySettings(1e-4, 0.01), total_steps=steps, schedule=Warmup(2000, Cosine(steps - 2000))
    )
    assert seen.total_decay == pytest.approx(1e-6 * (1000.5 + (steps - 2000) / 2 + 0.5), rel=1e-6)
    assert any("evenly spaced" in note for note in seen.notes)


def test_peak_is_that_of_the_run_not_of_the_settings() -> None:
    seen = forecast(ADAMW, total_steps=500, schedule=Warmup(1000, Constant()))
    assert seen.largest_share == pytest.approx(0.5 * 1e-4)


def test_settings_are_read_from_groups_of_torch_and_ours() -> None:
    torch_adam = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    seen = forecast_groups(
        [
            {**torch_adam, "decoupled_weight_decay": True},
            {**torch_adam, "decoupled_weight_decay": False},
            {**torch_adam, "decay_policy": "independent", "base_lr": 2e-3, "name": "head"},
            {**torch_adam, "decay_policy": "decoupled", "initial_lr": 5e-3, "cautious": True},
            {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 5e-4},
            {"lr": 0.1, "momentum": 0.9, "alpha": 0.99, "weight_decay": 5e-4},
        ],
        total_steps=100,
    )
    settings = [group.settings for group in seen.groups]
    assert [s.decay_policy for s in settings] == [
        "decoupled",
        "l2",
        "independent",
        "decoupled",
        "l2",
        "l2",
    ]
    assert [s.rule for s in settings] == ["adam"] * 4 + ["sgd", "other"]
    assert [s.name for s in settings][:3] == ["group 0", "group 1", "head"]
    assert settings[2].base_lr == 2e-3
    assert settings[3].lr == 5e-3
    assert settings[3].cautious
    assert settings[0].betas == (0.9, 0.99)
    assert seen.groups[5].verdict == "unknown"


def test_report_prints_and_becomes_json() -> None:
    seen = forecast_groups(
        [{"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "decay_policy": "decoupled"}],
        total_steps=100,
    )
    document = json.loads(seen.to_json())["groups"][0]
    assert document["timescale"]["steps"] is None
    assert document["verdict"] == "inert"
    assert document["settings"]["lr"] == 1e-3
    assert [moment["step"] for moment in document["moments"]] == [0, 25, 50, 74, 99]
    assert "no limit" in str(seen)
    assert "verdict" in str(seen)


def test_report_draws_its_picture(tmp_path: Path) -> None:
    groups = [
        {"lr": lr, "betas": (0.9, 0.999), "weight_decay": 0.1, "decay_policy": "decoupled"}
        for lr in (1e-3, 1e-4)
    ]
    seen = forecast_groups(groups, total_steps=300, schedule=CosineRestarts(100, 2))
    picture = tmp_path / "run.png"
    figure = seen.plot(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    removed = figure.axes[2].lines[0].get_ydata()
    assert len(figure.axes) == 4
    assert max(removed) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"lr": -1.0, "weight_decay": 0.1}, "lr"),
        ({"lr": math.nan, "weight_decay": 0.1}, "lr"),
        ({"lr": 1.0, "weight_decay": math.inf}, "weight_decay"),
        ({"lr": 1.0, "weight_decay": 0.1, "decay_policy": "paper"}, ", ".join(DECAY_POLICIES)),
        ({"lr": 1.0, "weight_decay": 0.1, "rule": "lion"}, "adam, sgd"),
        ({"lr": 1.0, "weight_decay": 0.1, "betas": (0.9, 1.0)}, "beta2"),
        ({"lr": 1.0, "weight_decay": 0.1, "momentum": 1.0}, "momentum"),
        ({"lr": 1.0, "weight_decay": 0.1, "gradient_scale": 0.0}, "gradient_scale"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        DecaySettings(**settings)  # type: ignore[arg-type]


def test_run_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="total_steps"):
        forecast(ADAMW, total_steps=0)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        forecast(ADAMW, total_steps=10, steps_per_epoch=0)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"a schedule is {value:g} at step 0"):
            forecast(ADAMW, total_steps=10, schedule=Constant(value))
    with pytest.raises(ValueError, match="base_lr"):
        forecast(DecaySettings(0.0, 0.1, "independent"), total_steps=10)


def test_many_groups_are_printed_as_a_table() -> None:
    groups = [
        {"lr": 10.0**-i, "betas": (0.9, 0.999), "weight_decay": 0.1, "decay_policy": "decoupled"}
        for i in range(2, 9)
    ]
    lines = str(forecast_groups(groups, total_steps=3000)).splitlines()
    assert lines[0].split() == [
        "group",
        "lr",
        "weight",
        "decay",
        "timescale",
        "κ",
        "kept",
        "verdict",
    ]
    assert lines[1].split() == ["group", "0", "0.01", "0.1", "1000", "3", "4.97%", "active"]
    assert [line.split()[-1] for line in lines[1:8]] == ["active"] * 2 + ["inert"] * 5
    assert sum(line.startswith("inert: ") for line in lines) == 5
    assert any("below half the spacing of float32" in line for line in lines)


@pytest.mark.parametrize(
    ("build", "policy", "share"),
    [(AdamW, "decoupled", 1e-4), (SGD, "l2", 1e-3), (SGD, "independent", 0.1)],
)
def test_groups_of_the_numpy_face_are_known(build: Any, policy: str, share: float) -> None:
    momentum = {"momentum": 0.9} if build is SGD else {}
    optimizer = build([np.ones((2, 2))], lr=1e-3, weight_decay=0.1, decay_policy=policy, **momentum)
    seen = forecast_groups(optimizer.param_groups, total_steps=100).groups[0]
    assert seen.settings.decay_policy == policy
    assert seen.largest_share == pytest.approx(share, rel=1e-12)


def test_a_run_of_one_step_is_seen_in_the_picture() -> None:
    for axes in forecast_groups([GROUP], total_steps=1).plot().axes:
        assert all(line.get_marker() == "." for line in axes.lines)


def test_the_picture_counts_whole_steps() -> None:
    ticks = forecast_groups([GROUP], total_steps=5).plot().axes[-1].get_xticks()
    assert all(tick == int(tick) for tick in ticks)


def test_a_timescale_of_less_than_a_step_is_not_none() -> None:
    assert "0.5 steps = 0.5% of the run" in str(forecast(DecaySettings(1.0, 2.0), total_steps=100))
