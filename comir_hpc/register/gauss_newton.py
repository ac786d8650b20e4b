"""Refine answers by Gauss-Newton steps on cubic voxels, also on channels that look along axes (`Features.describe`).

Such channels cannot be interpolated under a rotation. So the moving volume is turned onto the fixed grid first, on
cubic voxels, and described there, for every answer that is measured and at every step (`alignment`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from comir_hpc.register.alignment import Alignment, Kind
from comir_hpc.register.coarse import CoarseFeatures, coarsen
from comir_hpc.register.refine import Levels, Mask, Refined
from comir_hpc.register.similarity import Similarity
from comir_hpc.representations.criteria import Array32
from comir_hpc.representations.features import Features
from comir_hpc.representations.measures import Agreement
from comir_hpc.transforms.affine import Affine as Transform

_MOST_VOXELS = (
    96  # along the mean side of the fixed specimen; twelve channels of more would not fit into memory
)
_MEASURED = 2  # shrink factor of the grid on which answers are measured
_STEPS = 15


class CubicPair:
    """Both volumes on cubic voxels of any coarseness.

    Parameters
    ----------
    fixed, moving : Features
        Features of the two volumes: maps, or one channel that is to be described.
    """

    def __init__(self, fixed: Features, moving: Features) -> None:
        self._sides = fixed, moving
        box_mm = np.ptp(np.argwhere(fixed.mask), axis=0) * fixed.grid.spacing_mm
        mean_mm = float(np.mean([box_mm[axis] for axis in fixed.grid.axes]))
        self.spacing_mm = max(fixed.grid.finest_mm, moving.grid.finest_mm, mean_mm / _MOST_VOXELS)
        self._coarse: dict[int, tuple[CoarseFeatures, CoarseFeatures]] = {}

    def alignment(self, shrink: int, within: Mask | None = None) -> Alignment:
        """Make what compares and improves answers on voxels that are `shrink` times as large."""
        if shrink not in self._coarse:
            self._coarse[shrink] = self._at(shrink * self.spacing_mm)
        fixed, moving = self._coarse[shrink]
        return Alignment(fixed, moving, None if within is None else self._seen(within, fixed))

    def _at(self, spacing_mm: float) -> tuple[CoarseFeatures, CoarseFeatures]:
        fixed, moving = self._sides
        # Maps that are interpolated lose their finest structure on a grid of the same spacing (measured on T1w to EPI:
        # 1.9 mm of error against 1.2). Channels that are described after the turn are computed on it anyway.
        finer = 2 if moving.describe is None else 1
        return coarsen(fixed, spacing_mm), coarsen(moving, spacing_mm, finer=finer)

    def _seen(self, within: Mask, coarse: CoarseFeatures) -> Array32:
        """Look up a mask of the fixed features at the voxels of a coarse grid."""
        grid = self._sides[0].grid
        index = np.stack(np.meshgrid(*map(np.arange, coarse.weights.shape), indexing="ij"), axis=-1)
        place = np.rint(grid.index_zyx(coarse.origin_mm + index @ coarse.frame.T)).astype(int)
        last = np.asarray(within.shape) - 1
        found = within[tuple(np.moveaxis(np.clip(place, 0, last), -1, 0))]
        inside = (place >= 0).all(axis=-1) & (place <= last).all(axis=-1)
        return np.asarray(found & inside, dtype=np.float32)


class DescribedSimilarity(Similarity):
    """Measure answers by the described channels; the overlap and the information are those of the intensities.

    Parameters
    ----------
    fixed, moving : Features
        Features of the two volumes.
    pair : CubicPair
        The two volumes on cubic voxels.
    """

    def __init__(self, fixed: Features, moving: Features, pair: CubicPair) -> None:
        super().__init__(fixed, moving)
        self._alignment = pair.alignment(_MEASURED)

    def at(self, transform: Transform) -> Agreement:
        """Measure the agreement under a transform from fixed to moving points."""
        return replace(super().at(transform), correlation=self._alignment.at(transform).correlation)


class GaussNewtonRefiner:
    """Refine answers by Gauss-Newton steps, as `Refiner` does by SimpleITK's optimiser.

    Parameters
    ----------
    pair : CubicPair
        Both volumes on cubic voxels.
    """

    def __init__(self, pair: CubicPair) -> None:
        self._pair = pair

    def refine(
        self, start: Transform, levels: Levels, kind: Kind = "rigid", within: Mask | None = None
    ) -> Refined:
        """Improve one rough answer, through levels as `Refiner.refine` takes them.

        Raises
        ------
        RegistrationError
            If the specimen fills too few voxels.
        """
        transform, steps, value = start, 0, 0.0
        for level in levels:
            found = self._pair.alignment(level.shrink, within).improve(transform, _STEPS, kind)
            transform, steps, value = found.transform, steps + found.steps, found.evidence
        return Refined(transform, value, steps, f"at most {_STEPS} steps at each level")
