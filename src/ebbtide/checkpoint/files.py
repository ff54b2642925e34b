"""Files that are old or new, never half of each.

A file is written beside its target, flushed to the disk and then put in its place; the one it
replaces stays as `NAME.previous`. torch's and NumPy's files are zip archives, which may end with a
comment: it holds a SHA-256 of everything before it, and other readers pass over it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["CheckpointError", "is_sealed", "previous_of", "problem_of", "whole_file", "write_file"]

_MARK = b"ebbtide sha256 "
_SEAL_BYTES = len(_MARK) + 64
# A zip archive ends with this record; its last two bytes are the length of the comment.
_END_RECORD, _END_RECORD_BYTES = b"PK\x05\x06", 22
_END_BYTES = _END_RECORD_BYTES + _SEAL_BYTES


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; what was to be changed by it has not been changed."""


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one whole.

    A second process that saves to the same path waits for the first. The temporary file lies in the
    target's folder; one that a killed process left there is used again.

    Args:
        path: Where to. Symbolic links are followed; the folder must exist.
        write: Writes a zip archive (`torch.save`, `numpy.savez`) to the open file it is given.

    Raises:
        ValueError: What was written is not a zip archive; the old file is untouched.
        OSError: The disk is full or the folder cannot be written; the old file is untouched.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> def empty_archive(file):
        ...     zipfile.ZipFile(file, "w").close()
        >>> for _ in range(2):
        ...     write_file(folder / "x.npz", empty_archive)
        >>> sorted(file.name for file in folder.iterdir())
        ['x.npz', 'x.npz.previous']
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.new")
    with _locked(temporary) as file:
        try:
            write(file)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
            _put(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def previous_of(path: str | os.PathLike[str]) -> Path:
    """Return where `write_file` keeps the file that it replaced."""
    target = Path(os.path.realpath(path))
    return target.with_name(f"{target.name}.previous")


def whole_file(path: str | os.PathLike[str]) -> tuple[Path, list[str]]:
    """Choose the file to read: the one asked for, or the previous one where that is broken.

    Returns:
        The file, and what is wrong with the one asked for (empty if nothing is).

    Raises:
        FileNotFoundError: There is neither.
        CheckpointError: Neither is whole; both are named.
    """
    problems, missing = [], 0
    for candidate in (Path(path), previous_of(path)):
        if not candidate.exists():
            missing += 1
            problems.append(f"{candidate} is missing")
            continue
        problem = problem_of(candidate)
        if problem is None:
            return candidate, problems
        problems.append(f"{candidate} is broken: {problem}")
    if missing == 2:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    raise CheckpointError("; ".join(problems))


def problem_of(path: str | os.PathLike[str]) -> str | None:
    """Say what is wrong with a file, or `None`.

    A file of `write_file` is compared with its checksum; another zip archive must have its
    directory and right CRCs; of a file of another kind only emptiness can be told.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return "it is empty"
        seal = _read_at(file, max(0, size - _SEAL_BYTES), _SEAL_BYTES)
        if seal.startswith(_MARK):
            digest = _digest(file, size - _SEAL_BYTES - 2)
            return None if seal == _MARK + digest else "its checksum differs from its content"
        start = _read_at(file, 0, 4)
        if not b"PK\x03\x04".startswith(start):
            return None
        return _zip_problem(file)


def is_sealed(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file carries a checksum of its own."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        return _read_at(file, max(0, size - _SEAL_BYTES), _SEAL_BYTES).startswith(_MARK)


def _zip_problem(file: BinaryIO) -> str | None:
    tail = _read_at(file, max(0, file.seek(0, os.SEEK_END) - _END_BYTES), _END_BYTES)
    _, found, end = tail.rpartition(_END_RECORD)
    if found and len(end) < 18 + int.from_bytes(end[16:18], "little"):
        return "it ends early: its checksum is cut off"
    try:
        archive = zipfile.ZipFile(file)
        for entry in archive.infolist():
            if entry.CRC == 0:  # torch writes 0 where it was told not to compute it
                continue
            with archive.open(entry) as content:
                while content.read(1 << 20):
                    pass
    except (zipfile.BadZipFile, EOFError) as error:
        return f"it ends early or was changed ({error})"
    return None


@contextlib.contextmanager
def _locked(temporary: Path) -> Iterator[BinaryIO]:
    """Open the temporary file, empty, for this process alone."""
    import fcntl

    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Whoever held the lock before us may have renamed the file that we waited for.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
                break
        os.close(descriptor)
    with os.fdopen(descriptor, "r+b") as file:
        file.truncate(0)
        yield file


def _seal(file: BinaryIO) -> None:
    file.flush()
    size = file.seek(0, os.SEEK_END)
    end = _read_at(file, max(0, size - _END_RECORD_BYTES), _END_RECORD_BYTES)
    if not end.startswith(_END_RECORD) or not end.endswith(b"\0\0"):
        raise ValueError("write() must write a zip archive, as torch.save and numpy.savez do")
    seal = _MARK + _digest(file, size - 2)
    file.seek(size - 2)
    file.write(len(seal).to_bytes(2, "little") + seal)


def _digest(file: BinaryIO, size: int) -> bytes:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    file.seek(0)
    while size > 0:
        count = file.readinto(buffer[: min(size, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            break
        digest.update(buffer[:count])
        size -= count
    return digest.hexdigest().encode()


def _read_at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _put(temporary: Path, target: Path) -> None:
    """Replace the target. The old one becomes the previous one only when the new one is in place.

    So a broken target never replaces a whole previous file while it is the only whole one.
    """
    aside = target.with_name(f".{target.name}.old")
    aside.unlink(missing_ok=True)
    if not target.exists():
        os.replace(temporary, target)
    elif _linked(target, aside):
        os.replace(temporary, target)
        os.replace(aside, previous_of(target))
    else:  # for a moment there is the previous file only
        if problem_of(target) is None:
            os.replace(target, previous_of(target))
        os.replace(temporary, target)
    _sync_folder(target.parent)


def _linked(target: Path, link: Path) -> bool:
    """Give a file a second name, where the file system has hard links."""
    try:
        os.link(target, link)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(descriptor)
