"""PASS, WARN or FAIL: what the numbers of a registration allow to say. Every threshold stands here, with its reason.

A verdict never rests on one number. The worst outcome is a wrong answer reported as PASS, so a number that is
missing (no rival to compare with, no reference) can only lower the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Evidence:
    """The numbers a verdict is made from.

    Attributes
    ----------
    agreement : float
        Correlation of the compared values over the common specimen.
    reference : float or None
        The same on the model's aligned training pair; none where nothing is learned or known.
    margin : float or None
        Relative lead of the score over the best other answer, 0 to 1 (above 1 if that one's is negative); none if
        there is no other.
    disagreement : float
        How far two halves of the specimen, registered apart, end from each other, as share of its mean side.
    overlap : float
        Share of the smaller specimen that the other covers.
    consensus, starts : int
        How many starts led to this answer, of how many.
    drift : float
        How far refinement moved the answer from its start, as share of the mean side.
    learned : bool
        Whether representations were compared, or intensities.
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


def judge(evidence: Evidence) -> tuple[Verdict, list[str]]:
    """Verdict and the reasons for it, the most serious first; for PASS the reasons say what was found."""
    return "WARN", ["not judged"]
