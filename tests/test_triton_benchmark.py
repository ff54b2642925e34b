"""The benchmark of the GPU path, rehearsed without one: what fails costs its own row alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu, gpu_worker

from tests.devices import INTERPRETER, on

ROOT = Path(__file__).parent.parent


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[gpu_worker.Machine]:
    with on(INTERPRETER):
        yield gpu_worker.Machine(dry=True)


def rows_of(text: str) -> dict[str, dict[str, Any]]:
    lines = [line for line in text.splitlines() if line.startswith("ROW ")]
    rows = [json.loads(line.removeprefix("ROW ")) for line in lines]
    return {row["arm"]: row for row in rows}


def test_an_arm_that_fails_leaves_the_others_their_numbers(
    interpreted: gpu_worker.Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Late(torch.optim.AdamW):
        calls = 0

        def step(self, closure: Any = None) -> None:
            self.calls += 1
            if self.calls > 5:
                raise RuntimeError("out of luck")

    late = gpu_worker.Arm("float32", Late, {})
    unknown = gpu_worker.Arm("float32", torch.optim.AdamW, {"unknown": 1})
    monkeypatch.setitem(gpu_worker.ARMS, "late", late)
    monkeypatch.setitem(gpu_worker.ARMS, "unknown", unknown)
    names = ["unknown", "torch fused", "late", "ebbtide", "bitsandbytes 8-bit"]
    gpu_worker.timed([(8, 16), (5,)], names, interpreted, 0.1)
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["unknown", "torch fused", "late", "ebbtide", "bitsandbytes 8-bit"]
    assert rows["late"]["error"] == "RuntimeError: out of luck"
    assert "unknown" in rows["unknown"]["error"]
    assert rows["bitsandbytes 8-bit"]["error"].startswith("ModuleNotFoundError")
    for name in ("torch fused", "ebbtide"):
        assert rows[name]["step_us"] > 0
        assert rows[name]["host_us"] <= rows[name]["alone_us"]
        assert rows[name]["traffic_bytes"] == 28 * (8 * 16 + 5)
    assert rows["ebbtide"]["launches"] == 1


def test_gradients_move_between_steps(interpreted: gpu_worker.Machine) -> None:
    contestant = gpu_worker.Contestant(gpu_worker.ARMS["torch fused"], [(3, 4)], interpreted)
    addresses = set()
    for _ in range(4):
        contestant.move_gradients()
        addresses |= {p.grad.data_ptr() for p in contestant.params if p.grad is not None}
    assert len(addresses) == 2


def row(arm: str, step_us: float, **words: Any) -> str:
    return "ROW " + json.dumps({"arm": arm, "step_us": step_us, **words})


def test_arms_without_a_number_are_timed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gpu.Run(tmp_path / "gpu.json", 100, dry=True)
    run.report["machine"] = {"copy_bytes_per_second": 1e6}
    asked: list[list[str]] = []

    def call(stage: str, command: list[str], limit: float, **_: Any) -> str:
        arms = json.loads(command[-1])["arms"]
        asked.append(arms)
        first = len(arms) > 2
        run.report["stages"][stage] = {"outcome": "ended with -6" if first else "passed"}
        if first:
            return "\n".join([row("torch fused", 50.0), 'ROW {"arm": "ebbtide", "dtype": "x"}'])
        return "" if "torch foreach" in arms else row(arms[-1], 25.0, traffic_bytes=10)

    monkeypatch.setattr(run, "call", call)
    gpu.time_arms(run, "dry", ["torch fused", "ebbtide", "torch foreach"], "time", 90)
    assert asked[1:] == [["torch fused", "ebbtide"], ["torch fused", "torch foreach"]]
    rows = {each["arm"]: each for each in run.report["workloads"]["dry"]}
    assert rows["torch fused"]["ratio"] == 1
    assert (rows["ebbtide"]["ratio"], rows["ebbtide"]["share"]) == (2, pytest.approx(0.4))
    assert rows["torch foreach"]["error"] == "passed"
    assert json.loads((tmp_path / "gpu.json").read_text())["workloads"]["dry"]


def test_what_hangs_is_killed_and_what_it_printed_is_kept(tmp_path: Path) -> None:
    run = gpu.Run(tmp_path / "gpu.json", 60, dry=True)
    code = "import subprocess, sys\nprint('early', flush=True)\n"
    code += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    assert run.call("stage", [sys.executable, "-c", code], 4).strip() == "early"
    assert run.report["stages"]["stage"]["outcome"] == "killed after 4 s"


def test_goals_are_set_against_what_was_found() -> None:
    rows = [{"arm": "torch fused", "step_us": 60.0}, {"arm": "ebbtide", "step_us": 50.0}]
    report = {"workloads": {gpu.MODEL: rows, gpu.SMALL: [*rows[:1], {**rows[1], "step_us": 10.0}]}}
    said = {line[:48].strip(): line.split("found ")[1] for line in gpu.goals(report)}
    assert said["300 tensors, against torch fused"] == "1.20 MISSED"
    assert said["2,000 small ones, against torch fused"] == "6.00 met"
    assert said["8-bit, against flashoptim"] == "not known"
    assert [len(line) > 0 for line in gpu.table(report)].count(True) == 6


def test_goals_and_rows_name_arms_that_there_are() -> None:
    arms = [*gpu.OURS, *(arm for each in gpu.PEERS.values() for arm in each)]
    assert sorted(arms) == sorted(gpu_worker.ARMS)
    assert {each[3] for each in gpu.GOALS} | {each[4] for each in gpu.GOALS} <= {*arms, None}
    assert {each[1] for each in gpu.GOALS} <= set(gpu_worker.WORKLOADS)


@pytest.mark.slow
def test_the_whole_script_is_rehearsed(tmp_path: Path) -> None:
    """With peers of which one ends its process, one raises, one works."""
    works = "from torch.optim import AdamW as FlashAdamW\n"
    ends = "import os\nAdamW8bit = lambda *_, **__: os._exit(7)\n"
    raises = "def AdamW8bit(*_, **__): raise RuntimeError('not here')\n"
    for path, text in [
        ("flashoptim.py", works), ("bitsandbytes/optim.py", ends), ("torchao/optim.py", raises),
        ("bitsandbytes/__init__.py", ""), ("torchao/__init__.py", ""),
    ]:  # fmt: skip
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--dry", "--out", str(out), "--seconds", "500"],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=600,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert all(each["equal"] for each in report["bits"])
    assert len(report["bits"]) == 7
    rows = {each["arm"]: each for each in report["workloads"]["dry"]}
    assert set(rows) == set(gpu_worker.ARMS)
    assert rows["bitsandbytes 8-bit"]["error"] == "ended with 7"
    assert rows["torchao 8-bit"]["error"] == "RuntimeError: not here"
    failed = {arm for arm, each in rows.items() if "error" in each}
    assert failed == {"ebbtide, graph"} | {a for a in rows if a.startswith(("bitsand", "torchao"))}
    assert "DRY RUN: nothing was measured" in done.stdout.splitlines()[-1]


def test_a_run_on_a_gpu_fails_where_there_is_none() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not slow", "tests/test_triton_gpu.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "there is none" in done.stderr
