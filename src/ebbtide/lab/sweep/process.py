"""The parent's side of a cell's process: starts it, listens, ends it when it must."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ebbtide.lab.sweep.curve import Curve
from ebbtide.lab.sweep.guardian import guardian
from ebbtide.lab.sweep.reaper import VARIABLE, end_marked
from ebbtide.lab.sweep.target import Target

__all__ = ["Ending", "Order", "run_cell"]

_MOST_OUTPUT = 8_000  # characters kept of what a cell prints, the last ones
_SECONDS_TO_SAY_WHERE = 0.5
_SECONDS_TO_OBEY = 10.0  # to end after being asked at a report
_SECONDS_TO_END = 10.0  # to end after the result: user code may have clean-up to do
_SECONDS_BETWEEN_LOOKS = 0.1
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Order:
    """What a cell's process shall do.

    Attributes:
        target: The user's function.
        settings: Its settings; None to see only whether the function can be called.
        metric: Which of its numbers counts.
        timeout: Seconds it may take; None for ever.
        threads: Threads it is given where the environment does not say.
    """

    target: Target
    settings: Mapping[str, Any] | None
    metric: str | None = None
    timeout: float | None = None
    threads: int | None = None


@dataclass
class Ending:
    """How a cell's process ended.

    Attributes:
        message: Its last word, by its key `kind`: result, raised, pruned, changed, checked; or
            stopped, timeout, died where it had none.
        status: Its exit status, as `subprocess` gives it.
        seconds: How long it ran.
        output: The end of what it printed.
        curve: What it reported.
    """

    message: dict[str, Any] = field(default_factory=dict)
    status: int = 0
    seconds: float = 0.0
    output: str = ""
    curve: Curve = field(default_factory=Curve)

    @property
    def kind(self) -> str:
        """What its last word was."""
        return str(self.message.get("kind", "died"))


def run_cell(
    order: Order,
    *,
    stopped: Callable[[], bool],
    hopeless: Callable[[Curve], bool] = lambda _: False,
) -> Ending:
    """Run a cell to its end.

    Args:
        order: What to run.
        stopped: Asked several times a second; True ends the cell.
        hopeless: Asked after every report; True asks the function to stop at the next one.
    """
    with _Child(order) as child:
        return child.watch(order.timeout, stopped, hopeless)


class _Child:
    """A cell's process and the two lines to it."""

    def __init__(self, order: Order) -> None:
        self._line, theirs = socket.socketpair()
        self._mark = uuid.uuid4().hex
        with theirs:
            self._process = subprocess.Popen(
                # -P: the folder of the command is not where modules come from.
                [sys.executable, "-P", "-m", "ebbtide.lab.sweep.cell", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                # A group of its own: Ctrl-C goes to the sweep, and what it starts ends with it.
                start_new_session=True,
                env=_environment(order, self._mark),
            )
        guardian().watch(self._process.pid, self._mark)
        self._began = time.monotonic()
        self._ending = Ending()
        self._output = bytearray()
        self._incoming = bytearray()
        self._closing = False
        self._tell(
            path=str(order.target.path),
            function=order.target.function,
            sha256=order.target.sha256,
            metric=order.metric,
            settings=None if order.settings is None else _known(order.settings),
        )

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._line.close()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def watch(
        self,
        timeout: float | None,
        stopped: Callable[[], bool],
        hopeless: Callable[[Curve], bool],
    ) -> Ending:
        """Listen until the process has ended or must be ended."""
        limit = float("inf") if timeout is None else self._began + timeout
        with self._listening() as selector:
            while not self._has_ended():
                reports = self._listen(selector)
                if stopped():
                    self._ending.message = self._ending.message or {"kind": "stopped"}
                    break
                if time.monotonic() > limit:
                    self._time_is_up(selector)
                    break
                if reports and not self._closing and hopeless(self._ending.curve):
                    self._tell(stop=True)
                    limit = self._close(limit, _SECONDS_TO_OBEY)
                if self._ending.message and not self._closing:
                    limit = self._close(limit, _SECONDS_TO_END)
            if self._has_ended():
                self._drain(selector)
        return self._result()

    def _close(self, limit: float, seconds: float) -> float:
        self._closing = True
        return min(limit, time.monotonic() + seconds)

    def _result(self) -> Ending:
        ending = self._ending
        ending.seconds = time.monotonic() - self._began
        ending.status = self._end()
        ending.output = _readable(bytes(self._output))
        return ending

    def _time_is_up(self, selector: selectors.BaseSelector) -> None:
        """End a process that takes too long, and have it say where it was."""
        if self._ending.message:
            return  # the result is there, only the process is not gone
        # From here on only what it prints is heard: the signal may wake it from its sleep.
        self._ending.message = {"kind": "pruned" if self._closing else "timeout"}
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGUSR1)
        until = time.monotonic() + _SECONDS_TO_SAY_WHERE
        while time.monotonic() < until and not self._has_ended():
            self._listen(selector)

    @contextlib.contextmanager
    def _listening(self) -> Any:
        output = self._process.stdout
        assert output is not None
        self._line.setblocking(False)
        os.set_blocking(output.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(output.fileno(), selectors.EVENT_READ, self._take_output)
            selector.register(self._line.fileno(), selectors.EVENT_READ, self._take_messages)
            yield selector

    def _listen(self, selector: selectors.BaseSelector, wait: float | None = None) -> bool:
        """Take what has come; return whether a report was among it."""
        if not selector.get_map():  # both lines are closed, and the process is about to end
            time.sleep(0.01)
            return False
        before = self._ending.curve.count
        for key, _ in selector.select(_SECONDS_BETWEEN_LOOKS if wait is None else wait):
            try:
                data = os.read(key.fd, 65536)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                data = b""
            if data:
                key.data(data)
            else:
                selector.unregister(key.fileobj)
        return self._ending.curve.count > before

    def _drain(self, selector: selectors.BaseSelector) -> None:
        # A process that the cell started may keep a line open: take what is there, no more.
        for _ in range(1000):
            if not selector.get_map() or not selector.select(0):
                return
            self._listen(selector, wait=0)

    def _take_output(self, data: bytes) -> None:
        self._output += data
        del self._output[: -4 * _MOST_OUTPUT]

    def _take_messages(self, data: bytes) -> None:
        self._incoming += data
        *lines, rest = self._incoming.split(b"\n")
        self._incoming = bytearray(rest)
        for line in lines:
            try:
                message = _cleaned(json.loads(line))
            except ValueError:
                continue  # a process that the cell forked wrote at the same time
            if message.get("kind") == "report":
                self._ending.curve.add(message["step"], message["value"])
            elif not self._ending.message:
                self._ending.message = message

    def _tell(self, **content: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self._line.sendall((json.dumps(content) + "\n").encode())

    def _has_ended(self) -> bool:
        # Without collecting its status, so that its number stays its own until the group is gone.
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, options) is not None

    def _end(self) -> int:
        """End it, if it has not ended, and what it started; return its status."""
        if self._process.returncode is None:
            was_ended = not self._has_ended()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            guardian().forget(self._process.pid)
            # What it put into a session of its own may outlast it only where it ended by itself.
            if self._process.wait() < 0 or was_ended:
                end_marked([self._mark])
        return self._process.returncode


def _environment(order: Order, mark: str) -> dict[str, str]:
    # A sweep within a cell: what it starts is marked for both.
    marks = f"{os.environ.get(VARIABLE, '')} {mark}".strip()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", VARIABLE: marks}
    if order.threads is not None:
        for name in _THREAD_VARIABLES:
            environment.setdefault(name, str(order.threads))
    return environment


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("optimizer", "lr", "weight_decay", "seed")}


def _readable(data: bytes) -> str:
    """Return the end of a text that any display can show: no colours, no control characters."""
    text = data.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    return _ESCAPES.sub("", text)[-_MOST_OUTPUT:]


def _cleaned(value: Any) -> Any:
    """Return a message whose texts can be shown and stored anywhere."""
    if isinstance(value, str):
        return _ESCAPES.sub("", value.encode(errors="replace").decode())
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    return value
