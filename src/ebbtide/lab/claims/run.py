"""Run claims: measure, judge, say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ebbtide.lab.claims.bench import SHARED, Bench, Effort
from ebbtide.lab.claims.claim import Claim, Evidence, Verdict
from ebbtide.lab.experiment import Watcher
from ebbtide.lab.memory import FORGETFUL, Memory

__all__ = ["Finding", "run_claims"]

# What an experiment without training counts for in the progress, in steps of one network.
_SMALL = 20_000


@dataclass(frozen=True)
class Finding:
    """What became of a claim.

    Attributes:
        claim: The claim.
        verdict: What the data say of it.
        reading: The same in a sentence, with the numbers.
        evidence: What was measured; nothing where the claim is not testable.
    """

    claim: Claim
    verdict: Verdict
    reading: str
    evidence: Evidence

    @property
    def as_predicted(self) -> bool:
        """Whether the verdict is the one expected beforehand."""
        return self.verdict is self.claim.expected


def run_claims(
    claims: Sequence[Claim], effort: Effort, watcher: Watcher, memory: Memory = FORGETFUL
) -> Iterator[Finding]:
    """Yield the findings one by one as they are made."""
    bench = Bench(effort, watcher, memory)
    watcher.start("Claims", _total(claims, effort))
    for claim in claims:
        yield _finding(claim, bench)
        watcher.advance(_SMALL)


def _finding(claim: Claim, bench: Bench) -> Finding:
    if claim.measure is None or claim.judge is None:
        return Finding(claim, Verdict.UNTESTABLE, claim.rule, Evidence({}))
    evidence = claim.measure(bench)
    verdict = claim.judge(evidence)
    return Finding(claim, verdict, claim.reading(verdict, evidence), evidence)


def _total(claims: Sequence[Claim], effort: Effort) -> int:
    needed = {name for claim in claims for name in claim.needs}
    shared = sum(SHARED[name].experiment(effort).total_steps() for name in needed)
    own = sum(claim.steps[effort.quick] + _SMALL for claim in claims)
    return shared + own
