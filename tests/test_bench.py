"""The benchmark command: that it measures and reports, never how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ebbtide import _core
from ebbtide.cli import app
from ebbtide.lab.bench.measure import interleaved, step_peak_bytes
from ebbtide.lab.bench.peers import installed
from ebbtide.lab.bench.workloads import WORKLOADS, Contestant
from ebbtide.torch import AdamW


def test_the_workloads_are_the_models_they_name() -> None:
    sizes = {name: (len(w.shapes), w.numel) for name, w in WORKLOADS.items()}
    assert sizes["W2"] == (148, 124_439_808)
    assert sizes["W3"] == (161, 25_557_032)
    assert sizes["W5"] == (2000, 2_000_000)


def test_every_row_has_times_and_ratios(tmp_path: Path) -> None:
    ways = "step,clip,8bit,24bit,bfloat16"
    words = ["--workloads", "tiny", "--scenarios", ways, "--seconds", "0.1", "--json"]
    result = CliRunner().invoke(app, ["bench", *words, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "bench.json").read_text())
    assert [row["scenario"] for row in data["rows"]] == ways.split(",")
    for row in data["rows"]:
        torchs = {"default", "foreach"} if row["scenario"] in {"step", "clip"} else set()
        assert set(row["timings"]) >= {"fused", "ebbtide", *torchs}
        for timing in row["timings"].values():
            assert timing["rounds"] >= 5
            assert timing["step_us"] > 0
            assert timing["ratio"]["low"] <= timing["ratio"]["median"] <= timing["ratio"]["high"]
        assert row["timings"]["fused"]["ratio"]["median"] == 1


def test_the_table_is_written_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    words = ["--workloads", "tiny", "--scenarios", "step", "--seconds", "0.1"]
    result = CliRunner().invoke(app, ["bench", *words, "--readme", str(page)])
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| one step, for tests: 3 tensors | 372 | 3 |" in text


def test_the_contestants_compute_the_same() -> None:
    """A contestant that computed something else would be timed for nothing."""
    results = []
    for name, (make, clip) in installed(clip=True).items():
        contestant = Contestant(WORKLOADS["tiny"], make, clip=clip)
        interleaved({name: contestant}, name, seconds=0.0)
        results.append([param.detach() for param in contestant.params])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_needs_no_memory_that_grows_with_the_model() -> None:
    contestant = Contestant(WORKLOADS["W3"], lambda params: AdamW(params))
    contestant.step()
    contestant.step()
    peak = step_peak_bytes(contestant)
    assert peak is not None
    assert peak < 2_000_000, "a step of 25 M parameters allocated memory"


def test_a_step_is_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Counting:
        def __init__(self, table: object) -> None:
            self._table = table

        def __getattr__(self, name: str) -> object:
            calls.append(name)
            return getattr(self._table, name)

    param = torch.ones(4, 4, requires_grad=True)
    bias = torch.ones(4, requires_grad=True)
    groups = [{"params": [param]}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = AdamW(groups)
    for each in (param, bias):
        each.grad = torch.ones_like(each)
    optimizer.step()
    backend: Any = optimizer._backend
    monkeypatch.setattr(backend, "_table", Counting(backend._table))
    optimizer.step()
    assert calls == ["step"]


def test_the_memory_stream_takes_time() -> None:
    assert _core.memory_stream(1000, 2) > 0
