"""Compare the two volumes in other ways where the general model's answer cannot be trusted: FAIL or WARN.

The general model knows no contrast by heart, and some it does not see: smooth nuclear images, X-rays beside neutrons.
Self-similarities (MIND) and mutual information fail elsewhere, on other pairs. Measured: on T1w and PET templates the
general model was wrong in 6 of 6 cases; where the two others were tried, they ended 1.3 voxels from the truth. On a
living subject's T1w and EPI it is the general model that finds the way. WARN counts, too, since wrong answers had it:
one of T1w and PET, and one of concrete that was half a turn off.

Each way has its own search and its own checks, and its verdict is held against answers of its own representation. Only
PASS is taken: who asks several times until one says yes has more wrong answers among them. Of 14 wrong answers of MIND
8 had WARN and none had PASS; of 7 right ones all had PASS (`benchmarks/verdict`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from comir_hpc.config.register import RegisterSettings
from comir_hpc.errors import CheckpointError, RegistrationError, VolumeError
from comir_hpc.transforms.affine import Affine as Transform

if TYPE_CHECKING:
    from comir_hpc.register.deform import Deformation


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
    """

    transform: Transform | None
    record: dict[str, Any]
    panels: dict[str, NDArray[Any]]
    landscape: dict[str, NDArray[Any]] | None
    deformation: Deformation | None

    @property
    def passed(self) -> bool:
        """Whether the verdict is PASS."""
        return bool(self.record["verdict"] == "PASS")

    @property
    def mirrored(self) -> bool:
        """Whether one of the volumes is probably mirrored, which no way to compare them mends."""
        return self.record.get("mirrored_axis") is not None

    def tried(self, representation: str) -> dict[str, Any]:
        """Describe this way for result.json."""
        return {
            "representation": representation,
            "verdict": self.record["verdict"],
            "probability": self.record.get("probability"),
            "reason": next(iter(self.record["reasons"]), ""),
        }


def or_otherwise(
    first: Answer, settings: RegisterSettings, register_by: Callable[[RegisterSettings], Answer]
) -> Answer:
    """Return the first answer, or where it is not PASS that of the first fallback that is.

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
    tried = [first.tried(settings.representation)]
    chosen = first
    for word, answer in _others(settings, register_by):
        if isinstance(answer, Exception):
            tried.append(
                {"representation": word, "verdict": "FAIL", "probability": None, "reason": str(answer)}
            )
            continue
        tried.append(answer.tried(word))
        if answer.passed:
            chosen = answer
            break
    said = ", ".join(f"{one['representation']}: {one['verdict']}" for one in tried)
    if chosen is first:
        ending = "none of them is PASS, and this is the first"
    else:
        ending = f"this is the answer of --representation {tried[-1]['representation']}"
    verdict = first.record["verdict"]
    note = f"the general model's answer is {verdict}, so other ways to compare were tried, too ({said}): {ending}"
    chosen.record["tried"] = tried
    chosen.record["notes"] = [note, *chosen.record.get("notes", [])]
    return chosen


def _others(
    settings: RegisterSettings, register_by: Callable[[RegisterSettings], Answer]
) -> Iterator[tuple[str, Answer | Exception]]:
    """Register by each fallback when it is asked for; the error where one of them cannot be."""
    for word in settings.fallbacks:
        try:
            yield word, register_by(settings.model_copy(update={"representation": word}))
        except (RegistrationError, VolumeError, CheckpointError) as error:
            yield word, error
