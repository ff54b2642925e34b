"""Processes with gloo between them, started once, to which tests hand functions."""

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

LIMIT_SECONDS = 180  # of waiting for a rank; a machine under load takes a minute to start them


class RankPool:
    """Runs a function on all ranks and gives what they return.

    A function that raises on one rank leaves the others in a collective; all are then ended, and
    the next call starts new ones.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int = 2) -> None:
        self._size = size
        self._context = torch.multiprocessing.get_context("spawn")
        self._processes: list[Any] = []

    def run(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `task(rank, *args)` on all ranks; returns all results."""
        if not self._processes:
            self._start()
        for inbox in self._inboxes:
            inbox.put((task, args))
        results: list[Any] = [None] * self._size
        for _ in range(self._size):
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
        self._inboxes = [self._context.Queue() for _ in range(self._size)]
        for rank, inbox in enumerate(self._inboxes):
            args = (rank, self._size, str(meeting), inbox, self._outbox)
            process = self._context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self._processes.append(process)

    def stop(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _serve(rank: int, size: int, meeting: str, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=LIMIT_SECONDS / 2),
    )
    while True:
        task, args = inbox.get()
        try:
            outbox.put((rank, task(rank, *args), None))
        except BaseException:
            outbox.put((rank, None, traceback.format_exc()))
