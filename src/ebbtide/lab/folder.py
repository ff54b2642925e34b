"""Write a report's folder in one stroke, and never over something else."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ebbtide.lab.errors import InputError

__all__ = ["RESULTS", "check_folder", "replace_folder"]

RESULTS = "results.json"
"""The file that marks a folder as a report: its keys `command` and `files` say what is there."""


def check_folder(folder: Path, command: str) -> None:
    """Make sure that a report may be written to a folder.

    A new or empty folder is fine, and so is an earlier report of the same command.

    Raises:
        InputError: The folder holds something else, is the current one, or cannot be made.
        ModuleNotFoundError: A package that reports need is missing.
    """
    # What the report needs had better be missed now than after a night of training.
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401

    if folder.is_file() or (folder.is_symlink() and not folder.is_dir()):
        raise InputError(f"{folder} is a file, not a folder")
    if Path.cwd().resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder} is the current folder or above it; name one of its own")
    if folder.is_dir():
        _check_content(folder, command)
    parent = next(p for p in folder.resolve().parents if p.exists())
    try:
        # Trying is the only way to know: file systems refuse for reasons that modes do not show.
        os.rmdir(tempfile.mkdtemp(prefix=".ebbtide-", dir=parent))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {parent}: {error.strerror}") from error


def _check_content(folder: Path, command: str) -> None:
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if not present:
        return
    try:
        earlier = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        made_by, files = str(earlier["command"]), set(earlier["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is not empty and holds no ebbtide report") from None
    if made_by != command:
        raise InputError(f"{folder} holds a report of `ebbtide {made_by}`")
    if foreign := sorted(present - files):
        raise InputError(f"{folder} holds {foreign[0]!r}, which the earlier report did not write")


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files to a folder that then holds nothing else.

    They are written beside it first and take its place by renaming, so that an interruption
    leaves the earlier report or the new one.

    Raises:
        InputError: The folder cannot be written.
    """
    folder = folder.resolve()
    beside = f".{folder.name}.{os.getpid()}"
    fresh, old = folder.with_name(f"{beside}.new"), folder.with_name(f"{beside}.old")
    try:
        fresh.mkdir(parents=True)
        for name, content in files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(content)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
