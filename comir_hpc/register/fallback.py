"""Compare the two volumes in other ways where the general model's answer cannot be trusted: FAIL or WARN.

The general model knows no contrast by heart, and some it does not see: smooth nuclear images, X-rays beside neutrons.
Self-similarities (MIND) and mutual information fail elsewhere, on other pairs. Measured: on T1w and PET templates the
general model was wrong in 6 of 6 cases; where the two others were tried, they ended 1.3 voxels from the truth. On a
living subject's T1w and EPI it is the general model that finds the way. WARN counts, too, since wrong answers had it:
one of T1w and PET, and one of concrete that was half a turn off.

Each way has its own search and its own checks, and its verdict is held against answers of its own representation. The
first that is PASS is taken. Where none is, two ways that were searched apart and agree are believed before one that
stands alone, since wrong answers of different kinds seldom meet; the verdict stays that of the answer. Where no two
agree and the first one is WARN, the likeliest that is WARN is taken. Nothing raises a verdict: who asks several times
until one says yes has more wrong answers among them. Of 14 wrong answers of MIND 8 had WARN and none had PASS; of 7
right ones all had PASS (`benchmarks/verdict`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.config.register import RegisterSettings
from comir_hpc.errors import CheckpointError, RegistrationError, VolumeError
from comir_hpc.space.grid import FloatArray
from comir_hpc.transforms.affine import Affine as Transform

if TYPE_CHECKING:
    from comir_hpc.register.deform import Deformation


_SAME = 0.02  # of the specimen's mean side: answers that lie nearer to each other agree


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of one way to compare two volumes, before it is written.

    Attributes
    ----------
    transform : Transform or None
        From fixed to moving points in the world; the affine part where a deformation follows.
    record : dict
        Keys of result.json.
    panels : dict of str to (rows, columns) float32
        Slices for the report.
    landscape : dict of str to array, or None
        Arrays of the search; None without one.
    deformation : Deformation or None
        What bends after the transform; None where nothing was to bend.
    points_mm : (N, 3) float64
        Some points of the fixed specimen, (x, y, z) in mm, at which answers are compared.
    """

    transform: Transform | None
    record: dict[str, Any]
    panels: dict[str, NDArray[Any]]
    landscape: dict[str, NDArray[Any]] | None
    deformation: Deformation | None
    points_mm: FloatArray

    @property
    def passed(self) -> bool:
        """Whether the verdict is PASS."""
        return bool(self.record["verdict"] == "PASS")

    @property
    def mirrored(self) -> bool:
        """Whether one of the volumes is probably mirrored, which no way to compare them mends."""
        return self.record.get("mirrored_axis") is not None

    def apart_mm(self, other: Answer) -> float | None:
        """Mean distance between where two answers send the specimen, in mm; None where one has no transform."""
        if self.transform is None or other.transform is None:
            return None
        return float(self.transform.distance_mm(other.transform, self.points_mm).mean())

    def agrees_with(self, other: Answer) -> bool:
        """Whether two answers, neither of which is FAIL, send the specimen to one place."""
        apart = self.apart_mm(other)
        if apart is None or "FAIL" in (self.record["verdict"], other.record["verdict"]):
            return False
        return apart < _SAME * float(np.ptp(self.points_mm, axis=0).mean())

    def tried(self, representation: str, chosen: Answer) -> dict[str, Any]:
        """Describe this way for result.json, beside the answer that was taken."""
        return {
            "representation": representation,
            "verdict": self.record["verdict"],
            "probability": self.record.get("probability"),
            "reason": next(iter(self.record["reasons"]), ""),
            "apart_mm": self.apart_mm(chosen),
        }


def or_otherwise(
    first: Answer, settings: RegisterSettings, register_by: Callable[[RegisterSettings], Answer]
) -> Answer:
    """Return the first answer, or where it is not PASS what other ways to compare make of it.

    That is the first fallback that is PASS. Without one, it is the likelier one of the first two ways that agree. If
    none agree and the first answer is WARN, it is the likeliest of those that are WARN; if the first is FAIL, it
    stays.

    Parameters
    ----------
    first : Answer
        Answer of what the settings ask for.
    settings : RegisterSettings
        They say whether there are fallbacks.
    register_by : callable
        Registers with other settings, from the beginning.

    Returns
    -------
    Answer
        With ``tried`` and a note in its record if anything else was compared.
    """
    if first.passed or first.mirrored or not settings.fallbacks:
        return first
    ways: dict[str, Answer | Exception] = {settings.representation: first}
    taken, ending = settings.representation, "none of them is PASS, no two agree, and this is the first"
    for word, answer in _others(settings, register_by):
        ways[word] = answer
        if isinstance(answer, Answer) and answer.passed:
            taken, ending = word, f"this is the answer of --representation {word}"
            break
        if both := _agreeing(ways):
            # The rest is not asked: it could only agree with one of two answers that are the same.
            taken = _likeliest(both)
            ending = f"{' and '.join(both)} agree, and this is the answer of --representation {taken}"
            break
    else:
        if first.record["verdict"] == "WARN":  # no verdict rises by it: FAIL stays FAIL
            taken = _likeliest(_doubtful(ways))
            ending = (
                f"none of them is PASS, no two agree, and that of --representation {taken} is the likeliest"
            )
    chosen = ways[taken]
    assert isinstance(chosen, Answer)
    chosen.record["tried"] = tried = [_tried(word, answer, chosen) for word, answer in ways.items()]
    said = ", ".join(f"{one['representation']}: {one['verdict']}" for one in tried)
    verdict = first.record["verdict"]
    note = f"the general model's answer is {verdict}, so other ways to compare were tried, too ({said}): {ending}"
    chosen.record["notes"] = [note, *chosen.record.get("notes", [])]
    return chosen


def _agreeing(ways: dict[str, Answer | Exception]) -> dict[str, Answer]:
    """Return the first two ways that agree, by their words; nothing where no two do."""
    answers = [(word, answer) for word, answer in ways.items() if isinstance(answer, Answer)]
    pairs = (both for both in itertools.combinations(answers, 2) if both[0][1].agrees_with(both[1][1]))
    return dict(next(pairs, ()))


def _doubtful(ways: dict[str, Answer | Exception]) -> dict[str, Answer]:
    """Return the ways whose answer is WARN."""
    answers = {word: answer for word, answer in ways.items() if isinstance(answer, Answer)}
    return {word: answer for word, answer in answers.items() if answer.record["verdict"] == "WARN"}


def _likeliest(answers: dict[str, Answer]) -> str:
    """Return the word of the answer that is most probably right; of equal ones the first."""
    return max(answers, key=lambda word: answers[word].record.get("probability") or 0.0)


def _tried(word: str, answer: Answer | Exception, chosen: Answer) -> dict[str, Any]:
    if isinstance(answer, Answer):
        return answer.tried(word, chosen)
    return {"representation": word, "verdict": "FAIL", "probability": None, "reason": str(answer)}


def _others(
    settings: RegisterSettings, register_by: Callable[[RegisterSettings], Answer]
) -> Iterator[tuple[str, Answer | Exception]]:
    """Register by each fallback when it is asked for; the error where one of them cannot be."""
    for word in settings.fallbacks:
        try:
            yield word, register_by(settings.model_copy(update={"representation": word}))
        except (RegistrationError, VolumeError, CheckpointError) as error:
            yield word, error
