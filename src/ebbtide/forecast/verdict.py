"""One word for what decay does over a run, with its reason in one sentence."""

from __future__ import annotations

import math

__all__ = ["VERDICTS", "judge"]

VERDICTS = ("inert", "weak", "active", "short memory", "refused", "unknown")

_REFUSED_SHARE = 0.1
_INERT_BELOW, _WEAK_BELOW, _ACTIVE_TO = 0.05, 0.3, 10.0


def judge(*, largest_share: float, total_decay: float, steps: float) -> tuple[str, str]:
    """Return the verdict on a run and its reason.

        share of one step ≥ 0.1   refused
        κ < 0.05                  inert
        κ < 0.3                   weak
        κ ≤ 10                    active
        otherwise                 short memory

    Args:
        largest_share: Largest share of a weight that a step removes.
        total_decay: κ, the sum of the shares of all steps.
        steps: Length of the run.

    Example:
        >>> judge(largest_share=1e-5, total_decay=0.015, steps=1500)[0]
        'inert'
    """
    if largest_share > 1:
        return "refused", (
            f"A step would multiply every weight by {1.0 - largest_share:.3g}: its sign flips."
        )
    if largest_share >= _REFUSED_SHARE:
        return "refused", (
            f"A single step would remove {largest_share:.3g} of every weight, "
            f"and {_REFUSED_SHARE} or more is a mistake in units."
        )
    if total_decay == 0:
        return "inert", "Nothing decays: the weight decay or the learning rate is 0 throughout."
    lost = (
        f"Decay removes {-100.0 * math.expm1(-total_decay):.3g} % of an initial weight over the run"
    )
    if total_decay < _INERT_BELOW:
        return "inert", f"{lost}: training would look the same without it."
    if total_decay < _WEAK_BELOW:
        return "weak", f"{lost}: its effect will be hard to tell from noise."
    if total_decay <= _ACTIVE_TO:
        return "active", f"{lost}: enough to matter, too little to forget recent steps."
    return "short memory", (
        f"The weights forget what is older than about {steps / total_decay:,.0f} steps, "
        f"{1.0 / total_decay:.1%} of the run."
    )
