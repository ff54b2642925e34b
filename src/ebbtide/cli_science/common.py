"""Options, errors and output that the verbs share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Protocol

import typer

from ebbtide.lab.errors import InputError

__all__ = ["input_errors", "pair", "show", "table"]

SCHEDULE_HELP = (
    "constant, linear, cosine, polynomial:power=2, inverse-sqrt, wsd:decay=20%, "
    "restarts:first=10%,factor=2; settings as in cosine:end=0.1."
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Lr = Annotated[float, typer.Option(help="Learning rate before the schedule, its peak.")]
Decay = Annotated[float, typer.Argument(help="Weight decay to convert.")]
Momentum = Annotated[float, typer.Option(help="Momentum of SGD.")]
Dampening = Annotated[float, typer.Option(help="Dampening of SGD.")]
Betas = Annotated[str, typer.Option(help="β1,β2 of Adam.")]
Steps = Annotated[int, typer.Option(help="Length of the run in optimizer steps.")]


class _Printable(Protocol):
    def to_json(self) -> str: ...


def pair(text: str) -> tuple[float, float]:
    """Read the two betas."""
    try:
        beta1, beta2 = map(float, text.split(","))
    except ValueError:
        raise InputError(f"betas must be two numbers, as in 0.9,0.999; got {text!r}") from None
    return beta1, beta2


@contextmanager
def input_errors() -> Iterator[None]:
    """Turn a value that the mathematics refuses into an error of the command line."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


def show(result: _Printable, as_json: bool) -> None:
    """Print a result as text or as JSON."""
    typer.echo(result.to_json() if as_json else str(result))


def table(title: str, columns: list[str], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table; texts are taken as they are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", show_header=any(columns), box=None)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))
    # A pipe has no width to wrap to.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
