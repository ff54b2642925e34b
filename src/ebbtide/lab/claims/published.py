"""The algorithms as their papers print them, written apart from Ebbtide's own.

Nothing here calls the library: these are the independent witnesses of the claims.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ebbtide.lab.claims.streams import Array, Gradient

__all__ = ["adam_as_published", "rmsprop", "sgdw_as_published"]


def adam_as_published(
    start: Array,
    gradient: Gradient,
    *,
    steps: int,
    alpha: float,
    l2: float = 0.0,
    decay: float = 0.0,
    schedule: Callable[[int], float] | None = None,
    slip: str = "",
) -> Array:
    """Return the run of Algorithm 2 of Loshchilov & Hutter 2019, line by line.

        g ← ∇f(θ) + l2·θ
        m ← β1·m + (1 - β1)·g,   v ← β2·v + (1 - β2)·g²
        m̂ ← m/(1 - β1ᵗ),         v̂ ← v/(1 - β2ᵗ)
        θ ← θ - η·(α·m̂/(√v̂ + ε) + decay·θ)

    Args:
        start: θ at the start.
        gradient: ∇f.
        steps: Number of steps.
        alpha: α.
        l2: Coefficient of the L2 term.
        decay: λ of the decoupled term, not multiplied by α.
        schedule: η by the step, counted from 0; 1 if `None`.
        slip: A mistake to make, for comparison: "bias" leaves the correction out, "square"
            averages |g| where g² belongs, "penalty" takes the slope of l2/2·θ for that of
            l2/2·θ², "schedule" leaves η out.
    """
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    theta = start.astype(np.float64)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    path = [theta]
    for t in range(1, steps + 1):
        g = gradient(theta, t - 1) + (l2 / 2 if slip == "penalty" else l2 * theta)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (np.abs(g) if slip == "square" else g * g)
        m_hat = m if slip == "bias" else m / (1 - beta1**t)
        v_hat = v if slip == "bias" else v / (1 - beta2**t)
        eta = 1.0 if schedule is None or slip == "schedule" else schedule(t - 1)
        theta = theta - eta * (alpha * m_hat / (np.sqrt(v_hat) + eps) + decay * theta)
        path.append(theta)
    return np.stack(path)


def sgdw_as_published(
    start: Array, gradient: Gradient, *, steps: int, alpha: float, momentum: float, decay: float
) -> Array:
    """Return the run of Algorithm 1 (SGDW) of Loshchilov & Hutter 2019 with η = 1.

    m ← β1·m + α·∇f(θ)
    θ ← θ - m - decay·θ
    """
    theta = start.astype(np.float64)
    m = np.zeros_like(theta)
    path = [theta]
    for t in range(steps):
        m = momentum * m + alpha * gradient(theta, t)
        theta = theta - m - decay * theta
        path.append(theta)
    return np.stack(path)


def rmsprop(
    start: Array, gradient: Gradient, *, steps: int, lr: float, beta: float, corrected: bool
) -> Array:
    """Return a run of RMSProp, with or without the correction of the start at zero.

        v ← β·v + (1 - β)·g²
        θ ← θ - lr·g/(√v + ε),   or with √(v/(1 - βᵗ)) in place of √v

    References:
        Tieleman & Hinton 2012, lecture 6.5. Deviation: ε = 1e-8 is added outside the root.
    """
    theta = start.astype(np.float64)
    v = np.zeros_like(theta)
    path = [theta]
    for t in range(1, steps + 1):
        g = gradient(theta, t - 1)
        v = beta * v + (1 - beta) * g * g
        theta = theta - lr * g / (np.sqrt(v / (1 - beta**t) if corrected else v) + 1e-8)
        path.append(theta)
    return np.stack(path)
