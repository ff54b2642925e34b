"""What an interrupted command leaves behind, and going on from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import ebbtide
from ebbtide.lab.claims.bench import ADAMW, PLAIN, Bench, Effort
from ebbtide.lab.claims.registry import choose_claims
from ebbtide.lab.claims.report import write_partly, write_report
from ebbtide.lab.claims.run import run_claims
from ebbtide.lab.errors import InputError
from ebbtide.lab.experiment import run
from ebbtide.lab.memory import Arrays, Unfinished, code_fingerprint
from ebbtide.lab.tasks import Cell
from tests.lab import Counter, FormulaArm, experiment

QUICK = Effort(quick=True)


def memory(tmp_path: Path, **identity: object) -> Unfinished:
    return Unfinished(tmp_path / "report", identity)


def made(value: float) -> Arrays:
    return {"value": np.array(value)}


def unknown() -> Arrays:
    raise AssertionError("made once more")


def test_a_run_is_made_once(tmp_path: Path) -> None:
    kept, known = memory(tmp_path), list[str]()
    assert kept.arrays("a", lambda: made(1.5), lambda: known.append("a"))["value"] == 1.5
    assert known == []
    again = memory(tmp_path)
    assert again.arrays("a", unknown, lambda: known.append("a"))["value"] == 1.5
    assert known == ["a"]
    assert again.arrays("b", lambda: made(2.5), lambda: None)["value"] == 2.5
    assert again.within("part").arrays("a", lambda: made(3.5), lambda: None)["value"] == 3.5
    again.forget()
    assert list(tmp_path.iterdir()) == []


def test_runs_of_another_command_are_neither_used_nor_lost(tmp_path: Path) -> None:
    memory(tmp_path, seed=0).arrays("a", lambda: made(1.0), lambda: None)
    other = memory(tmp_path, seed=1)
    assert other.arrays("a", lambda: made(2.0), lambda: None)["value"] == 2.0
    other.forget()
    assert memory(tmp_path, seed=0).arrays("a", unknown, lambda: None)["value"] == 1.0


def test_a_damaged_run_is_made_again(tmp_path: Path) -> None:
    memory(tmp_path).arrays("a", lambda: made(1.0), lambda: None)
    (file,) = tmp_path.glob("*/*.npz")
    file.write_bytes(file.read_bytes()[:50])
    assert memory(tmp_path).arrays("a", lambda: made(2.0), lambda: None)["value"] == 2.0


def test_a_folder_of_the_users_is_left_alone(tmp_path: Path) -> None:
    folder = memory(tmp_path).folder
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="in the way"):
        memory(tmp_path)
    assert (folder / "thesis.tex").read_text() == "mine"


def test_the_fingerprint_changes_with_the_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "lab" / "runs.py"
    source.parent.mkdir()
    source.write_text("steps = 1")
    monkeypatch.setattr(ebbtide, "__file__", str(tmp_path / "__init__.py"))
    before = code_fingerprint()
    (tmp_path / "notes.txt").write_text("no code")
    assert code_fingerprint() == before
    source.write_text("steps = 2")
    assert code_fingerprint() != before


def test_an_experiment_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    first, second = FormulaArm(noise=1.0), FormulaArm(noise=1.0)
    (whole,) = run(experiment(first), Counter())
    run(experiment(first), Counter(), memory(tmp_path))
    # As after an interruption: some runs are there, some are not.
    files = sorted(tmp_path.glob("*/*.npz"))
    for file in files[::2]:
        file.unlink()
    counter = Counter()
    (resumed,) = run(experiment(second), counter, memory(tmp_path))
    assert len(second.calls) == len(files[::2])
    assert 0 < counter.skipped < counter.done == counter.total
    for ours, theirs in zip(resumed.results, whole.results, strict=True):
        assert ours.best == theirs.best
        for each in dataclasses.fields(ours.chosen):
            np.testing.assert_array_equal(
                getattr(ours.chosen, each.name), getattr(theirs.chosen, each.name)
            )


def test_a_bench_tells_its_calls_apart(tmp_path: Path) -> None:
    arm = dataclasses.replace(PLAIN, steps=20)
    other = dataclasses.replace(arm, loss_scale=100.0)
    cells = [Cell(1e-3, 0.1)]

    def losses(counter: Counter) -> list[float]:
        bench = Bench(QUICK, counter, memory(tmp_path))
        found = [bench.train([(each, ADAMW, cells)])[0] for each in (arm, other)]
        return [float(outcomes.test_loss.sum()) for outcomes in found]

    first, second = Counter(), Counter()
    found = losses(first)
    assert found[0] != found[1]
    assert losses(second) == found
    assert (first.skipped, second.skipped) == (0, first.done)


def test_a_part_of_a_report_does_not_replace_a_whole_one(tmp_path: Path) -> None:
    findings = list(run_claims(choose_claims("imagenet,language-models"), QUICK, Counter()))
    folder = tmp_path / "claims"
    assert write_partly([], 2, QUICK, folder) == "nothing is written"
    assert str(folder) in write_partly(findings[:1], 2, QUICK, folder)
    write_report(findings, QUICK, folder)
    whole = (folder / "results.json").read_bytes()
    assert f"{folder}-partly" in write_partly(findings[:1], 2, QUICK, folder)
    assert (folder / "results.json").read_bytes() == whole
    (tmp_path / "claims-partly" / "thesis.tex").write_text("mine")
    assert "thesis.tex" in write_partly(findings[:1], 2, QUICK, folder)
