"""From the options of `ebbtide sweep` to the definition of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ebbtide.lab.errors import InputError
from ebbtide.lab.sweep.axes import AXES, axis_points, check_timescale, split_optimizers
from ebbtide.lab.sweep.definition import SAMPLERS, Definition

__all__ = ["DEFAULT_LR", "DEFAULT_WEIGHT_DECAY", "Request"]

DEFAULT_LR = "1e-5..1e-1:9"
DEFAULT_WEIGHT_DECAY = "1e-3..1:7"


@dataclass(frozen=True)
class Request:
    """What the user asked to sweep; an empty axis was not mentioned.

    Attributes:
        optimizers: Names, comma-separated.
        lr: Grids, for all optimizers or `OPTIMIZER=GRID`.
        weight_decay: Grids of the weight decay.
        ratio: Grids of the weight decay divided by the lr.
        timescale: Grids of the timescale in steps.
        seeds: How many seeds.
        seed: The first of them.
        sampler: grid, random or tpe.
        points: Points per optimizer where they are sampled.
        metric: Which of the function's numbers counts.
        maximize: Whether more is better.
        prune: Whether hopeless cells are ended early.
        prune_after: Step up to which none is.
    """

    optimizers: str = "adamw"
    lr: Sequence[str] = ()
    weight_decay: Sequence[str] = ()
    ratio: Sequence[str] = ()
    timescale: Sequence[str] = ()
    seeds: int = 1
    seed: int = 0
    sampler: str = "grid"
    points: int | None = None
    metric: str | None = None
    maximize: bool = False
    prune: bool = False
    prune_after: int = 0

    def definition(self, file: str, function: str) -> Definition:
        """Return the sweep of a function.

        Args:
            file: What the storage calls the user's file.
            function: The function in it.

        Raises:
            InputError: Something asked for makes no sense.
        """
        if self.sampler not in SAMPLERS:
            raise InputError(f"unknown sampler {self.sampler!r}; choose {', '.join(SAMPLERS)}")
        if (self.points is None) != (self.sampler == "grid"):
            raise InputError("--points belongs to the samplers random and tpe, which need it")
        optimizers = split_optimizers(self.optimizers)
        axis, options = self._second_axis()
        if axis == "timescale":
            check_timescale(optimizers)
        sampled = self.sampler != "grid"
        return Definition(
            file=file,
            function=function,
            optimizers=optimizers,
            lrs=axis_points(
                self.lr or (DEFAULT_LR,), optimizers, name="lr", option="--lr", sampled=sampled
            ),
            axis=axis,
            seconds=axis_points(
                options,
                optimizers,
                name=AXES[axis],
                option="--" + axis.replace("_", "-"),
                sampled=sampled,
            ),
            seeds=tuple(range(self.seed, self.seed + self.seeds)),
            sampler=self.sampler,
            points=self.points,
            metric=self.metric,
            maximize=self.maximize,
            prune=self.prune,
            prune_after=self.prune_after,
        )

    def _second_axis(self) -> tuple[str, Sequence[str]]:
        asked = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis)}
        if len(asked) > 1:
            raise InputError(
                "the second axis is one of --weight-decay, --ratio and --timescale, not several"
            )
        return next(iter(asked.items()), ("weight_decay", (DEFAULT_WEIGHT_DECAY,)))
