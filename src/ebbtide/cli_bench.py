"""The verb `bench`: how fast a step is on this machine, beside torch and its peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ebbtide.lab.bench.run import Benchmark

__all__ = ["bench", "register"]

_BEGIN, _END = "<!-- bench: begin -->", "<!-- bench: end -->"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(bench)


def bench(
    workloads: Annotated[
        str | None, typer.Option(help="Comma-separated: W1, W2, W3, W4, W5, W10k. Default: all.")
    ] = None,
    scenarios: Annotated[
        str,
        typer.Option(
            help="Comma-separated: step, clip, dead5, dead50, 8bit, 24bit, bfloat16, backward."
        ),
    ] = "step,clip,dead5,dead50,8bit,24bit,bfloat16,backward",
    seconds: Annotated[float, typer.Option(min=0.1, help="About how long for each row.")] = 8.0,
    all_peers: Annotated[
        bool, typer.Option("--all-peers", help="Also torch.compile and other packages installed.")
    ] = False,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also how the cost grows; draws growth.png.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and growth.png.")] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Write the table between the marks in this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Time steps side by side with torch, in one process, as ratios with quartiles."""
    from ebbtide.lab.errors import InputError

    try:
        from ebbtide.lab.bench.run import readme_table, run
        from ebbtide.lab.bench.workloads import SCENARIOS, WORKLOADS
    except ImportError as error:
        raise InputError(f"bench needs torch: pip install 'ebbtide[torch]' ({error})") from error

    chosen = _chosen(workloads, list(WORKLOADS), "workload")
    ways = _chosen(scenarios, [*SCENARIOS, "backward"], "scenario")
    if readme is not None and _BEGIN not in _text(readme):
        raise InputError(f"{readme} has no line {_BEGIN!r} to write the table after")
    named = [name for name in chosen if name != "tiny"] if workloads is None else chosen
    result = run(
        workloads=list(WORKLOADS) if workloads is None else named,
        scenarios=ways,
        seconds=seconds,
        all_peers=all_peers,
        growth=growth,
        tick=lambda title: typer.echo(title, err=True),
    )
    if out is not None:
        result.save(out / "bench.json")
        if growth:
            from ebbtide.lab.bench.picture import draw_growth

            draw_growth(result.growth, out / "growth.png")
    if readme is not None:
        text = _text(readme)
        start, stop = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
        readme.write_text(f"{text[:start]}\n{readme_table(result)}\n{text[stop:]}")
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
    else:
        _print(result)


def _chosen(text: str | None, known: list[str], what: str) -> list[str]:
    from ebbtide.lab.errors import InputError

    names = known if text is None else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"unknown {what} {', '.join(unknown)!r}; known: {', '.join(known)}")
    return names


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _print(result: Benchmark) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in result.machine.items()))
    for row in [*result.rows, *result.growth]:
        table = Table(title=f"{row.what} ({row.numel:,} elements)", title_justify="left")
        for column in ("optimizer", "µs a step", "times faster than fused", "step's peak, MB"):
            table.add_column(column, justify="left" if column == "optimizer" else "right")
        for name, timing in row.timings.items():
            peak = row.peak_bytes.get(name)
            shown = "" if peak is None else f"{peak / 1e6:.1f}"
            table.add_row(name, f"{timing.step_us:,.1f}", str(timing.ratio), shown)
        console.print(table)
        if row.stream_share is not None:
            console.print(f"{row.stream_share:.0%} of a memory stream with the same traffic")
