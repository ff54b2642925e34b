"""A process that ends what cells started when the sweep itself is killed.

The kernel ends a cell with its parent, but not what the cell started in turn. One guardian a
process, running `reaper`, knows which are at work; once the line to it breaks, it ends them.
"""

from __future__ import annotations

import atexit
import contextlib
import subprocess
import sys
import threading

from ebbtide.lab.sweep import reaper

__all__ = ["Guardian", "guardian"]


class Guardian:
    """This process's line to its guardian."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for the sweep, which ends its cells itself.
            start_new_session=True,
        )

    def watch(self, group: int, mark: str) -> None:
        """Take a group of processes into care, and what carries the mark."""
        self._say(f"+{group} {mark}\n")

    def forget(self, group: int) -> None:
        """Leave a group alone from now on; its number may be another's soon."""
        self._say(f"-{group}\n")

    def close(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        # Without it all goes on as well, less what `kill -9` leaves behind.
        with self._lock, contextlib.suppress(OSError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


_starting = threading.Lock()
_started: list[Guardian] = []


def guardian() -> Guardian:
    """Return this process's guardian, started at its first use."""
    with _starting:
        if not _started:
            _started.append(Guardian())
            atexit.register(_started[0].close)
        return _started[0]
