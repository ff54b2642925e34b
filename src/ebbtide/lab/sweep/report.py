"""The report of a sweep: what was found, the pictures, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ebbtide.lab.conclusions import join
from ebbtide.lab.errors import InputError
from ebbtide.lab.folder import RESULTS, replace_folder
from ebbtide.lab.report import Listing, Picture, Report, Section, Table, picture_files, render
from ebbtide.lab.sweep.analysis import Side
from ebbtide.lab.sweep.axes import AXES
from ebbtide.lab.sweep.drawings import MARKS, best_curves, dots, maps, profiles
from ebbtide.lab.sweep.export import csv_files, json_bytes
from ebbtide.lab.sweep.outcome import FAULTS, Outcome
from ebbtide.lab.sweep.results import Cell, Results
from ebbtide.lab.sweep.words import Said, across, factor_words, said, widest, winner
from ebbtide.lab.sweep.workers import cell_words

__all__ = ["COMMAND", "parse_rise", "summary_rows", "to_json", "write_report"]

COMMAND = "sweep"
_COLUMNS = (
    "Optimizer",
    "Best lr",
    "Best weight decay",
    "Result ± noise",
    "Room of the lr",
    "Cells",
)
_MOST_ERRORS = 12


def parse_rise(text: str) -> tuple[float, bool]:
    """Read by how much a result may worsen: `5%` of it, or an absolute amount.

    Raises:
        InputError: It is no positive number.

    Example:
        >>> parse_rise("5%"), parse_rise("0.02")
        ((0.05, True), (0.02, False))
    """
    relative = text.strip().endswith("%")
    try:
        size = float(text.strip().removesuffix("%")) / (100 if relative else 1)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise InputError(f"--rise {text!r} is no amount such as 5% or 0.02")
    return size, relative


def write_report(results: Results, folder: Path) -> None:
    """Write the report, its pictures and the numbers to a folder.

    Raises:
        InputError: The folder cannot be written.
    """
    items = said(results)
    report = _report(results, items)
    files = {"report.html": render(report), **picture_files(report), **csv_files(results)}
    content = json_bytes(results, items, [*files, RESULTS])
    replace_folder(folder, {**files, RESULTS: content})


def to_json(results: Results) -> bytes:
    """Return everything that was asked and found."""
    return json_bytes(results, said(results), [])


def summary_rows(results: Results) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headings of the table and a row of text for each optimizer."""
    return _COLUMNS, [_row(item) for item in said(results)]


def _row(item: Said) -> tuple[str, ...]:
    arm = item.arm
    if arm.best is None:
        return (arm.label, "-", "-", "-", "-", _cells(arm.cells))
    settings = arm.settings(arm.best)
    noise = "" if item.noise is None else f" ± {item.number(item.noise.band)}"
    room = "-"
    if item.width is not None:
        room = f"÷ {_room(item.width.below)}, × {_room(item.width.above)}"
    return (
        arm.label,
        f"{settings['lr']:.3g}",
        f"{settings['weight_decay']:.3g}",
        f"{item.results.metric} {item.number(item.best_value)}{noise}",
        room,
        _cells(arm.cells),
    )


def _room(side: Side) -> str:
    end = {"rise": "", "edge": " (edge)", "unknown": " (?)"}[side.until]
    return f"{factor_words(side.factor) if side.is_known else '-'}{end}"


def _cells(cells: Sequence[Sequence[Cell]]) -> str:
    """Return how many cells came to what, the frequent first."""
    outcomes: dict[str, int] = {}
    for row in cells:
        for cell in row:
            name = "not run" if cell.record is None else cell.record.outcome
            outcomes[name] = outcomes.get(name, 0) + 1
    order = sorted(outcomes.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {name}" for name, count in order)


def _report(results: Results, items: Sequence[Said]) -> Report:
    definition = results.definition
    file = definition.file.rpartition("/")[2]
    return Report(
        title=f"Sweep of {definition.function} in {file}",
        lead=_lead(results),
        findings=_findings(items),
        sections=[
            section
            for section in (
                _map_section(results, items),
                _width_section(results, items),
                _curve_section(results, items),
                _seed_section(results, items),
                _fault_section(results),
                _output_section(items),
            )
            if section is not None
        ],
        method=_method(results),
        facts=_facts(results),
    )


def _lead(results: Results) -> str:
    definition = results.definition
    labels = join([arm.label for arm in results.arms])
    seeds = "1 seed" if len(definition.seeds) == 1 else f"{len(definition.seeds)} seeds"
    states = {outcome: results.count(outcome) for outcome in _OUTCOME_WORDS}
    parts = [f"{count} {_OUTCOME_WORDS[name]}" for name, count in states.items() if count]
    if results.missing:
        parts.append(f"{results.missing} have not been run yet")
    return f"{labels} under {seeds}, {len(results.cells)} cells: {join(parts)}."


_OUTCOME_WORDS = {
    Outcome.FINISHED: "finished",
    Outcome.DIVERGED: "diverged",
    Outcome.PRUNED: "were ended early as hopeless",
    Outcome.FAILED: "failed",
    Outcome.TIMEOUT: "ran out of time",
}


def _findings(items: Sequence[Said]) -> list[tuple[str, str]]:
    findings = [("Optimizers", across(items))] if len(items) > 1 else []
    for item in items:
        sentences = [item.best_sentence()]
        if item.arm.best is not None:
            sentences += [item.width_sentence(), item.coupling_sentence()]
        if item.edges:
            sentences.append(item.edge_sentence())
        findings.append((item.arm.label, " ".join(sentences)))
    return findings


def _map_section(results: Results, items: Sequence[Said]) -> Section:
    axis = AXES[results.definition.axis]
    notes = [note for item in items for note in item.edge_notes()]
    table = Table(_COLUMNS, [_row(item) for item in items], "The best of each optimizer")
    return Section(
        title=f"Learning rate by {axis}",
        text=_legend(results),
        notes=notes,
        tables=[table],
        pictures=[Picture("map", maps(results, items), winner(items))],
    )


def _legend(results: Results) -> str:
    several = len(results.definition.seeds) > 1
    mean = "Means over the seeds. " if several else ""
    band = "Thin frames cannot be told from it by the noise. " if several else ""
    if results.definition.sampler != "grid":
        rings = band.replace("frames", "rings")
        crosses = "Crosses diverged." if results.count(Outcome.DIVERGED) else ""
        return f"{mean}The red ring is the best. {rings}{crosses}"
    signs = []
    if results.count(Outcome.DIVERGED):
        signs.append("hatched: diverged" + (" under at least one seed" if several else ""))
    for name, letter in MARKS.items():
        if results.count(name):
            signs.append(f"{letter}: {_OUTCOME_WORDS[name].removeprefix('were ')}")
    if results.missing:
        signs.append("empty: not run yet")
    legend = "; ".join(signs)
    return f"{mean}The red frame is the best. {band}{legend[:1].upper()}{legend[1:]}" + (
        "." if legend else ""
    )


def _width_section(results: Results, items: Sequence[Said]) -> Section | None:
    if all(item.width is None for item in items):
        return None
    axis = AXES[results.definition.axis]
    return Section(
        title="How far the learning rate can be off",
        text=f"The result over the lr, the {axis} kept where it is best. A bar spans the lr at "
        f"which the {results.metric} is worse than the best by {_rise_words(results)} at most.",
        pictures=[Picture("width", profiles(results, items), widest(items))],
    )


def _curve_section(results: Results, items: Sequence[Said]) -> Section | None:
    draw = best_curves(results, items)
    if draw is None:
        return None
    ends = [
        f"{item.arm.label}'s best cell ends at {results.metric} {item.number(item.best_value)}"
        for item in items
        if item.arm.best is not None
    ]
    return Section(
        title="Curves of the best cells",
        text="What the function reported on the way; bands are one standard deviation over seeds.",
        pictures=[Picture("curves", draw, f"{join(ends)}.")],
    )


def _seed_section(results: Results, items: Sequence[Said]) -> Section | None:
    draw = dots(results, items)
    if draw is None:
        return None
    return Section(
        title="The best cells, seed by seed",
        text="Every seed a dot; the diamond is the mean, the bar its 95 % interval. The best cell "
        "was chosen by these same seeds, which flatters it.",
        pictures=[Picture("seeds", draw, across(items))],
    )


def _fault_section(results: Results) -> Section | None:
    groups: dict[str, list[Cell]] = {}
    for cell in results.cells:
        record = cell.record
        if record is not None and (record.outcome in FAULTS or record.traceback):
            groups.setdefault(f"{record.outcome}: {record.error}", []).append(cell)
    if not groups:
        return None
    rows = [(str(len(cells)), error, cell_words(cells[0].settings))
            for error, cells in groups.items()]  # fmt: skip
    listings = [
        Listing(f"{error} ({cell_words(cells[0].settings)})", _account(cells[0]))
        for error, cells in list(groups.items())[:_MOST_ERRORS]
    ]
    return Section(
        title="What went wrong",
        text="Cells with the same error are counted together; run them again with --retry-failed.",
        tables=[Table(("Cells", "Error", "The first of them"), rows)],
        listings=listings,
    )


def _account(cell: Cell) -> str:
    record = cell.record
    assert record is not None
    parts = [record.traceback or record.error]
    if record.output:
        parts.append(f"What it printed:\n{record.output}")
    return "\n\n".join(part.rstrip() for part in parts)


def _output_section(items: Sequence[Said]) -> Section | None:
    listings = []
    for item in items:
        records = [] if item.arm.best is None else item.arm.records(item.arm.best)
        if records and records[0].output.strip():
            words = cell_words(item.arm.settings(item.arm.best or 0))
            listings.append(Listing(f"{item.arm.label} ({words})", records[0].output))
    if not listings:
        return None
    return Section(title="What the best cells printed", listings=listings)


def _rise_words(results: Results) -> str:
    size, relative = results.rise
    return f"{100 * size:g} % of it" if relative else f"{size:g}"


def _method(results: Results) -> list[str]:
    definition = results.definition
    ways = {
        "grid": "Every point of the grid is a cell under every seed.",
        "random": f"{definition.points} points per optimizer are drawn, the same for all.",
        "tpe": f"{definition.points} points per optimizer are chosen by Optuna's TPE sampler under "
        "the first seed and repeated under the others.",
    }
    rule = "largest" if definition.maximize else "smallest"
    items = [
        f"{ways[definition.sampler]} Each cell runs in a process of its own. The best point has "
        f"the {rule} mean over the seeds.",
        "A cell has diverged when it returned NaN or an infinity, or raised FloatingPointError.",
        "Noise: the standard deviation over seeds at the best quarter of the points, without what "
        "a seed does to all points alike; two means of S seeds differ by less than t·d·√(2/S) in "
        "95 % of cases where there is no difference.",
        "Coupling: -e/(2√(df)) of the parabola a + bx + cy + dx² + exy + fy² in the logarithms of "
        "both axes, fitted to the best 40 % of the points; 0 where each axis can be tuned alone, "
        "±1 where only a combination counts. Intervals are 95 % bootstrap intervals over the "
        "residuals.",
        "Differences between optimizers are taken seed by seed, with 95 % expanded percentile "
        "bootstrap intervals (Hesterberg 2015).",
    ]  # fmt: skip
    if definition.prune:
        items.append(
            "A cell is ended early when its best reported value is worse than the median of what "
            "the optimizer's finished cells had reported at the same step (Golovin et al. 2017)."
        )
    if len(results.hashes) > 1:
        items.append("The file was changed while the sweep was under way: cells before and after "
                     "need not be comparable.")  # fmt: skip
    return items


def _facts(results: Results) -> Mapping[str, str]:
    from importlib.metadata import version

    definition = results.definition
    return {
        "study": results.name,
        "file": definition.file,
        "SHA-256": ", ".join(results.hashes),
        "seeds": ", ".join(map(str, definition.seeds)),
        "ebbtide": version("ebbtide"),
        "optuna": version("optuna"),
        **results.facts,
    }
