"""`FILE.py:FUNCTION`: the user's function, and the bytes that it was read from."""

from __future__ import annotations

import ast
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

from ebbtide.lab.errors import InputError

__all__ = ["Target", "fingerprint"]


def fingerprint(content: bytes) -> str:
    """Return the SHA-256 of a file's bytes.

    Example:
        >>> fingerprint(b"")[:12]
        'e3b0c44298fc'
    """
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Target:
    """A function in a file.

    Attributes:
        path: The file, absolute.
        function: Name of the function.
        sha256: Of the file, when the target was made.
    """

    path: Path
    function: str
    sha256: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `FILE.py:FUNCTION`; the file is read but not run.

        Raises:
            InputError: There is no such file, it is no Python, or it defines no such function.
        """
        file, colon, function = text.rpartition(":")
        if not colon or not file or not function.isidentifier():
            raise InputError(f"{text!r} names no function; write FILE.py:FUNCTION")
        return cls.at(Path(file), function)

    @classmethod
    def at(cls, path: Path, function: str) -> Target:
        """Return the function of a file.

        Raises:
            InputError: As for `parse`.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        names = _top_level_names(path, content)
        if "*" not in names and function not in names:
            known = f"; it defines {', '.join(sorted(names))}" if names else ""
            raise InputError(f"{path} defines no {function!r}{known}")
        return cls(path.resolve(), function, fingerprint(content))

    def __str__(self) -> str:
        return f"{self.path.name}:{self.function}"


def _top_level_names(path: Path, content: bytes) -> set[str]:
    """Return what the file may define; '*' where that cannot be told without running it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the cells print them
            tree = ast.parse(content, filename=str(path))
    except SyntaxError as error:
        where = "" if error.lineno is None else f", line {error.lineno}"
        raise InputError(f"{path}{where}: {error.msg}") from None
    except ValueError as error:
        raise InputError(f"{path} is no Python file: {error}") from None
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(name.id for name in node.targets if isinstance(name, ast.Name))
        elif not isinstance(node, ast.Expr | ast.Import):
            names.add("*")
    return names
