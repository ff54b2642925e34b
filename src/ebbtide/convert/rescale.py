"""A recipe for another batch size, data set, run length or width, by a rule that is named."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import NamedTuple

from ebbtide.convert._conversion import check_range, check_rate

__all__ = ["RESCALE_RULES", "Recipe", "RescaleRule", "Rescaled", "rescale"]


class RescaleRule(NamedTuple):
    """A rule: the powers of the factor by which each setting is multiplied.

    Attributes:
        lr: Power for the learning rate.
        weight_decay: Power for the decoupled λ; None where the caller names it.
        one_minus_beta: Power for 1 - β of both betas.
        eps: Power for eps.
        steps: Power for the number of steps that go with it.
        meaning: What the factor is and what the rule keeps.
        source: Where the rule comes from.
    """

    lr: float
    weight_decay: float | None
    one_minus_beta: int
    eps: float
    steps: int
    meaning: str
    source: str


_TIMESCALE = "Wang & Aitchison 2024, arXiv:2405.13698"
_SDE = "Malladi et al. 2022, arXiv:2205.10287; Mlodozeniec et al. 2025, arXiv:2512.22382"
_NORMALISED = "Loshchilov & Hutter 2019, section B.1, arXiv:1711.05101"

RESCALE_RULES = {
    "batch-fixed-lr": RescaleRule(
        0, 1, 0, 0, -1, "batch × k, same epochs and lr; keeps τ in epochs", _TIMESCALE
    ),
    "batch-sqrt": RescaleRule(
        0.5, 0.5, 1, -0.5, -1, "batch × k, same epochs; keeps the noise of Adam's path", _SDE
    ),
    "batch-linear": RescaleRule(
        1,
        0,
        0,
        0,
        -1,
        "batch × k, same epochs; SGD's linear rule",
        "Goyal et al. 2017, arXiv:1706.02677",
    ),
    "data-epochs": RescaleRule(
        0, -1, 0, 0, 1, "data × m, same batch and epochs; keeps τ in epochs", _TIMESCALE
    ),
    "data-sde": RescaleRule(
        -0.5, -0.5, -1, 0.5, 1, "data × m, same batch; keeps the noise of Adam's path", _SDE
    ),
    "data-normalized": RescaleRule(
        0, -0.5, 0, 0, 1, "data × m, same batch and epochs; keeps λ_norm", _NORMALISED
    ),
    "run-epochs": RescaleRule(
        0, 0, 0, 0, 1, "epochs × n, same data; keeps τ in epochs", _TIMESCALE
    ),
    "run-share": RescaleRule(
        0, -1, 0, 0, 1, "epochs × n, same data; keeps τ as a share of the run", _TIMESCALE
    ),
    "run-normalized": RescaleRule(
        0, -0.5, 0, 0, 1, "epochs × n, same data; keeps λ_norm", _NORMALISED
    ),
    "run-sde": RescaleRule(
        -0.5, -0.5, -1, 0.5, 1, "epochs × n, same data; keeps the noise of Adam's path", _SDE
    ),
    "width-mup": RescaleRule(-1, 1, 0, 0, 0, "width × s, hidden matrices; keeps lr·λ", _TIMESCALE),
    "width-sqrt": RescaleRule(
        -1,
        0.5,
        0,
        0,
        0,
        "width × s, hidden matrices; λ with √s",
        "Fan et al. 2025, arXiv:2510.15262",
    ),
    "width-power": RescaleRule(
        -1, None, 0, 0, 0, "width × s, hidden matrices; λ with s^exponent", "the caller's exponent"
    ),
}


@dataclass(frozen=True)
class Recipe:
    """The settings of Adam or AdamW that a rule changes.

    Args:
        lr: Learning rate before the schedule; above 0.
        weight_decay: λ in the convention of `decay_policy`; at least 0.
        betas: β1 and β2, each in [0, 1).
        eps: Above 0.
        decay_policy: "decoupled", "independent" or "corrected".
    """

    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay_policy: str = "decoupled"

    def __post_init__(self) -> None:
        check_range("lr", self.lr, above=0.0)
        check_range("weight_decay", self.weight_decay, at_least=0.0)
        check_range("eps", self.eps, above=0.0)
        check_rate("beta1", self.betas[0])
        check_rate("beta2", self.betas[1])
        if self.decay_policy not in ("decoupled", "independent", "corrected"):
            raise ValueError(
                "rules are stated for decay_policy 'decoupled', 'independent' and 'corrected', "
                f"got {self.decay_policy!r}"
            )


@dataclass(frozen=True)
class Rescaled:
    """A rescaled recipe and the rule it came by.

    Attributes:
        recipe: The new settings.
        rule: Name of the rule.
        meaning: What the factor is and what the rule keeps.
        factor: The factor.
        steps_factor: By what the number of steps changes.
        total_decay_factor: By what κ, the total decay of the run, changes.
        source: Where the rule comes from.
    """

    recipe: Recipe
    rule: str
    meaning: str
    factor: float
    steps_factor: float
    total_decay_factor: float
    source: str

    def __str__(self) -> str:
        recipe = self.recipe
        return "\n".join(
            [
                f"lr {recipe.lr:.6g}, weight decay {recipe.weight_decay:.6g} "
                f"({recipe.decay_policy}), betas ({recipe.betas[0]:.6g}, {recipe.betas[1]:.6g}), "
                f"eps {recipe.eps:.6g}",
                f"  {self.rule}, factor {self.factor:g}: {self.meaning}",
                f"  steps × {self.steps_factor:.4g}, total decay κ × {self.total_decay_factor:.4g}",
                f"  {self.source}",
            ]
        )

    def to_json(self) -> str:
        """Return the recipe and the rule as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def rescale(recipe: Recipe, rule: str, factor: float, *, exponent: float | None = None) -> Rescaled:
    """Rescale a recipe by a named rule.

    Every setting is multiplied by a power of the factor; `RESCALE_RULES` is the table. The rules
    contradict each other because they keep different things, so none is a default.

    Args:
        recipe: The settings that work now.
        rule: Name in `RESCALE_RULES`.
        factor: How much larger the batch, the data, the run or the width is; above 0.
        exponent: Power of λ; needed by `width-power` and by no other.

    Raises:
        ValueError: The rule is unknown, the factor out of range, the exponent missing or unused,
            or the rule breaks: 1 - β, or the share of a weight that a step removes, would reach 1.

    Example:
        Four times the batch:

        >>> small = Recipe(lr=3e-4, weight_decay=0.1)
        >>> rescale(small, "batch-fixed-lr", 4).recipe.weight_decay
        0.4
        >>> print(rescale(small, "batch-sqrt", 4))
        lr 0.0006, weight decay 0.2 (decoupled), betas (0.6, 0.996), eps 5e-09
          batch-sqrt, factor 4: batch × k, same epochs; keeps the noise of Adam's path
          steps × 0.25, total decay κ × 1
          Malladi et al. 2022, arXiv:2205.10287; Mlodozeniec et al. 2025, arXiv:2512.22382
    """
    if rule not in RESCALE_RULES:
        raise ValueError(f"unknown rule {rule!r}; choose from {', '.join(RESCALE_RULES)}")
    check_range("factor", factor, above=0.0)
    chosen = RESCALE_RULES[rule]
    decay_power = _decay_power(rule, chosen, exponent)
    # Under `independent` the share of a step has no lr in it, so λ carries the power of lr too.
    independent = recipe.decay_policy == "independent"
    own_power = decay_power + (chosen.lr if independent else 0.0)
    rescaled = Recipe(
        lr=recipe.lr * factor**chosen.lr,
        weight_decay=recipe.weight_decay * factor**own_power,
        betas=_rescaled_betas(recipe.betas, factor, chosen.one_minus_beta),
        eps=recipe.eps * factor**chosen.eps,
        decay_policy=recipe.decay_policy,
    )
    share = rescaled.weight_decay * (1.0 if independent else rescaled.lr)
    if share >= 1:
        raise ValueError(
            f"the rule breaks at factor {factor:g}: a step would remove {share:g} of a weight, and "
            "must leave some of it"
        )
    return Rescaled(
        recipe=rescaled,
        rule=rule,
        meaning=chosen.meaning,
        factor=factor,
        steps_factor=factor**chosen.steps,
        total_decay_factor=factor ** (chosen.lr + decay_power + chosen.steps),
        source=chosen.source,
    )


def _decay_power(rule: str, chosen: RescaleRule, exponent: float | None) -> float:
    if chosen.weight_decay is None:
        if exponent is None:
            raise ValueError(f"rule {rule!r} needs the exponent of λ")
        return exponent
    if exponent is not None:
        raise ValueError(f"rule {rule!r} has its own exponent; only 'width-power' takes one")
    return chosen.weight_decay


def _rescaled_betas(betas: tuple[float, float], factor: float, power: int) -> tuple[float, float]:
    # As written, in decimal: in binary 10·(1 - 0.9) is below 1 and would pass.
    exact_factor = Fraction(repr(float(factor))) ** power
    scaled = []
    for number, beta in enumerate(betas, start=1):
        one_minus_beta = exact_factor * (1 - Fraction(repr(float(beta))))
        if one_minus_beta >= 1:
            raise ValueError(
                f"the rule breaks at factor {factor:g}: 1 - β{number} would be "
                f"{float(one_minus_beta):g}, and must stay below 1"
            )
        scaled.append(float(1 - one_minus_beta))
    return scaled[0], scaled[1]
