"""What the user's training function is given.

Imports the standard library only, since every cell loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The settings of one cell of a sweep.

    Made by hand it works as well, so that the function can be called without a sweep.

    Attributes:
        optimizer: Name of the optimizer, as the command line said it.
        lr: Learning rate; above 0.
        weight_decay: Weight decay in the optimizer's own convention; at least 0.
        seed: Seed of this repetition. Python's, NumPy's and torch's own generators are seeded
            with it before the function is called.

    Example:
        >>> def train(settings: Settings) -> float:
        ...     theta = 1.0
        ...     for step in range(10):
        ...         theta -= settings.lr * (theta + settings.weight_decay * theta)
        ...         settings.report(step, theta**2)
        ...     return theta**2
        >>> round(train(Settings(lr=0.1, weight_decay=0.0)), 3)
        0.122
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-2
    seed: int = 0
    _report: Callable[[int, float], None] | None = field(default=None, repr=False, compare=False)

    def report(self, step: int, value: float) -> None:
        """Tell the sweep a value on the way, such as the loss after an epoch.

        It becomes a point of the curve in the report, and with `--prune` it may end the cell.
        Outside a sweep nothing happens.

        Args:
            step: How far training has come, in whatever unit all cells share.
            value: The number that the function would return if it ended here.

        Raises:
            ValueError: 64 bits do not hold `step`.
        """
        if self._report is not None:
            count = int(step)
            if abs(count) >= 2**63:
                raise ValueError("a step must lie between -2**63 and 2**63")
            self._report(count, float(value))

    def torch_optimizer(self, params: Any, **options: Any) -> Any:
        """Return the optimizer of these settings from `ebbtide.torch`.

        Args:
            params: Parameters or groups, as `torch.optim` takes them. A group's own lr and
                weight decay are kept.
            **options: More keyword arguments of the class; they win over the settings.

        Raises:
            ValueError: `optimizer` is none of sgd, sgdw, adam and adamw.
            FloatingPointError: A step would remove a whole parameter: the cell diverges.
        """
        import ebbtide.torch

        return self._make(ebbtide.torch, params, options)

    def numpy_optimizer(self, params: Any, **options: Any) -> Any:
        """Return the optimizer of these settings from `ebbtide.numpy`.

        Args:
            params: Arrays by name, a list of arrays, or groups.
            **options: More keyword arguments of the class; they win over the settings.

        Raises:
            ValueError: `optimizer` is none of sgd, sgdw, adam and adamw.
            FloatingPointError: A step would remove a whole parameter: the cell diverges.

        Example:
            >>> import numpy as np
            >>> weight = np.ones((2, 2))
            >>> optimizer = Settings("sgdw", lr=0.1, weight_decay=0.5).numpy_optimizer([weight])
            >>> optimizer.step([np.zeros((2, 2))])
            >>> weight[0, 0]
            np.float64(0.95)
        """
        import ebbtide.numpy

        return self._make(ebbtide.numpy, params, options)

    def _make(self, face: Any, params: Any, options: dict[str, Any]) -> Any:
        from ebbtide.lab.optimizers import OPTIMIZERS

        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"{self.optimizer!r} is none of {', '.join(OPTIMIZERS)}; make it yourself from "
                "settings.lr and settings.weight_decay"
            )
        given = OPTIMIZERS[self.optimizer]
        spec = replace(given, options={**given.options, **options})
        # A gradient that overflows is a result of the cell, not a fault in it.
        chosen = {
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "nonfinite": "propagate",
            **spec.options,
        }
        if not spec.can_run(chosen["lr"], chosen["weight_decay"]):
            raise FloatingPointError(
                f"lr {chosen['lr']:g} and weight decay {chosen['weight_decay']:g} would remove a "
                "whole parameter in one step"
            )
        return getattr(face, spec.family)(params, **chosen)

    def __reduce__(self) -> tuple[Any, ...]:
        # The way back to the sweep stays in this process; data loaders pickle the rest.
        return Settings, (self.optimizer, self.lr, self.weight_decay, self.seed)
