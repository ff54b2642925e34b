"""Schedules: pure functions of the step, exact at fractional steps, without hidden state.

A schedule is called with the number of steps already applied (0 for the first step) and returns
a number. For the learning rate and the weight decay that number multiplies the group's own
value, so one schedule serves groups of different learning rates; for the betas it is the value
itself. To resume at step t is to call the schedule with t.

Every length is in steps. A length in epochs works as well, as long as the argument is in
epochs too. After its end a schedule keeps its last value.

Imports the standard library only.
"""

from ebbtide.schedules._arithmetic import Schedule
from ebbtide.schedules.combine import Join, Reciprocal, Warmup
from ebbtide.schedules.restarts import CosineRestarts, Cycle, CycleNormalized
from ebbtide.schedules.shapes import WSD, Constant, Cosine, InverseSqrt, Linear, Polynomial
from ebbtide.schedules.spec import SCHEDULE_NAMES, parse_schedule

__all__ = [
    "SCHEDULE_NAMES",
    "WSD",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Cycle",
    "CycleNormalized",
    "InverseSqrt",
    "Join",
    "Linear",
    "Polynomial",
    "Reciprocal",
    "Schedule",
    "Warmup",
    "parse_schedule",
]
