"""Parts of a registration's result.json: candidates, evidence, inputs, and what was tried."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from comir_hpc.errors import RegistrationError
from comir_hpc.runs.record import Record
from comir_hpc.space.grid import Grid
from comir_hpc.transforms.affine import Affine

Verdict = Literal["PASS", "WARN", "FAIL"]
"""What is said of an answer."""

Figure = float | None
Finite = Annotated[float, Field(allow_inf_nan=False)]
Row = tuple[Finite, Finite, Finite, Finite]
Point = tuple[Finite, Finite, Finite]


def in_percent(probability: float) -> str:
    """Write a probability, 0 to 1, in percent; never as 100 %, which no calibration can show."""
    percent = 100 * probability
    if percent > 99.5:
        return "more than 99 %"
    return "less than 1 %" if percent < 0.5 else f"{math.floor(percent + 0.5)} %"


def _invertible(matrix: tuple[Row, Row, Row, Row]) -> tuple[Row, Row, Row, Row]:
    try:
        Affine(matrix)  # type: ignore[arg-type]  # which makes an array of it
    except RegistrationError as error:
        raise ValueError("an affine map that can be inverted") from error
    return matrix


def _grid(record: dict[str, Any]) -> dict[str, Any]:
    try:
        Grid.from_dict(record)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a grid of shape, spacing, origin, direction and unit ({error})") from error
    return record


Matrix = Annotated[tuple[Row, Row, Row, Row], AfterValidator(_invertible)]
GridRecord = Annotated[dict[str, Any], AfterValidator(_grid)]


class Metric(Record):
    """What candidates are ranked by, and its value at the answer."""

    name: str = ""
    value: Figure = None


class CandidateRecord(Record):
    """One start of the refinement, and what became of it.

    Attributes
    ----------
    rank : int
        Place of the candidate in the list, from 1; the best is first.
    answer : int or None
        Number of the distinct answer that it belongs to, 0 for the best; -1 for none.
    coarse_score, refined_score : float or None
        Score before and after the refinement; None where it was not measured.
    failure : str or None
        Reason why the candidate is no valid answer; None for a valid one.
    matrix_lps_mm : 4 x 4
        Map from fixed to moving points (x, y, z) in LPS, in mm.
    """

    rank: int | None = None
    answer: int | None = None
    rotation_deg: Figure = None
    coarse_score: Figure = None
    refined_score: Figure = None
    agreement: Figure = None
    overlap: Figure = None
    failure: str | None = None
    matrix_lps_mm: Matrix

    @property
    def transform(self) -> Affine:
        """Map from fixed to moving points in LPS, in mm."""
        return Affine(self.matrix_lps_mm)  # type: ignore[arg-type]  # which makes an array of it


class PieceRecord(Record):
    """One piece of the evidence that a verdict rests on.

    Attributes
    ----------
    name : str
        Name of what was measured.
    value : float or None
        The number in `unit`; None if it could not be measured.
    unit : str
        Unit of the value.
    sentence : str
        What it says, without a full stop.
    title : str
        What it is, in a few words.
    right, wrong : tuple of float
        What right and wrong answers of the calibration had, in `unit`: five percentiles, 5 to 95; empty where that is
        not known.
    """

    name: str
    value: Figure = None
    unit: str = ""
    sentence: str = ""
    title: str = ""
    right: tuple[Finite, ...] = ()
    wrong: tuple[Finite, ...] = ()


class InputRecord(Record):
    """One of the two volumes.

    Attributes
    ----------
    path : str
        Path of the store; absolute since format 1.
    source : str or None
        Path of what the store was made of; None where it is not known.
    fingerprint : str or None
        Fingerprint of the store's content; None where it is not known.
    grid : dict or None
        Grid of the volume, as `Grid.as_dict` gives it; None where it is not known.
    compared : dict or None
        Store, pyramid level and grid that were compared; None where that is not known.
    """

    path: str
    source: str | None = None
    fingerprint: str | None = None
    grid: GridRecord | None = None
    compared: dict[str, Any] | None = None

    @property
    def space(self) -> Grid | None:
        """Grid of the volume; None where it is not known."""
        return None if self.grid is None else Grid.from_dict(self.grid)


class TriedRecord(Record):
    """One way to compare the two volumes, where several were tried.

    Attributes
    ----------
    representation : str
        What was compared, by the word for it.
    verdict : str
        Verdict on its answer.
    probability : float or None
        Probability that its answer is right; None where there is none.
    reason : str
        The first reason for the verdict.
    apart_mm : float or None
        Mean distance of its answer from the one that was taken; None where it has no answer.
    """

    representation: str
    verdict: Verdict = "FAIL"
    probability: Figure = None
    reason: str = ""
    apart_mm: Figure = None


class LastStepRecord(Record):
    """What became of the last refinement, on the intensities.

    Attributes
    ----------
    used : bool
        Whether the answer was moved.
    sentence : str
        Why, or why not.
    moved_mm : float or None
        Mean distance to the place that the intensities prefer; None if there is none.
    halves_mm : two of float, or None
        Distance between the answers of two halves, on the representations and on the intensities; None if it was not
        measured.
    """

    used: bool = False
    sentence: str = ""
    moved_mm: Figure = None
    halves_mm: tuple[Figure, Figure] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it, in sentences."""
        if not self.used:
            return ()
        return (
            f"the answer was refined once more on the intensities, by {self.moved_mm:.3g} mm: {self.sentence}",
        )
