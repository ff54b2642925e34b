"""The command line as a user meets it: results, one line for bad input, Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebbtide.cli import main

TINY = [
    "--quick", "--optimizers", "adam,adamw", "--lr", "1e-3,0.01", "--weight-decay", "0,1",
    "--seeds", "2",
]  # fmt: skip


def ebbtide(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ebbtide", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    text = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, text.out, text.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "nonsense"),
        (["compare", "--nonsense"], "--nonsense"),
        (["compare", "extra"], "extra"),
        (["compare", "--task", "mnist"], "unknown task 'mnist'"),
        (["compare", "--optimizers", "adamw,lion"], "unknown optimizer 'lion'"),
        (["compare", "--optimizers", ""], "no optimizer named"),
        (["compare", "--lr", ""], "has no point"),
        (["compare", "--lr", "1e-3..1e-1:0"], "must have 2 to 1000 points"),
        (["compare", "--weight-decay", "much"], "'much' in the weight decay grid"),
        (["compare", "--seeds", "0"], "greater than or equal to 1"),
        (["compare", "--seed", "one"], "'--seed'"),
        (["compare", "--out", "taken"], "holds no ebbtide report"),
        (["compare", "--out", "taken/thesis.tex"], "is a file"),
        (["compare", "--out", "."], "current folder"),
        (["claims", "--only", "lion"], "unknown claim 'lion'"),
        (["claims", "--only", ","], "no claim named"),
        (["claims", "--out", "taken"], "holds no ebbtide report"),
    ],
)
def test_bad_input_is_one_line_status_2_and_nothing_written(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    status, out, err = ebbtide(arguments, monkeypatch, capsys)
    assert (status, out) == (2, "")
    assert err.startswith("ebbtide: ")
    assert says in err
    assert err.count("\n") == 1
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "taken",
        "taken/thesis.tex",
    ]


def test_compare_writes_a_report_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "report"
    arguments = ["compare", *TINY, "--out", str(folder)]
    status, out, err = ebbtide(arguments, monkeypatch, capsys)
    assert status == 0
    assert out.rstrip().endswith(f"Report: {folder / 'report.html'}")
    assert "Adam + L2" in out
    assert err.splitlines()[0] == "Handwritten digits: started"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["files"]) == {path.name for path in folder.iterdir()}
    assert [arm["name"] for arm in results["arms"]] == ["plain", "multi-scale"]
    with (folder / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 4  # arms, optimizers, seeds, cells


def interrupted(arguments: list[str], folder: Path, after: str) -> str:
    """Run a command until it has said a line, press Ctrl-C, and return what it says then."""
    command = [sys.executable, "-m", "ebbtide", *arguments, "--out", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert after in iter(process.stderr.readline, "")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    # A shell says 130 to both. Python ends by the signal itself, though all was caught, where
    # the interrupt came while it compiled a string, as it does to make a dataclass.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in rest
    return rest


def test_ctrl_c_ends_a_comparison_at_once_and_says_what_is_there(tmp_path: Path) -> None:
    rest = interrupted(["compare"], tmp_path / "report", "Handwritten digits: started\n")
    assert "no run had come to its end" in rest
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_a_report_of_the_claims_tested_so_far(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    arguments = ["claims", "--only", "late-parameter,loss-picture"]
    rest = interrupted(arguments, folder, "Claims: late-parameter: not confirmed\n")
    assert "interrupted after 1 of 2 claims; a report of these is in" in rest
    results = json.loads((folder / "results.json").read_text())
    assert results["partly"]
    assert [claim["name"] for claim in results["claims"]] == ["late-parameter"]
    assert "Only 1 of 2 claims" in (folder / "report.html").read_text()


def test_claims_are_listed_run_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = ebbtide(["claims", "--list"], monkeypatch, capsys)
    assert status == 0
    assert "late-parameter" in out
    status, out, _ = ebbtide(["claims", "--list", "--json"], monkeypatch, capsys)
    assert "late-parameter" in {claim["name"] for claim in json.loads(out)}
    folder = tmp_path / "report"
    arguments = ["claims", "--only", "late-parameter,imagenet", "--quick", "--out", str(folder)]
    status, out, err = ebbtide(arguments, monkeypatch, capsys)
    assert status == 0
    assert "Claims: late-parameter: not confirmed" in err.splitlines()
    assert out.rstrip().endswith(f"Report: {folder / 'report.html'}")
    # The same command once more: the earlier report gives way, and the numbers are the same.
    before = json.loads((folder / "results.json").read_text())
    status, out, _ = ebbtide([*arguments, "--json"], monkeypatch, capsys)
    assert [c["name"] for c in json.loads(out)["claims"]] == ["late-parameter", "imagenet"]
    assert json.loads(out) == before == json.loads((folder / "results.json").read_text())


def test_a_report_of_another_verb_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "report"
    arguments = ["claims", "--only", "imagenet", "--out", str(folder)]
    assert ebbtide(arguments, monkeypatch, capsys)[0] == 0
    status, _, err = ebbtide(["compare", "--out", str(folder)], monkeypatch, capsys)
    assert status == 2
    assert "holds a report of `ebbtide claims`" in err


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "sys.argv = ['ebbtide', '--help']\n"
        "from ebbtide.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ended:\n"
        "    assert ended.code == 0, ended.code\n"
        "heavy = {'torch', 'numpy', 'optuna', 'matplotlib', 'sklearn', 'scipy', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout


def test_doctor_describes_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = ebbtide(["doctor", "--json"], monkeypatch, capsys)
    assert status == 0
    facts = json.loads(out)
    status, out, _ = ebbtide(["doctor"], monkeypatch, capsys)
    assert status == 0
    assert all(name in out for name in facts)


def test_no_verb_is_answered_with_the_help_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = ebbtide([], monkeypatch, capsys)
    assert status == 2
    assert "Usage: ebbtide" in out
    assert err == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_greek_gets_question_marks(encoding: str) -> None:
    command = [sys.executable, "-m", "ebbtide"]
    for verb in ("convert rules", "explain --lr 1e-3 --weight-decay 0.1 --steps 100"):
        run = subprocess.run(
            [*command, *verb.split()], env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert b"?" in run.stdout
