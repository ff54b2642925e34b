"""The weight decay of SGD and of Adam with L2, as a start for AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ebbtide.convert._conversion import Conversion, check_range, check_rate

__all__ = ["DEAD_BELOW", "SpreadConversion", "adam_l2_to_adamw", "sgd_recipe_to_adamw"]

# A weight with a smaller √v̂ has no gradient to speak of: eps alone is 1e-8.
DEAD_BELOW = 1e-8


@dataclass(frozen=True)
class SpreadConversion(Conversion):
    """A conversion that depends on each weight, and how far the weights disagree.

    Attributes:
        low: Value that the weights at the 95th percentile of √v̂ ask for.
        high: Value that the weights at the 5th percentile ask for.
        median_scale: Median √v̂ of the live weights.
        live_share: Share of the weights that have a gradient at all.
        single_value: Whether one value serves: high is at most ten times low.
    """

    low: float = math.nan
    high: float = math.nan
    median_scale: float = math.nan
    live_share: float = math.nan
    single_value: bool = False


def sgd_recipe_to_adamw(
    weight_decay: float,
    *,
    sgd_lr: float,
    adamw_lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> Conversion:
    """Turn the L2 of an SGD recipe into a decoupled weight decay for AdamW.

        λ' = lr_sgd·λ·(1 - dampening)/((1 - momentum)·lr_adamw)

    Args:
        weight_decay: λ of `torch.optim.SGD`; at least 0.
        sgd_lr: Learning rate of the SGD recipe before its schedule; above 0.
        adamw_lr: Learning rate of AdamW before its schedule; above 0.
        momentum: Momentum of the SGD recipe, in [0, 1).
        dampening: Dampening of the SGD recipe, in [0, 1).

    Example:
        A usual ImageNet recipe, whose 1e-4 is a thousand times too small for AdamW:

        >>> round(sgd_recipe_to_adamw(
        ...     1e-4, sgd_lr=0.1, momentum=0.9, adamw_lr=1e-3
        ... ).value, 9)
        0.1
    """
    check_range("sgd_lr", sgd_lr, above=0.0)
    check_range("adamw_lr", adamw_lr, above=0.0)
    check_range("weight_decay", weight_decay, at_least=0.0)
    check_rate("momentum", momentum)
    check_rate("dampening", dampening)
    share = sgd_lr * weight_decay * (1.0 - dampening) / (1.0 - momentum)
    return Conversion(
        value=share / adamw_lr,
        rule="same share every step",
        formula="lr_sgd·λ·(1 - dampening)/(1 - momentum) = lr_adamw·λ'",
        exact=False,
        note="The decay is matched, not the update: a start for a sweep over lr and λ.",
    )


def adam_l2_to_adamw(
    weight_decay: float, root_v_hats: Iterable[float], *, dead_below: float = DEAD_BELOW
) -> SpreadConversion:
    """Turn the L2 of Adam into a decoupled weight decay, from the √v̂ of a real run.

        λ' = λ / median(√v̂)

    L2 under Adam is divided by √v̂ like any gradient, so every weight has its own equivalent. One
    value serves all only where their √v̂ agree.

    Args:
        weight_decay: λ of Adam with L2; at least 0.
        root_v_hats: √v̂ = √(v/(1 - β2ᵗ)) of the decayed weights of one group.
        dead_below: Weights with a smaller √v̂ have no gradient and are left out.

    Raises:
        ValueError: No weight is live, or a √v̂ is negative or not finite.

    Example:
        >>> converted = adam_l2_to_adamw(0.0064, [0.009, 0.010, 0.011])
        >>> round(converted.value, 3), converted.single_value
        (0.64, True)
        >>> adam_l2_to_adamw(0.0064, [1e-4, 1e-2, 1.0]).single_value
        False

    References:
        Loshchilov & Hutter 2019, Propositions 2 and 3, arXiv:1711.05101: no single value is ever
        exact. Deviation: the median is ours.
    """
    check_range("weight_decay", weight_decay, at_least=0.0)
    every = list(root_v_hats)
    if not all(0.0 <= scale < math.inf for scale in every):
        raise ValueError("root_v_hats must be finite numbers of at least 0")
    live = sorted(scale for scale in every if scale >= dead_below)
    if not live:
        raise ValueError(f"none of the {len(every)} weights has a √v̂ of {dead_below:g} or more")
    p5, median, p95 = (_quantile(live, share) for share in (0.05, 0.5, 0.95))
    single_value = p95 <= 10.0 * p5
    low, high = weight_decay / p95, weight_decay / p5
    note = f"The weights ask for {low:.3g} to {high:.3g} (√v̂ at p95 and p5, {p95 / p5:.3g} apart)"
    return SpreadConversion(
        value=weight_decay / median,
        rule="divide by the median gradient scale",
        formula="λ' = λ / median(√v̂)",
        exact=False,
        note=f"{note}." if single_value else f"No single value matches. {note}.",
        low=low,
        high=high,
        median_scale=median,
        live_share=len(live) / len(every),
        single_value=single_value,
    )


def _quantile(ordered: list[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
