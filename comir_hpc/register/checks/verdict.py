"""Judge a registration by its numbers: PASS, WARN or FAIL. Every threshold is here, with its reason.

A verdict is never made from one number. The worst outcome is a wrong answer that is reported as PASS. So a number that
is missing (no rival to compare with, no reference) can only lower the verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Evidence:
    """Numbers from which a verdict is made.

    Attributes
    ----------
    agreement : float
        Correlation of the compared values over the common specimen.
    reference : float or None
        Agreement on the model's aligned training pair; None where nothing is learned or nothing is known.
    margin : float or None
        Relative lead of the score over the best other answer, 0 to 1 (above 1 if that one's is negative); None if
        there is no other.
    disagreement : float
        Distance between the answers of two halves of the specimen, registered separately, as a share of its mean side.
    overlap : float
        Share of the smaller specimen that the other one covers, 0 to 1.
    consensus, starts : int
        How many starts led to this answer, and how many there were.
    drift : float
        Distance that refinement moved the answer from its start, as a share of the specimen's mean side.
    learned : bool
        Whether what was compared was trained to correlate, so that the agreement has a scale.
    compared : str
        What was compared, in the plural.
    reference_of : str
        What `reference` was measured on, in words.
    """

    agreement: float
    reference: float | None
    margin: float | None
    disagreement: float
    overlap: float
    consensus: int
    starts: int
    drift: float
    learned: bool
    compared: str = "intensities"
    reference_of: str = "the training pair"


# The thresholds come from registrations of the brain pair with a known answer. Agreement as a share of the reference:
# right answers had 0.94 to 1.0, and 0.81 with half of the specimen cut off. A mirrored head, which no rotation brings
# back, had 0.67. Other wrong answers, noise and shuffled blocks had less than 0.25.
_PASS_AGREEMENT, _FAIL_AGREEMENT = 0.75, 0.4
# Lead over the best other answer: right ones had 0.82 and more. If two answers explain the pair nearly as well as each
# other, the choice is open.
_PASS_MARGIN, _FAIL_MARGIN = 0.3, 0.05
# Distance between two halves registered separately, as a share of the specimen's mean side, on representations of the
# 2 mm brain: right answers had 0.2 and 0.3 %, and 0.9 % with half of the specimen cut off. The best wrong ones had 2.3
# to 3.1 %.
_PASS_HALVES, _FAIL_HALVES = 0.015, 0.05
# With less overlap, the agreement is that of less than half of the smaller specimen.
_PASS_OVERLAP = 0.5
# Refinement moved right answers by up to 0.19 of the mean side from their start. If it moves one further, it has left
# the place that the search proposed.
_PASS_DRIFT = 0.3


def judge(evidence: Evidence) -> tuple[Verdict, list[str]]:
    """Judge the evidence: the verdict and its reasons, the most serious first. For PASS they say what was found.

    What was not trained to correlate never gets PASS, intensities above all. Mutual information has no scale: nothing
    says how much of it a right answer has. So a wrong answer without a rival looks like a right one.
    """
    failures: list[str] = []
    doubts: list[str] = []
    found: list[str] = []
    for text, failed, doubtful in _findings(evidence):
        (failures if failed else doubts if doubtful else found).append(text)
    if failures:
        return "FAIL", failures + doubts
    if doubts:
        return "WARN", doubts + found
    return "PASS", found


def _findings(evidence: Evidence) -> list[tuple[str, bool, bool]]:
    """Put each finding into words, and say whether it refutes the answer, and whether it leaves it in doubt."""
    findings = [_agreement(evidence)]
    if evidence.margin is None:
        findings.append(("no other answer was there to compare this one with", False, True))
    else:
        lead = f"its score leads the best other answer's by {100 * evidence.margin:.0f} %"
        wanted = "" if evidence.margin >= _PASS_MARGIN else f"; {100 * _PASS_MARGIN:.0f} % is safe"
        findings.append((lead + wanted, evidence.margin < _FAIL_MARGIN, evidence.margin < _PASS_MARGIN))
    apart = evidence.disagreement
    if not math.isfinite(apart):
        findings.append(("a half of the specimen alone cannot be registered", False, True))
    else:
        limit = "" if apart <= _PASS_HALVES else f"; {100 * _PASS_HALVES:g} % is safe"
        halves = f"two halves registered apart end {100 * apart:.2g} % of the specimen's side from each other{limit}"
        findings.append((halves, apart > _FAIL_HALVES, apart > _PASS_HALVES))
    overlap = f"{100 * evidence.overlap:.0f} % of the smaller specimen overlaps"
    findings.append((overlap, False, evidence.overlap < _PASS_OVERLAP))
    moved = (
        f"{evidence.consensus} of {evidence.starts} starts led here; refinement moved the best of them by "
        f"{100 * evidence.drift:.0f} % of the specimen's side"
    )
    findings.append((moved, False, evidence.drift > _PASS_DRIFT))
    return findings


def _agreement(evidence: Evidence) -> tuple[str, bool, bool]:
    if not evidence.learned:
        return (
            f"{evidence.compared} were compared, whose agreement has no scale: look at the pictures",
            False,
            True,
        )
    text = f"the representations correlate at {evidence.agreement:.2f}"
    if evidence.reference is None or evidence.reference <= 0:
        return f"{text}; the model has no reference to hold that against", evidence.agreement <= 0, True
    share = evidence.agreement / evidence.reference
    text += f", {100 * share:.0f} % of what they reach on {evidence.reference_of}"
    if share < _PASS_AGREEMENT:
        text += f"; {100 * _PASS_AGREEMENT:.0f} % is safe"
    return text, share < _FAIL_AGREEMENT, share < _PASS_AGREEMENT
