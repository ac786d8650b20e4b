"""Write down the answer of a registration, with its evidence and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from comir_hpc.errors import RegistrationError
from comir_hpc.register.checks.verdict import judge
from comir_hpc.register.outputs import FAILED_START, candidate_record
from comir_hpc.register.pair import Pair
from comir_hpc.register.ranking import Candidate, Ranking
from comir_hpc.register.slices import SlicePlane
from comir_hpc.register.starts import Start

if TYPE_CHECKING:
    from comir_hpc.register.checks.evidence import Evidence


def account_of(pair: Pair, ranking: Ranking, evidence: Evidence, frame: SlicePlane) -> dict[str, Any]:
    """Describe the answer and the numbers that the verdict is made from, as keys of result.json."""
    found = judge(evidence)
    return {
        "verdict": found.verdict,
        "reasons": list(found.reasons),
        "probability": found.probability,
        "bound_mm": found.bound_mm,
        "evidence": [asdict(piece) for piece in found.pieces],
        "causes": [cause.name for cause in evidence.causes],
        "mirrored_axis": evidence.mirror_axis,
        "metric": {"name": pair.measure.name, "value": ranking.best.score},
        **_numbers(evidence),
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


def _numbers(evidence: Evidence) -> dict[str, Any]:
    """Give the numbers that a registration has without the grid of the checks."""
    return {
        "agreement": evidence.agreement,
        "reference_agreement": evidence.reference,
        "margin": evidence.margin,
        "overlap": evidence.overlap,
        "halves_distance_mm": evidence.halves_mm if np.isfinite(evidence.halves_mm) else None,
        "consensus": f"{evidence.consensus} of {evidence.starts} starts",
        "drift_mm": evidence.drift_mm,
        "deviation": evidence.deviation,
    }
