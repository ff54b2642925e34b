"""Which parameters get which settings, and why.

The engine knows names, shapes and the classes of modules, and no framework;
`ebbtide.torch.param_groups` walks a model for it. `docs/grouping.md` tells the rules.

Imports the standard library only.
"""

from ebbtide.groups.assign import Grouping, assign
from ebbtide.groups.kinds import EMBEDDING_CHOICES, is_embedding, standard_rule
from ebbtide.groups.layers import depths_below_top
from ebbtide.groups.records import Assignment, ParamInfo, bare_names
from ebbtide.groups.rules import GroupRule, Pattern, Rules, check_number, find_rules, matches
from ebbtide.groups.state_format import (
    ELEMENT_BYTES,
    MASTER_FORMATS,
    SMALL_NUMEL,
    STATE_FORMATS,
    embedding_names,
    is_embedding_of_group,
    master_format_for,
    moments_of_group,
    param_state_bytes,
    state_bytes,
    state_format_for,
)
from ebbtide.groups.table import GroupRow, GroupTable, ParamRow, format_bytes

__all__ = [
    "ELEMENT_BYTES",
    "EMBEDDING_CHOICES",
    "MASTER_FORMATS",
    "SMALL_NUMEL",
    "STATE_FORMATS",
    "Assignment",
    "GroupRow",
    "GroupRule",
    "GroupTable",
    "Grouping",
    "ParamInfo",
    "ParamRow",
    "Pattern",
    "Rules",
    "assign",
    "bare_names",
    "check_number",
    "depths_below_top",
    "embedding_names",
    "find_rules",
    "format_bytes",
    "is_embedding",
    "is_embedding_of_group",
    "master_format_for",
    "matches",
    "moments_of_group",
    "param_state_bytes",
    "standard_rule",
    "state_bytes",
    "state_format_for",
]
