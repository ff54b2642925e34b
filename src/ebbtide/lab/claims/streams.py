"""Gradients to feed optimizers with, and how far apart two runs come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ebbtide.numpy

__all__ = ["Array", "Gradient", "distance", "noisy_quadratic", "trajectory"]

Array = NDArray[np.float64]
Gradient = Callable[[Array, int], Array]
"""Gradient at θ in step t, counted from 0."""


def noisy_quadratic(*, size: int = 20, seed: int = 0, steps: int = 1000) -> tuple[Array, Gradient]:
    """Return a start and the gradients of an ill-conditioned quadratic with fixed noise.

        g_t = c ⊙ (θ - θ*) + n_t,    c from 0.01 to 1, n_t of deviation 1

    The noise of a step is the same for every run, of up to `steps` steps.
    """
    generator = np.random.default_rng([seed, 7])
    curvature = np.geomspace(0.01, 1, size)
    target, start = generator.normal(0, 1, size), generator.normal(0, 3, size)
    noise = generator.normal(0, 1, (steps, size))

    def gradient(theta: Array, step: int) -> Array:
        return np.asarray(curvature * (theta - target) + noise[step])

    return start, gradient


def trajectory(
    family: str,
    start: Array,
    gradient: Gradient,
    *,
    steps: int,
    schedule: Callable[[int], float] | None = None,
    options: Mapping[str, Any],
) -> Array:
    """Return θ before the first and after every step of one of Ebbtide's optimizers.

    Args:
        family: Name of the class in `ebbtide.numpy`.
        start: θ at the start, float64; not written.
        gradient: The gradients.
        steps: Number of steps.
        schedule: Multiplier of the lr.
        options: The optimizer's keyword arguments.
    """
    theta = start.copy()
    optimizer = getattr(ebbtide.numpy, family)(
        {"theta": theta}, **{"decay_mask": {"theta": True}, **options}
    )
    group, path = optimizer.param_groups[0], [theta.copy()]
    for step in range(steps):
        if schedule is not None:
            group["lr"] = options["lr"] * schedule(step)
        optimizer.step({"theta": gradient(theta, step)})
        path.append(theta.copy())
    return np.stack(path)


def distance(first: Array, second: Array) -> float:
    """Return the largest difference of two runs, relative to the largest movement of the first.

    Example:
        >>> import numpy as np
        >>> path = np.array([[0.0], [1.0], [2.0]])
        >>> distance(path, path + 1e-3)
        0.0005
    """
    moved = float(np.abs(first - first[0]).max())
    return float(f"{np.abs(first - second).max() / moved:.3g}")
