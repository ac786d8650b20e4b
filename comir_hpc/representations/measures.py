"""How alike two representations are: one value says how answers are scored, searched for and refined."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comir_hpc.representations.criteria import Criterion, MaskedCorrelation, MutualInformation, Weighted

# Mutual information needs 25 correlations by FFT (9 for a rough look), correlation needs 6. So it gets a grid with this
# share of the voxels along each axis, 0.42 of them in all.
_INFORMATION_GRID = 0.75
_BINS = 32  # classes of each volume's values in Mattes' estimate


@dataclass(frozen=True)
class Agreement:
    """Agreement of two volumes over the voxels that both masks hold.

    Attributes
    ----------
    correlation : float
        Correlation of the values of all channels together, with each channel's mean taken off: -1 to 1, and 0 where
        nothing varies.
    information : float
        Normalised mutual information of the first channel, less 1: from 0 (independent) to 1 (each determines the
        other).
    overlap : float
        Share of the smaller mask that the other one covers, 0 to 1.
    """

    correlation: float
    information: float
    overlap: float

    @property
    def evidence(self) -> float:
        """Correlation times the square root of the overlap.

        The significance of a correlation grows with the root of the number of samples. So of two answers with the same
        correlation, the one that explains more of the specimen is better.
        """
        return self.correlation * math.sqrt(self.overlap)


@dataclass(frozen=True)
class Measure:
    """One way to say how alike two volumes are, for every step of a registration.

    Attributes
    ----------
    name : str
        Name of the score in words, for ``result.json``.
    score : callable
        Takes an `Agreement` and returns the number by which answers are ranked; higher is better.
    criterion : callable
        Takes the fixed and the moving map of the global search (`Weighted`) and returns what compares them at all
        shifts (`Criterion`).
    choose_metric : callable
        Takes an ``ImageRegistrationMethod`` of SimpleITK and sets the metric that the refinement optimises.
    search_grid : float
        Share of the voxels along each axis that the global search uses, more than 0 and at most 1. A criterion that
        takes longer for one shift gets a coarser grid.
    correlates : bool
        Whether the score is the correlation of all channels, so that hundreds of answers can be improved quickly.
    """

    name: str
    score: Callable[[Agreement], float]
    criterion: Callable[[Weighted, Weighted], Criterion]
    choose_metric: Callable[[Any], None]
    search_grid: float = 1.0
    correlates: bool = False


def _informative(agreement: Agreement) -> float:
    return agreement.information * float(agreement.overlap**0.5)


CORRELATION = Measure(
    name="correlation of the representations, times the root of the overlap",
    score=lambda agreement: agreement.evidence,
    criterion=lambda fixed, moving: MaskedCorrelation(fixed),
    choose_metric=lambda method: method.SetMetricAsCorrelation(),
    correlates=True,
)
"""For values that are alike in both volumes: correlation of all channels together. ITK optimises its square."""

INFORMATION = Measure(
    name="normalised mutual information, times the root of the overlap",
    score=_informative,
    criterion=MutualInformation,
    choose_metric=lambda method: method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=_BINS),
    search_grid=_INFORMATION_GRID,
)
"""For values of which one tells the other, in whatever way: mutual information of the first channel."""
