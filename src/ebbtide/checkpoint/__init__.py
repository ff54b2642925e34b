"""Checkpoints without a framework: whole files, matching by name, flat arrays, summaries.

The faces (`ebbtide.numpy`, `ebbtide.torch`) describe what they hold as slots and arrays; nothing
here knows their classes. The standard library only.
"""

from ebbtide.checkpoint.files import (
    CheckpointError,
    is_sealed,
    previous_of,
    problem_of,
    whole_file,
    write_file,
)
from ebbtide.checkpoint.flat import flatten, unflatten
from ebbtide.checkpoint.groups import IMPLEMENTATION, merged_groups
from ebbtide.checkpoint.kind import kind_of, lacking
from ebbtide.checkpoint.loading import Loading, prepare
from ebbtide.checkpoint.match import Difference, Match, Slot, match, saved_slots, unwrapped
from ebbtide.checkpoint.summary import Facts, find_states, summarize

__all__ = [
    "IMPLEMENTATION",
    "CheckpointError",
    "Difference",
    "Facts",
    "Loading",
    "Match",
    "Slot",
    "find_states",
    "flatten",
    "is_sealed",
    "kind_of",
    "lacking",
    "match",
    "merged_groups",
    "prepare",
    "previous_of",
    "problem_of",
    "saved_slots",
    "summarize",
    "unflatten",
    "unwrapped",
    "whole_file",
    "write_file",
]
