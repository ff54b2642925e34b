"""Claims: words complete, rules that can go both ways, verdicts that follow from the numbers."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ebbtide.lab.claims.bench import ADAMW, PLAIN, SHARED, Bench, Effort
from ebbtide.lab.claims.claim import Claim, Evidence, Number, Verdict, exact
from ebbtide.lab.claims.registry import CLAIMS, choose_claims
from ebbtide.lab.claims.report import summary, write_report
from ebbtide.lab.claims.run import Finding, run_claims
from ebbtide.lab.errors import InputError
from ebbtide.lab.statistics import Interval
from ebbtide.lab.tasks import Cell
from tests.lab import Counter

QUICK = Effort(quick=True)
TESTABLE = [claim for claim in CLAIMS if claim.measure is not None]
UNTESTABLE = [claim for claim in CLAIMS if claim.measure is None]
# Those that train nothing take a second or two.
SMALL = [claim for claim in TESTABLE if not claim.needs and not claim.steps[0]]
TRAINED = [claim for claim in TESTABLE if claim not in SMALL]


def name_of(claim: Claim) -> str:
    return claim.name


def doctored(claim: Claim, evidence: Evidence, interval: Interval) -> Evidence:
    numbers = {n: Number(m.label, interval, m.form) for n, m in evidence.numbers.items()}
    return Evidence(numbers)


def check(claim: Claim, evidence: Evidence) -> Verdict:
    """Check everything that holds for any evidence, and return the verdict."""
    assert claim.judge is not None
    verdict = claim.judge(evidence)
    for sentence in claim.readings:
        text = claim.reading(sentence, evidence)
        assert "{" not in text
        assert text.endswith(".")
    # What is unknown can confirm nothing.
    unknown = doctored(claim, evidence, Interval(math.nan, -math.inf, math.inf, 1))
    assert claim.judge(unknown) is not Verdict.CONFIRMED
    # Some numbers must lead to another verdict, and every verdict has its sentence.
    found = {verdict}
    for value in (0.0, 1e-15, 0.004, 0.05, 0.5, 1.0, 1.5, 5.0, 1e4, -5.0):
        changed = claim.judge(doctored(claim, evidence, Interval(value, value, value, 1)))
        assert changed in claim.readings
        found.add(changed)
    for name in evidence.numbers:
        for value in (0.0, 0.05, 1.0, 50.0, -50.0):
            numbers = {**evidence.numbers, name: exact(name, value)}
            found.add(claim.judge(Evidence(numbers)))
    assert len(found) > 1
    assert found <= set(claim.readings)
    return verdict


def test_names_are_unique_and_fit_a_command_line() -> None:
    names = [claim.name for claim in CLAIMS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_a_claim_says_all_that_is_needed_to_follow_it(claim: Claim) -> None:
    words = (claim.title, claim.claim, claim.source, claim.experiment, claim.prediction, claim.rule)
    assert all(words)
    assert not claim.title.endswith(".")
    assert all(text.endswith((".", ")")) for text in (claim.claim, claim.prediction, claim.rule))
    assert set(claim.needs) <= set(SHARED)


@pytest.mark.parametrize("claim", TESTABLE, ids=name_of)
def test_a_testable_claim_has_a_rule_and_could_be_refuted(claim: Claim) -> None:
    assert claim.judge is not None
    assert claim.expected in claim.readings
    assert {Verdict.CONFIRMED, Verdict.NOT_CONFIRMED} <= set(claim.readings)
    assert Verdict.UNTESTABLE not in claim.readings


def test_an_untestable_claim_says_why() -> None:
    findings = list(run_claims(UNTESTABLE, QUICK, Counter()))
    assert [finding.verdict for finding in findings] == [Verdict.UNTESTABLE] * len(UNTESTABLE)
    assert [finding.reading for finding in findings] == [claim.rule for claim in UNTESTABLE]


@pytest.mark.parametrize("claim", SMALL, ids=name_of)
def test_a_deterministic_experiment_comes_out_as_predicted(claim: Claim) -> None:
    assert claim.measure is not None
    evidence = claim.measure(Bench(QUICK, Counter()))
    assert check(claim, evidence) is claim.expected


def test_the_numbers_of_the_literature_come_out() -> None:
    """Values that theory gives in closed form, to the digits printed."""
    bench = Bench(QUICK, Counter())
    known = {
        ("late-parameter", "shared"): 0.1 / math.sqrt(0.001 / (1 - 0.999**1001)),
        ("bias-correction", "usual"): 0.1 / math.sqrt(0.001),
        ("bias-correction", "equal"): 0.05 / math.sqrt(0.05),
        ("constant-gradient", "drift"): 1 / math.sqrt(2),
        ("constant-gradient", "walk"): math.sqrt(0.1 / 1.9),
        ("effective-decay", "l2"): 0.5,
        ("effective-decay", "small"): math.sqrt(1 / 0.03),
        ("big-weights", "adamw"): 1 - (1 - 1e-4) ** 1000,
        ("linf-bound", "top"): 1.0,
    }
    for claim in choose_claims(",".join({name for name, _ in known})):
        assert claim.measure is not None
        evidence = claim.measure(bench)
        for (name, number), value in known.items():
            if name == claim.name:
                # Simulated ones are known to about a percent.
                assert evidence[number].value == pytest.approx(value, rel=0.02), (name, number)


@pytest.mark.slow
def test_every_experiment_with_training_can_be_judged_both_ways() -> None:
    counter = Counter()
    findings = {f.claim.name: f for f in run_claims(TRAINED, QUICK, counter)}
    assert counter.done == counter.total
    for finding in findings.values():
        assert check(finding.claim, finding.evidence) is finding.verdict
    # Those that do not hang on a few seeds.
    for name in ("loss-scale", "loss-picture", "convergence-speed", "larger-lambda"):
        assert findings[name].as_predicted, findings[name].reading


def test_progress_counts_what_was_announced() -> None:
    def measure(bench: Bench) -> Evidence:
        job = (replace(PLAIN, steps=25), ADAMW, [Cell(1e-3, 0.0), Cell(1e-3, 0.1)])
        bench.train([job, job])
        return Evidence({})

    seeds = len(QUICK.seeds)
    (formulas,) = choose_claims("formulas")
    trained = replace(formulas, measure=measure, judge=lambda _: Verdict.CONFIRMED, readings={
        Verdict.CONFIRMED: "So it is."}, steps=(0, 2 * 2 * seeds * 25))  # fmt: skip
    counter = Counter()
    assert len(list(run_claims([formulas, trained], QUICK, counter))) == 2
    assert counter.done == counter.total


def test_unknown_claims_are_refused() -> None:
    with pytest.raises(InputError, match="unknown claim 'lion'"):
        choose_claims("formulas,lion")
    with pytest.raises(InputError, match="no claim named"):
        choose_claims(" , ")


def test_numbers_are_written_with_their_range() -> None:
    number = Number("gain", Interval(1.234, -0.5, 2.5, 10), "+.1f", "points")
    assert str(number) == "+1.2 points [-0.5 to 2.5]"
    assert str(exact("share", 0.5, ".0%")) == "50%"
    assert str(exact("slope", math.nan)) == "not determined"


def test_a_report_holds_verdicts_words_and_numbers(tmp_path: Path) -> None:
    findings = list(run_claims(choose_claims("late-parameter,imagenet"), QUICK, Counter()))
    write_report(findings, QUICK, tmp_path / "claims")
    results = json.loads((tmp_path / "claims" / "results.json").read_text())
    first, second = results["claims"]
    assert (first["verdict"], first["as_predicted"]) == ("not confirmed", True)
    assert first["numbers"]["shared"]["value"] == pytest.approx(2.515, rel=1e-3)
    assert second["numbers"] == {}
    text = (tmp_path / "claims" / "report.html").read_text()
    assert 'href="#late-parameter"' in text
    assert 'id="late-parameter"' in text
    with (tmp_path / "claims" / "claims.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["claim"] for row in rows} == {"late-parameter", "imagenet"}


def test_what_was_changed_after_first_numbers_is_said(tmp_path: Path) -> None:
    changed, kept = choose_claims("warm-restarts,formulas")[::-1]
    findings = [Finding(claim, claim.expected, "So.", Evidence({})) for claim in (changed, kept)]
    write_report(findings, QUICK, tmp_path / "claims")
    results = json.loads((tmp_path / "claims" / "results.json").read_text())
    assert [claim["revised"] for claim in results["claims"]] == [changed.revised, ""]
    text = (tmp_path / "claims" / "report.html").read_text()
    assert changed.revised
    assert text.count("<span>Changed</span>") == 1


def test_the_summary_counts_verdicts_and_surprises() -> None:
    claim = choose_claims("formulas")[0]
    findings = [Finding(claim, verdict, "", Evidence({})) for verdict in Verdict]
    assert summary(findings) == (
        "1 confirmed; 1 confirmed with a condition; 1 not confirmed; 1 not testable here. "
        "1 of 3 verdicts are as predicted."
    )
