"""What the rows of a benchmark say: rates with intervals, errors, and paired tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from comir_hpc.recipes.benchmark.table import FAILED, SKIPPED, key_of

Row = Mapping[str, str]

_Z = 1.959964  # quantile of the normal distribution for 95 %
VERDICTS = ("PASS", "WARN", "FAIL")


def wilson(found: int, total: int) -> tuple[float, float]:
    """Give the 95 % interval of a rate, by Wilson's score; 0 to 1 without a trial.

    Examples
    --------
    >>> [round(end, 3) for end in wilson(8, 10)]
    [0.49, 0.943]
    """
    if total == 0:
        return 0.0, 1.0
    rate, square = found / total, _Z * _Z
    middle = rate + square / (2 * total)
    spread = _Z * math.sqrt(rate * (1 - rate) / total + square / (4 * total * total))
    low, high = ((middle + sign * spread) / (1 + square / total) for sign in (-1, 1))
    # At none or all right one end is the rate itself, which rounding must not pass by: figures draw the distance to it.
    return max(0.0, min(low, rate)), min(1.0, max(high, rate))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's step-down method, in the order given.

    Examples
    --------
    >>> [round(p, 6) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Score:
    """How one method did on a group of cases.

    Attributes
    ----------
    group, method : str
        What the cases have in common, and the method.
    cases : int
        Number of cases that it was run on, failed ones too.
    right : int
        Number of answers with a mean error of at most 2 % of the mean side.
    tre_mm, tre_median_mm, tre_p95_mm, tre_voxels : float
        Over the cases with an answer: medians of mean, median and 95th percentile of the error; NaN without an answer.
        A median over cases, because one lost case would decide a mean.
    seconds, cpu_seconds, peak_memory_mib : float
        Medians over the cases with an answer. Processor time does not depend on what else the machine does.
    failed : int
        Number of crashes, time limits and refusals.
    verdicts_right, verdicts_wrong : tuple of int
        Numbers of PASS, WARN and FAIL of right and of wrong answers.
    """

    group: str
    method: str
    cases: int
    right: int
    tre_mm: float
    tre_median_mm: float
    tre_p95_mm: float
    tre_voxels: float
    seconds: float
    cpu_seconds: float
    peak_memory_mib: float
    failed: int
    verdicts_right: tuple[int, ...]
    verdicts_wrong: tuple[int, ...]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the rate of right answers."""
        return wilson(self.right, self.cases)


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same cases of one pair.

    Attributes
    ----------
    pair, method, other : str
        Pair of volumes, and the two methods.
    cases : int
        Number of cases that both were run on.
    difference_mm : float
        Median of the error of `method` less that of `other`, over cases in which both gave an answer.
    p_value : float
        Of Wilcoxon's signed-rank test, adjusted by Holm for all comparisons of the pair; NaN if cases are too few.
    """

    pair: str
    method: str
    other: str
    cases: int
    difference_mm: float
    p_value: float


def run_rows(rows: Sequence[Row]) -> list[Row]:
    """Leave out the rows of methods that were not installed."""
    return [row for row in rows if row.get("status") != SKIPPED]


def scores(rows: Sequence[Row], by: Sequence[str] = ("family",)) -> list[Score]:
    """Score every method on every group of cases, in the order in which both appear.

    Parameters
    ----------
    by : sequence of str
        Columns that make a group.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in run_rows(rows):
        group = ", ".join(row.get(column) or "none" for column in by)
        groups.setdefault((group, row["method"]), []).append(row)
    return [_score(group, method, some) for (group, method), some in groups.items()]


def _score(group: str, method: str, rows: Sequence[Row]) -> Score:
    right = [row for row in rows if row["success"] == "True"]
    wrong = [row for row in rows if row["success"] != "True"]
    return Score(
        group=group,
        method=method,
        cases=len(rows),
        right=len(right),
        tre_mm=_median(rows, "tre_mm"),
        tre_median_mm=_median(rows, "tre_median_mm"),
        tre_p95_mm=_median(rows, "tre_p95_mm"),
        tre_voxels=_median(rows, "tre_voxels"),
        seconds=_median(rows, "seconds"),
        cpu_seconds=_median(rows, "cpu_seconds"),
        peak_memory_mib=_median(rows, "peak_memory_mib"),
        failed=sum(row.get("status") == FAILED or not row["tre_mm"] for row in rows),
        verdicts_right=_verdicts(right),
        verdicts_wrong=_verdicts(wrong),
    )


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Compare every two methods on the cases of each pair that both were run on.

    A case without an answer counts as an error of infinite size: the test only ranks, and two failures are a tie.
    """
    found = []
    for pair in dict.fromkeys(row["family"] for row in run_rows(rows)):
        errors: dict[str, dict[tuple[object, ...], float]] = {}
        for row in run_rows(rows):
            if row["family"] == pair:
                errors.setdefault(row["method"], {})[key_of(row)[:4]] = (
                    float(row["tre_mm"]) if row["tre_mm"] else math.inf
                )
        tested = [_compared(pair, one, other, errors) for one, other in combinations(errors, 2)]
        kept = [each for each in tested if not math.isnan(each.p_value)]
        adjusted = iter(holm([each.p_value for each in kept]))
        for each in tested:
            p_value = each.p_value if math.isnan(each.p_value) else next(adjusted)
            found.append(
                Comparison(each.pair, each.method, each.other, each.cases, each.difference_mm, p_value)
            )
    return found


def _compared(
    pair: str, method: str, other: str, errors: Mapping[str, Mapping[tuple[object, ...], float]]
) -> Comparison:
    both = sorted(errors[method].keys() & errors[other].keys(), key=str)
    one, two = (np.array([errors[name][case] for case in both]) for name in (method, other))
    finite = np.isfinite(one) & np.isfinite(two)
    difference = float(np.median((one - two)[finite])) if finite.any() else math.nan
    return Comparison(pair, method, other, len(both), difference, signed_rank(one, two))


def signed_rank(one: np.ndarray, two: np.ndarray) -> float:
    """Give the p-value of Wilcoxon's signed-rank test on paired errors; NaN for fewer than six pairs that differ.

    With five pairs the smallest possible p-value is 0.0625, so that nothing could be told.
    """
    from scipy.stats import wilcoxon

    finite = np.concatenate([one[np.isfinite(one)], two[np.isfinite(two)]])
    largest = 10 * float(finite.max()) if finite.size else 1.0
    # A failure is worse than any answer; by how much is arbitrary, and ranks forget it.
    values = [np.where(np.isfinite(each), each, largest) for each in (one, two)]
    differ = values[0] != values[1]
    if differ.sum() < 6:
        return math.nan
    return float(wilcoxon(values[0][differ], values[1][differ]).pvalue)


def _median(rows: Sequence[Row], column: str) -> float:
    values = [float(row[column]) for row in rows if row.get(column) and row["tre_mm"]]
    return float(np.median(values)) if values else math.nan


def _verdicts(rows: Sequence[Row]) -> tuple[int, ...]:
    return tuple(sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS)
