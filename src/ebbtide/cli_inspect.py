"""The verb `inspect`: what a checkpoint holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["inspect", "register"]

_MOST_ROWS = 40


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(inspect)


def inspect(
    file: Annotated[Path, typer.Argument(help="A file of torch.save, or an .npz of ours.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    all_rows: Annotated[bool, typer.Option("--all", help="Print every parameter.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Unpickle any object, which can run code of the file.")
    ] = False,
) -> None:
    """Say what a checkpoint holds: groups, state, steps, and what is wrong with it.

    Ends with status 1 if state is unusable (NaN, infinity, negative second moments).
    """
    found = _contents(file, trust)
    if as_json:
        from ebbtide.lab.export import to_bytes

        print(to_bytes(found).decode(), end="")
    else:
        _print(_printable(found), None if all_rows else _MOST_ROWS)
    if any(optimizer["problems"] for optimizer in found["optimizers"]):
        raise typer.Exit(1)


def _contents(file: Path, trust: bool) -> dict[str, Any]:
    from ebbtide.checkpoint import CheckpointError
    from ebbtide.lab.errors import InputError

    if file.is_dir():
        raise InputError(
            f"{file} is a folder; of a distributed checkpoint make a file first: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {file} FILE"
        )
    if not file.exists():
        raise InputError(f"there is no file {file}")
    try:
        if file.suffix == ".npz":
            return _numpy_contents(file)
        from ebbtide.torch.contents import contents

        return contents(file, trust=trust)
    except CheckpointError as error:
        raise InputError(str(error)) from None


def _numpy_contents(file: Path) -> dict[str, Any]:
    import numpy as np

    from ebbtide.checkpoint import CheckpointError, is_sealed, problem_of, summarize, unflatten

    problem = problem_of(file)
    if problem is not None:
        raise CheckpointError(f"{file} is broken: {problem}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            state_dict = unflatten(arrays)
    except ValueError as error:
        raise CheckpointError(f"{file} holds no optimizer's state: {error}") from None
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "checksum": "right" if is_sealed(file) else "none",
        "optimizers": [{"where": "", **summarize(state_dict, _numpy_facts)}],
        "other": [],
    }


def _numpy_facts(key: str, value: Any) -> Any:
    import numpy as np

    from ebbtide.checkpoint import Facts

    finite = bool(np.isfinite(value).all())
    problem = "" if finite else "NaN or infinity"
    if finite and key.endswith("_sq") and value.size and value.min() < 0:
        problem = f"the negative value {value.min():g}"
    number = float(value) if value.size == 1 else None
    return Facts(value.shape, str(value.dtype), value.nbytes, problem, number)


def _printable(value: Any) -> Any:
    """Replace what would command the terminal: names are the file's."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "?" for c in value)
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


def _print(found: dict[str, Any], most: int | None) -> None:
    from ebbtide.groups.table import format_bytes

    checksum = "checksum right" if found["checksum"] == "right" else "without a checksum"
    typer.echo(f"{found['file']}: {format_bytes(found['bytes'])}, {checksum}")
    for optimizer in found["optimizers"]:
        _print_optimizer(optimizer, most, format_bytes)
    if not found["optimizers"]:
        typer.echo("no optimizer's state (a dictionary with state and param_groups)")
    for entry in found["other"]:
        what = entry.get("value", entry["type"])
        if "tensors" in entry:
            what = f"{entry['tensors']} tensors, {format_bytes(entry['bytes'])}"
        typer.echo(f"{entry['where']}: {what}")


def _print_optimizer(optimizer: dict[str, Any], most: int | None, format_bytes: Any) -> None:
    where = f"{optimizer['where']}: " if optimizer["where"] else ""
    parameters, groups = optimizer["parameters"], optimizer["groups"]
    steps = optimizer["steps"]
    count = "no steps" if steps is None else "step " + " to ".join(f"{s:g}" for s in _range(steps))
    typer.echo(
        f"\n{where}{optimizer['kind'] or 'unknown'} state, {_count(parameters, 'parameter')} in "
        f"{_count(groups, 'group')}, {count}, {format_bytes(optimizer['bytes'])}"
    )
    keys = list(dict.fromkeys(key for group in groups for key in group))
    _table(
        ["setting", *(f"group {number}" for number in range(len(groups)))],
        [(key, *(_shown(group.get(key, "")) for group in groups)) for key in keys],
    )
    rows = [
        (
            each["name"],
            str(each["group"]),
            "" if each["step"] is None else _shown(each["step"]),
            _state(each["state"]),
        )
        for each in parameters[:most]
    ]
    typer.echo("")
    _table(["parameter", "group", "step", "state"], rows)
    if most is not None and len(parameters) > most:
        typer.echo(f"and {len(parameters) - most} more: --all")
    for problem in optimizer["problems"]:
        typer.echo(f"unusable: {problem}")
    typer.echo("")


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")


def _range(steps: Sequence[float]) -> Sequence[float]:
    return steps[:1] if steps[0] == steps[1] else steps


def _state(arrays: dict[str, Any]) -> str:
    shown = [
        f"{key} {array['dtype']} {'×'.join(map(str, array['shape']))}"
        for key, array in arrays.items()
        if key != "step"
    ]
    return ", ".join(shown) or "none"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(_shown(each) for each in value)
    return str(value)


def _table(columns: list[str], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=True, box=None)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))
    # A pipe has no width to wrap to.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
