"""Where a sweep is kept: a journal file, a PostgreSQL database, or SQLite for one worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebbtide.lab.errors import InputError
from ebbtide.lab.sweep.locks import FileLocks, Locks, PostgresLocks

__all__ = ["DEFAULT_STORAGE", "Storage", "open_storage", "storage_errors", "storage_folder"]

DEFAULT_STORAGE = "sweeps.journal"
_JOURNAL_HEAD = b'{"op_code":'
_SQLITE_WORKER = 2  # the byte that the one worker of a SQLite file holds
_SQLITE_REASON = (
    "SQLite has no row locks, and several workers take the same cell from it or crash; keep the "
    "sweep in a journal file (the default) or in PostgreSQL"
)


@dataclass(frozen=True)
class Storage:
    """An open storage.

    Attributes:
        address: As it may be shown: without a password.
        optuna: Optuna's storage.
        folder: The folder that file names are relative to, if there is one.
        engine: SQLAlchemy's engine, for a database.
        file: The file, for a storage in one.
    """

    address: str
    optuna: Any
    folder: Path | None = None
    engine: Any = None
    file: Path | None = None
    _held: list[PostgresLocks] = field(default_factory=list)

    def locks(self, study: str) -> Locks:
        """Return the locks of a study."""
        if self.file is not None:
            return FileLocks(_beside(self.file))
        locks = PostgresLocks(self.engine, study)
        self._held.append(locks)
        return locks

    def close(self) -> None:
        """Close the connections to a database, with the locks they hold."""
        for locks in self._held:
            locks.close()
        if self.engine is not None:
            self.optuna.remove_session()
            self.engine.dispose()


def storage_folder(text: str) -> Path | None:
    """Return the folder that a storage lies in, or None where it lies in none.

    Raises:
        InputError: The address cannot be read.
    """
    if "://" not in text:
        return Path(text).resolve().parent
    url = _parse_url(text)
    if url.get_backend_name() != "sqlite":
        return None
    if not url.database or url.database == ":memory:":
        raise InputError(f"{text} names no file")
    return Path(url.database).resolve().parent


def open_storage(text: str, *, create: bool, workers: int = 0) -> Storage:
    """Open a storage.

    Args:
        text: A path of a journal file, or an address `postgresql://…` or `sqlite:///…`.
        create: Whether a file may be made.
        workers: How many cells this process will run at the same time.

    Raises:
        InputError: It does not exist, cannot be reached, is of another kind, or cannot bear so
            many workers.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" not in text:
        return _journal(Path(text), create)
    url = _parse_url(text)
    address = url.render_as_string(hide_password=True)
    folder = storage_folder(text)
    file = None
    if url.get_backend_name() == "sqlite":
        if workers > 1:
            raise InputError(_SQLITE_REASON)
        file = _file(Path(url.database), create)
        if workers and not FileLocks(_beside(file)).try_hold(_SQLITE_WORKER):
            raise InputError("another worker is at work on this file. " + _SQLITE_REASON)
    if url.get_driver_name() == "psycopg":
        import psycopg  # noqa: F401 - says in its own words that it is missing
    with storage_errors(address):
        database = optuna.storages.RDBStorage(
            url.render_as_string(hide_password=False), engine_kwargs=_engine_options(url)
        )
    storage = optuna.storages.get_storage(database)
    return Storage(address, storage, folder, database.engine, file)


def _engine_options(url: Any) -> dict[str, Any]:
    if url.get_backend_name() != "postgresql" or "options" in url.query:
        return {}
    # The server looks after 20 s without a word whether a machine is still there, and gives up
    # after another 30 s, so that the cells of a machine that lost power come back.
    keepalive = ("idle=20", "interval=10", "count=3")
    options = " ".join(f"-c tcp_keepalives_{option}" for option in keepalive)
    return {"pool_pre_ping": True, "connect_args": {"options": options}}


def _journal(path: Path, create: bool) -> Storage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = _file(path, create)
    _check_journal(path)
    lock = FileLocks(_beside(path))
    backend = JournalFileBackend(str(path), lock_obj=_JournalLock(path, lock))  # type: ignore[arg-type]
    try:
        storage = JournalStorage(backend)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no journal of sweeps") from None
    return Storage(str(path), storage, path.resolve().parent, None, path)


def _check_journal(path: Path) -> None:
    """Refuse to append to a file that is something else."""
    if not path.exists():
        return
    with open(path, "rb") as journal:
        head = journal.read(len(_JOURNAL_HEAD))
    if not _JOURNAL_HEAD.startswith(head):  # the first line may be half written
        raise InputError(f"{path} is no journal of sweeps")


class _JournalLock:
    """Optuna's lock on its journal, by a lock that dies with its holder.

    The one that Optuna brings stays behind when its holder is killed, and so may half a line:
    without its end being cut off, the next line would be lost with it.
    """

    def __init__(self, path: Path, locks: FileLocks) -> None:
        self._path = path
        self._locks = locks

    def acquire(self) -> bool:
        self._locks.acquire()
        _cut_half_line(self._path)
        return True

    def release(self) -> None:
        self._locks.release()


def _cut_half_line(path: Path) -> None:
    with open(path, "r+b") as journal:
        end = journal.seek(0, os.SEEK_END)
        if end == 0:
            return
        journal.seek(end - 1)
        if journal.read(1) == b"\n":
            return
        journal.seek(0)
        journal.truncate(journal.read().rfind(b"\n") + 1)


def _file(path: Path, create: bool) -> Path:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    if not path.exists():
        if not create:
            raise InputError(f"there is no {path}")
        if not path.parent.is_dir():
            raise InputError(f"there is no folder {path.parent} for {path.name}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written to")
    return path


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _parse_url(text: str) -> Any:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except ArgumentError:
        raise InputError(f"the storage {text.partition('://')[0]}://… cannot be read") from None
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("postgresql", "sqlite"):
        raise InputError(
            f"the storage {url.drivername}://… is not supported: keep the sweep in a journal file, "
            "in postgresql://…, or in sqlite:///… with one worker"
        )
    return url


@contextmanager
def storage_errors(address: str) -> Iterator[None]:
    """Say in one line what is wrong with a storage.

    Args:
        address: The storage, as it may be shown.

    Raises:
        InputError: Where the storage raised something.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError, OSError, ImportError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        raise InputError(
            f"the storage {address} cannot be used: {reason}; what it holds is kept, and the same "
            "command goes on"
        ) from error
