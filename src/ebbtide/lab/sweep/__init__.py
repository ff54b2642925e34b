"""Sweeps of the user's own training function over lr, weight decay, optimizers and seeds.

A sweep is a `Definition`; its cells wait in an Optuna study, the `Queue`; `Workers` take them
one by one and run each in a process of its own; `Results` reads what came of them, and `report`
shows it. What survives a killed process is the study alone.
"""

from ebbtide.lab.sweep.settings import Settings

__all__ = ["Settings"]
