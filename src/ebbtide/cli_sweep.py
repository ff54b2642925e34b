"""The verbs `sweep`, `worker` and `report`: the user's own function over a grid of settings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ebbtide.lab.sweep.queue import Counts
    from ebbtide.lab.sweep.request import Request
    from ebbtide.lab.sweep.results import Results
    from ebbtide.lab.sweep.storage import Storage
    from ebbtide.lab.sweep.study import Sweep
    from ebbtide.lab.sweep.target import Target

__all__ = ["register", "report", "sweep", "worker"]

_MOST_NOTES = 10

Grids = list[str] | None
StorageOption = Annotated[
    str, typer.Option(help="Journal file, postgresql://… or, for one worker, sqlite:///….")
]
WorkersOption = Annotated[int, typer.Option(min=0, help="Cells that run at the same time.")]
TimeoutOption = Annotated[
    float | None, typer.Option(min=0.001, help="Seconds a cell may take; unlimited.")
]
AllowOption = Annotated[
    bool, typer.Option("--allow-changed", help="Go on although FILE.py has changed.")
]
RiseOption = Annotated[
    str, typer.Option(help="By how much the result may worsen for the width of the lr: 5% or 0.02.")
]
OutOption = Annotated[
    Path | None, typer.Option(help="Folder of the report; reports/STUDY by default.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_STORAGE = "sweeps.journal"


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line.

    Args:
        app: The command line.
    """
    for verb in (sweep, worker, report):
        app.command()(verb)


def sweep(
    target: Annotated[str, typer.Argument(metavar="FILE.py:FUNCTION", help="What to sweep.")],
    lr: Annotated[
        Grids, typer.Option(help="Grid, such as 1e-5..1e-1:9; for one optimizer: sgdw=1e-3..1:7.")
    ] = None,
    weight_decay: Annotated[Grids, typer.Option(help="Grid, such as 0,1e-3..1:7.")] = None,
    ratio: Annotated[Grids, typer.Option(help="Instead: grid of weight decay / lr.")] = None,
    timescale: Annotated[Grids, typer.Option(help="Instead: grid of 1/(lr·λ), in steps.")] = None,
    optimizer: Annotated[str, typer.Option(help="Names, comma-separated.")] = "adamw",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of every point.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    sampler: Annotated[str, typer.Option(help="grid, random or tpe.")] = "grid",
    points: Annotated[
        int | None, typer.Option(min=1, help="Points per optimizer, for random and tpe.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Which number counts, where the function returns several.")
    ] = None,
    maximize: Annotated[bool, typer.Option("--maximize", help="More is better.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="End hopeless cells early.")] = False,
    prune_after: Annotated[int, typer.Option(min=0, help="Step up to which none is ended.")] = 0,
    workers: WorkersOption = 1,
    cell_timeout: TimeoutOption = None,
    storage: StorageOption = _STORAGE,
    study: Annotated[str | None, typer.Option(help="Name of the study; made up.")] = None,
    allow_changed: AllowOption = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run failed cells once more.")
    ] = False,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Take over cells that other sweeps of it finished.")
    ] = False,
    rise: RiseOption = "5%",
    out: OutOption = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write none.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run your own training function over lr, weight decay, optimizers and seeds, and report.

    The same command goes on where an earlier one ended, however it ended.
    """
    from ebbtide.lab.sweep.request import Request

    request = Request(
        optimizer, lr or (), weight_decay or (), ratio or (), timescale or (), seeds, seed,
        sampler, points, metric, maximize, prune, prune_after,
    )  # fmt: skip
    run = _Run(workers, cell_timeout, allow_changed, retry_failed, reuse)
    ending = _Ending(None if no_report else out, rise, as_json, wanted=not no_report)
    _sweep(target, request, run, ending, storage, study)


def worker(
    study: Annotated[str, typer.Argument(help="Name of the study, or its beginning.")],
    storage: StorageOption = _STORAGE,
    workers: WorkersOption = 1,
    cell_timeout: TimeoutOption = None,
    file: Annotated[
        Path | None, typer.Option(help="Where FILE.py lies on this machine, if elsewhere.")
    ] = None,
    allow_changed: AllowOption = False,
) -> None:
    """Join a sweep from anywhere: run its cells until none waits."""
    from ebbtide.lab.sweep.study import Sweep, find_study

    with _opened(storage, workers, create=False) as opened:
        found = Sweep(opened, find_study(opened, study))
        target = _target_of(found, file)
        timeout = cell_timeout or found.options.get("cell_timeout")
        found.check_file(target, allow_changed=allow_changed)
        _work(found, target, _Run(workers, timeout, allow_changed), wait=False)


def report(
    study: Annotated[str, typer.Argument(help="Name of the study, or its beginning.")],
    storage: StorageOption = _STORAGE,
    rise: RiseOption = "5%",
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the report of a sweep again; one that still runs is reported as far as it is."""
    from ebbtide.lab.sweep.results import read
    from ebbtide.lab.sweep.study import Sweep, find_study

    with _opened(storage, 0, create=False) as opened:
        name = find_study(opened, study)
        ending = _Ending(out, rise, as_json)
        ending.check(name)
        results = read(Sweep(opened, name))
    ending.show(results)


@dataclass(frozen=True)
class _Run:
    """How a sweep is run."""

    workers: int
    timeout: float | None
    allow_changed: bool
    retry_failed: bool = False
    reuse: bool = False


@dataclass(frozen=True)
class _Ending:
    """What is written and printed at the end."""

    out: Path | None
    rise: str
    as_json: bool
    wanted: bool = True

    def check(self, study: str) -> None:
        """Refuse what could not be written, before any work is done."""
        from ebbtide.lab.folder import check_folder
        from ebbtide.lab.sweep.report import COMMAND, parse_rise

        parse_rise(self.rise)
        if self.wanted:
            check_folder(self._folder(study), COMMAND)

    def show(self, results: Results) -> None:
        from ebbtide.lab.sweep.report import parse_rise, summary_rows, to_json, write_report

        results = replace(results, rise=parse_rise(self.rise))
        folder = self._folder(results.name)
        if self.wanted:
            write_report(results, folder)
        if self.as_json:
            sys.stdout.write(to_json(results).decode())
            return
        _print_table(*summary_rows(results))
        if self.wanted:
            typer.echo(f"Report: {(folder / 'report.html').resolve()}")

    def _folder(self, study: str) -> Path:
        return self.out or Path("reports") / study


def _sweep(
    text: str, request: Request, run: _Run, ending: _Ending, storage: str, study: str | None
) -> None:
    from ebbtide.lab.optimizers import OPTIMIZERS
    from ebbtide.lab.sweep.results import read
    from ebbtide.lab.sweep.storage import storage_folder
    from ebbtide.lab.sweep.study import Sweep, check_name, file_name
    from ebbtide.lab.sweep.target import Target
    from ebbtide.lab.sweep.workers import check_target

    target = Target.parse(text)
    definition = request.definition(file_name(target, storage_folder(storage)), target.function)
    name = check_name(study or definition.name)
    ending.check(name)
    for unknown in [name for name in definition.optimizers if name not in OPTIMIZERS]:
        typer.echo(f"{unknown} is none of {', '.join(OPTIMIZERS)}: {target} makes it", err=True)
    versions = check_target(target, run.timeout, lambda text: typer.echo(text, err=True))
    with _opened(storage, run.workers, create=True) as opened:
        found = Sweep(opened, name, definition)
        found.check_file(target, allow_changed=run.allow_changed)
        found.keep_options({"cell_timeout": run.timeout, "versions": versions})
        found.queue.fill(found.finished_elsewhere() if run.reuse else {})
        if run.retry_failed:
            found.queue.retry_failed()
        if run.workers == 0:
            found.queue.recover()
            counts = found.queue.counts()
            typer.echo(f"{counts.waiting} of {counts.total} cells wait in {name}", err=True)
            return
        counts = _work(found, target, run, wait=True)
        results = read(found)
    ending.show(results)
    if counts.faults:
        cells = "1 cell" if counts.faults == 1 else f"{counts.faults} cells"
        typer.echo(f"ebbtide: {cells} failed; run again with --retry-failed", err=True)
        raise typer.Exit(1)


def _work(found: Sweep, target: Target, run: _Run, *, wait: bool) -> Counts:
    """Run cells until none waits, and show how far they have come."""
    from ebbtide.lab.sweep.workers import Crew

    watch = _Watch(found.name, found.queue.counts())
    crew = Crew(found, target, run.workers, run.timeout, wait, watch.note)
    try:
        with watch.shown():
            crew.run(watch.see)
    except KeyboardInterrupt:
        counts = found.queue.counts()
        typer.echo(
            f"ebbtide: interrupted with {counts.done} of {counts.total} cells done; the same "
            "command goes on from here",
            err=True,
        )
        raise typer.Exit(130) from None
    return found.queue.counts()


class _Watch:
    """Shows the progress of a sweep; cells that ended before are not counted in."""

    def __init__(self, title: str, counts: Counts) -> None:
        from ebbtide.lab.progress import Progress

        self._progress = Progress()
        self._title = title
        self._begun = self._done = counts.done
        self._total = counts.total
        self._notes = 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        if self._begun == self._total:
            yield
            return
        with self._progress:
            if self._begun:
                typer.echo(
                    f"{self._title}: {self._begun} of {self._total} cells are done", err=True
                )
            self._progress.start(self._title, self._total - self._begun)
            yield

    def see(self, counts: Counts) -> None:
        if counts.done > self._done:
            self._progress.advance(counts.done - self._done)
            self._done = counts.done

    def note(self, text: str) -> None:
        self._notes += 1
        if self._notes <= _MOST_NOTES:
            self._progress.note(text)
        if self._notes == _MOST_NOTES:
            self._progress.note("further failures are in the report")


@contextmanager
def _opened(storage: str, workers: int, *, create: bool) -> Iterator[Storage]:
    """Open a storage; what it raises later is said in one line as well."""
    from ebbtide.lab.sweep.storage import open_storage, storage_errors

    opened = open_storage(storage, create=create, workers=workers)
    try:
        with storage_errors(opened.address):
            yield opened
    finally:
        opened.close()


def _target_of(found: Sweep, file: Path | None) -> Target:
    """Return the function of a sweep, wherever its file lies on this machine."""
    from ebbtide.lab.sweep.target import Target

    definition, folder = found.definition, found.storage.folder
    path = file or (Path(definition.file) if folder is None else folder / definition.file)
    return Target.at(path, definition.function)


def _print_table(columns: Any, rows: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))
    # A pipe has no width to wrap to.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
