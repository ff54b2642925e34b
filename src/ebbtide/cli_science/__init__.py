"""The verbs `explain` and `convert`: the mathematics of weight decay on the command line."""

from __future__ import annotations

import typer

from ebbtide.cli_science.convert import convert
from ebbtide.cli_science.explain import explain

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line.

    Args:
        app: The command line.
    """
    app.command()(explain)
    app.add_typer(convert)
