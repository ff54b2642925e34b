"""Weight decay between the conventions that share its name, and between schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

from ebbtide.convert._conversion import Conversion, check_range, check_rate

__all__ = ["CONVENTIONS", "convert_weight_decay", "for_schedule"]

# Convention: the power of the schedule's multiplier η in the share that a step removes.
CONVENTIONS = {"decoupled": 1, "independent": 1, "corrected": 2, "constant": 0, "sgd_l2": 1}

_SHARES = {
    "decoupled": "lr·η·λ",
    "independent": "η·λ",
    "corrected": "lr·η²·λ",
    "constant": "λ",
    "sgd_l2": "lr·η·λ·(1 - dampening)/(1 - momentum)",
}


def convert_weight_decay(
    weight_decay: float,
    source: str,
    target: str,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    match: str | None = None,
    schedule: Callable[[float], float] | None = None,
    total_steps: int | None = None,
) -> Conversion:
    """Convert a weight decay from one convention to another.

    With η the multiplier of the schedule, a step removes

        decoupled    lr·η·λ
        independent  η·λ
        corrected    lr·η²·λ
        constant     λ                        (no schedule at all)
        sgd_l2       lr·η·λ·(1 - dampening)/(1 - momentum)

    Conventions with the same power of η remove the same at every step. The others agree either
    at the peak or in total, and which must be said.

    Args:
        weight_decay: λ in the source's convention; at least 0.
        source: One of `CONVENTIONS`.
        target: One of `CONVENTIONS`.
        lr: Learning rate of the group before any schedule; above 0.
        momentum: Momentum of SGD, in [0, 1); read for `sgd_l2`.
        dampening: Dampening of SGD, in [0, 1); read for `sgd_l2`.
        match: "peak" or "total"; needed where the powers of η differ.
        schedule: Multiplier of the learning rate; needed for "total".
        total_steps: Length of the run; needed for "total".

    Raises:
        ValueError: A convention is unknown, a number out of range, or what to match unsaid.

    Example:
        The paper's λ and PyTorch's, then an SGD recipe's L2 as decoupled decay:

        >>> convert_weight_decay(0.1, "decoupled", "independent", lr=1e-3).value
        0.0001
        >>> print(convert_weight_decay(5e-4, "sgd_l2", "decoupled", lr=0.1, momentum=0.9))
        0.005
          same share every step: lr·η·λ·(1 - dampening)/(1 - momentum) = lr·η·λ' (approximate)
          With momentum L2 arrives spread over later steps, so the two runs stay close, not equal.

    References:
        Loshchilov & Hutter 2019, Algorithms 1 and 2, Proposition 1, arXiv:1711.05101.
    """
    _check_convention(source)
    _check_convention(target)
    check_range("weight_decay", weight_decay, at_least=0.0)
    check_range("lr", lr, above=0.0)
    check_rate("momentum", momentum)
    check_rate("dampening", dampening)
    scales = {"independent": 1.0, "constant": 1.0}
    scales["sgd_l2"] = lr * (1.0 - dampening) / (1.0 - momentum)
    value = weight_decay * scales.get(source, lr) / scales.get(target, lr)
    powers = CONVENTIONS[source], CONVENTIONS[target]
    rule = "same share every step"
    if powers[0] != powers[1]:
        value *= _schedule_ratio(powers, match, schedule, total_steps)
        rule = "same share at the peak" if match == "peak" else "same total decay"
    through_momentum = "sgd_l2" in (source, target) and source != target and momentum > 0
    return Conversion(
        value=value,
        rule=rule,
        formula=f"{_SHARES[source]} = " + _SHARES[target].replace("λ", "λ'"),
        exact=powers[0] == powers[1] and not through_momentum,
        note=(
            "With momentum L2 arrives spread over later steps, so the two runs stay close, not "
            "equal."
            if through_momentum
            else ""
        ),
    )


def for_schedule(
    weight_decay: float,
    *,
    old: Callable[[float], float],
    new: Callable[[float], float],
    total_steps: int,
) -> Conversion:
    """Return the weight decay that removes as much in total under another schedule.

        λ' = λ·Σ η_old / Σ η_new        (decoupled and independent)

    Args:
        weight_decay: λ under the old schedule; at least 0.
        old: Multiplier of the learning rate until now.
        new: Multiplier of the learning rate from now on.
        total_steps: Length of the run.

    Example:
        From a constant learning rate to one that falls to zero:

        >>> converted = for_schedule(
        ...     0.1, old=lambda t: 1.0, new=lambda t: 1 - t / 10_000, total_steps=10_000
        ... )
        >>> round(converted.value, 4)
        0.2
    """
    check_range("weight_decay", weight_decay, at_least=0.0)
    total = _total(new, 1, total_steps)
    if total <= 0:
        raise ValueError("the new schedule is 0 throughout")
    return Conversion(
        value=weight_decay * _total(old, 1, total_steps) / total,
        rule="same total decay",
        formula="λ' = λ·Ση_old/Ση_new",
        exact=False,
    )


def _schedule_ratio(
    powers: tuple[int, int],
    match: str | None,
    schedule: Callable[[float], float] | None,
    total_steps: int | None,
) -> float:
    if match == "peak":
        return 1.0
    if match != "total":
        raise ValueError(
            "the two conventions follow the schedule differently: match='peak' or match='total' "
            f"must say which decay to keep, got {match!r}"
        )
    if schedule is None or total_steps is None:
        raise ValueError("match='total' needs the schedule and total_steps")
    totals = [_total(schedule, power, total_steps) for power in powers]
    if totals[1] <= 0:
        raise ValueError("the schedule is 0 throughout")
    return totals[0] / totals[1]


def _total(schedule: Callable[[float], float], power: int, total_steps: int) -> float:
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    return math.fsum(schedule(step) ** power for step in range(total_steps))


def _check_convention(name: str) -> None:
    if name not in CONVENTIONS:
        raise ValueError(f"unknown convention {name!r}; choose from {', '.join(CONVENTIONS)}")
