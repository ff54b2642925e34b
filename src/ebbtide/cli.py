"""The command line: verbs over the library's public face.

Start-up must stay quick, so a verb imports what it needs when it runs.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebbtide import cli_bench, cli_inspect, cli_science, cli_sweep

if TYPE_CHECKING:
    from ebbtide.lab.claims.claim import Claim
    from ebbtide.lab.compare import Request
    from ebbtide.lab.memory import Unfinished

__all__ = ["app", "claims", "compare", "doctor", "main"]

app = typer.Typer(
    name="ebbtide",
    help="The AdamW family: compare optimizers, and see what weight decay does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

cli_inspect.register(app)
cli_science.register(app)
cli_sweep.register(app)
cli_bench.register(app)


def main() -> None:
    """Run the command line and exit.

    Bad input ends with one line on standard error and status 2, Ctrl-C with status 130.

    Raises:
        SystemExit: Always.
    """
    from ebbtide.lab.errors import InputError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no λ
    try:
        status = typer.main.get_command(app).main(prog_name="ebbtide", standalone_mode=False)
    except InputError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", status=130)
    except Exception as error:
        # Typer's own errors live in different modules in its different versions.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message())
    raise SystemExit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int = 2) -> None:
    if message:  # empty where the help has been printed instead
        print("ebbtide: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(status)


@app.callback()
def _verbs() -> None:
    """Keep the verbs a group even while there is only one."""


@app.command()
def compare(
    task: Annotated[
        str, typer.Option(help="What to train: digits, char-lm, convnet, or FILE.py:FUNCTION.")
    ] = "digits",
    optimizers: Annotated[
        str, typer.Option(help="Which to compare, comma-separated.")
    ] = "sgd,sgdw,adam,adamw",
    lr: Annotated[
        str | None, typer.Option(help="Grid in AdamW's units, such as 1e-4..1e-1:7 or 0.001,0.01.")
    ] = None,
    weight_decay: Annotated[
        str | None, typer.Option(help="Grid in AdamW's units, such as 0,0.03..10:6.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Paired test seeds; 10.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Where the seeds begin.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("reports/compare"),
    quick: Annotated[bool, typer.Option(help="A small grid and short runs.")] = False,
    metric: Annotated[
        str | None, typer.Option(help="Which number of the function's counts; loss, or the only.")
    ] = None,
    maximize: Annotated[bool, typer.Option(help="More of it is better.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train one model under several optimizers, each at its best settings, and report."""
    from ebbtide.lab.compare import Request

    request = Request(
        task, optimizers, lr, weight_decay, seeds, seed, quick, metric=metric, maximize=maximize
    )
    _compare(request, out, as_json)


def _compare(request: Request, out: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from ebbtide.lab.compare import COMMAND, write_report
    from ebbtide.lab.experiment import run
    from ebbtide.lab.folder import RESULTS, check_folder
    from ebbtide.lab.progress import Progress

    experiment = request.experiment()
    check_folder(out, COMMAND)
    memory = _memory(out, {COMMAND: asdict(request), "facts": dict(experiment.task.facts)})
    progress = Progress()
    try:
        with progress:
            arms = run(experiment, progress, memory)
            write_report(experiment, arms, out)
    except KeyboardInterrupt:
        done = f"interrupted with {progress.share:.0%} of the training done"
        _fail(f"{done}; {_resumption(memory)}", status=130)
    memory.forget()
    if as_json:
        print((out / RESULTS).read_text(encoding="utf-8"), end="")
    else:
        _print_results(arms, out)


def _memory(out: Path, identity: dict[str, Any]) -> Unfinished:
    from ebbtide.lab.memory import Unfinished, code_fingerprint

    memory = Unfinished(out, {**identity, "code": code_fingerprint()})
    if memory.folder.exists():
        typer.echo(f"goes on with what {memory.folder} holds", err=True)
    return memory


def _resumption(memory: Unfinished) -> str:
    if not memory.folder.exists():
        return "no run had come to its end"
    return f"the runs that ended are kept in {memory.folder}, and the same command goes on"


def _print_results(arms: Any, out: Path) -> None:
    from ebbtide.lab.compare import RESULT_COLUMNS, metric_sentence, result_rows

    for arm in arms:
        columns = [*RESULT_COLUMNS[:-1], f"Against {arm.reference.spec.label}"]
        _print_table(arm.arm.title, columns, result_rows(arm))
        typer.echo(metric_sentence(arm) + "\n")
    typer.echo(f"Report: {(out / 'report.html').resolve()}")


@app.command()
def claims(
    only: Annotated[str | None, typer.Option(help="Names of claims, comma-separated.")] = None,
    quick: Annotated[bool, typer.Option(help="A minute in all, with wider intervals.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Where the seeds begin.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("reports/claims"),
    as_list: Annotated[bool, typer.Option("--list", help="Only name the claims.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put what is said about AdamW to the test: an experiment and a verdict for each claim."""
    from ebbtide.lab.claims.registry import choose_claims

    chosen = choose_claims(only)
    if as_list:
        _list_claims(chosen, as_json)
    else:
        _claims(chosen, out, as_json, quick=quick, seed=seed)


def _list_claims(chosen: Sequence[Claim], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"name": c.name, "title": c.title} for c in chosen], indent=1))
    else:
        _print_table("", ["Name", "Claim"], [(claim.name, claim.title) for claim in chosen])


def _claims(chosen: Sequence[Claim], out: Path, as_json: bool, *, quick: bool, seed: int) -> None:
    from ebbtide.lab.claims.bench import Effort
    from ebbtide.lab.claims.report import COMMAND, summary, write_partly, write_report
    from ebbtide.lab.claims.run import Finding, run_claims
    from ebbtide.lab.folder import RESULTS, check_folder
    from ebbtide.lab.progress import Progress

    check_folder(out, COMMAND)
    effort, progress, findings = Effort(quick=quick, seed=seed), Progress(), list[Finding]()
    identity = {"names": [claim.name for claim in chosen], "quick": quick, "seed": seed}
    memory = _memory(out, {COMMAND: identity})
    try:
        with progress:
            for finding in run_claims(chosen, effort, progress, memory):
                findings.append(finding)
                progress.note(f"{finding.claim.name}: {finding.verdict.value}")
            write_report(findings, effort, out)
    except KeyboardInterrupt:
        done = f"interrupted after {len(findings)} of {len(chosen)} claims"
        where = write_partly(findings, len(chosen), effort, out)
        _fail(f"{done}; {where}; {_resumption(memory)}", status=130)
    memory.forget()
    if as_json:
        print((out / RESULTS).read_text(encoding="utf-8"), end="")
        return
    rows = [(f.claim.title, f.verdict.value, f.reading) for f in findings]
    _print_table("", ["Claim", "Verdict", "What was found"], rows)
    typer.echo(f"\n{summary(findings)}\nReport: {(out / 'report.html').resolve()}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine runs: instruction set, threads, torch, GPU."""
    from ebbtide.lab.doctor import facts

    found = facts()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print_table("", ["", ""], list(found.items()))


def _print_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", show_header=any(columns), box=None)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))
    # A pipe has no width to wrap to.
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
