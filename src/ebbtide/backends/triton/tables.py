"""What the kernels read beside tensors: rows of addresses, scalars, hyperparameters.

All of it is small. It is written in the host's memory, pinned where there is a GPU, and copied
without waiting; torch keeps pinned memory until the copy has been made.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ebbtide import codecs
from ebbtide.backends.triton.prologue import NUMBERS, POLICIES
from ebbtide.backends.triton.rows import COLUMNS
from ebbtide.codecs.dither import mix
from ebbtide.plan import BLOCK, Format, Row
from ebbtide.rules import Rule, Scalars

__all__ = [
    "Kind",
    "Launch",
    "Uploader",
    "counts_plainly",
    "is_plain",
    "kind_of",
    "lane_constants",
    "numbers_of",
    "with_key",
]

_TILES_IN_16_BYTES = 4
_STEPS_OF_A_PAGE = 64


class Kind(NamedTuple):
    """What rows must share to be stepped by one launch.

    Attributes:
        param: Format of the parameter, a number of `ebbtide.plan.Format`.
        grad: Of the gradient.
        residual_bits: Of the parameter, 0 for none.
        state: Of the state arrays, -1 where there is none.
        stochastic: Whether the parameter is rounded stochastically.
        counts_on_device: Whether the step count lies there, and the scalars are computed there.
        way: In which the parameter is spread over processes.
    """

    param: int
    grad: int
    residual_bits: int
    state: tuple[int, ...]
    stochastic: bool
    counts_on_device: bool
    way: int

    @property
    def narrowest(self) -> int:
        """Bytes of an element of the narrowest array."""
        formats = [Format(each) for each in (self.param, self.grad, *self.state) if each >= 0]
        residual = [self.residual_bits // 8] if self.residual_bits else []
        return min([each.itemsize for each in formats] + residual)


class Launch:
    """The rows of one kind, as the kernels see them.

    Attributes:
        kind: What the rows share.
        rows: (entry of the plan, row).
        tiles: Number of tiles, of `blocks` blocks each.
        row_of_tile: Index of the row of each tile, on the device.
    """

    def __init__(self, kind: Kind, blocks: int) -> None:
        self.kind = kind
        self.rows: list[tuple[int, Row]] = []
        self.tiles = 0
        self.row_of_tile: torch.Tensor
        self._blocks = blocks
        self._columns: list[int] = []
        self._tiles_of_rows: list[int] = []

    def add(self, entry: int, row: Row, scalars: int) -> None:
        """Add a row.

        Args:
            entry: Of the plan.
            row: The parameter, its gradient and state.
            scalars: Where its scalars lie.
        """
        state = [each.address for each in row.state]
        flat = row.lead == 0 and (row.run_length == row.numel or row.run_length % BLOCK == 0)
        addresses = (row.param.address, row.residual, *state)
        aligned = flat and all(address % 16 == 0 for address in addresses)
        columns = {
            "param": row.param.address,
            **{f"state{k}": address for k, address in enumerate(state)},
            **{f"scale{k}": each.scale for k, each in enumerate(row.state)},
            "residual": row.residual,
            "numel": row.numel,
            "blocks": _blocks_of(row),
            "run_length": row.run_length,
            "lead": row.lead,
            "first_block": row.first_block,
            "salt": row.salt - (row.salt >> 63 << 64),
            "first_tile": self.tiles,
            "scalars": scalars,
            "entry": entry,
            "aligned": int(aligned),
            "grad_format": int(row.grad.format),
            "tiles_before": self.tiles,
        }
        self._columns += [columns.get(name, 0) for name in COLUMNS]
        tiles = -(-_blocks_of(row) // self._blocks)
        self._tiles_of_rows.append(tiles)
        self.tiles += tiles
        self.rows.append((entry, row))

    @property
    def padded_tiles(self) -> int:
        """Number of tiles with those added so that another launch's begin at 16 bytes."""
        return -(-self.tiles // _TILES_IN_16_BYTES) * _TILES_IN_16_BYTES

    def host_tables(self, rows_before: int, tiles_before: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows' columns and the row of each tile, on the host.

        Tiles that are added belong to the last row, behind its end.

        Args:
            rows_before: Rows of the launches before.
            tiles_before: Their tiles, padded.
        """
        columns = torch.tensor(self._columns, dtype=torch.int64).view(-1, len(COLUMNS))
        columns[:, COLUMNS.index("tiles_before")] += tiles_before
        tiles = torch.tensor(self._tiles_of_rows)
        tiles[-1] += self.padded_tiles - self.tiles
        index = torch.arange(rows_before, rows_before + len(self.rows), dtype=torch.int32)
        return columns.flatten(), torch.repeat_interleave(index, tiles)


class Uploader:
    """Copies tables to one device without waiting, also while a graph is captured.

    A replay copies from the memory of the host that was captured, so that memory is never used
    again; and none can be allocated during a capture, so some is kept in reserve.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reserve: dict[str, torch.Tensor] = {}
        self._captured: list[torch.Tensor] = []
        self._there: dict[str, torch.Tensor] = {}  # what was sent last
        self._pages: dict[str, _Page] = {}

    def release(self) -> None:
        """Give back what lies on the device, once the current stream is done with it."""
        if self._there and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self._device)
            for there in self._there.values():
                there.record_stream(stream)
        self._there, self._pages = {}, {}

    def send_numbers(self, slot: str, numbers: list[float]) -> torch.Tensor:
        """Copy float64 numbers that change in every step; they lie where those before lay."""
        if self._device.type == "cpu" or torch.cuda.is_current_stream_capturing():
            return self.send(slot, [torch.tensor(numbers, dtype=torch.float64)])[0]
        there = self._there.get(slot)
        if there is None or there.numel() != len(numbers):
            there = torch.empty(len(numbers), dtype=torch.float64, device=self._device)
            self._there[slot] = there
            self._pages.pop(slot, None)
        page = self._pages.get(slot)
        if page is None or page.left == 0:
            self._keep_in_reserve(slot, there.nbytes)
            page = self._pages[slot] = _Page(len(numbers))
        return there.copy_(page.written(numbers), non_blocking=True)

    def send(self, slot: str, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy host tensors to the device in one go; returns them there.

        Args:
            slot: What they are; memory is kept in reserve for each slot.
            parts: Tensors on the host.

        Raises:
            RuntimeError: A capture before the first step without.
        """
        if self._device.type == "cpu":
            return list(parts)
        padded = [-(-part.nbytes // 16) * 16 for part in parts]
        host = self._host(slot, sum(padded))
        there = torch.empty(sum(padded), dtype=torch.uint8, device=self._device)
        self._there[slot] = there
        views, at = [], 0
        for part, length in zip(parts, padded, strict=True):
            place = slice(at, at + part.nbytes)
            host[place].view(part.dtype).copy_(part.flatten())
            views.append(there[place].view(part.dtype))
            at += length
        there.copy_(host[:at], non_blocking=True)
        return views

    def _host(self, slot: str, size: int) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            if not self._has_reserve(slot, size):
                raise RuntimeError(
                    "a step that is captured in a graph must have been taken without before: "
                    "warm up first, with the same parameters"
                )
            self._captured.append(self._reserve.pop(slot))
            return self._captured[-1]
        self._keep_in_reserve(slot, size)
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _has_reserve(self, slot: str, size: int) -> bool:
        return slot in self._reserve and self._reserve[slot].numel() >= size

    def _keep_in_reserve(self, slot: str, size: int) -> None:
        if not self._has_reserve(slot, size):
            self._reserve[slot] = torch.empty(size, dtype=torch.uint8, pin_memory=True)


class _Page:
    """Pinned memory for the numbers of some steps; torch keeps it until the last was copied.

    Args:
        count: Numbers of a step.

    Attributes:
        left: Steps that it still has room for.
    """

    def __init__(self, count: int) -> None:
        self.left = _STEPS_OF_A_PAGE
        whole = torch.empty((self.left, count), dtype=torch.float64, pin_memory=True)
        self._lines = whole.unbind()
        self._memory = (ctypes.c_char * whole.nbytes).from_address(whole.data_ptr())
        self._line = struct.Struct(f"{count}d")

    def written(self, numbers: list[float]) -> torch.Tensor:
        """Return memory that holds the numbers, for one copy."""
        self.left -= 1
        self._line.pack_into(self._memory, self.left * self._line.size, *numbers)
        return self._lines[self.left]


def kind_of(row: Row) -> Kind:
    """Return what a row must share with others to be stepped with them."""
    state = [int(each.format) for each in row.state]
    return Kind(
        int(row.param.format),
        int(row.grad.format),
        row.residual_bits,
        (*state, *[-1] * (3 - len(state))),
        row.stochastic,
        row.counts_on_device,
        row.way,
    )


def lane_constants() -> torch.Tensor:
    """Return the constants by which the 128 elements of a block vary its random bits."""
    lanes = [codecs.lane_constant(lane) for lane in range(BLOCK)]
    return torch.tensor(lanes, dtype=torch.int64).to(torch.int32)


def numbers_of(
    groups: Iterable[Mapping[str, Any]], device: torch.device
) -> tuple[list[float], list[int]]:
    """Return the hyperparameters of each group, and the addresses of those on the device.

    Returns:
        `NUMBERS` of each group, and for each of them the address of the tensor that it is,
        negative where that is float64, 0 where it is a number.
    """
    numbers: list[float] = []
    sources: list[int] = []
    for group in groups:
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        values = {**group, "beta1": beta1, "beta2": beta2}
        values["decay_policy"] = POLICIES.index(group["decay_policy"])
        for name in NUMBERS:
            value = values.get(name, 0.0)
            on_device = isinstance(value, torch.Tensor) and value.device == device
            # One on another GPU is for the rows there, and would have to be waited for.
            elsewhere = isinstance(value, torch.Tensor) and not value.is_cpu
            numbers.append(0.0 if on_device or elsewhere else float(value))
            sources.append(_source(value) if on_device else 0)
    return numbers, sources


def with_key(scalars: Scalars) -> list[float]:
    """Return the scalars as the kernels read them, behind them halves of `codecs.epoch_key`."""
    return [*scalars, *_epoch_key(int(scalars.seed), int(scalars.step) >> 7)]


@lru_cache(maxsize=1024)
def _epoch_key(seed: int, epoch: int) -> tuple[float, float]:
    key = mix(seed) ^ mix(epoch * 0xD1342543DE82EF95 & ((1 << 64) - 1))
    return float(key & 0xFFFFFFFF), float(key >> 32)


def is_plain(rule: Rule, scalars: Scalars) -> bool:
    """Tell whether a step needs but the usual: no L2, no cautious decay, β1 above 0.5, an eps."""
    plain = scalars.l2 == 0 == scalars.cautious
    adam = rule.name == "adam"
    return plain and not (adam and (scalars.exp_avg_weight > 0.499 or scalars.eps < 1e-30))


def counts_plainly(rule: Rule, numbers: list[float], sources: list[int]) -> bool:
    """Tell whether `is_plain` of all groups whose scalars are computed on the device.

    Args:
        rule: The update rule.
        numbers: From `numbers_of`.
        sources: From there; what is on the device is not known here.
    """
    asked = ("weight_decay", "decay_policy", "cautious", "beta1", "eps")
    for at in range(0, len(numbers), len(NUMBERS)):
        known = {name: at + NUMBERS.index(name) for name in asked}
        if any(sources[place] for place in known.values()):
            return False
        weight_decay, policy, cautious, beta1, eps = (numbers[place] for place in known.values())
        l2 = weight_decay if POLICIES[int(policy)] == "l2" else 0.0
        of_group = Scalars(0, 0, l2, cautious, 0, exp_avg_weight=1 - beta1, eps=eps)
        if not is_plain(rule, of_group):
            return False
    return True


def _source(value: torch.Tensor) -> int:
    return -value.data_ptr() if value.dtype == torch.float64 else value.data_ptr()


def _blocks_of(row: Row) -> int:
    if row.run_length == 0:
        return 0
    return row.numel // row.run_length * (-(-(row.lead + row.run_length) // BLOCK))
