"""Rank several rough answers: refine all of them coarsely and the best few finely, and find which are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from comir_hpc.errors import RegistrationError
from comir_hpc.register.global_search import MIN_OVERLAP
from comir_hpc.register.refine import Kind, Level, Refines
from comir_hpc.register.similarity import Similarity
from comir_hpc.representations.measures import Agreement, Measure
from comir_hpc.transforms.affine import Affine as Transform

COARSE = (Level(4, 2.0, 0.5),)
FINE = (Level(2, 1.0, 0.2), Level(1, 0.0, 0.3))
FINALISTS = 3
"""Distinct answers that are refined finely: the winner, and the rivals that its margin is measured against."""

SAME_SHARE = 0.05
"""Two answers are the same if they send the specimen's points to places closer than this share of its mean side. After
the coarse level, starts that lead to one optimum end within 4 % of each other (measured on the 2 mm brain)."""

_KEPT_SHARE = 0.9  # a refinement is used if it keeps at least this share of the candidate's score


@dataclass(frozen=True, eq=False)
class Candidate:
    """One answer, and what became of it.

    Attributes
    ----------
    start, transform : Transform
        Transform before and after refinement.
    coarse_score : float or None
        Score in the global search; None for a start that did not come from it.
    agreement : Agreement
        Agreement of the two volumes under `transform`.
    score : float
        Score that candidates are ranked by: correlation, or information, times the root of the overlap.
    answer : int
        Number of the distinct answer that this candidate belongs to; 0 is the best, and -1 means that it is invalid.
    failure : str or None
        Why it is invalid: the start shows too little of the moving specimen. None for a valid one.
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
    """Order all candidates: the best first, and valid ones before failed ones."""

    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The candidate that has won."""
        return self.candidates[0]

    @property
    def runner_up(self) -> Candidate | None:
        """The best candidate with another answer than the winner's; None if there is none."""
        rivals = (c for c in self.candidates if c.failure is None and c.answer > 0)
        return next(rivals, None)

    @property
    def consensus(self) -> int:
        """Number of starts that led to the winner's answer."""
        return sum(c.answer == 0 for c in self.candidates)


def rank(
    refiner: Refines,
    similarity: Similarity,
    starts: list[tuple[Transform, float | None]],
    *,
    measure: Measure,
    kind: Kind = "rigid",
    coarse: tuple[Level, ...] = COARSE,
    fine: tuple[Level, ...] = FINE,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Refine rough answers and order them.

    Parameters
    ----------
    refiner : Refines
        Refines one answer.
    similarity : Similarity
        Measures one answer.
    starts : list of (transform, score)
        Rough answers, from fixed to moving points, with their score in the search or None.
    measure : Measure
        Gives the score.
    kind : "rigid" or "affine"
        Kind of transform. An affine one starts from the rigid winner.
    coarse : tuple of Level
        Levels at which every answer is refined; none for answers that came through finer and finer scales.
    fine : tuple of Level
        Levels at which the best distinct answers are refined after that.
    progress : callable, optional
        Function that is called as ``progress(done, total)`` after each refinement.

    Raises
    ------
    RegistrationError
        If no start leads to an answer.
    """
    steps = len(starts) * bool(coarse) + FINALISTS + (kind == "affine")
    done = 0

    def improve(candidate: Candidate, levels: tuple[Level, ...], how: Kind = "rigid") -> Candidate:
        nonlocal done
        improved = _improve(refiner, similarity, candidate, levels, how, measure)
        done += 1
        if progress is not None:
            progress(done, steps)
        return improved

    rough = [_measured(similarity, Candidate(t, t, s, Agreement(0, 0, 0), 0.0), measure) for t, s in starts]
    ranked = _ordered([improve(c, coarse) for c in rough] if coarse else rough, similarity)
    finalists = [next(c for c in ranked if c.answer == n) for n in sorted({c.answer for c in ranked} - {-1})]
    for finalist in finalists[:FINALISTS]:
        ranked[ranked.index(finalist)] = improve(finalist, fine)
    ranked = _ordered(ranked, similarity)
    if ranked[0].failure is not None:
        raise RegistrationError(
            f"none of {len(ranked)} starts led to an answer (the best: {ranked[0].failure}); check that the two "
            "volumes show the same specimen, or start elsewhere: --initial global or moments"
        )
    # Only the winner is stretched: the answers were ranked as rigid ones.
    if kind == "affine":
        ranked[0] = improve(ranked[0], fine, "affine")
    if progress is not None:
        progress(steps, steps)
    return Ranking(tuple(ranked))


def _improve(
    refiner: Refines,
    similarity: Similarity,
    candidate: Candidate,
    levels: tuple[Level, ...],
    kind: Kind,
    measure: Measure,
) -> Candidate:
    if candidate.failure is not None:
        return candidate
    try:
        refined = refiner.refine(candidate.transform, levels, kind)
    except RegistrationError:
        return candidate
    improved = _measured(similarity, replace(candidate, transform=refined.transform), measure)
    # The optimiser compares only a sample of the voxels, and knows nothing of the overlap. From a poor start it may go
    # to a worse place; such a result is not used.
    wandered = improved.failure is not None or improved.score < _KEPT_SHARE * candidate.score
    return candidate if wandered else improved


def _measured(similarity: Similarity, candidate: Candidate, measure: Measure) -> Candidate:
    agreement = similarity.at(candidate.transform)
    failure = None
    if agreement.overlap < MIN_OVERLAP:
        failure = f"only {agreement.overlap:.0%} of the smaller specimen overlaps, at least {MIN_OVERLAP:.0%} has to"
    return replace(candidate, agreement=agreement, score=measure.score(agreement), failure=failure)


def _ordered(candidates: list[Candidate], similarity: Similarity) -> list[Candidate]:
    """Sort candidates by score, failed ones last, and number the distinct answers."""
    points = similarity.some_points_mm(1000)
    side = similarity.side_mm(points)
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
