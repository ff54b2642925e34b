"""`ebbtide inspect`: what a checkpoint holds, from us or from torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.testing
from torch import nn

import ebbtide.numpy
import ebbtide.torch
from ebbtide.checkpoint import CheckpointError, flatten, write_file
from ebbtide.cli import app, main
from ebbtide.torch.contents import contents


def stepped(optimizer_class: Any, **options: Any) -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    named = list(model.named_parameters())
    groups = [{"params": named[:1], "weight_decay": 0.5}, {"params": named[1:]}]
    optimizer = optimizer_class(groups, **options)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def run(*arguments: object) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def inspected(path: Path) -> dict[str, Any]:
    result = run(path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert isinstance(found, dict)
    return found


def test_a_checkpoint_of_ours(tmp_path: Path) -> None:
    model, optimizer = stepped(ebbtide.torch.AdamW)
    path = tmp_path / "a.pt"
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    ebbtide.torch.save(content, path)
    found = inspected(path)
    assert found["checksum"] == "right"
    assert found["bytes"] == path.stat().st_size
    (state,) = found["optimizers"]
    assert (state["where"], state["kind"], state["steps"]) == ("optimizer", "Adam", [1.0, 1.0])
    assert [group["weight_decay"] for group in state["groups"]] == [0.5, 0.01]
    assert [group["decay_policy"] for group in state["groups"]] == ["decoupled"] * 2
    assert state["parameters"][0] == {
        "name": "0.weight",
        "group": 0,
        "step": 1.0,
        "state": {
            "step": {"shape": [], "dtype": "float32", "bytes": 4},
            "exp_avg": {"shape": [4, 3], "dtype": "float32", "bytes": 48},
            "exp_avg_sq": {"shape": [4, 3], "dtype": "float32", "bytes": 48},
        },
    }
    assert found["other"] == [
        {"where": "model", "type": "OrderedDict", "tensors": 3, "bytes": 96},
        {"where": "epoch", "type": "int", "value": 3},
    ]
    text = run(path).output
    for words in ("checksum right", "Adam state, 3 parameters in 2 groups, step 1", "epoch: 3"):
        assert words in text


def test_checkpoints_of_torch(tmp_path: Path) -> None:
    _, optimizer = stepped(torch.optim.SGD, momentum=0.9)
    path = tmp_path / "optimizer.pt"
    for legacy in (False, True):
        torch.save(
            {"optimizer_states": [optimizer.state_dict()]},
            path,
            _use_new_zipfile_serialization=not legacy,
        )
        found = inspected(path)
        (state,) = found["optimizers"]
        assert (state["where"], state["kind"]) == ("optimizer_states.0", "SGD")
        assert found["checksum"] == "none"
        assert "momentum_buffer float32 4×3" in run(path).output
    torch.save(optimizer.state_dict(), path)
    assert inspected(path)["optimizers"][0]["where"] == ""


def test_an_archive_of_the_numpy_face(tmp_path: Path) -> None:
    w = np.ones((2, 3))
    optimizer = ebbtide.numpy.AdamW({"w": w})
    optimizer.step({"w": w.copy()})
    path = tmp_path / "a.npz"
    write_file(path, lambda file: np.savez(file, **flatten(optimizer.state_dict())))
    (state,) = inspected(path)["optimizers"]
    assert state["parameters"][0]["state"]["exp_avg"]["shape"] == [2, 3]
    assert state["steps"] == [1.0, 1.0]
    optimizer.state["w"]["exp_avg"][0, 0] = np.nan
    write_file(path, lambda file: np.savez(file, **flatten(optimizer.state_dict())))
    result = run(path)
    assert result.exit_code == 1
    assert "unusable: w: exp_avg holds NaN" in result.output


def test_unusable_state_is_named_with_status_1(tmp_path: Path) -> None:
    _, optimizer = stepped(ebbtide.torch.AdamW)
    values = optimizer.state_dict()["state"]
    values[0]["exp_avg_sq"][0, 0] = -1.0
    values[1]["exp_avg"][0] = float("inf")
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    result = run(tmp_path / "a.pt")
    assert result.exit_code == 1
    assert "unusable: 0.weight: exp_avg_sq holds the negative value -1" in result.output
    assert "unusable: 0.bias: exp_avg holds infinity" in result.output


def test_a_count_below_zero_is_unusable(tmp_path: Path) -> None:
    _, optimizer = stepped(ebbtide.torch.AdamW)
    optimizer.state_dict()["state"][1]["step"].fill_(-2)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    result = run(tmp_path / "a.pt")
    assert result.exit_code == 1
    assert "unusable: 0.bias: has taken -2 steps" in result.output


def test_what_a_file_says_cannot_command_the_terminal(tmp_path: Path) -> None:
    params = [("red\x1b[31m", nn.Parameter(torch.ones(1)))]
    content = {"o": torch.optim.AdamW(params).state_dict(), "bell\x07": 1, "note": "\x1b]0;me\x07"}
    torch.save(content, tmp_path / "a.pt")
    output = run(tmp_path / "a.pt").output
    assert "red?[31m" in output
    assert not {"\x1b", "\x07"} & {*output}


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    torch.save({"loss": float("nan"), "best": float("inf")}, tmp_path / "a.pt")
    assert [entry["value"] for entry in inspected(tmp_path / "a.pt")["other"]] == [None, None]


def test_a_long_list_is_cut_short_but_on_request(tmp_path: Path) -> None:
    params = [(f"p{i}", nn.Parameter(torch.ones(1))) for i in range(50)]
    torch.save(torch.optim.AdamW(params).state_dict(), tmp_path / "a.pt")
    assert "and 10 more: --all" in run(tmp_path / "a.pt").output
    assert "p49" in run(tmp_path / "a.pt", "--all").output


def test_a_file_without_an_optimizer_says_so(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "a.pt")
    output = run(tmp_path / "a.pt").output
    assert "no optimizer's state" in output
    assert "weight: 1 tensors, 12 B" in output


class Custom:
    """No tensor, no plain value."""


def test_other_objects_need_trust(tmp_path: Path) -> None:
    torch.save({"settings": Custom()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="--trust"):
        contents(tmp_path / "a.pt")
    assert contents(tmp_path / "a.pt", trust=True)["other"][0]["type"] == "Custom"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.pt", "there is no file"),
        ("folder", "dcp_to_torch"),
        ("cut.pt", "is broken"),
        ("text.pt", "cannot be read"),
        ("other.npz", "holds no optimizer's state"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    words: str,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    np.savez(tmp_path / "other.npz", w=np.ones(3))
    torch.save({"a": torch.ones(100)}, tmp_path / "cut.pt")
    os.truncate(tmp_path / "cut.pt", 500)
    monkeypatch.setattr("sys.argv", ["ebbtide", "inspect", str(tmp_path / name)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
