"""`compare` on the user's own function: what it is called with, and what is made of its answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from typer.testing import CliRunner

from ebbtide.cli import app
from ebbtide.lab.errors import InputError, Stopped
from ebbtide.lab.experiment import KeepsCalls
from ebbtide.lab.memory import Unfinished
from ebbtide.lab.optimizers import OPTIMIZERS
from ebbtide.lab.parallel import stoppable
from ebbtide.lab.tasks import Arm, Cell, Outcomes, load_task

CODE = """
import time

def value(s):
    return 1000 * s.seed + 10 * s.lr + s.weight_decay + (0.5 if s.optimizer == "adamw" else 0)

def both(s):
    for step in range(0, 4 + s.seed):
        s.report(10 * step, -1.0 * step)
    print("<i>printed</i>")
    return {"loss": value(s), "test": -value(s), "other": 3}

def accuracy(s):
    return {"accuracy": 90 - abs(s.lr - 0.01) - s.weight_decay, "loss": 1.0}

def fragile(s):
    if s.lr > 0.5:
        raise FloatingPointError("overflow")
    return float("inf") if s.weight_decay else value(s)

def failing(s):
    raise ValueError("no <data>")

def leaving(s):
    raise SystemExit(3)

def hanging(s):
    time.sleep(600)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def arm_of(file: Path, function: str, **options: object) -> Arm:
    (arm,) = load_task(f"{file}:{function}", **options).arms  # type: ignore[arg-type]
    return arm


def train(arm: Arm, cells: list[Cell], seeds: list[int], points: int = 5) -> Outcomes:
    ticks: list[int] = []
    outcomes = arm.train(OPTIMIZERS["adamw"], cells, seeds, curve_points=points, tick=ticks.append)
    assert sum(ticks) == len(cells) * len(seeds)
    return outcomes


CELLS = [Cell(0.1, 0.0), Cell(1.0, 2.0)]


def test_a_call_that_came_to_its_end_is_never_made_again(tmp_path: Path, file: Path) -> None:
    counting = "\ndef counted(s):\n    open('%s', 'a').write('x')\n    return s.lr\n"
    file.write_text(CODE + counting % (tmp_path / "calls"))
    kept = Unfinished(tmp_path / "unfinished", {})

    def arm() -> Arm:
        found = arm_of(file, "counted")
        assert isinstance(found, KeepsCalls)
        return found.keeping(kept)

    first = train(arm(), CELLS, [1])
    again = train(arm(), CELLS, [1, 2])
    assert first.validation.tolist() == again.validation[:1].tolist() == [[0.1, 1.0]]
    assert (tmp_path / "calls").read_text() == "x" * 4


def test_one_number_chooses_and_is_reported(file: Path) -> None:
    seen = train(arm_of(file, "value"), CELLS, [1, 2])
    assert seen.validation.tolist() == [[1001.5, 1012.5], [2001.5, 2012.5]]
    assert seen.test.tolist() == seen.validation.tolist()
    assert not seen.diverged.any()
    assert seen.steps.size == 0
    assert seen.test_loss.shape == (2, 2, 0)


def test_a_number_called_test_is_what_is_reported_and_reports_become_curves(file: Path) -> None:
    seen = train(arm_of(file, "both"), CELLS, [1, 2])
    assert seen.test.tolist() == (-seen.validation).tolist()
    assert seen.steps.tolist() == [0, 10, 20, 30, 40]  # those that both seeds have
    assert seen.test_loss[1, 0].tolist() == [0, -1, -2, -3, -4]
    assert np.isnan(seen.train_loss).all()
    assert train(arm_of(file, "both"), CELLS[:1], [1], points=1).steps.size == 0


def test_the_metric_is_the_one_asked_for(file: Path) -> None:
    arm = arm_of(file, "accuracy", metric="accuracy", maximize=True)
    assert arm.metric.higher_is_better
    assert train(arm, CELLS[1:], [0]).validation[0, 0] == pytest.approx(87.01)


def test_what_is_not_finite_has_diverged(file: Path) -> None:
    cells = [Cell(0.1, 0.0), Cell(0.1, 1.0), Cell(1.0, 0.0)]
    seen = train(arm_of(file, "fragile"), cells, [0])
    assert seen.diverged.tolist() == [[False, True, True]]
    assert np.isnan(seen.test).tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("failing", r"mine.py:failing failed at adamw, lr 0.1, .* ValueError: no <data>"),
        ("leaving", "SystemExit: 3"),
    ],
)
def test_a_function_that_fails_ends_the_comparison(file: Path, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(arm_of(file, function), CELLS, [0])


def test_a_file_that_changes_ends_the_comparison(file: Path) -> None:
    arm = arm_of(file, "value")
    file.write_text(CODE + "\n# changed")
    with pytest.raises(InputError, match="was changed"):
        train(arm, CELLS, [0])


def test_a_function_that_hangs_ends_when_the_others_have(file: Path) -> None:
    stop = Event()
    stop.set()
    arm = arm_of(file, "hanging")
    began = time.monotonic()
    with pytest.raises(Stopped):
        arm.train(
            OPTIMIZERS["adam"], CELLS, [0], curve_points=1, tick=stoppable(lambda _: None, stop)
        )
    assert time.monotonic() - began < 60  # a hang would be 600


@pytest.mark.parametrize("text", ["mine.py:nothing", "absent.py:value", "mine.py:3"])
def test_what_is_no_function_is_refused(
    file: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    with pytest.raises(InputError):
        load_task(text)


def test_the_command_reports_it_escaped(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    arguments = ["compare", "--task", "mine.py:both", "--optimizers", "adam,adamw", "--seeds", "2"]
    grid = ["--lr", "0.1,0.2", "--weight-decay", "0,1", "--out", "out", "--json"]
    run = CliRunner().invoke(app, [*arguments, *grid])
    assert run.exit_code == 0, run.output
    results = json.loads((file.parent / "out" / "results.json").read_text())
    assert json.loads(run.stdout) == results
    (arm,) = results["arms"]
    assert {each["name"]: each["best"] for each in arm["optimizers"]} == {
        "adam": {"lr": 0.1, "weight_decay": 0.0},
        "adamw": {"lr": 0.1, "weight_decay": 0.0},
    }
    html = (file.parent / "out" / "report.html").read_text()
    assert "SHA-256 of the file" in html
    assert "runs of the function in all" in html
    assert "<i>" not in html
    assert (file.parent / "out" / "function-curves.png").stat().st_size > 1000


@pytest.mark.parametrize(("function", "seen"), [("accuracy", True), ("both", False)])
def test_seeds_that_change_nothing_are_mentioned(
    file: Path, monkeypatch: pytest.MonkeyPatch, function: str, seen: bool
) -> None:
    monkeypatch.chdir(file.parent)
    arguments = ["compare", "--task", f"mine.py:{function}", "--metric", "loss", "--seeds", "2"]
    grid = ["--optimizers", "adamw", "--lr", "0.1", "--weight-decay", "0", "--out", "out"]
    assert CliRunner().invoke(app, [*arguments, *grid]).exit_code == 0
    html = (file.parent / "out" / "report.html").read_text()
    assert ("the intervals say nothing: is settings.seed used?" in html) is seen
