"""Two processes with gloo between them, started once, to which tests hand functions."""

from __future__ import annotations

import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

RANKS = 2
LIMIT_SECONDS = 180  # of waiting for a rank; a machine under load takes a minute to start two


class TwoRanks:
    """Runs a function on both ranks and gives what they return.

    A function that raises on one rank leaves the other in a collective; both are then ended, and
    the next call starts new ones.
    """

    def __init__(self) -> None:
        self._context = torch.multiprocessing.get_context("spawn")
        self._processes: list[Any] = []

    def run(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `task(rank, *args)` on both ranks; returns both results."""
        if not self._processes:
            self._start()
        for inbox in self._inboxes:
            inbox.put((task, args))
        results: list[Any] = [None] * RANKS
        for _ in range(RANKS):
            try:
                rank, result, error = self._outbox.get(timeout=LIMIT_SECONDS)
            except queue.Empty:
                self.stop()
                raise TimeoutError(f"a rank did not answer in {LIMIT_SECONDS} s") from None
            if error is not None:
                self.stop()
                raise AssertionError(f"on rank {rank}:\n{error}")
            results[rank] = result
        return results

    def _start(self) -> None:
        meeting = Path(tempfile.mkdtemp()) / "rendezvous"
        self._outbox = self._context.Queue()
        self._inboxes = [self._context.Queue() for _ in range(RANKS)]
        for rank, inbox in enumerate(self._inboxes):
            process = self._context.Process(
                target=_serve, args=(rank, str(meeting), inbox, self._outbox), daemon=True
            )
            process.start()
            self._processes.append(process)

    def stop(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _serve(rank: int, meeting: str, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=LIMIT_SECONDS / 2),
    )
    while True:
        task, args = inbox.get()
        try:
            outbox.put((rank, task(rank, *args), None))
        except BaseException:
            outbox.put((rank, None, traceback.format_exc()))
