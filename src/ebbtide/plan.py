"""The plan: what a step will touch, as rows of addresses that know no framework.

A face (`ebbtide.numpy`, `ebbtide.torch`) turns parameters, gradients and state into rows;
everything that could make a step wrong is checked here or there, before anything is written. A
backend runs the plan.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from ebbtide.memory import Region, check_overlap, extents_of, layout_of
from ebbtide.rules import Rule, Scalars

__all__ = [
    "BLOCK",
    "Backend",
    "Bucket",
    "Field",
    "Format",
    "Outcome",
    "Plan",
    "Row",
    "clip_scale",
    "extents_of",
    "layout_of",
    "nonfinite_message",
    "salt_of",
]

BLOCK = 128  # elements that share a hash for stochastic rounding, and a scale of 8-bit state


class Format(IntEnum):
    """How the elements of an array are stored; the values of `csrc/step.h`."""

    FLOAT32 = 0
    FLOAT64 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    SIGNED8 = 4
    WINDOW8 = 5

    @property
    def itemsize(self) -> int:
        """Bytes of one element, without its share of the scales."""
        return (4, 8, 2, 2, 1, 1)[self]


class Field(NamedTuple):
    """One array of a row: its address, the address of its scales (0 if none), its format."""

    address: int
    scale: int
    format: Format


@dataclass(slots=True)
class Row:
    """One parameter with its gradient and state; all arrays share one dense layout.

    Attributes:
        name: What the parameter is called in errors.
        numel: Number of elements of this row.
        state: In the order of `Rule.state_keys`.
        extents: Shape and stride of each dimension larger than one, flat.
        residual: Address of the low bits of a 16-bit parameter, 0 if there are none.
        stochastic: Round the parameter stochastically.
        run_length: Elements that blocks do not cross; 0 for an empty parameter.
        lead: Elements of the first block that belong to another shard.
        first_block: Index of the first block in the whole parameter.
        salt: Of the parameter's name, for the random bits.
        step_address: Of the step count in the state, 0 if the state has none.
        count: Steps taken, where the state has no count.
        device: Where the memory is, in torch's words.
        counts_on_device: The step count lies there too and must not be read.
        way: Of those in which parameters are spread over processes, for their common norm.
        local: The row is the local shard of a distributed tensor.
        lazy_grad: Its gradient may read otherwise than it lies, as torch's lazy conjugates do.
        keep: Objects that own the memory of the addresses.
    """

    name: str
    numel: int
    param: Field
    grad: Field
    state: tuple[Field, ...] = ()
    extents: tuple[int, ...] = ()
    residual: int = 0
    residual_bits: int = 0
    stochastic: bool = False
    run_length: int = 0
    lead: int = 0
    first_block: int = 0
    salt: int = 0
    step_address: int = 0
    step_is_double: bool = False
    count: int = 0
    device: str = "cpu"
    counts_on_device: bool = False
    way: int = 0
    local: bool = False
    lazy_grad: bool = False
    keep: tuple[object, ...] = ()


class Bucket(NamedTuple):
    """The scalars of the rows of one group that are about to take the same step."""

    group: int
    scalars: Scalars
    hyperparameters: Mapping[str, Any]


class Outcome(NamedTuple):
    """What a backend reports of a step: elements left untouched, by entry of the plan."""

    untouched: Sequence[tuple[int, int]]

    @property
    def total(self) -> int:
        """Number of elements left untouched."""
        return sum(count for _, count in self.untouched)


@dataclass
class Plan:
    """Every parameter of an optimizer in the order of its groups.

    Attributes:
        entries: (parameter, group index, row or `None` without a gradient, its state dict).
        cacheable: Whether the rows stay true while nothing moves; not so for staged copies.
        regions: The memory that the step writes in the end, where that is not the rows' own.
        elsewhere: Entries whose rows are in another plan.
    """

    rule: Rule
    entries: list[tuple[Any, int, Row | None, dict[str, Any] | None]] = field(default_factory=list)
    cacheable: bool = True
    regions: list[Region] = field(default_factory=list)
    elsewhere: set[int] = field(default_factory=set)

    def rows(self) -> Iterable[tuple[int, int, Row]]:
        """Yield (entry, group, row) of the parameters that have a gradient."""
        for index, (_, group, row, _) in enumerate(self.entries):
            if row is not None:
                yield index, group, row

    def check_formats(self) -> None:
        """Refuse rows whose formats no kernel takes together.

        Raises:
            ValueError: The parameter is named, and what does not go with what.
        """
        for _, _, row in self.rows():
            problem = _format_problem(row, self.rule)
            if problem:
                raise ValueError(f"parameter {row.name!r}: {problem}")

    def check_overlap(self) -> None:
        """Refuse rows that would write the same memory twice.

        Raises:
            ValueError: Two parameters or state arrays share memory; both are named.
        """
        check_overlap(
            self.regions
            or [
                Region(row.name, each.address, each.format.itemsize, (row.numel, 1))
                for _, _, row in self.rows()
                for each in (row.param, *row.state)
            ]
        )


class Backend(Protocol):
    """Who does the arithmetic. It knows no framework's classes."""

    name: str

    def load(self, plan: Plan) -> list[tuple[int, int]]:
        """Take the rows of a plan; returns the (group, step) pairs it needs scalars for."""
        ...

    def run(self, plan: Plan, buckets: list[Bucket], *, grad_scale: float, guard: bool) -> Outcome:
        """Take one step of every row.

        Args:
            plan: The rows; already checked.
            buckets: The scalars of each group and step count that occurs.
            grad_scale: Multiplies every gradient (clipping, loss scale).
            guard: Leave elements untouched whose new state would not be finite.
        """
        ...

    def sum_squares(self, plan: Plan) -> float:
        """Return the sum of squares of all gradients, in float64."""
        ...


def _format_problem(row: Row, rule: Rule) -> str:
    formats = {row.param.format, row.grad.format, *(each.format for each in row.state)}
    if row.residual_bits:
        if row.param.format not in (Format.BFLOAT16, Format.FLOAT16):
            return f"a residual completes numbers of 16 bits, not {row.param.format.name.lower()}"
        if row.residual_bits not in (8, 16) or not (row.residual or row.numel == 0):
            return "a residual has 8 or 16 bits and an address"
    if len(formats) == 1:
        return ""
    if Format.FLOAT64 in formats:
        return "float64 goes with a gradient and state of float64 only"
    eight = {Format.SIGNED8, Format.WINDOW8} & formats
    if not eight:
        return ""
    usual = (Format.SIGNED8, *([Format.WINDOW8] * max(len(row.state) - 1, 1)))
    if rule.name != "adam" or tuple(each.format for each in row.state) != usual:
        return "state of 8 bits is for both moments of Adam, not for part of them or for SGD"
    if row.numel and not all(each.scale for each in row.state):
        return "state of 8 bits needs its scales"
    return ""


def salt_of(name: str) -> int:
    """Hash a parameter's name to 64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def clip_scale(sum_squares: float, max_norm: float | None) -> float:
    """Return what the gradients are multiplied by to clip their global norm.

        scale ← min(1, max_norm / (√sum_squares + 10⁻⁶))

    The same scale as `torch.nn.utils.clip_grad_norm_`, which is 0 where the norm is infinite and
    NaN where it is NaN; 1 where nothing is clipped.
    """
    if max_norm is None:
        return 1.0
    scale = max_norm / (math.sqrt(sum_squares) + 1e-6) if sum_squares >= 0 else math.nan
    return 1.0 if scale > 1.0 else scale  # NaN stays


def nonfinite_message(rows: Iterable[tuple[str, int, int]], step: int) -> str:
    """Word the error for gradients that are not finite.

    Args:
        rows: (name, elements left untouched, elements in all) of each parameter concerned.
        step: 1-based count of the step.
    """
    rows = list(rows)
    shown = ", ".join(f"{name!r} ({count} of {numel})" for name, count, numel in rows[:8])
    more = f" and {len(rows) - 8} more parameters" if len(rows) > 8 else ""
    return (
        f"non-finite gradient (or too large to square) at step {step} in {shown}{more}; those "
        'elements were left untouched, the rest of the step is complete. nonfinite="skip" drops '
        'such steps, "propagate" lets them through as torch does'
    )
