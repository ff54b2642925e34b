"""Show how far a long command has come: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from threading import Lock
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A progress display on standard error, with the time left.

    Everything goes to standard error, so that standard output holds results only.

    Example:
        >>> import contextlib, io
        >>> with contextlib.redirect_stderr(io.StringIO()) as text, Progress() as progress:
        ...     progress.start("Digits", 10)
        ...     progress.advance(10)
        >>> text.getvalue().splitlines()[-1]
        'Digits: done in 0 s'
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._bar: Any = None
        self._task: Any = None
        self.title = ""
        self.total = self.done = self._skipped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._say(f"done in {self._seconds():.0f} s")

    @property
    def share(self) -> float:
        """Share of the work done, in [0, 1]."""
        return self.done / self.total if self.total else 0.0

    def start(self, title: str, total: int) -> None:
        """Announce work of `total` units, of whatever kind."""
        self.title, self.total = title, total
        self.done = self._skipped = 0
        self._began = self._last_line = time.monotonic()
        if sys.stderr.isatty():
            self._bar = _rich_bar()
            self._task = self._bar.add_task(title, total=total)
            self._bar.start()
        else:
            self._say("started")

    def advance(self, units: int) -> None:
        """Count units done; may be called from several threads."""
        with self._lock:
            self.done += units
            if self._bar is not None:
                self._bar.advance(self._task, units)
            elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                self._say(f"{self.share:.0%} after {self._seconds():.0f} s, {self._left()}")

    def skip(self, units: int) -> None:
        """Count units that need not be done, and say nothing of how fast the others go."""
        with self._lock:
            self.done += units
            self._skipped += units
            if self._bar is not None:
                left = self.total - self._skipped
                here = self.done - self._skipped if left else 1
                self._bar.update(self._task, completed=here, total=left or 1)

    def note(self, text: str) -> None:
        """Show a line of text; it stays when the bar goes."""
        with self._lock:
            if self._bar is not None:
                self._bar.console.print(f"{self.title}: {text}", markup=False, highlight=False)
            else:
                self._say(text)

    def _left(self) -> str:
        done_here = self.done - self._skipped
        if done_here <= 0:
            return "time left unknown"
        return f"about {self._seconds() * (self.total - self.done) / done_here:.0f} s left"

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _say(self, text: str) -> None:
        print(f"{self.title}: {text}", file=sys.stderr, flush=True)


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True),
        transient=True,
    )
