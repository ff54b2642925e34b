"""Sweeps of the user's own training function over lr, weight decay, optimizers and seeds.

A `Request` gives the `Definition` of a sweep; its cells wait in a `Queue`, the trials of an Optuna
study; a `Crew` takes them one by one and runs each in a process of its own (`process`, `cell`);
`Results` holds what came of them, and `report` shows it. What survives a killed process is the
study alone.
"""

from ebbtide.lab.sweep.settings import Settings

__all__ = ["Settings"]
