"""The report on claims: each can be followed without the paper at hand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebbtide.lab.claims.bench import Effort
from ebbtide.lab.claims.claim import Number, Verdict
from ebbtide.lab.claims.run import Finding
from ebbtide.lab.errors import InputError
from ebbtide.lab.export import to_bytes
from ebbtide.lab.folder import RESULTS, check_folder, replace_folder
from ebbtide.lab.report import Report, Section, Table, picture_files, render

__all__ = ["COMMAND", "summary", "write_partly", "write_report"]

COMMAND = "claims"
_CSV_COLUMNS = (
    "claim", "verdict", "expected", "number", "label", "value", "low", "high", "unit"
)  # fmt: skip
_TONES = {
    Verdict.CONFIRMED: "good",
    Verdict.CONDITION: "mixed",
    Verdict.NOT_CONFIRMED: "bad",
    Verdict.UNTESTABLE: "none",
}


def summary(findings: Sequence[Finding]) -> str:
    """Count the verdicts in a sentence.

    Example:
        >>> summary([])
        'No claim was tested.'
    """
    counts = {verdict: sum(f.verdict is verdict for f in findings) for verdict in Verdict}
    parts = [f"{count} {verdict.value}" for verdict, count in counts.items() if count]
    if not parts:
        return "No claim was tested."
    tested = [f for f in findings if f.verdict is not Verdict.UNTESTABLE]
    expected = sum(f.as_predicted for f in tested)
    return f"{'; '.join(parts)}. {expected} of {len(tested)} verdicts are as predicted."


def write_partly(findings: Sequence[Finding], asked: int, effort: Effort, folder: Path) -> str:
    """Report what an interrupted run has found; return in words where.

    A complete earlier report is left alone: then the part goes beside it.

    Args:
        findings: What was found.
        asked: How many claims were to be tested.
        effort: How they were tested.
        folder: The folder of the whole report.
    """
    if not findings:
        return "nothing is written"
    if _is_complete(folder):
        folder = folder.with_name(f"{folder.name}-partly")
    try:
        check_folder(folder, COMMAND)
        write_report(findings, effort, folder, asked=asked)
    except InputError as error:
        return str(error)
    return f"a report of these is in {folder}"


def _is_complete(folder: Path) -> bool:
    try:
        return not json.loads((folder / RESULTS).read_text(encoding="utf-8"))["partly"]
    except (OSError, ValueError, KeyError, TypeError):
        return folder.is_dir() and any(folder.iterdir())


def write_report(
    findings: Sequence[Finding], effort: Effort, folder: Path, *, asked: int | None = None
) -> None:
    """Write the report, its pictures and the numbers to a folder.

    Args:
        findings: What was found.
        effort: How the claims were tested.
        folder: Where to.
        asked: How many claims were to be tested, where some were not.
    """
    report = _report(findings, effort, asked)
    files = {
        "report.html": render(report),
        "claims.csv": _csv(findings),
        **picture_files(report),
    }
    content = {
        "command": COMMAND,
        "partly": asked is not None,
        "files": sorted([*files, RESULTS]),
        "quick": effort.quick,
        "seed": effort.seed,
        "claims": [_json(finding) for finding in findings],
    }
    replace_folder(folder, {**files, RESULTS: to_bytes(content)})


def _report(findings: Sequence[Finding], effort: Effort, asked: int | None) -> Report:
    from importlib.metadata import version

    overview = Table(
        ("Claim", "Verdict", "As predicted", "What was found"),
        [(f.claim.title, f.verdict.value, _predicted(f), f.reading) for f in findings],
        links=[f"#{finding.claim.name}" for finding in findings],
        tones=[_TONES[finding.verdict] for finding in findings],
    )
    return Report(
        title="What is said about AdamW, put to the test",
        lead="Every claim has an experiment that could have gone the other way, a prediction, and "
        "a rule that makes the verdict from the numbers. In square brackets: 95 % intervals.",
        findings=[("Verdicts", summary(findings)), *_incomplete(len(findings), asked)],
        sections=[
            Section("All claims", tables=[overview]),
            *(_section(finding) for finding in findings),
        ],
        method=[
            "The verdict is computed from the numbers by the rule given with each claim; nobody "
            "decides afterwards. Predictions come from theory, from the literature and, for "
            "training on digits, from smaller trials. Where the experiment or its rule was changed "
            "after first numbers had been seen, the claim says what was.",
            f"Training runs: {effort.steps} steps; settings chosen on validation data over "
            f"{len(effort.selection_seeds)} seeds; reported on test data over {len(effort.seeds)} "
            "other seeds, paired. Intervals hold the truth in 95 of 100 cases: expanded "
            "percentile bootstrap, or Student's for fewer than eight seeds.",
            "Small networks on small data: what holds here need not hold for large models, and a "
            "difference too small to be seen here may be there.",
        ],
        facts={
            "ebbtide": version("ebbtide"),
            "numpy": version("numpy"),
            "scikit-learn": version("scikit-learn"),
            "run": "quick" if effort.quick else "full",
            "seed": str(effort.seed),
        },
    )


def _incomplete(found: int, asked: int | None) -> list[tuple[str, str]]:
    if asked is None:
        return []
    return [("Interrupted", f"Only {found} of {asked} claims had been tested by then.")]


def _predicted(finding: Finding) -> str:
    if finding.verdict is Verdict.UNTESTABLE:
        return "-"
    return "yes" if finding.as_predicted else f"no; expected: {finding.claim.expected.value}"


def _section(finding: Finding) -> Section:
    claim, evidence = finding.claim, finding.evidence
    tables = [_words(finding)]
    if evidence.numbers:
        rows = [(number.label, str(number)) for number in evidence.numbers.values()]
        tables.append(Table(("Measured", "Value"), rows))
    pictures = list(evidence.pictures)
    if len(pictures) == 1:
        said = f"{finding.reading} {pictures[0].conclusion}"
        pictures = [replace(pictures[0], conclusion=said)]
    return Section(
        claim.title,
        notes=[f"{finding.verdict.value.capitalize()}. {finding.reading}"],
        tables=[*tables, *evidence.tables],
        pictures=pictures,
        anchor=claim.name,
    )


def _words(finding: Finding) -> Table:
    claim = finding.claim
    if finding.verdict is Verdict.UNTESTABLE:
        rows = [("Why not", claim.rule), ("What is known", claim.prediction)]
    else:
        rows = [
            ("Experiment", claim.experiment),
            ("Prediction", f"{claim.prediction} Expected: {claim.expected.value}."),
            ("Rule", claim.rule),
            *([("Changed", claim.revised)] if claim.revised else []),
        ]
    return Table(("", ""), [("Claim", claim.claim), ("Source", claim.source), *rows])


def _json(finding: Finding) -> dict[str, Any]:
    claim = finding.claim
    return {
        "name": claim.name,
        "title": claim.title,
        "claim": claim.claim,
        "source": claim.source,
        "experiment": claim.experiment,
        "prediction": claim.prediction,
        "expected": claim.expected.value,
        "rule": claim.rule,
        "revised": claim.revised,
        "verdict": finding.verdict.value,
        "as_predicted": finding.as_predicted,
        "reading": finding.reading,
        "numbers": {name: _number(n) for name, n in finding.evidence.numbers.items()},
    }


def _number(number: Number) -> dict[str, Any]:
    return {
        "label": number.label,
        "value": number.value,
        "low": number.low,
        "high": number.high,
        "unit": number.unit,
        "count": number.interval.count,
    }


def _csv(findings: Sequence[Finding]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("claim", "verdict", "expected", "number", "label", "value", "low", "high", "unit")
    )
    for finding in findings:
        head = (finding.claim.name, finding.verdict.value, finding.claim.expected.value)
        numbers = finding.evidence.numbers
        if not numbers:
            writer.writerow((*head, "", "", "", "", "", ""))
        for name, number in numbers.items():
            values = (number.value, number.low, number.high)
            writer.writerow((*head, name, number.label, *values, number.unit))
    return text.getvalue().encode()
