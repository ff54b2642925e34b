"""The process of one cell: loads the user's file, calls the function, says what came of it.

It is started as `python -P -m ebbtide.lab.sweep.cell FD`, where FD is one end of a pair of
sockets. A line of JSON comes in, the order; lines of JSON go out. A second line that comes in,
whatever it says, asks the function to stop at its next report, and the end of the other side
ends this one. What the function prints goes where the parent put it and is not looked at here.

Imports the standard library only, so that a cell starts quickly.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import inspect
import json
import os
import random
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ebbtide.lab.sweep.settings import Settings
from ebbtide.lab.sweep.target import fingerprint

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_MOST_CHARACTERS = 20_000


class _Pruned(BaseException):
    """Ends the function at a report; no `except Exception` on the way holds it up."""


class _FileChanged(Exception):
    """The file is not the one that the sweep was started with."""


class _Line:
    """This end of the sockets."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        self._incoming = self._socket.makefile("rb")
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def order(self) -> dict[str, Any]:
        order: dict[str, Any] = json.loads(self._incoming.readline())
        threading.Thread(target=self._listen, daemon=True).start()
        return order

    def send(self, **content: Any) -> None:
        data = (json.dumps(content) + "\n").encode()
        with self._lock:
            self._socket.sendall(data)

    def report(self, step: int, value: float) -> None:
        if self.stop.is_set():
            raise _Pruned
        self.send(kind="report", step=step, value=value)

    def _listen(self) -> None:
        if not self._incoming.readline():
            os._exit(1)  # nobody is left to take the result
        self.stop.set()
        self._incoming.read()
        os._exit(1)


def main() -> None:
    """Run the cell whose order comes in by the socket that the first argument names."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent asks where a cell hangs
    _die_with_parent()
    line = _Line(int(sys.argv[1]))
    order = line.order()
    try:
        function = _load(Path(order["path"]), order["function"], order["sha256"])
        if order["settings"] is None:
            _check_signature(function)
            line.send(kind="checked", versions=_versions())
            return
        _seed(order["settings"]["seed"])
        result = function(Settings(**order["settings"], _report=line.report))
        line.send(kind="result", **_numbers(result, order["metric"]))
    except _Pruned:
        line.send(kind="pruned")
    except _FileChanged:
        line.send(kind="changed")
    except BaseException as error:
        line.send(kind="raised", **_description(error, order["path"]))
    finally:
        _flush()


def _die_with_parent() -> None:
    """Ask the kernel to end this process with its parent, even while it holds the interpreter."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _load(path: Path, name: str, sha256: str) -> Callable[[Settings], Any]:
    content = path.read_bytes()
    if fingerprint(content) != sha256:
        raise _FileChanged
    # As `python FILE.py` would have it, except that it is not __main__.
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path)]
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    module = _module("ebbtide_sweep_target" if taken else path.stem, path)
    exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)
    function = getattr(module, name, None)
    if not callable(function):
        raise TypeError(f"{path.name} defines no function {name!r}")
    return function  # type: ignore[no-any-return]


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:  # a file without the ending .py
        spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[name] = module
    return module


def _check_signature(function: Callable[..., Any]) -> None:
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"{function.__name__!r} must return a number, not wait or yield")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # a function that is not written in Python
    try:
        signature.bind(None)
    except TypeError:
        raise TypeError(
            f"the function must take one argument, the settings; it takes {signature}"
        ) from None


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _numbers(result: Any, metric: str | None) -> dict[str, Any]:
    """Return the number that counts, and all numbers by their names."""
    if isinstance(result, Mapping):
        found = {str(key): _number(item) for key, item in result.items()}
        numbers = {key: number for key, number in found.items() if number is not None}
        for key in found.keys() - numbers.keys():
            print(f"ebbtide: {key!r} is no number and is left out")
    else:
        number = _number(result)
        numbers = {} if number is None else {metric or "value": number}
    if not numbers:
        raise TypeError(f"the function returned {_kind(result)}, not a number or numbers by name")
    name = metric or ("loss" if "loss" in numbers else next(iter(numbers)))
    if name not in numbers:
        raise KeyError(f"the function returned no {name!r}, but {', '.join(numbers)}")
    if metric is None and len(numbers) > 1 and name != "loss":
        raise TypeError(f"the function returned {', '.join(numbers)}: choose one with --metric")
    return {"value": numbers[name], "numbers": numbers, "metric": name}


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # torch, for a tensor of several elements
        return None


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _description(error: BaseException, path: str) -> dict[str, Any]:
    """Return an exception in text, without the frames that are not the user's."""
    lines = traceback.TracebackException.from_exception(error)
    while lines.stack and lines.stack[0].filename != path:
        lines.stack.pop(0)
    text = "".join(lines.format())
    # A syntax error begins with an indented line that says where.
    said = "".join(lines.format_exception_only()).splitlines()
    summary = next((line for line in said if line.strip() and not line[0].isspace()), "")
    return {
        "error": (summary or type(error).__name__)[:500],
        "traceback": text[-_MOST_CHARACTERS:],
        "diverged": isinstance(error, FloatingPointError),
    }


def _versions() -> dict[str, str]:
    loaded = ("torch", "numpy", "jax", "sklearn", "tensorflow")
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in loaded}
    return {name: str(version) for name, version in found.items() if version is not None}


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed by the function
            continue


if __name__ == "__main__":
    main()
