"""Gather what is measured of an answer, for its verdict."""

from __future__ import annotations

from comir_hpc.register.checks.cross_check import halves_distance_mm
from comir_hpc.register.checks.verdict import Evidence
from comir_hpc.register.inputs import Inputs
from comir_hpc.register.pair import Pair
from comir_hpc.register.ranking import FINE, Ranking


def gather(pair: Pair, ranking: Ranking, inputs: Inputs) -> Evidence:
    """Measure the best answer of a ranking.

    Parameters
    ----------
    pair : Pair
        Both volumes as they are compared.
    ranking : Ranking
        The answers, the best first.
    inputs : Inputs
        What is known of the representation.
    """
    best, rival = ranking.best, ranking.runner_up
    apart = halves_distance_mm(pair.refiner, pair.fixed, best.transform, FINE[:1], pair.points_mm)
    moved = float(best.start.distance_mm(best.transform, pair.points_mm).mean())
    return Evidence(
        agreement=best.agreement.correlation,
        reference=inputs.fixed.representation.reference,
        margin=None if rival is None or best.score <= 0 else 1 - rival.score / best.score,
        disagreement=apart / pair.side_mm,
        overlap=best.agreement.overlap,
        consensus=ranking.consensus,
        starts=len(ranking.candidates),
        drift=moved / pair.side_mm,
        learned=inputs.fixed.representation.learned,
        compared=inputs.fixed.representation.noun,
        reference_of=inputs.fixed.representation.reference_of,
    )
