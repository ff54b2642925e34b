"""A real PostgreSQL server for the tests that need one."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["needs_postgres", "server"]


def _programs() -> Path | None:
    """Return the folder of initdb and pg_ctl; Debian keeps it out of the path."""
    folders = [*map(Path, os.get_exec_path()), *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    found = [folder for folder in folders if (folder / "initdb").exists()]
    real = [Path(os.path.realpath(folder / "initdb")).parent for folder in found]
    return next((folder for folder in real if (folder / "pg_ctl").exists()), None)


def _user() -> str | None:
    """Return whom the server runs as: it refuses to be root's."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


PROGRAMS, USER = _programs(), _user()
_MISSING = (
    "no PostgreSQL server (initdb and pg_ctl) on this machine"
    if PROGRAMS is None
    else "no user but root to run PostgreSQL as"
    if USER is None
    else "psycopg is not installed: pip install 'ebbtide[postgres]'"
    if importlib.util.find_spec("psycopg") is None
    else ""
)
needs_postgres = pytest.mark.skipif(bool(_MISSING), reason=_MISSING)


class Server:
    """A server on a port of its own, with a database for the sweeps."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._data = folder, folder / "data"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._call("initdb", "-D", self._data, "-U", "tester", "-A", "trust", "-N", "-E", "UTF8")
        self.start()
        self._call("createdb", "-h", "127.0.0.1", "-p", self._port, "-U", "tester", "sweeps")

    @property
    def url(self) -> str:
        return f"postgresql://tester@127.0.0.1:{self._port}/sweeps"

    def start(self) -> None:
        options = f"-p {self._port} -k {self._folder} -c listen_addresses=127.0.0.1 -F"
        self._call(
            "pg_ctl", "-D", self._data, "-w", "-l", self._folder / "log", "-o", options, "start"
        )

    def stop(self, mode: str = "immediate") -> None:
        self._call("pg_ctl", "-D", self._data, "-w", "-m", mode, "stop")

    def _call(self, program: str, *arguments: object) -> None:
        assert PROGRAMS is not None
        subprocess.run(
            [PROGRAMS / program, *map(str, arguments)],
            check=True, timeout=60, stdout=subprocess.DEVNULL, cwd=self._folder,
            user=USER if os.geteuid() == 0 else None,
        )  # fmt: skip


@contextmanager
def server() -> Iterator[Server]:
    # A short path, since that of a Unix socket has a limit, and one the server's user may enter.
    folder = Path(
        subprocess.check_output(["mktemp", "-d", "/tmp/ebbtide-pg.XXXXXX"], text=True).strip()
    )
    assert USER is not None
    if os.geteuid() == 0:
        shutil.chown(folder, USER)
    try:
        running = Server(folder)
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
