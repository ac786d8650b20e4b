"""The calibrated model: from what was measured of an answer to the probability that it is right, and to millimetres.

It is a logistic function of a few terms. Each term is a number of `measured`, turned so that more is better, cut to the
range that right and wrong answers cover, and given a weight that is not negative: better evidence never lowers the
probability. The weakest of some of them counts once more: a wrong answer may look good in all respects but one. The
bound in millimetres is a sum of distances with weights that are not negative, in voxels of the checks.

The coefficients stand in ``data/verdict.json``, with the rows that they were fitted to
(``benchmarks/verdict/fit.py``). A file for another version of the measures is refused: the same word would mean
another number.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from comir_hpc.errors import RegistrationError
from comir_hpc.runs.record import Record, read_record

if TYPE_CHECKING:
    from comir_hpc.register.checks.measured import Measured

MEASURES_VERSION = 1
"""Version of what `measured` measures. It grows with every change that makes other numbers of the same answer."""

_REMEDY = "install the package again: the file comes with it"
Form = Literal["as it is", "logarithm", "less is better, logarithm", "less is better"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
_NEAREST_VOX = 0.02  # distances below this are the same


class Spread(Record):
    """Values of one measure over the rows of the calibration: five quantiles of right and of wrong answers."""

    right: tuple[Number, ...] = ()
    wrong: tuple[Number, ...] = ()


class Term(Record):
    """One term of the logistic.

    Attributes
    ----------
    name : str
        Name of the number in `Measured`.
    form : str
        How it is turned, so that more is better.
    low, high : float
        Range that the turned number is cut to; it is then scaled to 0 to 1.
    weight : float
        Weight of the scaled number, not negative.
    missing : float
        Scaled number, 0 to 1, that counts where nothing was measured: a poor one.
    """

    name: str
    form: Form
    low: Number
    high: Number
    weight: Weight
    missing: Number = 0.0

    def scaled(self, measured: Measured) -> float:
        """Scale what was measured to 0 (bad) to 1 (good)."""
        value = asdict(measured)[self.name]
        if value is None:
            return self.missing
        return min(1.0, max(0.0, (turned(value, self.form) - self.low) / (self.high - self.low)))


class Bound(Record):
    """A bound of the error that `share` of the right answers keep.

    Attributes
    ----------
    share : float
        Share of right answers whose mean error is below the bound.
    constant : float
        Bound without any sign of an error, in voxels of the checks.
    weights : dict
        Weight of each distance of `Measured`, by its name.
    """

    share: Number
    constant: Weight
    weights: dict[str, Weight]


class Weakest(Record):
    """The least of the scaled numbers of some terms, as a term of its own.

    Attributes
    ----------
    among : tuple of str
        Names of the terms; without any there is no such term.
    weight : float
        Weight of the least one, not negative.
    """

    among: tuple[str, ...] = ()
    weight: Weight = 0.0

    def of(self, scaled: dict[str, float]) -> tuple[float, str | None]:
        """Give the least of the scaled numbers, and its name; 0 and None without any."""
        return min(((scaled[name], name) for name in self.among), default=(0.0, None))


class Calibration(Record):
    """Content of verdict.json.

    Attributes
    ----------
    measures : int
        Version of the measures that the rows were made with (`MEASURES_VERSION`).
    made_from : dict
        The file of rows, how many there were, and their families.
    intercept, terms : float, tuple of Term
        The logistic.
    weakest : Weakest
        What the weakest of some terms adds to it.
    pass_from, fail_below : float
        Cuts of the probability.
    bound : Bound
        The error in voxels of the checks.
    spreads : dict
        What right and wrong answers had, by the name of the measure.
    """

    format: int = 0
    measures: int
    made_from: dict[str, Any]
    intercept: Number
    terms: tuple[Term, ...]
    weakest: Weakest = Weakest()
    pass_from: Number
    fail_below: Number
    bound: Bound
    spreads: dict[str, Spread] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _weakest_is_among_the_terms(self) -> Self:
        unknown = set(self.weakest.among) - {term.name for term in self.terms}
        if unknown:
            raise ValueError(f"weakest: {', '.join(sorted(unknown))} is no term")
        return self

    def probability(self, measured: Measured) -> float:
        """Give the probability that an answer is right, 0 to 1."""
        scaled = {term.name: term.scaled(measured) for term in self.terms}
        total = self.intercept + self.weakest.weight * self.weakest.of(scaled)[0]
        total += sum(term.weight * scaled[term.name] for term in self.terms)
        return 1 / (1 + math.exp(-min(50.0, max(-50.0, total))))

    def bound_vox(self, measured: Measured) -> float:
        """Bound the mean error of a right answer, in voxels of the checks."""
        values = asdict(measured)
        total = self.bound.constant
        for name, weight in self.bound.weights.items():
            value = values[name]
            total += weight * (self.spreads[name].right[-1] if value is None else value)
        return total

    def rows_of(self, representation: str) -> int:
        """Give the number of rows of one representation that the coefficients were fitted to."""
        return int(self.made_from.get("representations", {}).get(representation, 0))

    def poorest(self, measured: Measured) -> list[str]:
        """Name the measures that lower the probability, the one that costs most first."""
        scaled = {term.name: term.scaled(measured) for term in self.terms}
        least, weakest = self.weakest.of(scaled)
        costs = [
            (
                term.weight * (1 - scaled[term.name])
                + (self.weakest.weight * (1 - least) if term.name == weakest else 0.0),
                term.name,
            )
            for term in self.terms
        ]
        return [name for cost, name in sorted(costs, reverse=True) if cost > 0]


def turned(value: float, form: Form) -> float:
    """Turn a number so that more is better."""
    if form == "as it is":
        return value
    if form == "less is better":
        return -value
    if form == "logarithm":
        return math.log1p(max(value, 0.0))
    return -math.log(max(value, _NEAREST_VOX))


def read_calibration(path: Path) -> Calibration:
    """Read the coefficients of the verdict.

    Raises
    ------
    RegistrationError
        If the file is missing, damaged, or made for another version of the measures.
    """
    found = read_record(path, Calibration, RegistrationError, _REMEDY)
    if found.measures != MEASURES_VERSION:
        raise RegistrationError(
            f"{path} was calibrated for version {found.measures} of the checks, this comir-hpc makes version "
            f"{MEASURES_VERSION}: the same words mean other numbers; {_REMEDY}"
        )
    return found


@cache
def own_calibration() -> Calibration:
    """Give the calibration that comes with the package."""
    return read_calibration(Path(str(files("comir_hpc") / "data" / "verdict.json")))
