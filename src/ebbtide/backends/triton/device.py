"""The rows of one device: their tables, and the launches, one for each kind of row."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from ebbtide.backends.triton import kernels, norm, prologue
from ebbtide.backends.triton.launching import Launcher
from ebbtide.backends.triton.question import Question
from ebbtide.backends.triton.tables import (
    Kind,
    Launch,
    Uploader,
    counts_plainly,
    is_plain,
    kind_of,
    lane_constants,
    numbers_of,
    with_key,
)
from ebbtide.plan import BLOCK, Bucket, Row
from ebbtide.rules import Rule, Scalars

__all__ = ["BLOCKS", "WARPS", "Device", "Groups"]

# Blocks of 128 elements in a tile, and warps of a program by the bytes of the narrowest array. With
# one warp a thread has 16 elements, so that it takes 16 bytes of an array of eight bits at once; a
# reduction needs no barrier, and what a program must look up costs little for each element.
BLOCKS = 4
WARPS = {1: 1, 2: 1, 4: 1, 8: 2}
# Programs that sum squares, at most: their sums are added by one program.
SUMMING = 4096

Groups = Sequence[Mapping[str, Any]]


class Device:
    """Runs the rows of one device and remembers them.

    Args:
        device: A CUDA device; the CPU for Triton's interpreter.

    Attributes:
        launcher: Counts the kernels launched.
        verdict: `VERDICT` of the last question, on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launcher = Launcher()
        self._uploader = Uploader(device)
        with self._on_device():
            self.verdict = torch.zeros(len(prologue.VERDICT), dtype=torch.float64, device=device)
            self._lanes = lane_constants().to(device)
            self._nothing = torch.zeros(1, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._alarm = torch.zeros(1, dtype=torch.int32, pin_memory=pinned)
        self._ringing = ctypes.c_int32.from_address(self._alarm.data_ptr())
        self._spoilt = torch.zeros((0, 2), dtype=torch.int64, device=device)
        self._runs = 0
        self._captured: list[Any] = []  # what graphs read when they are replayed
        self.forget()

    def forget(self) -> None:
        """Drop the tables: the next step needs a plan."""
        self._uploader.release()
        self._launches: list[Launch] = []  # in the order of their ways
        self._tiles_of_way: dict[int, tuple[int, int]] = {}  # the first, and behind the last
        self._keys: list[_Key] = []
        self._counters: list[_Counter] = []
        self._counted: list[torch.Tensor] = []
        self._sent: dict[str, Any] = {}
        self._counts_plainly = False
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._table = self._grads = self._row_of_tile = self._lanes[:0]

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """(group, step) of the next step of the remembered rows that count on the host."""
        return list(dict.fromkeys((key.group, key.step) for key in self._keys))

    def load(self, rows: Iterable[tuple[int, int, Row]], entries: int) -> None:
        """Take rows.

        Args:
            rows: (entry, group, row).
            entries: Number of entries of their plan.
        """
        self.forget()
        launches: dict[Kind, Launch] = {}
        keys: dict[_Key, int] = {}
        counted: list[int] = []
        for entry, group, row in rows:
            kind = kind_of(row)
            launch = launches.setdefault(kind, Launch(kind, BLOCKS))
            if row.counts_on_device:
                launch.add(entry, row, len(counted) // 3)
                counted += [row.step_address, int(row.step_is_double), group]
                continue
            counter = _counter_of(row)
            step = (row.count if counter is None else int(counter.value)) + 1
            key = _Key(group, step, counter is not None)
            launch.add(entry, row, keys.setdefault(key, len(keys)))
            if counter is not None:
                self._counters.append(counter)
        self._launches = sorted(launches.values(), key=lambda each: each.kind.way)
        self._keys = list(keys)
        self._send_tables(counted, entries)
        self.send_gradients(torch.tensor([row.grad.address for _, row in self.rows]))

    @property
    def rows(self) -> list[tuple[int, Row]]:
        """(entry, row) of the remembered rows, in the order of the gradients' addresses."""
        return [each for launch in self._launches for each in launch.rows]

    def send_gradients(self, addresses: torch.Tensor) -> None:
        """Let the rows have their gradients elsewhere, in the order of `rows`."""
        self._grads = self._send("grads", [addresses.long()])[0]

    def leave_counts(self) -> None:
        """Let the caller advance the rows' step counts from now on."""
        self._counters = []

    def partial_sums(self, question: Question, way: int) -> torch.Tensor:
        """Return sums of squares, on the device; their sum is that of all gradients of one way."""
        begin, end = self._tiles_of_way.get(way, (0, 0))
        if not question.wants_norm or begin == end:
            return self.verdict[:0]
        size = min(SUMMING, end - begin)
        with self._on_device():
            sums = torch.empty(size, dtype=torch.float64, device=self.device)
            self.launcher.launch(
                norm.sum_squares, size,
                (self._table, self._grads, self._row_of_tile, begin, end, sums),
                {"FINITE_ONLY": question.finite_only, "SIZE": BLOCKS * BLOCK}, warps=2,
            )  # fmt: skip
        return sums

    def decide(self, rule: Rule, question: Question, partial: torch.Tensor, groups: Groups) -> None:
        """Answer a question into `verdict`, and count the rows that count on the device.

        Args:
            rule: The update rule.
            question: What to decide.
            partial: From `partial_sums`, of all devices.
            groups: Hyperparameters of every group.
        """
        if question.max_norm is not None and self._sent.get("max_norm") != question.max_norm:
            # Not an assignment: that would copy the number from the host, and wait.
            self.verdict[prologue.VERDICT.index("max_norm")].fill_(question.max_norm)
            self._sent["max_norm"] = question.max_norm
        self._prepare(rule, groups, partial, question, judged=True)

    def count(self, rule: Rule, groups: Groups, *, judged: bool) -> None:
        """Count the rows that count on the device, if the verdict, where there is one, allows."""
        if self._counted:
            self._prepare(rule, groups, self.verdict[:0], None, judged=judged)

    def _prepare(
        self,
        rule: Rule,
        groups: Groups,
        partial: torch.Tensor,
        question: Question | None,
        *,
        judged: bool,
    ) -> None:
        asked = question or Question()
        numbers, sources = self._hyperparameters(rule, groups)
        counters, scalars = self._counted or [self._nothing, self.verdict]
        found_inf, loss_scale = asked.found_inf, asked.loss_scale
        with self._on_device():
            tensors = [self.verdict if it is None else it for it in (found_inf, loss_scale)]
            self.launcher.launch(
                prologue.prepare, 1,
                (
                    self.verdict, partial, partial.numel(), *tensors, counters,
                    counters.numel() // 3 if self._counted else 0, numbers, sources, scalars,
                ),
                {
                    "DECIDE": question is not None, "JUDGED": judged,
                    "FOUND_INF": found_inf is not None, "LOSS_SCALE": loss_scale is not None,
                    "CLIP": asked.max_norm is not None, "SKIP": asked.skip,
                    "ADAM": rule.name == "adam",
                },
                warps=1, key=tuple(it.dtype for it in tensors),
            )  # fmt: skip

    def step(
        self, rule: Rule, buckets: list[Bucket], *, grad_scale: float, guard: bool, judged: bool
    ) -> None:
        """Launch the step of every kind of row.

        Args:
            rule: The update rule.
            buckets: The scalars of the rows that count on the host.
            grad_scale: Multiplies every gradient.
            guard: Leave elements untouched whose new state would not be finite.
            judged: Whether `verdict` has a say.
        """
        self._runs += 1
        with self._on_device():
            scalars = self._send_scalars(buckets, grad_scale)
            plain = all(is_plain(rule, each.scalars) for each in buckets)
            for launch in self._launches:
                if not launch.tiles:
                    continue
                if launch.kind.counts_on_device:
                    there = self._counted[1]
                    self._launch(rule, launch, there, guard, judged, self._counts_plainly)
                else:
                    self._launch(rule, launch, scalars, guard, judged, plain)
        for counter in self._counters:
            counter.value += 1
        self._keys = [key.next() for key in self._keys]
        if self.captures:
            self._captured.append((dict(self._parts), self._counted, self.verdict, self._spoilt))

    def _launch(
        self,
        rule: Rule,
        launch: Launch,
        scalars: torch.Tensor,
        guard: bool,
        judged: bool,
        plain: bool,
    ) -> None:
        kind = launch.kind
        self.launcher.launch(
            kernels.step, launch.tiles,
            (
                self._table, self._grads, launch.row_of_tile, scalars, self.verdict, self._lanes,
                self._spoilt, self._alarm.data_ptr(),
            ),
            {
                "RULE": 0 if rule.name == "adam" else 1, "PARAM": kind.param,
                "RESIDUAL": kind.residual_bits, "GRAD": kind.grad, "STATE0": kind.state[0],
                "STATE1": kind.state[1], "STATE2": kind.state[2], "STOCHASTIC": kind.stochastic,
                "GUARD": guard, "JUDGED": judged, "PLAIN": plain, "BLOCKS": BLOCKS,
            },
            warps=WARPS[kind.narrowest],
        )  # fmt: skip

    @property
    def captures(self) -> bool:
        """Whether the device is recording a graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @property
    def alarmed(self) -> bool:
        """Whether elements are known to have been left untouched; does not wait."""
        return self._ringing.value != 0

    @property
    def flag(self) -> torch.Tensor:
        """Not 0 where elements were left untouched; on the device."""
        return self._spoilt[:, 0].any().float().view(1)

    def spoilt(self) -> list[tuple[int, int, int]]:
        """Return (entry, elements left untouched, step) of rows that have any; then forget them.

        Waits for the device.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if not self.alarmed:
            return []
        found = self._spoilt.tolist()
        self._spoilt.zero_()
        self._ringing.value = 0
        return [(entry, count, step) for entry, (step, count) in enumerate(found) if step]

    def _send_tables(self, counted: list[int], entries: int) -> None:
        columns, row_of_tile, rows, places = [], [], 0, [0]
        for launch in self._launches:
            parts = launch.host_tables(rows, places[-1])
            columns.append(parts[0])
            row_of_tile.append(parts[1])
            rows += len(launch.rows)
            places.append(places[-1] + launch.padded_tiles)
        nothing = torch.empty(0, dtype=torch.int64)
        tables = [torch.cat(columns or [nothing]), torch.cat(row_of_tile or [nothing.int()])]
        tables.append(torch.tensor(counted, dtype=torch.int64))
        self._table, self._row_of_tile, counters = self._send("tables", tables)
        for launch, place, after in zip(self._launches, places, places[1:], strict=False):
            launch.row_of_tile = self._row_of_tile[place : place + launch.tiles]
            way = launch.kind.way
            self._tiles_of_way[way] = (self._tiles_of_way.get(way, (place,))[0], after)
        with self._on_device():
            if counted:
                shape = (len(counted) // 3, len(with_key(Scalars(0, 0, 0, 0, 0))))
                scalars = torch.empty(shape, dtype=torch.float64, device=self.device)
                self._counted = [counters, scalars]
            if self._spoilt.shape[0] < entries:
                self._spoilt = torch.zeros((entries, 2), dtype=torch.int64, device=self.device)

    def _send_scalars(self, buckets: list[Bucket], grad_scale: float) -> torch.Tensor:
        if not self._keys:
            return self.verdict
        found = {(each.group, int(each.scalars.step)): each.scalars for each in buckets}
        flat: list[float] = []
        for key in self._keys:
            scalars = found[key.group, key.step]
            step = scalars.step if key.counts else float(self._runs)
            scalars = scalars._replace(grad_scale=scalars.grad_scale * grad_scale, step=step)
            flat += with_key(scalars)
        self._parts["scalars"] = [self._uploader.send_numbers("scalars", flat)]
        return self._parts["scalars"][0]

    def _hyperparameters(self, rule: Rule, groups: Groups) -> list[torch.Tensor]:
        """Return the numbers of the groups on the device; sent where they have changed."""
        if not self._counted:
            return [self.verdict, self._nothing]
        numbers, sources = numbers_of(groups, self.device)
        if self._sent.get("numbers") == (numbers, sources):
            return self._parts["numbers"]
        parts = [
            torch.tensor(numbers, dtype=torch.float64), torch.tensor(sources, dtype=torch.int64)
        ]  # fmt: skip
        self._sent["numbers"] = (numbers, sources)
        self._counts_plainly = counts_plainly(rule, numbers, sources)
        return self._send("numbers", parts)

    def _send(self, slot: str, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        with self._on_device():
            self._parts[slot] = self._uploader.send(slot, parts)
        return self._parts[slot]

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


class _Key(NamedTuple):
    """Rows of one group with the same count, and whether they keep one."""

    group: int
    step: int
    counts: bool

    def next(self) -> _Key:
        """Return the key of the step after."""
        return self._replace(step=self.step + 1 if self.counts else 2)


_Counter = ctypes.c_float | ctypes.c_double


def _counter_of(row: Row) -> _Counter | None:
    if row.step_address == 0:
        return None
    kind = ctypes.c_double if row.step_is_double else ctypes.c_float
    return kind.from_address(row.step_address)
