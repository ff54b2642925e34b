"""Weight decay between conventions, optimizers, schedules and sizes.

Every function goes by a rule that is named, and returns with the number the formula, and whether
the two runs then take the same steps or only similar ones.

Imports the standard library only.
"""

from ebbtide.convert._conversion import Conversion
from ebbtide.convert.conventions import CONVENTIONS, convert_weight_decay, for_schedule
from ebbtide.convert.memory import batch_passes, from_normalized, from_timescale, to_normalized
from ebbtide.convert.recipes import (
    DEAD_BELOW,
    SpreadConversion,
    adam_l2_to_adamw,
    sgd_recipe_to_adamw,
)
from ebbtide.convert.rescale import RESCALE_RULES, Recipe, Rescaled, RescaleRule, rescale

__all__ = [
    "CONVENTIONS",
    "DEAD_BELOW",
    "RESCALE_RULES",
    "Conversion",
    "Recipe",
    "RescaleRule",
    "Rescaled",
    "SpreadConversion",
    "adam_l2_to_adamw",
    "batch_passes",
    "convert_weight_decay",
    "for_schedule",
    "from_normalized",
    "from_timescale",
    "rescale",
    "sgd_recipe_to_adamw",
    "to_normalized",
]
