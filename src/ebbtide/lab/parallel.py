"""Independent pieces of work on all processors, which an error or Ctrl-C ends in a moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

from ebbtide.backends.cpu import one_thread
from ebbtide.lab.errors import Stopped

__all__ = ["on_all_processors", "stoppable"]

T = TypeVar("T")


def stoppable(tick: Callable[[int], None], stop: Event) -> Callable[[int], None]:
    """Return a tick that raises `Stopped` once `stop` is set."""

    def checked(steps: int) -> None:
        if stop.is_set():
            raise Stopped
        tick(steps)

    return checked


def on_all_processors(
    work: Callable[..., T], jobs: Iterable[tuple[object, ...]], stop: Event
) -> list[T]:
    """Return the results of the jobs in order, done on all processors.

    The first failure, or Ctrl-C, stops the others at their next tick.
    """
    from threadpoolctl import threadpool_limits

    # A thread a job: further threads of BLAS and the core would get in each other's way.
    processors = len(os.sched_getaffinity(0))
    with one_thread(), threadpool_limits(1), ThreadPoolExecutor(processors) as pool:
        futures = [pool.submit(work, *job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failures = [error for future in done if (error := future.exception())]
            if failures:
                raise failures[0]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]
