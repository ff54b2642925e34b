"""The grouping as a value: it prints itself and becomes JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

__all__ = ["GroupRow", "GroupTable", "ParamRow", "format_bytes"]


@dataclass(frozen=True)
class ParamRow:
    """One parameter.

    Attributes:
        name: The name it goes by.
        shape: Of the whole parameter.
        dtype: Of its elements.
        group: Name of its group; empty for a parameter in none.
        weight_decay: In force; None for a parameter in no group.
        lr: In force, where the group has one.
        reason: Why it decays or does not.
        state_format: In which its moments are kept.
        state_bytes: Of its moments and its residual, on this process.
        tied: Other names of the same tensor.
        frozen: Whether it takes no gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: str
    weight_decay: float | None
    lr: float | None
    reason: str
    state_format: str
    state_bytes: int
    tied: tuple[str, ...] = ()
    frozen: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay reaches it."""
        return bool(self.weight_decay)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, texts and numbers."""
        fields = dataclasses.asdict(self)
        return {**fields, "shape": list(self.shape), "tied": list(self.tied),
                "numel": self.numel, "decays": self.decays}  # fmt: skip


@dataclass(frozen=True)
class GroupRow:
    """The sums of one group."""

    name: str
    weight_decay: float | None
    lr: float | None
    tensors: int
    numel: int
    state_bytes: int


@dataclass(frozen=True)
class GroupTable:
    """Every parameter with its group, its decay and the reason.

    Attributes:
        rows: The parameters, in the order of the model where it is known.
        missing: Trainable parameters of the model that are in no group.
    """

    rows: tuple[ParamRow, ...]
    missing: tuple[str, ...] = ()

    @property
    def decayed_below_2d(self) -> tuple[str, ...]:
        """Names of the parameters below two dimensions that decay; there should be none."""
        return tuple(row.name for row in self.rows if row.decays and len(row.shape) < 2)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that take no gradient."""
        return tuple(row.name for row in self.rows if row.frozen)

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state once every parameter has been stepped."""
        return sum(row.state_bytes for row in self.rows)

    def groups(self) -> list[GroupRow]:
        """Return the sums of each group."""
        members: dict[str, list[ParamRow]] = {}
        for row in self.rows:
            if row.weight_decay is not None:
                members.setdefault(row.group, []).append(row)
        return [
            GroupRow(name, rows[0].weight_decay, rows[0].lr, len(rows),
                     sum(row.numel for row in rows), sum(row.state_bytes for row in rows))
            for name, rows in members.items()
        ]  # fmt: skip

    def __str__(self) -> str:
        header = ("parameter", "shape", "group", "decay", "reason", "state")
        lines = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([text[0], "  ".join("─" * width for width in widths), *text[1:], "",
                          *self._summary()])  # fmt: skip

    def _summary(self) -> list[str]:
        groups = self.groups()
        width = max((len(group.name) for group in groups), default=0)
        lines = []
        for group in groups:
            lr = "" if group.lr is None else f", lr {group.lr:g}"
            lines.append(
                f"{group.name:<{width}}  weight decay {group.weight_decay:g}{lr}: "
                f"{_count(group.tensors, 'tensor')}, {_count(group.numel, 'element')}, "
                f"state {format_bytes(group.state_bytes)}"
            )
        if len(groups) > 1:
            lines.append(f"{'all':<{width}}  state {format_bytes(self.state_bytes)}")
        if self.frozen:
            numel = sum(row.numel for row in self.rows if row.frozen)
            lines.append(
                f"frozen: {_count(len(self.frozen), 'tensor')}, {_count(numel, 'element')}"
            )
        lines.append(f"decayed below 2-D: {', '.join(self.decayed_below_2d) or 'none'}")
        if self.missing:
            lines.append(f"trainable but in no group: {', '.join(self.missing)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, texts and numbers."""
        return {
            "parameters": [row.to_dict() for row in self.rows],
            "groups": [dataclasses.asdict(group) for group in self.groups()],
            "decayed_below_2d": list(self.decayed_below_2d),
            "frozen": list(self.frozen),
            "missing": list(self.missing),
            "state_bytes": self.state_bytes,
        }

    def to_json(self) -> str:
        """Return the table as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


def format_bytes(count: float) -> str:
    """Return a number of bytes as people read it.

    Example:
        >>> format_bytes(512), format_bytes(1_500_000), format_bytes(2**34)
        ('512 B', '1.43 MiB', '16 GiB')
    """
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def _cells(row: ParamRow) -> tuple[str, str, str, str, str, str]:
    tied = f", tied to {', '.join(row.tied)}" if row.tied else ""
    if row.weight_decay is None:
        group, decay, state = "frozen" if row.frozen else "none", "", ""
    else:
        group, decay = row.group, f"{row.weight_decay:g}"
        state = f"{row.state_format} {format_bytes(row.state_bytes)}"
        if row.frozen:
            group += " (frozen)"
    shape = "×".join(map(str, row.shape)) or "scalar"
    return row.name, shape, group, decay, row.reason + tied, state


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
