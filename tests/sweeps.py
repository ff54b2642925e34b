"""What the tests of sweeps share: functions to sweep, commands, and a look into the storage."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ebbtide.lab.sweep.definition import Definition
from ebbtide.lab.sweep.request import Request
from ebbtide.lab.sweep.storage import open_storage
from ebbtide.lab.sweep.study import Sweep, find_study

HEADER = "import math, os, random, signal, subprocess, sys, time\n"


def write_function(folder: Path, body: str, name: str = "train.py") -> Path:
    """Write a file with `def train(s)` of this body."""
    file = folder / name
    file.write_text(HEADER + "def train(s):\n" + textwrap.indent(textwrap.dedent(body), "    "))
    return file


def definition(file: str = "train.py", **options: Any) -> Definition:
    given = {"lr": ["1e-3,1e-2"], "weight_decay": ["0,0.1"], **options}
    return Request(**given).definition(file, "train")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "ebbtide", *map(str, arguments)]


@contextmanager
def running(*arguments: str | Path, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `ebbtide …` and end it with the block at the latest."""
    process = subprocess.Popen(
        command(*arguments), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `ebbtide …` to its end."""
    return subprocess.run(
        command(*arguments), cwd=cwd, text=True, capture_output=True, check=False, timeout=120
    )


@contextmanager
def looking_into(storage: str | Path, study: str = "") -> Iterator[Sweep]:
    """Open a sweep as any other process sees it."""
    found = open_storage(str(storage), create=False)
    try:
        yield Sweep(found, find_study(found, study))
    finally:
        found.close()


def opened(journal: str | Path) -> Sweep:
    """Return the one sweep in a journal as any other process sees it."""
    with looking_into(journal) as sweep:
        return sweep


def trials(sweep: Sweep) -> list[Any]:
    return list(sweep._study.get_trials(deepcopy=False))


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that happens soon; the limit only ends a test that hangs."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that nobody has collected yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += map(int, file.read_text().split())
    return found


def assert_one_record_a_cell(sweep: Sweep) -> None:
    """Every cell of the sweep is exactly one trial, and that has ended."""
    found = trials(sweep)
    assert sorted(t.user_attrs["slot"] for t in found) == list(range(len(sweep.definition.slots)))
    assert [t.state.name for t in found if not t.state.is_finished()] == []
    assert all(t.user_attrs["record"]["outcome"] for t in found)
