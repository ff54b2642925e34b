"""What a sweep is: everything that decides which cells there are and what they mean.

Two commands with the same definition are the same sweep, and the second goes on where the first
ended. How the work is done (workers, timeouts, storage) is no part of it.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Self

from ebbtide.lab.errors import InputError
from ebbtide.lab.sweep.axes import axis_value

__all__ = ["SAMPLERS", "Definition", "Slot"]

SAMPLERS = ("grid", "random", "tpe")
_MOST_CELLS = 100_000


@dataclass(frozen=True)
class Slot:
    """A place for one result: a point of one optimizer under one seed.

    Attributes:
        index: Its number in the sweep.
        optimizer: Name.
        point: Number of the point among the optimizer's.
        seed: Seed.
        place: lr and value of the second axis; None where the sampler decides when it is run.
    """

    index: int
    optimizer: str
    point: int
    seed: int
    place: tuple[float, float] | None


@dataclass(frozen=True)
class Definition:
    """A sweep.

    Attributes:
        file: The user's file, as seen from the storage.
        function: Name of the function in it.
        optimizers: Names.
        lrs: Learning rates by optimizer; the two ends of the range where they are sampled.
        axis: What the second axis is, a key of `AXES`.
        seconds: Points of the second axis by optimizer, or the ends of its range.
        seeds: Seeds, the same for every point.
        sampler: One of `SAMPLERS`.
        points: Points per optimizer where they are sampled, else None.
        metric: Which number of the function's counts, where it returns several.
        maximize: Whether more is better.
        prune: Whether hopeless cells are ended early.
        prune_after: Step up to which no cell is.
    """

    file: str
    function: str
    optimizers: tuple[str, ...]
    lrs: Mapping[str, tuple[float, ...]]
    axis: str
    seconds: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...] = (0,)
    sampler: str = "grid"
    points: int | None = None
    metric: str | None = None
    maximize: bool = False
    prune: bool = False
    prune_after: int = 0

    def __post_init__(self) -> None:
        points = [
            self.points or len(self.lrs[optimizer]) * len(self.seconds[optimizer])
            for optimizer in self.optimizers
        ]
        cells = sum(points) * len(self.seeds)
        if cells > _MOST_CELLS:
            raise InputError(f"a sweep of {cells:,} cells is too large")

    @property
    def name(self) -> str:
        """Name of the study: the function's, and a hash of everything else."""
        code = hashlib.sha256(self.to_json().encode()).hexdigest()[:8]
        stem = self.file.rpartition("/")[2].removesuffix(".py")
        # It names a folder, too, and must not look like an option.
        plain = re.sub(r"[^\w.+ -]", "_", f"{stem}-{self.function}").lstrip(" .+-")
        return f"{plain}-{code}"

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All cells in the order they are run: every point under the first seed first."""
        places = {optimizer: self._places(optimizer) for optimizer in self.optimizers}
        order = [
            (optimizer, point)
            for point in range(max(map(len, places.values())))
            for optimizer in self.optimizers
            if point < len(places[optimizer])
        ]
        runs = [(seed, *item) for seed in self.seeds for item in order]
        return tuple(
            Slot(index, optimizer, point, seed, places[optimizer][point])
            for index, (seed, optimizer, point) in enumerate(runs)
        )

    @property
    def sameness(self) -> tuple[Any, ...]:
        """What two sweeps must share for a cell of one to be a cell of the other."""
        return self.file, self.function, self.metric, self.maximize

    def weight_decay(self, lr: float, second: float) -> float:
        """Return the weight decay at a point."""
        return axis_value(self.axis, lr, second)

    def to_json(self) -> str:
        """Return the definition as text, the same for the same sweep."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the definition that `to_json` wrote."""
        content = json.loads(text)
        for key in ("optimizers", "seeds"):
            content[key] = tuple(content[key])
        for key in ("lrs", "seconds"):
            content[key] = {name: tuple(values) for name, values in content[key].items()}
        return cls(**content)

    def differences(self, other: Definition) -> Iterator[tuple[str, Any, Any]]:
        """Return what distinguishes another definition: the field, here and there."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if mine != theirs:
                yield item.name, mine, theirs

    def _places(self, optimizer: str) -> list[tuple[float, float] | None]:
        # The same draws for every optimizer and every run of the command. A grid is mixed as
        # well: its first half then says something about all of it.
        draw = random.Random(0)
        lrs, seconds = self.lrs[optimizer], self.seconds[optimizer]
        if self.sampler == "tpe":
            return [None] * (self.points or 0)
        if self.sampler == "random":
            return [
                (_between(lrs, draw.random()), _between(seconds, draw.random()))
                for _ in range(self.points or 0)
            ]
        grid: list[tuple[float, float] | None] = [(lr, y) for lr in lrs for y in seconds]
        draw.shuffle(grid)
        return grid


def _between(ends: tuple[float, ...], share: float) -> float:
    """Return the point at a share of the way at equal ratios, to six digits."""
    low, high = ends
    return min(max(float(f"{low * (high / low) ** share:.6g}"), low), high)
