"""The workers of this process: threads that each take a cell, have it run, and record it.

A thread only watches; the work is done by the cell's own process. So nothing is lost with this
process but the cells in hand, which go back to the queue when somebody next looks.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ebbtide.lab.errors import InputError
from ebbtide.lab.sweep.curve import Curve, Medians
from ebbtide.lab.sweep.outcome import FAULTS, Outcome, Record
from ebbtide.lab.sweep.process import Ending, Order, run_cell
from ebbtide.lab.sweep.queue import Claim, Counts
from ebbtide.lab.sweep.study import Sweep
from ebbtide.lab.sweep.target import Target

__all__ = ["Crew", "cell_words", "check_target"]

_SECONDS_BETWEEN_COUNTS = 1.0
_SECONDS_OF_LOADING = 10.0
_MOST_KILLS = 5
# Ended by somebody else than the function: the machine is short of memory, or shuts down.
_KILLS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Crew:
    """Workers on one sweep.

    Attributes:
        sweep: The sweep.
        target: The user's function.
        count: How many cells run at the same time.
        timeout: Seconds a cell may take; None for ever.
        wait: Whether to stay until cells that run elsewhere have ended too.
        say: Told a line of text when a cell fails or other workers are waited for.
    """

    sweep: Sweep
    target: Target
    count: int = 1
    timeout: float | None = None
    wait: bool = False
    say: Callable[[str], None] = lambda _: None

    def run(self, watch: Callable[[Counts], None]) -> None:
        """Work until no cell waits.

        Args:
            watch: Told every second how far the sweep has come.

        Raises:
            InputError: The user's file changed meanwhile.
            KeyboardInterrupt: After Ctrl-C or SIGTERM, once the cells are back in the queue.
        """
        _Shift(self, watch).run()


class _Shift:
    """One run of a crew."""

    def __init__(self, crew: Crew, watch: Callable[[Counts], None]) -> None:
        self._crew, self._watch = crew, watch
        self._queue = crew.sweep.queue
        self._stop = threading.Event()
        self._interrupted = self._waiting = False
        self._error: BaseException | None = None
        self._medians: dict[str, tuple[float, Medians]] = {}

    def run(self) -> None:
        self._queue.hold()
        with self._signals():
            try:
                while self._round():
                    pass
            finally:
                self._stop.set()
        if self._error is not None:
            raise self._error
        if self._interrupted:
            raise KeyboardInterrupt

    def _round(self) -> bool:
        """Run what waits; return whether there may be more."""
        self._queue.recover()
        threads = [threading.Thread(target=self._work) for _ in range(self._crew.count)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self._watch_for(threads)
        counts = self._queue.counts()
        self._watch(counts)
        if self._stop.is_set():
            return False
        if self._crew.wait and counts.running and not counts.waiting:
            self._say_who_is_awaited(counts.running)
            self._stop.wait(_SECONDS_BETWEEN_COUNTS)
            return True
        return counts.waiting > 0

    def _say_who_is_awaited(self, cells: int) -> None:
        if not self._waiting:
            self._crew.say(f"waiting for other workers, cells at work: {cells}")
        self._waiting = True

    def _watch_for(self, threads: list[threading.Thread]) -> None:
        until = time.monotonic() + _SECONDS_BETWEEN_COUNTS
        for thread in threads:
            # Never without a limit, so that signals are handled.
            thread.join(max(0.0, until - time.monotonic()))
        if not self._stop.is_set():
            self._watch(self._queue.counts())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(_number: int, _frame: FrameType | None) -> None:
            self._interrupted = True
            self._stop.set()

        kept = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                claim = self._queue.claim()
                if claim is None:
                    return
                self._do(claim)
        except BaseException as error:
            self._error = self._error or error
            self._stop.set()

    def _do(self, claim: Claim) -> None:
        crew, definition = self._crew, self._crew.sweep.definition
        order = Order(
            crew.target,
            claim.settings,
            metric=definition.metric,
            timeout=crew.timeout,
            threads=max(1, len(os.sched_getaffinity(0)) // crew.count),
        )
        try:
            ending = run_cell(
                order,
                stopped=self._stop.is_set,
                hopeless=lambda curve: definition.prune and self._is_hopeless(claim, curve),
            )
        except BaseException:
            self._queue.release(claim)
            raise
        if ending.kind == "changed":
            self._queue.release(claim)
            raise InputError(f"{crew.target.path.name} was changed while the sweep was running")
        if ending.kind == "stopped" or (_was_killed(ending) and self._is_once_more(claim)):
            self._queue.release(claim)
            return
        record = self._queue.finish(claim, _record(ending, crew.target, crew.timeout))
        if record is not None and record.outcome in FAULTS:
            crew.say(f"{cell_words(claim.settings)}: {record.outcome}: {record.error}")

    def _is_once_more(self, claim: Claim) -> bool:
        return self._queue.count_kill(claim) < _MOST_KILLS

    def _is_hopeless(self, claim: Claim, curve: Curve) -> bool:
        optimizer = claim.slot.optimizer
        made, medians = self._medians.get(optimizer, (-math.inf, None))
        if medians is None or time.monotonic() > made + _SECONDS_BETWEEN_COUNTS:
            definition = self._crew.sweep.definition
            curves = [
                record.curve
                for slot, _, record in self._queue.cells()
                if slot.optimizer == optimizer and record is not None and record.is_number
            ]
            medians = Medians(curves, maximize=definition.maximize, after=definition.prune_after)
            self._medians[optimizer] = time.monotonic(), medians
        return medians.rule_out(curve)


def check_target(
    target: Target, timeout: float | None = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, str]:
    """Load the user's file in a process of its own; return versions of what it loaded.

    Args:
        target: The function.
        timeout: Seconds that loading may take; None for ever.
        say: Told a line of text when it takes long.

    Raises:
        InputError: It cannot be loaded, or the function cannot be called with settings.
    """
    said_at = [time.monotonic() + _SECONDS_OF_LOADING]

    def stopped() -> bool:
        if said_at and time.monotonic() > said_at[0]:
            said_at.clear()
            say(f"loading {target.path.name} takes long; what its top level does, every cell does")
        return False

    for _ in range(_MOST_KILLS):
        ending = run_cell(Order(target, None, timeout=timeout), stopped=stopped)
        if not _was_killed(ending):
            break
    if ending.kind == "checked":
        return dict(ending.message["versions"])
    error = _outcome(ending, timeout)[1]
    if ending.kind == "timeout":
        error = f"loading it takes longer than the {timeout:g} s of a cell"
    raise InputError(f"{target.path.name} cannot be used: {error}")


def cell_words(settings: Any) -> str:
    """Return settings as a person would say them.

    Example:
        >>> cell_words({"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.01, "seed": 0})
        'adamw, lr 0.1, weight decay 0.01, seed 0'
    """
    return (
        f"{settings['optimizer']}, lr {settings['lr']:.4g}, "
        f"weight decay {settings['weight_decay']:.4g}, seed {settings['seed']}"
    )


def _was_killed(ending: Ending) -> bool:
    return ending.kind == "died" and -ending.status in _KILLS


def _record(ending: Ending, target: Target, timeout: float | None) -> Record:
    outcome, error = _outcome(ending, timeout)
    message = ending.message
    return Record(
        outcome=outcome,
        value=message.get("value") if outcome != Outcome.PRUNED else None,
        numbers=message.get("numbers", {}),
        metric=message.get("metric", ""),
        curve=ending.curve.points(),
        seconds=round(ending.seconds, 3),
        error=error,
        traceback=message.get("traceback", ""),
        output=ending.output,
        sha256=target.sha256,
        where=socket.gethostname(),
    )


def _outcome(ending: Ending, timeout: float | None) -> tuple[str, str]:
    """Return the outcome and the line that explains it."""
    message, last = ending.message, ending.curve.last
    if ending.kind == "result":
        finite = math.isfinite(message["value"])
        return (Outcome.FINISHED, "") if finite else (Outcome.DIVERGED, "")
    if ending.kind == "raised":
        outcome = Outcome.DIVERGED if message["diverged"] else Outcome.FAILED
        return outcome, message["error"]
    if ending.kind == "pruned":
        if last is not None and math.isfinite(last[1]):
            return Outcome.PRUNED, ""
        return Outcome.DIVERGED, ""
    if ending.kind == "timeout":
        return Outcome.TIMEOUT, f"ended after {timeout:g} s"
    if ending.kind == "checked":
        return Outcome.FINISHED, ""
    return Outcome.FAILED, _death(ending.status)


def _death(status: int) -> str:
    if status >= 0:
        return f"its process ended (status {status}) before the function returned"
    name = signal.Signals(-status).name
    why = "; is memory short?" if -status == signal.SIGKILL else ""
    return f"its process was ended by {name}{why}"
