"""Ends what cells have started, wherever it has gone; as a program, it is the guardian.

Every cell carries a mark in its environment, which its children inherit: one that has begun a
session of its own, as those of `torchrun` do, is no longer of the cell's group, but marked.

Imports the standard library only, and nothing of this package: the guardian runs this file alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path

__all__ = ["VARIABLE", "end_marked", "main"]

VARIABLE = "EBBTIDE_CELL"
_MOST_ROUNDS = 5  # one that is being ended may start another meanwhile


def end_marked(marks: Collection[str]) -> None:
    """End every process of this user that carries one of these marks; needs Linux's /proc."""
    for _ in range(_MOST_ROUNDS):
        found = [pid for pid in _processes() if _carries(pid, marks)]
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def _carries(pid: int, marks: Collection[str]) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # another user's, or gone
        return False
    return any(mark.encode() in environment for mark in marks)


def main() -> None:
    """Hear of cells on standard input, and end those that are left when it breaks off.

    A line is `+GROUP MARK` where a cell begins and `-GROUP` where it has ended.
    """
    marks: dict[int, str] = {}
    for line in sys.stdin:
        group, _, mark = line[1:].strip().partition(" ")
        if line[0] == "+":
            marks[int(group)] = mark
        else:
            marks.pop(int(group), None)
    for left in marks:
        with contextlib.suppress(OSError):
            os.killpg(left, signal.SIGKILL)
    if marks:
        end_marked(marks.values())


if __name__ == "__main__":
    main()
