"""`kill -9` of the command, of a worker and of a cell, and Ctrl-C: the same command goes on."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.sweeps import (
    assert_one_record_a_cell,
    children,
    finish,
    is_alive,
    lines,
    opened,
    running,
    trials,
    wait_until,
    write_function,
)

# Writes what it runs, and holds every cell at the gate until that is opened.
BODY = """
cell = f"{s.optimizer} {s.lr} {s.weight_decay} {s.seed} {os.getpid()}"
with open("log", "a") as log: print("start", cell, file=log)
while not os.path.exists("gate"): time.sleep(0.01)
with open("log", "a") as log: print("end", cell, file=log)
if s.lr > 0.005 and s.weight_decay: raise ValueError("too large")
return s.lr
"""
# What a cell started must end with it, and with the command.
HELPER = """
with open("helpers", "a") as log:
    for own in (False, True):
        print(subprocess.Popen(["sleep", "600"], start_new_session=own).pid, file=log)
"""
STORM_BODY = """
time.sleep(0.1)
if s.lr > 0.005 and s.weight_decay: raise ValueError("too large")
return s.lr
"""
MOST_KILLS = 25
COMMAND = ["sweep", "train.py:train", "--lr", "1e-3,1e-2", "--weight-decay", "0,0.1",
           "--no-report"]  # fmt: skip


def started(folder: Path) -> list[str]:
    return [line for line in lines(folder / "log") if line.startswith("start")]


def test_three_kills_of_the_command_leave_one_record_a_cell(tmp_path: Path) -> None:
    write_function(tmp_path, HELPER + BODY)
    command = [*COMMAND, "--workers", "2"]
    for kill in range(3):
        with running(*command, cwd=tmp_path) as process:
            wait_until(lambda runs=2 * (kill + 1): len(started(tmp_path)) == runs)
            cells = [pid for pid in children(process.pid) if is_alive(pid)]
            process.kill()
            process.wait()
            helpers = [int(line) for line in lines(tmp_path / "helpers")]
            wait_until(lambda pids=cells + helpers: not any(map(is_alive, pids)))
    (tmp_path / "gate").touch()
    ended = finish(*command, cwd=tmp_path)
    assert ended.returncode == 1
    assert "1 cell failed" in ended.stderr
    found = opened(tmp_path / "sweeps.journal")
    assert_one_record_a_cell(found)
    assert found.queue.counts().outcomes == {"finished": 3, "failed": 1}
    # A session of its own outlasts a cell that has come to its end.
    for pid in map(int, lines(tmp_path / "helpers")[-8:][1::2]):
        os.kill(pid, signal.SIGKILL)
    # Six were killed at the gate, and each of the four came through it once.
    assert Counter(line.split()[0] for line in lines(tmp_path / "log")) == {"start": 10, "end": 4}


def test_kills_of_a_worker_and_of_a_cell_are_made_good_by_the_others(tmp_path: Path) -> None:
    write_function(tmp_path, BODY)
    with running(*COMMAND, cwd=tmp_path) as process:
        wait_until(lambda: len(started(tmp_path)) == 1)
        with running("worker", "train", cwd=tmp_path) as worker:
            wait_until(lambda: len(started(tmp_path)) == 2)
            worker.kill()
            worker.wait()
        for kill in range(3):
            mine = [int(line.split()[-1]) for line in started(tmp_path)]
            pid = next(pid for pid in mine if pid in children(process.pid) and is_alive(pid))
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda runs=3 + kill: len(started(tmp_path)) == runs)
        (tmp_path / "gate").touch()
        process.communicate(timeout=60)
        assert process.returncode == 1
    found = opened(tmp_path / "sweeps.journal")
    assert_one_record_a_cell(found)
    assert found.queue.counts().outcomes == {"finished": 3, "failed": 1}
    assert [t.user_attrs["killed"] for t in trials(found) if "killed" in t.user_attrs] == [3]


def test_a_cell_that_is_killed_again_and_again_fails_in_the_end(tmp_path: Path) -> None:
    body = "open('log', 'a').write('x')\nos.kill(os.getpid(), signal.SIGKILL)"
    write_function(tmp_path, body)
    command = [*COMMAND[:2], "--lr", "1e-3", "--weight-decay", "0", "--no-report"]
    ended = finish(*command, cwd=tmp_path)
    assert ended.returncode == 1
    assert "its process was ended by SIGKILL; is memory short?" in ended.stderr
    assert lines(tmp_path / "log") == ["xxxxx"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_ctrl_c_and_sigterm_leave_everything_resumable(
    tmp_path: Path, number: signal.Signals
) -> None:
    write_function(tmp_path, BODY)
    with running(*COMMAND, "--workers", "2", cwd=tmp_path) as process:
        wait_until(lambda: len(started(tmp_path)) == 2)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == (
        "ebbtide: interrupted with 0 of 4 cells done; the same command goes on from here"
    )
    assert {t.state.name for t in trials(opened(tmp_path / "sweeps.journal"))} == {"WAITING"}
    assert not any(is_alive(int(line.split()[-1])) for line in started(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_storm_of_kills(tmp_path: Path, seed: int) -> None:
    """Kill the command, workers and cells at random moments until the work is done."""
    draw = random.Random(seed)
    write_function(tmp_path, STORM_BODY)
    command = [*COMMAND, "--optimizer", "adamw,sgdw", "--seeds", "6", "--workers", "2"]
    kills = 0
    # A worker that comes before there is a study says so and ends.
    for _ in range(MOST_KILLS + 1):
        with running(*command, cwd=tmp_path) as main, running("worker", "train", cwd=tmp_path) as w:
            while kills < MOST_KILLS and main.poll() is None:
                time.sleep(draw.uniform(0.02, 0.8))
                kills += kill_one_of(draw, [main.pid, w.pid, *children(main.pid)])
            err = main.communicate(timeout=120)[1]
            if main.returncode != -signal.SIGKILL:
                break
    assert main.returncode == 1, err
    found = opened(tmp_path / "sweeps.journal")
    assert_one_record_a_cell(found)
    assert found.queue.counts().outcomes == {"finished": 36, "failed": 12}


def kill_one_of(draw: random.Random, processes: list[int]) -> int:
    """Kill one of the processes; return how many that were alive were killed."""
    pid = draw.choice(processes)
    if not is_alive(pid):
        return 0
    os.kill(pid, signal.SIGKILL)
    return 1
