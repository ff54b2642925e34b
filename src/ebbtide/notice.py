"""Warnings that show the user's own line."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

_OURS = ("ebbtide", "torch")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is neither of this package nor of torch.

    How many frames lie between differs: hooks, schedulers and wrappers of torch call `step` from
    within, and a constructor calls another.

    Args:
        message: What the user reads.
        category: Class of the warning.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
