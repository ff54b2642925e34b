"""The paired study of training: its verdicts, its file of finished runs, its runs."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path

import pytest
from benchmarks import parity
from benchmarks.lessons import perceptron
from benchmarks.parity import REFERENCE, Run, Verdict, read, report, train, verdict, verdicts

from ebbtide.torch import AdamW

LOSSES = [1.0, 1.1, 0.9, 1.02, 1.05, 0.97]
SETTING = parity.TASKS["perceptron"]
CONTROLS = [name for name, arm in parity.ARMS.items() if arm.control]


def records(shifts: dict[str, float]) -> dict[Run, float]:
    """Return losses of six seeds for float32, and for arms that end higher by so much."""
    return {
        Run("perceptron", arm, seed, SETTING.steps, SETTING.lr): loss + shift
        for arm, shift in {REFERENCE: 0.0, **shifts}.items()
        for seed, loss in enumerate(LOSSES)
    }


def test_the_example_of_verdict() -> None:
    assert doctest.testmod(parity).failed == 0


def test_a_noisy_difference_is_undecided_and_a_lost_run_diverged() -> None:
    noisy = [a + b for a, b in zip(LOSSES, [0.2, -0.2, 0.2, -0.2, 0.2, -0.1], strict=True)]
    assert verdict(noisy, LOSSES).word == "undecided"
    assert verdict([math.nan, *LOSSES[1:]], LOSSES).word == "diverged"


def told(shifts: dict[str, float]) -> str:
    found = verdicts(records(shifts), "perceptron", shifts)
    return "\n".join(report("perceptron", found, LOSSES))


def test_nothing_is_shown_where_a_control_passes_or_lacks() -> None:
    shifts = {"8bit": 0.001, **dict.fromkeys(CONTROLS, 0.5)}
    assert "6 seeds  equivalent" in told(shifts)
    assert "nothing is shown" not in told(shifts)
    passing = told({**shifts, CONTROLS[0]: 0.001})
    assert f"nothing is shown by this task: {CONTROLS[0]} is told equivalent" in passing
    assert "6 seeds  not shown" in passing
    del shifts[CONTROLS[1]]
    assert f"nothing is shown by this task: no {CONTROLS[1]}" in told(shifts)


def test_a_line_that_a_kill_cut_off_is_run_again(tmp_path: Path) -> None:
    runs = [Run("perceptron", REFERENCE, seed, 2, 1e-3) for seed in range(2)]
    path = tmp_path / "runs.jsonl"
    whole = json.dumps({**runs[0]._asdict(), "loss": None, "seconds": 1.0})
    path.write_text(whole + "\n" + whole[:40])
    assert [*read(path)] == [runs[0]]
    found = parity.complete(runs, path, workers=1)
    assert math.isnan(found[runs[0]])  # kept, not run again
    assert math.isfinite(found[runs[1]])


@pytest.mark.parametrize("arm", parity.ARMS)
def test_every_arm_trains_and_can_be_repeated(arm: str) -> None:
    first, again = (train(Run("perceptron", arm, 3, 5, 1e-3)) for _ in range(2))
    assert first["loss"] == again["loss"]
    assert arm == "naive int8 v" or first["loss"] < 2.6  # ln 10 is 2.3


def test_the_low_bit_arms_are_low_bit() -> None:
    lesson = perceptron(0)
    keys = {}
    for name in ("8bit", "bf16: 24bit + 8bit"):
        model = lesson.model()
        if parity.ARMS[name].low_precision:
            model.bfloat16()
        optimizer = parity.ARMS[name].make(model, 1e-3)
        assert isinstance(optimizer, AdamW)
        for param in model.parameters():
            param.grad = param.detach().clone()
        optimizer.step()
        keys[name] = {key for state in optimizer.state.values() for key in state}
    assert "exp_avg_sq_codes" in keys["8bit"]
    assert {"exp_avg_sq_codes", "residual"} <= keys["bf16: 24bit + 8bit"]


def test_a_verdict_says_what_it_is_made_of() -> None:
    found = verdict([each + 0.01 for each in LOSSES], LOSSES)
    assert isinstance(found, Verdict)
    assert found.seeds == 6
    assert found.low == pytest.approx(found.high) == pytest.approx(0.01)
