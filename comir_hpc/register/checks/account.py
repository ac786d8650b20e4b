"""Write down the answer of a registration, with its evidence and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from comir_hpc.errors import RegistrationError
from comir_hpc.register.checks.verdict import Evidence, judge
from comir_hpc.register.outputs import FAILED_START, candidate_record
from comir_hpc.register.pair import Pair
from comir_hpc.register.ranking import Candidate, Ranking
from comir_hpc.register.slices import SlicePlane
from comir_hpc.register.starts import Start


def account_of(pair: Pair, ranking: Ranking, evidence: Evidence, frame: SlicePlane) -> dict[str, Any]:
    """Describe the answer and the numbers that the verdict is made from, as keys of result.json."""
    verdict, reasons = judge(evidence)
    return {
        "verdict": verdict,
        "reasons": reasons,
        "metric": {"name": pair.measure.name, "value": ranking.best.score},
        **_numbers(evidence, pair),
        "candidates": [candidate_record(rank + 1, c, frame) for rank, c in enumerate(ranking.candidates)],
    }


def without_answer(
    pair: Pair, starts: Sequence[Start], frame: SlicePlane, error: RegistrationError
) -> dict[str, Any]:
    """Describe the starts that were tried, and why none of them led to an answer."""
    tried = [
        Candidate(start, start, score, pair.similarity.at(start), 0.0, failure=FAILED_START)
        for start, score in starts
    ]
    return {
        "verdict": "FAIL",
        "reasons": [str(error)],
        "metric": {"name": pair.measure.name, "value": None},
        "agreement": None,
        "margin": None,
        "candidates": [
            candidate_record(rank + 1, one, frame) | {"refined_score": None} for rank, one in enumerate(tried)
        ],
    }


def _numbers(evidence: Evidence, pair: Pair) -> dict[str, Any]:
    apart = evidence.disagreement * pair.side_mm
    return {
        "agreement": evidence.agreement,
        "reference_agreement": evidence.reference,
        "margin": evidence.margin,
        "overlap": evidence.overlap,
        "halves_distance_mm": apart if np.isfinite(apart) else None,
        "consensus": f"{evidence.consensus} of {evidence.starts} starts",
        "drift_mm": evidence.drift * pair.side_mm,
    }
