"""What can go wrong with a request to the laboratory, in the words the command line prints."""

from __future__ import annotations

__all__ = ["InputError", "Stopped"]


class InputError(Exception):
    """A request that cannot be carried out as given; nothing was trained or written."""


class Stopped(Exception):
    """Work that ended early because it was asked to."""
