"""From several rough answers to a ranking: refine all coarsely, the best few finely, and see which agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from comir_hpc.errors import RegistrationError
from comir_hpc.register.agreement import Agreement, Comparison
from comir_hpc.register.global_search import MIN_OVERLAP
from comir_hpc.register.refine import Kind, Level, Metric, Refiner
from comir_hpc.transforms import Transform

COARSE = (Level(4, 2.0, 0.5),)
FINE = (Level(2, 1.0, 0.2), Level(1, 0.0, 0.3))
FINALISTS = 3
"""Distinct answers that are refined finely: the winner, and the rivals that its margin is measured against."""

SAME_SHARE = 0.05
"""Two answers are one when they send the specimen's points to places closer than this share of its mean side:
after the coarse level, starts that lead to one optimum end within 4 % of each other (measured on the 2 mm brain)."""

_KEPT_SHARE = 0.9  # of a candidate's score that a refinement has to keep, to be taken


@dataclass(frozen=True, eq=False)
class Candidate:
    """One answer, and what became of it.

    Attributes
    ----------
    start, transform : Transform
        Before and after refinement.
    coarse_score : float or None
        Score in the global search; none for a start that did not come from it.
    agreement : Agreement
        Under `transform`.
    score : float
        What candidates are ranked by: evidence of correlation, or information times the root of the overlap.
    answer : int
        Number of the distinct answer that this one belongs to; 0 is the best. -1: not a valid answer.
    failure : str or None
        Why it is none: the start shows too little of the moving specimen.
    """

    start: Transform
    transform: Transform
    coarse_score: float | None
    agreement: Agreement
    score: float
    answer: int = -1
    failure: str | None = None


@dataclass(frozen=True, eq=False)
class Ranking:
    """All candidates, best first; valid ones before failed ones."""

    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The winner."""
        return self.candidates[0]

    @property
    def runner_up(self) -> Candidate | None:
        """The best candidate that is another answer than the winner's."""
        rivals = (c for c in self.candidates if c.failure is None and c.answer > 0)
        return next(rivals, None)

    @property
    def consensus(self) -> int:
        """How many starts led to the winner's answer."""
        return sum(c.answer == 0 for c in self.candidates)


def rank(
    refiner: Refiner,
    comparison: Comparison,
    starts: list[tuple[Transform, float | None]],
    *,
    metric: Metric,
    kind: Kind = "rigid",
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Refine rough answers and order them.

    Parameters
    ----------
    starts : list of (transform, score)
        Fixed to moving.
    kind : "rigid" or "affine"
        Affine starts from the rigid winner.

    Raises
    ------
    RegistrationError
        If no start leads to an answer.
    """
    steps = len(starts) + FINALISTS + (kind == "affine")
    done = 0

    def improve(candidate: Candidate, levels: tuple[Level, ...], how: Kind = "rigid") -> Candidate:
        nonlocal done
        improved = _improve(refiner, comparison, candidate, levels, how, metric)
        done += 1
        if progress is not None:
            progress(done, steps)
        return improved

    rough = [_measured(comparison, Candidate(t, t, s, Agreement(0, 0, 0), 0.0), metric) for t, s in starts]
    ranked = _ordered([improve(c, COARSE) for c in rough], comparison)
    finalists = [next(c for c in ranked if c.answer == n) for n in sorted({c.answer for c in ranked} - {-1})]
    for finalist in finalists[:FINALISTS]:
        ranked[ranked.index(finalist)] = improve(finalist, FINE)
    ranked = _ordered(ranked, comparison)
    if ranked[0].failure is not None:
        raise RegistrationError(
            f"none of {len(ranked)} starts led to an answer (the best: {ranked[0].failure}); check that the two "
            "volumes show the same specimen, or start elsewhere: --initial global or moments"
        )
    if kind == "affine":
        ranked[0] = improve(ranked[0], FINE, "affine")
    if progress is not None:
        progress(steps, steps)
    return Ranking(tuple(ranked))


def _improve(
    refiner: Refiner,
    comparison: Comparison,
    candidate: Candidate,
    levels: tuple[Level, ...],
    kind: Kind,
    metric: Metric,
) -> Candidate:
    if candidate.failure is not None:
        return candidate
    try:
        refined = refiner.refine(candidate.transform, levels, kind)
    except RegistrationError:
        return candidate
    improved = _measured(comparison, replace(candidate, transform=refined.transform), metric)
    # The optimiser sees a sample of the voxels and no overlap: it may wander off a poor start, never a good one.
    wandered = improved.failure is not None or improved.score < _KEPT_SHARE * candidate.score
    return candidate if wandered else improved


def _measured(comparison: Comparison, candidate: Candidate, metric: Metric) -> Candidate:
    agreement = comparison.at(candidate.transform)
    score = agreement.evidence if metric == "correlation" else agreement.information * agreement.overlap**0.5
    failure = None
    if agreement.overlap < MIN_OVERLAP:
        failure = f"only {agreement.overlap:.0%} of the smaller specimen overlaps, at least {MIN_OVERLAP:.0%} has to"
    return replace(candidate, agreement=agreement, score=score, failure=failure)


def _ordered(candidates: list[Candidate], comparison: Comparison) -> list[Candidate]:
    """Sort by score, failed ones last, and number the distinct answers."""
    points = comparison.some_points_mm(1000)
    side = comparison.side_mm(points)
    ranked = sorted(candidates, key=lambda c: (c.failure is not None, -c.score))
    answers: list[Candidate] = []
    numbered = []
    for candidate in ranked:
        if candidate.failure is not None:
            numbered.append(replace(candidate, answer=-1))
            continue
        near = (
            n
            for n, answer in enumerate(answers)
            if candidate.transform.distance_mm(answer.transform, points).mean() < SAME_SHARE * side
        )
        number = next(near, len(answers))
        if number == len(answers):
            answers.append(candidate)
        numbered.append(replace(candidate, answer=number))
    return numbered
