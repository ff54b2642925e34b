"""`ebbtide explain` and `ebbtide convert`, as typed on a command line."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from ebbtide.cli import main
from ebbtide.convert import CONVENTIONS, RESCALE_RULES


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[[str], Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_line(line: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["ebbtide", *shlex.split(line)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return Result(int(stopped.value.code or 0), *capsys.readouterr())

    return run_line


EXPLAIN = "explain --lr 1e-3 --weight-decay 0.1 --steps 10000"


@pytest.mark.parametrize(
    ("options", "kappa"),
    [
        ("", 1.0),
        ("--schedule cosine", 0.50005),
        ("--schedule linear", 0.50005),
        ("--schedule wsd:decay=2000 --warmup 500", 0.8751),
        ("--schedule cosine --policy corrected", 0.37505),
        ("--schedule cosine --weight-decay-schedule cosine", 0.37505),
    ],
)
def test_explain_sums_the_run(run: Run, options: str, kappa: float) -> None:
    result = run(f"{EXPLAIN} {options} --json")
    assert result.status == 0, result.err
    forecast = json.loads(result.out)["groups"][0]
    assert forecast["total_decay"] == pytest.approx(kappa, abs=1e-5)


def test_explain_prints_numbers_verdict_and_moments(run: Run) -> None:
    result = run(f"{EXPLAIN} --schedule cosine --steps-per-epoch 500")
    for text in ("10,000 steps = 20 epochs", "60.65%", "active.", "0.07071", "9,999"):
        assert text in result.out


def test_explain_draws(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "run.png"
    result = run(f"{EXPLAIN} --schedule cosine --plot {picture}")
    assert result.status == 0
    assert str(picture) in result.out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ("--optimizer sgd --momentum 0.9", 1e-3),
        ("--optimizer sgd --momentum 0.9 --dampening 0.5", 5e-4),
        ("--optimizer sgdw", 1e-4),
        ("--optimizer adam --gradient-scale 0.01", 1e-2),
        ("--policy independent --base-lr 2e-3", 0.05),
    ],
)
def test_explain_knows_the_optimizers(run: Run, options: str, share: float) -> None:
    forecast = json.loads(run(f"{EXPLAIN} {options} --json").out)["groups"][0]
    assert forecast["largest_share"] == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("decay 0.1 --from decoupled --to independent --lr 1e-3", 1e-4),
        ("decay 5e-4 --from sgd_l2 --to decoupled --lr 0.1 --momentum 0.9", 5e-3),
        (
            "decay 0.1 --from decoupled --to constant --lr 1e-3 --match total "
            "--schedule linear --steps 1000",
            5.005e-5,
        ),
        ("sgd-recipe 1e-4 --sgd-lr 0.1 --momentum 0.9 --adamw-lr 1e-3", 0.1),
        ("normalized 0.025 --dataset-size 50000 --batch-size 128 --epochs 100", 1.26491e-4),
        (
            "normalized 1.26491e-4 --dataset-size 50000 --batch-size 128 --epochs 100 --inverse",
            0.025,
        ),
        (
            "normalized 0.025 --dataset-size 50000 --batch-size 128 --epochs 1800 --lr 1e-3",
            0.0298142,
        ),
        (
            "normalized 0.0298142 --dataset-size 50000 --batch-size 128 --epochs 1800 --lr 1e-3 "
            "--inverse",
            0.025,
        ),
        ("timescale --lr 1e-3 --steps 39062.5", 0.0256),
        ("timescale --lr 1e-3 --epochs 100 --steps-per-epoch 390.625", 0.0256),
        ("schedule 0.1 --old constant --new linear --steps 10000", 0.19998),
    ],
)
def test_convert_by_hand(run: Run, line: str, value: float) -> None:
    result = run(f"convert {line} --json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["value"] == pytest.approx(value, rel=4e-6)
    printed = float(run(f"convert {line}").out.split()[0])
    assert printed == pytest.approx(value, rel=4e-6)


def test_convert_rescale_by_hand(run: Run) -> None:
    line = "convert rescale --rule batch-sqrt --factor 4 --lr 3e-4 --weight-decay 0.1"
    recipe = json.loads(run(f"{line} --json").out)["recipe"]
    assert recipe["lr"] == pytest.approx(6e-4)
    assert recipe["weight_decay"] == pytest.approx(0.2)
    assert recipe["betas"] == [0.6, 0.996]
    assert "lr 0.0006, weight decay 0.2" in run(line).out


def test_convert_rules_lists_every_rule(run: Run) -> None:
    out = run("convert rules").out
    assert [rule for rule in RESCALE_RULES if rule not in out] == []


def scales_file(folder: Path, kind: str, scales: list[float]) -> Path:
    path = folder / f"scales.{kind}"
    if kind == "txt":
        path.write_text(" ".join(map(str, scales)))
    elif kind == "npy":
        np.save(path, np.array(scales))
    else:
        weight = torch.nn.Parameter(torch.zeros(len(scales)))
        optimizer = torch.optim.Adam([weight])
        weight.grad = torch.tensor(scales)
        optimizer.step()
        torch.save({"epoch": 3, "optimizer": optimizer.state_dict()}, path)
    return path


@pytest.mark.parametrize("kind", ["txt", "npy", "pt"])
def test_convert_adam_l2_reads_the_scales_of_a_run(run: Run, tmp_path: Path, kind: str) -> None:
    path = scales_file(tmp_path, kind, [0.005, 0.01, 0.01, 0.01, 0.02])
    groups = json.loads(run(f"convert adam-l2 0.0064 {path} --json").out)
    assert [group["value"] for group in groups] == pytest.approx([0.64], rel=1e-5)
    assert "No single value" not in run(f"convert adam-l2 0.0064 {path}").out


def test_convert_adam_l2_is_honest_about_the_spread(run: Run, tmp_path: Path) -> None:
    path = scales_file(tmp_path, "txt", [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert "No single value matches" in run(f"convert adam-l2 0.0064 {path}").out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{EXPLAIN} --schedule cosin", "choose from constant"),
        (f"{EXPLAIN} --optimizer lion", "adamw, adam, sgd, sgdw"),
        (f"{EXPLAIN} --policy paper", "l2, decoupled, independent, corrected"),
        (f"{EXPLAIN} --betas 0.9", "two numbers"),
        (f"{EXPLAIN} --warmup 20000", "shorter than the run"),
        (f"{EXPLAIN} --plot /no/such/folder/x.png", "cannot write the picture"),
        (f"{EXPLAIN} --plot x.nonsense", "cannot write the picture"),
        ("explain --lr -1 --weight-decay 0.1 --steps 10", "lr must be"),
        ("explain --lr nan --weight-decay 0.1 --steps 10", "lr must be"),
        ("explain --lr 1e-3 --weight-decay 0.1 --steps 0", "total_steps must be at least 1"),
        ("explain --lr 1e-3 --weight-decay 0.1", "--steps"),
        ("explain --lr high --weight-decay 0.1 --steps 5", "--lr"),
        ("convert decay 0.1 --from torch --to paper --lr 1e-3", ", ".join(CONVENTIONS)),
        ("convert decay 0.1 --from decoupled --to constant --lr 1e-3", "match"),
        ("convert rescale --rule batch --factor 2 --lr 1e-3 --weight-decay 0.1", "batch-sqrt"),
        (
            "convert rescale --rule batch-sqrt --factor 10 --lr 1e-3 --weight-decay 0.1",
            "the rule breaks at factor 10",
        ),
        ("convert adam-l2 0.1 /no/such/file", "is not a file"),
        ("convert timescale --lr 1e-3 --steps 0", "steps must be"),
        ("convert timescale --lr 1e-3 --epochs 5", "--steps-per-epoch"),
        ("convert timescale --lr 1e-3 --epochs 5 --steps 7", "not both"),
        ("convert lightyears", "lightyears"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run: Run, line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(line)
    assert result.status == 2
    assert result.out == ""
    assert message in result.err
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"), [("x.txt", "0.1 a"), ("x.npy", "junk"), ("x.pt", "junk")]
)
def test_file_without_scales_is_one_line_and_status_2(
    run: Run, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    result = run(f"convert adam-l2 0.1 {tmp_path / name}")
    assert result.status == 2
    assert name in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("scales", [np.array(["0.1"]), np.array([0.1j])], ids=["text", "complex"])
def test_an_array_of_other_things_holds_no_scales(
    run: Run, tmp_path: Path, scales: np.ndarray
) -> None:
    np.save(tmp_path / "x.npy", scales)
    result = run(f"convert adam-l2 0.1 {tmp_path / 'x.npy'}")
    assert result.status == 2
    assert result.err.count("\n") == 1


def test_a_percent_sign_where_nothing_is_a_length(run: Run) -> None:
    percent, plain = (run(f"{EXPLAIN} --schedule cosine:end={end} --json") for end in ("10%", 0.1))
    assert percent == plain


def test_checkpoint_without_a_second_moment_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "sgd.pt"
    torch.save(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))]).state_dict(), path)
    result = run(f"convert adam-l2 0.1 {path}")
    assert result.status == 2
    assert "exp_avg_sq" in result.err
