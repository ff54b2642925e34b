"""What each weight-decay policy removes from a parameter in one step.

A policy is one number by the time a backend runs: the share of the parameter removed this
step, or the coefficient of θ that is added to the gradient. `cautious` decay is not a policy
but a mask on the share, applied element by element inside the kernels.

Imports the standard library only.
"""

from __future__ import annotations

__all__ = ["DECAY_POLICIES", "decay_share", "l2_coefficient"]

DECAY_POLICIES = ("l2", "decoupled", "independent", "corrected")

_NEEDS_BASE_LR = ("independent", "corrected")


def decay_share(policy: str, *, lr: float, base_lr: float, weight_decay: float) -> float:
    """Return the share of a parameter that this step removes.

        l2           0, since the decay is part of the gradient
        decoupled    lr·λ
        independent  (lr / base_lr)·λ
        corrected    lr·(lr / base_lr)·λ

    Every policy removes nothing at lr 0.

    Args:
        policy: One of `DECAY_POLICIES`.
        lr: Learning rate of this step, after the schedule; at least 0.
        base_lr: Learning rate of the group before any schedule; above 0. Read only by
            `independent` and `corrected`.
        weight_decay: λ in the convention of the policy.

    Returns:
        The share d in θ ← θ·(1 - d).

    Raises:
        ValueError: The policy is unknown, or it needs a `base_lr` and that is not above 0.

    Example:
        The same λ under four policies, in the middle of a schedule:

        >>> for policy in DECAY_POLICIES:
        ...     share = decay_share(policy, lr=5e-4, base_lr=1e-3, weight_decay=0.1)
        ...     print(policy, round(share, 9))
        l2 0.0
        decoupled 5e-05
        independent 0.05
        corrected 2.5e-05

    References:
        Loshchilov & Hutter 2019, Algorithm 2, arXiv:1711.05101 (`independent`).
        Defazio 2025, arXiv:2506.02285 (`corrected`). Deviation: the paper corrects the layers
        that a normalisation follows; here the groups say which parameters that is.
    """
    _check_policy(policy)
    if policy in _NEEDS_BASE_LR and not base_lr > 0:
        raise ValueError(
            f"decay_policy {policy!r} divides by base_lr, which must be above 0, got {base_lr}"
        )
    if policy == "l2" or lr <= 0:  # negative where a schedule misses 0 by its rounding
        return 0.0
    if policy == "decoupled":
        return lr * weight_decay
    if policy == "independent":
        return (lr / base_lr) * weight_decay
    return lr * (lr / base_lr) * weight_decay


def l2_coefficient(policy: str, *, weight_decay: float) -> float:
    """Return the coefficient of θ that the policy adds to the gradient.

        g ← g + λ·θ        (l2; the other policies leave the gradient alone)

    Args:
        policy: One of `DECAY_POLICIES`.
        weight_decay: λ in the convention of the policy.

    Raises:
        ValueError: The policy is unknown.

    Example:
        >>> l2_coefficient("l2", weight_decay=5e-4), l2_coefficient("decoupled", weight_decay=0.1)
        (0.0005, 0.0)
    """
    _check_policy(policy)
    return weight_decay if policy == "l2" else 0.0


def _check_policy(policy: str) -> None:
    if policy not in DECAY_POLICIES:
        valid = ", ".join(DECAY_POLICIES)
        raise ValueError(f"unknown decay_policy {policy!r}; the policies are {valid}")
