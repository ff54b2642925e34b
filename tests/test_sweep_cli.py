"""`ebbtide sweep`, `worker` and `report` as a user meets them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ebbtide.cli import main
from tests.sweeps import assert_one_record_a_cell, lines, opened, write_function

GRID = ["--lr", "1e-3,1e-2", "--weight-decay", "0,0.1"]
TARGET = "train.py:train"


class Console:
    """Runs `ebbtide …` in this process, in a folder of its own."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(folder)
        self._patch, self._capsys = monkeypatch, capsys
        self.folder = folder

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._patch.setattr(sys, "argv", ["ebbtide", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        text = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, text.out, text.err

    def json(self, *arguments: str) -> Any:
        _, out, _ = self(*arguments, "--json")
        return json.loads(out)


@pytest.fixture
def console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Console:
    return Console(tmp_path, monkeypatch, capsys)


def test_a_sweep_from_the_command_to_the_report(console: Console) -> None:
    write_function(console.folder, "print('at', s.lr)\nfor i in range(3): s.report(i, s.lr)\n"
                                   "return s.lr + s.weight_decay + 1e-4 * s.seed")  # fmt: skip
    status, out, err = console(
        "sweep", TARGET, "--lr", "1e-3,1e-2", "--weight-decay", "0.1", "--optimizer", "adamw,lion",
        "--seeds", "2", "--workers", "2",
    )  # fmt: skip
    assert status == 0, err
    assert "AdamW" in out
    assert "value 0.101" in out
    assert [line for line in err.splitlines() if "started" in line or "done in" in line]
    report = Path(out.splitlines()[-1].removeprefix("Report: "))
    assert report.parent.parent == console.folder / "reports"
    content = json.loads((report.parent / "results.json").read_text())
    assert set(content["files"]) == {path.name for path in report.parent.iterdir()}
    assert content["outcomes"] == {"finished": 8}
    assert [arm["best"]["lr"] for arm in content["optimizers"]] == [0.001, 0.001]
    rows = list(csv.DictReader(lines(report.parent / "cells.csv")))
    assert Counter(row["optimizer"] for row in rows) == {"adamw": 4, "lion": 4}
    assert len(lines(report.parent / "curves.csv")) == 1 + 24
    assert "at 0.001" in report.read_text()
    assert_one_record_a_cell(opened("sweeps.journal"))


def test_the_same_command_runs_nothing_twice_and_makes_the_report_again(console: Console) -> None:
    write_function(console.folder, "open('ran', 'a').write('x')\nreturn s.lr")
    command = ["sweep", TARGET, *GRID, "--no-report"]
    assert console(*command)[0] == 0
    status, out, err = console(*command)
    assert (status, err) == (0, "")
    assert "AdamW" in out
    assert (console.folder / "ran").read_text() == "xxxx"


def test_cells_that_fail_do_not_stop_the_others(console: Console) -> None:
    body = """
    if s.lr > 5e-3 and s.weight_decay: raise ValueError('too <b>big</b>')
    if s.lr > 5e-3 and not os.path.exists('seen'): open('seen', 'w'); time.sleep(1000)
    if s.weight_decay: return float('nan')
    return s.lr
    """
    write_function(console.folder, body)
    command = ["sweep", TARGET, *GRID, "--cell-timeout", "4", "--no-report"]
    status, out, err = console(*command)
    assert status == 1
    assert "adamw, lr 0.01, weight decay 0.1, seed 0: failed: ValueError: too <b>big</b>" in err
    assert "adamw, lr 0.01, weight decay 0, seed 0: timeout: ended after 4 s" in err
    assert "2 cells failed" in err
    assert "1 finished" in out
    again = console.json(*command, "--retry-failed")
    assert again["outcomes"] == {"diverged": 1, "failed": 1, "finished": 2}


def test_pruning_ends_hopeless_cells_and_no_others(console: Console) -> None:
    # Slow only where enough others have finished for it to be judged.
    body = """
    for step in range(1, 100):
        s.report(step, s.lr + step * 1e-9)
        time.sleep(0.1 if s.lr > 0.5 and s.seed == 2 else 0)
    return s.lr
    """
    write_function(console.folder, body)
    grid = ["--lr", "1e-3..1:4", "--weight-decay", "0", "--seeds", "3", "--prune"]
    found = console.json("sweep", TARGET, *grid, "--prune-after", "2", "--no-report")
    outcomes = Counter((record["lr"], record["outcome"]) for record in found["records"])
    assert outcomes[1.0, "pruned"] >= 1
    assert {lr for (lr, outcome) in outcomes if outcome == "pruned"} <= {0.1, 1.0}
    assert outcomes[0.001, "finished"] == outcomes[0.01, "finished"] == 3


def test_a_changed_file_is_refused_until_it_is_allowed(console: Console) -> None:
    file = write_function(console.folder, "return s.lr")
    command = ["sweep", TARGET, *GRID, "--no-report"]
    assert console(*command)[0] == 0
    file.write_text(file.read_text() + "# changed\n")
    status, out, err = console(*command)
    assert (status, out) == (2, "")
    assert "train.py has changed since this sweep began" in err
    assert console(*command, "--allow-changed")[0] == 0


def test_a_file_that_changes_under_way_stops_the_sweep(console: Console) -> None:
    body = "open('train.py', 'a').write('#')\nreturn s.lr"
    write_function(console.folder, body)
    status, _, err = console("sweep", TARGET, *GRID, "--no-report")
    assert status == 2
    assert err.splitlines()[-1] == "ebbtide: train.py was changed while the sweep was running"
    counts = opened("sweeps.journal").queue.counts()
    assert (counts.done, counts.running, counts.waiting) == (1, 0, 3)


def test_cells_queued_here_are_run_by_workers_elsewhere(console: Console) -> None:
    write_function(console.folder, "return s.lr")
    status, out, err = console("sweep", TARGET, *GRID, "--workers", "0", "--study", "mine")
    assert (status, out, err) == (0, "", "4 of 4 cells wait in mine\n")
    elsewhere = console.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "train.py").write_text((console.folder / "train.py").read_text())
    (console.folder / "train.py").unlink()
    assert "train.py cannot be read" in console("worker", "mine")[2]
    assert console("worker", "mi", "--file", "elsewhere/train.py", "--workers", "2")[0] == 0
    assert_one_record_a_cell(opened("sweeps.journal"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sweep"], "Missing argument"),
        (["sweep", "train.py"], "write FILE.py:FUNCTION"),
        (["sweep", "none.py:train"], "none.py cannot be read"),
        (["sweep", "train.py:tain"], "defines no 'tain'; it defines train"),
        (["sweep", "broken.py:train"], "broken.py, line 1"),
        (["sweep", "import.py:train"], "No module named 'no_such_module'"),
        (["sweep", TARGET, "--lr", "fast"], "no number and no range"),
        (["sweep", TARGET, "--sampler", "bayes"], "unknown sampler"),
        (["sweep", TARGET, "--seeds", "0"], "--seeds"),
        (["sweep", TARGET, "--rise", "much"], "is no amount"),
        (["sweep", TARGET, "--storage", "mysql://x"], "is not supported"),
        (["sweep", TARGET, "--storage", "sqlite:///x.db", "--workers", "2"], "no row locks"),
        (["sweep", TARGET, "--storage", "no/such.journal"], "no folder no"),
        (["sweep", TARGET, "--storage", "broken.py"], "is no journal"),
        (["sweep", TARGET, "--study", "../up"], "cannot name a study"),
        (["sweep", TARGET, "--out", "taken"], "is not empty and holds no ebbtide report"),
        (["worker", "x"], "there is no sweeps.journal"),
        (["report", "x"], "there is no sweeps.journal"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    console: Console, arguments: list[str], says: str
) -> None:
    write_function(console.folder, "return 1")
    (console.folder / "broken.py").write_text("def train(s) return")
    (console.folder / "import.py").write_text("import no_such_module\ndef train(s): ...")
    (console.folder / "taken").mkdir()
    (console.folder / "taken" / "mine.txt").touch()
    before = sorted(console.folder.rglob("*"))
    status, out, err = console(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("ebbtide: ")
    assert err.count("\n") == 1
    assert says in err
    left = [path for path in sorted(console.folder.rglob("*")) if "__pycache__" not in str(path)]
    assert left == before


def test_an_unknown_study_names_those_that_there_are(console: Console) -> None:
    write_function(console.folder, "return s.lr")
    for name in ("one", "other"):
        assert console("sweep", TARGET, *GRID, "--workers", "0", "--study", name)[0] == 0
    assert console("report", "two")[2] == (
        "ebbtide: sweeps.journal holds no study 'two'; the names are: one, other\n"
    )
    assert "several studies that begin with 'o'" in console("report", "o")[2]


@pytest.mark.parametrize(
    ("package", "extra"), [("optuna", "lab"), ("matplotlib", "lab"), ("psycopg", "postgres")]
)
def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, package: str, extra: str
) -> None:
    write_function(tmp_path, "return 1")
    script = (
        f"import sys; sys.modules[{package!r}] = None; from ebbtide.__main__ import main; main()"
    )
    command = ["sweep", TARGET, "--storage", "postgresql://x@127.0.0.1:1/y"]
    ended = subprocess.run(
        [sys.executable, "-c", script, *command],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 2
    remedy = f"pip install 'ebbtide[{extra}]'"
    assert ended.stderr == f"ebbtide: {package} is not installed: {remedy}\n"


def test_cells_judged_by_different_numbers_are_not_compared(console: Console) -> None:
    write_function(console.folder, "return {'loss': 1.0} if s.lr < 5e-3 else {'error': 0.1}")
    status, _, err = console("sweep", TARGET, *GRID, "--workers", "1")
    assert status == 1
    said = "failed: the function returned 'loss' here and 'error' in another cell: say which counts"
    assert err.count(said) == 2  # the grid is mixed: an 'error' comes first
    found = console.json("sweep", TARGET, *GRID, "--metric", "loss")
    assert found["outcomes"] == {"finished": 2, "failed": 2}


@pytest.mark.slow
def test_cells_of_others_that_were_judged_by_another_number_are_not_taken_over(
    console: Console,
) -> None:
    write_function(console.folder, "return {'loss': 1.0} if s.lr < 5e-3 else {'error': 0.1}")
    for lr in ("1e-3", "1e-2"):
        assert console("sweep", TARGET, "--lr", lr, "--weight-decay", "0,0.1")[0] == 0
    both = console.json("sweep", TARGET, *GRID)
    assert both["outcomes"] == {"finished": 2, "failed": 2}
