"""A sweep in its storage: the study, and what it remembers beside its cells."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebbtide.lab.errors import InputError
from ebbtide.lab.sweep.definition import Definition
from ebbtide.lab.sweep.outcome import Record
from ebbtide.lab.sweep.queue import Key, Queue, key
from ebbtide.lab.sweep.storage import Storage
from ebbtide.lab.sweep.target import Target

__all__ = ["Sweep", "check_name", "file_name", "find_study"]

_NAME = re.compile(r"[\w+][\w.+ -]*")
_DEFINITION, _HASHES, _OPTIONS = "ebbtide.definition", "ebbtide.sha256", "ebbtide.options"


def file_name(target: Target, folder: Path | None) -> str:
    """Return what a storage calls the file: its path from there, where it has a folder."""
    return str(target.path) if folder is None else os.path.relpath(target.path, folder)


def check_name(name: str) -> str:
    """Return a name of a study, which is also that of a folder.

    Raises:
        InputError: It cannot be one.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot name a study: use letters, digits, spaces and ._+-")
    return name


def find_study(storage: Storage, text: str) -> str:
    """Return the name of a study from its beginning.

    Raises:
        InputError: No study, or more than one, begins so.
    """
    import optuna

    names = optuna.get_all_study_names(storage.optuna)
    found = [text] if text in names else [name for name in names if name.startswith(text)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(found or names) or "none"
    what = "several studies that begin with" if found else "no study"
    raise InputError(f"{storage.address} holds {what} {text!r}; the names are: {listed}")


class Sweep:
    """A study with the definition it is of.

    Args:
        storage: Where it is kept.
        name: Name of the study.
        definition: What it is of; None to take over that of the study, which then exists.

    Raises:
        InputError: The study is of another definition, or there is no such study.
    """

    def __init__(self, storage: Storage, name: str, definition: Definition | None = None) -> None:
        self.storage, self.name = storage, name
        self._locks = storage.locks(name)
        with self._locks.queue():
            self._study = self._open(definition)
            self.definition = self._check(definition)
        self.queue = Queue(self._study, storage.optuna, self.definition, self._locks)

    def check_file(self, target: Target, *, allow_changed: bool) -> None:
        """Record the hash of the user's file, or compare it with the recorded one.

        Raises:
            InputError: The file has changed and that is not allowed.
        """
        with self._locks.queue():
            hashes = self.hashes
            if target.sha256 in hashes[-1:]:
                return
            if hashes and not allow_changed:
                raise InputError(
                    f"{target.path.name} has changed since this sweep began (its SHA-256 was "
                    f"{hashes[-1][:12]}… and is {target.sha256[:12]}…), and its cells would not "
                    "be comparable; go on with --allow-changed, or begin anew with --study NAME"
                )
            self._study.set_user_attr(_HASHES, [*hashes, target.sha256])

    @property
    def hashes(self) -> tuple[str, ...]:
        """Hashes of the user's file that the sweep was run with, the last one last."""
        return tuple(self._study.user_attrs.get(_HASHES, ()))

    @property
    def options(self) -> dict[str, Any]:
        """How the sweep was last run."""
        return dict(self._study.user_attrs.get(_OPTIONS, {}))

    def keep_options(self, options: Mapping[str, Any]) -> None:
        """Remember how the sweep is run, for workers and reports to come."""
        if self.options != options:
            self._study.set_user_attr(_OPTIONS, dict(options))

    def finished_elsewhere(self) -> dict[Key, Record]:
        """Return cells of this function that other sweeps in the storage have finished.

        Only those of the same file, to the byte, and of the same metric.
        """
        import optuna

        found: dict[Key, Record] = {}
        for name in optuna.get_all_study_names(self.storage.optuna):
            study = optuna.load_study(study_name=name, storage=self.storage.optuna)
            text = study.user_attrs.get(_DEFINITION)
            if name == self.name or text is None:
                continue
            other = Definition.from_json(text)
            if other.sameness != self.definition.sameness:
                continue
            queue = Queue(study, self.storage.optuna, other, self._locks)
            for _, settings, record in queue.cells():
                if record is not None and record.is_reusable and record.sha256 in self.hashes[-1:]:
                    found[key(settings)] = record
        return found

    def _open(self, definition: Definition | None) -> Any:
        import optuna

        known = optuna.get_all_study_names(self.storage.optuna)
        if self.name in known:
            return optuna.load_study(study_name=self.name, storage=self.storage.optuna)
        if definition is None:
            raise InputError(f"{self.storage.address} holds no study {self.name!r}")
        return optuna.create_study(
            study_name=self.name,
            storage=self.storage.optuna,
            direction="maximize" if definition.maximize else "minimize",
        )

    def _check(self, definition: Definition | None) -> Definition:
        text = self._study.user_attrs.get(_DEFINITION)
        if text is None:
            # Made by a command that was killed at once, or by another program.
            if definition is None or self._study.get_trials(deepcopy=False):
                raise InputError(f"the study {self.name!r} is no sweep of ebbtide's")
            self._study.set_user_attr(_DEFINITION, definition.to_json())
            return definition
        kept = Definition.from_json(text)
        if definition is not None:
            for name, mine, theirs in definition.differences(kept):
                raise InputError(
                    f"the study {self.name!r} is another sweep: its {name} is {theirs!r}, "
                    f"not {mine!r}; name another with --study"
                )
        return kept
