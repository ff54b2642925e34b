"""Locks that die with their holder.

Who holds a lock is alive, since the kernel, or the database, takes the locks of a process back
when it ends, however it ends. So there is no heartbeat to wait for, no process id that somebody
else may carry by now, and nothing to clean up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ebbtide.lab.errors import InputError

__all__ = ["FileLocks", "Locks", "PostgresLocks", "new_holder"]

# The bytes of a lock file, or the keys of a database: two for purposes, the others for holders.
_QUEUE, _JOURNAL, _FIRST_HOLDER = 0, 1, 1 << 20
_LAST_HOLDER = 1 << 62


def new_holder() -> int:
    """Return a number for a process that nobody else will have."""
    span = _LAST_HOLDER - _FIRST_HOLDER
    return _FIRST_HOLDER + int.from_bytes(os.urandom(8), "big") % span


class Locks(Protocol):
    """What the queue needs of a storage's locks."""

    def queue(self) -> contextlib.AbstractContextManager[None]:
        """Hold the queue: nobody else changes it meanwhile."""

    def hold(self, holder: int) -> None:
        """Show that a process is alive until it ends."""

    def try_hold(self, holder: int) -> bool:
        """Do so unless another process does already; return whether it worked."""

    def is_held(self, holder: int) -> bool:
        """Return whether some other process shows so."""


class FileLocks:
    """Locks on the bytes of a file beside the storage.

    POSIX locks belong to a process and end with the first close of the file in it, so each file
    is opened once in a process and never closed.

    Args:
        path: The lock file; made if there is none.
    """

    _opened: dict[str, FileLocks] = {}  # noqa: RUF012 - shared on purpose

    def __new__(cls, path: Path) -> FileLocks:
        """Return the locks of a file, the same ones each time."""
        key = os.path.realpath(path)
        if key not in cls._opened or not cls._opened[key]._is_file(path):
            locks = super().__new__(cls)
            locks._open(path)
            cls._opened[key] = locks
        return cls._opened[key]

    def _is_file(self, path: Path) -> bool:
        """Return whether the open file is still the one of that name."""
        return path.exists() and os.path.samestat(os.fstat(self._file), path.stat())

    def _open(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        # Threads of a process do not exclude each other by these locks.
        self._threads = {_QUEUE: threading.RLock(), _JOURNAL: threading.RLock()}
        self._depth = {_QUEUE: 0, _JOURNAL: 0}
        self._mine: set[int] = set()

    @contextlib.contextmanager
    def queue(self) -> Iterator[None]:
        """Hold the queue: nobody else changes it meanwhile."""
        self.acquire(_QUEUE)
        try:
            yield
        finally:
            self.release(_QUEUE)

    def acquire(self, byte: int = _JOURNAL) -> bool:
        """Wait for a lock and take it; a thread may take it again.

        Raises:
            InputError: The file system has no locks.
        """
        self._threads[byte].acquire()
        try:
            if not self._depth[byte]:
                fcntl.lockf(self._file, fcntl.LOCK_EX, 1, byte)
            self._depth[byte] += 1
        except BaseException as error:
            self._threads[byte].release()
            if isinstance(error, OSError):
                raise InputError(
                    f"{self._path} cannot be locked ({error.strerror}); keep the storage on "
                    "another file system, or in PostgreSQL"
                ) from error
            raise
        return True

    def release(self, byte: int = _JOURNAL) -> None:
        """Give a lock back."""
        self._depth[byte] -= 1
        if not self._depth[byte]:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)
        self._threads[byte].release()

    def hold(self, holder: int) -> None:
        """Show that this process is alive until it ends."""
        if not self.try_hold(holder):
            raise RuntimeError("another process has the same number")

    def try_hold(self, holder: int) -> bool:
        """Do so unless another process does already; return whether it worked."""
        if not self._try(holder):
            return False
        self._mine.add(holder)
        return True

    def is_held(self, holder: int) -> bool:
        """Return whether some other process shows that it is alive."""
        if holder in self._mine:
            return True
        free = self._try(holder)
        if free:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, holder)
        return not free

    def _try(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True


class PostgresLocks:
    """Advisory locks of a PostgreSQL server, held by one connection of this process.

    Args:
        engine: SQLAlchemy's engine of the database.
        scope: Name of the study; another study has another queue.
    """

    def __init__(self, engine: Any, scope: str) -> None:
        self._connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._thread = threading.RLock()
        self._depth = 0
        digest = hashlib.sha256(b"ebbtide " + scope.encode()).digest()
        self._queue = -1 - int.from_bytes(digest[:7], "big")  # holders are positive

    @contextlib.contextmanager
    def queue(self) -> Iterator[None]:
        """Hold the queue: nobody else changes it meanwhile."""
        with self._thread:
            if not self._depth:
                self._ask("SELECT pg_advisory_lock(:key)", self._queue)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    self._ask("SELECT pg_advisory_unlock(:key)", self._queue)

    def hold(self, holder: int) -> None:
        """Show that this process is alive until it ends."""
        self._ask("SELECT pg_advisory_lock(:key)", holder)

    def try_hold(self, holder: int) -> bool:
        """Do so unless another process does already; return whether it worked."""
        return bool(self._ask("SELECT pg_try_advisory_lock(:key)", holder))

    def is_held(self, holder: int) -> bool:
        """Return whether some process shows that it is alive."""
        # Where the lock is free, taking it for a moment would make it look held to others.
        return bool(
            self._ask(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
                "AND objsubid = 1 AND (classid::bigint << 32 | objid::bigint) = :key",
                holder,
            )
        )

    def close(self) -> None:
        """Give all locks back."""
        # A connection of the pool would keep them.
        self._connection.detach()
        self._connection.close()

    def _ask(self, question: str, key: int) -> Any:
        from sqlalchemy import text

        with self._thread:
            return self._connection.execute(text(question), {"key": key}).scalar()
