"""Training runs that an interrupted command leaves behind, for the same command to go on from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.errors import InputError
from ebbtide.lab.tasks import Outcomes

__all__ = ["FORGETFUL", "Arrays", "Memory", "Unfinished", "code_fingerprint"]

Arrays = Mapping[str, NDArray[Any]]

_MARK = "unfinished.json"


class Memory:
    """What is known of runs made before; this one forgets everything."""

    def arrays(self, key: str, make: Callable[[], Arrays], known: Callable[[], None]) -> Arrays:
        """Return what `make` returned the first time for this key.

        Args:
            key: Tells the run from all others of the command.
            make: Makes the run.
            known: Called instead where the run is known.
        """
        del key, known
        return make()

    def within(self, part: str) -> Memory:
        """Return the memory of a part of the command, whose keys are its own."""
        del part
        return self

    def outcomes(
        self, key: str, make: Callable[[], Outcomes], known: Callable[[], None]
    ) -> Outcomes:
        """Return outcomes as `arrays` does arrays."""
        found: dict[str, Any] = dict(self.arrays(key, lambda: _to_arrays(make()), known))
        return Outcomes(**{**found, "test_loss_name": str(found["test_loss_name"])})


FORGETFUL = Memory()


class Unfinished(Memory):
    """Runs kept in a folder beside the report's until the command has come to its end.

    The folder has a name of its own for each command, and nothing is made before the first run
    is kept.

    Args:
        report: Folder of the report.
        identity: All that the numbers depend on.

    Raises:
        InputError: There is a folder of that name which is not of this kind.
    """

    def __init__(self, report: Path, identity: Mapping[str, Any]) -> None:
        self._prefix = ""
        self._digest = _digest(json.dumps(identity, sort_keys=True, default=str))
        self._lock = threading.Lock()
        resolved = report.resolve()
        self.folder = resolved.with_name(f"{resolved.name}.{self._digest[:8]}.unfinished")
        if self.folder.exists() and _mark_of(self.folder) != self._digest:
            raise InputError(f"{self.folder} is in the way: it holds no unfinished report")

    def within(self, part: str) -> Memory:
        """Return the memory of a part of the command."""
        inner = object.__new__(Unfinished)
        inner.__dict__.update(self.__dict__, _prefix=f"{self._prefix}{part}/")
        return inner

    def arrays(self, key: str, make: Callable[[], Arrays], known: Callable[[], None]) -> Arrays:
        """Return the arrays kept for this key, or make and keep them."""
        path = self.folder / f"{_digest(self._prefix + key)}.npz"
        try:
            with open(path, "rb") as file, np.load(file) as kept:
                found = {name: kept[name] for name in kept.files}
        except (OSError, ValueError, EOFError, BadZipFile):
            found = dict(make())
            self._keep(path, found)
            return found
        known()
        return found

    def forget(self) -> None:
        """Remove the folder: the command has come to its end."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep(self, path: Path, arrays: Arrays) -> None:
        fresh = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        # A full disk costs the convenience, not the run.
        with contextlib.suppress(OSError):
            self._mark()
            named: dict[str, Any] = dict(arrays)
            with open(fresh, "wb") as file:
                np.savez(file, **named)
            fresh.rename(path)

    def _mark(self) -> None:
        with self._lock:
            if self.folder.exists():
                return
            fresh = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
            fresh.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"ebbtide": "unfinished", "identity": self._digest})
            (fresh / _MARK).write_text(content, encoding="utf-8")
            fresh.rename(self.folder)


def code_fingerprint() -> str:
    """Return a hash of Ebbtide itself, its compiled part included."""
    import ebbtide

    files = sorted(Path(ebbtide.__file__).parent.rglob("*.py"))
    core = find_spec("ebbtide._core")
    if core is not None and core.origin is not None:
        files.append(Path(core.origin))
    found = hashlib.sha256(np.__version__.encode())
    for path in files:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _mark_of(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / _MARK).read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _to_arrays(outcomes: Outcomes) -> Arrays:
    return {each.name: np.asarray(getattr(outcomes, each.name)) for each in fields(outcomes)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
