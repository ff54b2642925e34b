"""All claims, in the order of the report."""

from __future__ import annotations

from ebbtide.lab.claims import (
    accuracy,
    equivalence,
    loss_picture,
    regularizer,
    separability,
    tuning,
    untestable,
    update_rule,
    variants,
)
from ebbtide.lab.claims.claim import Claim
from ebbtide.lab.errors import InputError

__all__ = ["CLAIMS", "choose_claims"]

CLAIMS: tuple[Claim, ...] = (
    *update_rule.CLAIMS,
    *equivalence.CLAIMS,
    *regularizer.CLAIMS,
    *loss_picture.CLAIMS,
    *accuracy.CLAIMS,
    *tuning.CLAIMS,
    *separability.CLAIMS,
    *variants.CLAIMS,
    *untestable.CLAIMS,
)


def choose_claims(only: str | None) -> tuple[Claim, ...]:
    """Return the claims named in a comma-separated list, or all.

    Raises:
        InputError: A name is unknown, or there is none.
    """
    if only is None:
        return CLAIMS
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {claim.name for claim in CLAIMS}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = f"unknown claim {unknown[0]!r}" if unknown else "no claim named"
        raise InputError(f"{what}; `ebbtide claims --list` names them all")
    return tuple(claim for claim in CLAIMS if claim.name in names)
