"""From a rough answer to an exact one: SimpleITK's optimiser over a pyramid, in units of voxels.

The rough answer is handed over as the moving initial transform, and a small rotation and shift about the
specimen's centre, starting at nothing, are optimised before it. Optimising the large rotation itself does not
converge near 180 degrees: the versor's own coordinates are singular there (measured: 1.5 to 4 voxels left after 60
iterations, against 0.4 this way).

The world is scaled so that the working voxel is 1 and its centre 0. Step lengths of the optimiser are absolute
numbers; in millimetres they would be right for a brain and absurd for a cell.

A pair of single slices, laid flat in the plane z = 0 (`plane`), is refined by ITK's transforms of two dimensions on
images of two: a volume of one voxel along z can neither be smoothed nor turned.

Samples are drawn at random places between the voxels, with a fixed seed: samples on the voxels themselves favour
transforms that put voxels on voxels. With one seed, correlation gives the same bits on any number of threads;
Mattes information differs in the tenth digit from run to run, because its threads add to one histogram in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from comir_hpc.errors import RegistrationError
from comir_hpc.geometry import Grid
from comir_hpc.register.features import Features
from comir_hpc.transforms import Transform, from_itk, itk_image, itk_transform

_MOST_SAMPLES = 300_000  # voxels compared at once: more of them cost time and sharpen nothing
_NO_VALUE = (
    1e30  # ITK's correlation without a single sample is the largest number there is, and only a warning
)
Metric = Literal["correlation", "information"]
Kind = Literal["rigid", "affine"]


@dataclass(frozen=True)
class Level:
    """One level of the pyramid: every `shrink`-th voxel after smoothing by `sigma_vox`, and a share of those.

    Of a single slice all are taken.
    """

    shrink: int
    sigma_vox: float
    share: float


@dataclass(frozen=True, eq=False)
class Refined:
    """Where the optimiser went.

    Attributes
    ----------
    transform : Transform
        Fixed to moving.
    value : float
        The optimiser's metric, higher is better.
    iterations : int
        Over all levels.
    stopped : str
        Why the last level ended.
    """

    transform: Transform
    value: float
    iterations: int
    stopped: str


class Refiner:
    """Refines any number of rough answers for one pair of volumes.

    Parameters
    ----------
    fixed, moving : Features
        One channel each (see `one_channel`).
    metric : "correlation" or "information"
        Squared correlation, or Mattes mutual information with 32 classes.
    seed : int
        Of the metric's sampling, where it samples.
    threads : int
        For SimpleITK.
    """

    def __init__(
        self, fixed: Features, moving: Features, *, metric: Metric, seed: int = 0, threads: int = 1
    ) -> None:
        # ITK takes a seed of 0 as "by the clock".
        self._metric, self._seed, self._threads = metric, seed % 2**31 + 1, threads
        self._num_voxels = fixed.mask.size
        self._flat = fixed.grid.planar
        self._scale_mm = fixed.grid.finest_mm
        self._middle_mm = fixed.centroid_mm
        self._grid = self._normal(fixed.grid)
        self._fixed = itk_image(fixed.values[0], self._grid, flat=self._flat)
        self._moving = itk_image(moving.values[0], self._normal(moving.grid), flat=self._flat)
        self._fixed_mask = itk_image(fixed.mask, self._grid, flat=self._flat)
        self._moving_mask: sitk.Image | None = None
        if moving.known is not None:
            self._moving_mask = itk_image(moving.known, self._normal(moving.grid), flat=self._flat)

    def refine(
        self,
        start: Transform,
        levels: tuple[Level, ...],
        kind: Kind = "rigid",
        within: NDArray[np.bool_] | None = None,
    ) -> Refined:
        """Improve one rough answer.

        Parameters
        ----------
        within : (z, y, x) bool, optional
            Compare only these fixed voxels, instead of all of the specimen.

        Raises
        ------
        RegistrationError
            If the optimiser cannot go on, for example because the volumes no longer overlap.
        """
        small = self._nothing(kind)
        method = self._method(levels)
        mask = self._fixed_mask if within is None else itk_image(within, self._grid, flat=self._flat)
        method.SetMetricFixedMask(mask)
        if self._moving_mask is not None:
            method.SetMetricMovingMask(self._moving_mask)
        method.SetMovingInitialTransform(itk_transform(self._to_normal(start), flat=self._flat))
        method.SetInitialTransform(small, inPlace=True)
        iterations = 0

        def count() -> None:
            nonlocal iterations
            iterations += 1

        method.AddCommand(sitk.sitkIterationEvent, count)
        try:
            method.Execute(self._fixed, self._moving)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RegistrationError(f"the optimiser stopped: {reason}") from error
        value = -float(method.GetMetricValue())
        if not abs(value) < _NO_VALUE:
            raise RegistrationError("the optimiser stopped: no voxel of the two specimens overlaps")
        found = self._from_normal(self._to_normal(start).compose(from_itk(small, flat=self._flat)))
        return Refined(
            transform=found.about(self._middle_mm),
            value=value,
            iterations=iterations,
            stopped=method.GetOptimizerStopConditionDescription(),
        )

    def _nothing(self, kind: Kind) -> sitk.Transform:
        """The motion that is optimised, at its beginning."""
        if kind == "affine":
            return sitk.AffineTransform(2 if self._flat else 3)
        return sitk.Euler2DTransform() if self._flat else sitk.Euler3DTransform()

    def _method(self, levels: tuple[Level, ...]) -> sitk.ImageRegistrationMethod:
        method = sitk.ImageRegistrationMethod()
        if self._metric == "correlation":
            method.SetMetricAsCorrelation()
        else:
            method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=1.0,
            minStep=1e-3,
            numberOfIterations=100,
            relaxationFactor=0.5,
            gradientMagnitudeTolerance=1e-8,
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetMetricSamplingStrategy(method.RANDOM)
        shares = [self._share(level) for level in levels]
        method.SetMetricSamplingPercentagePerLevel(shares, seed=self._seed)
        method.SetShrinkFactorsPerLevel([level.shrink for level in levels])
        method.SetSmoothingSigmasPerLevel([level.sigma_vox for level in levels])
        method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(True)  # the unit is the working voxel
        method.SetNumberOfThreads(self._threads)
        return method

    def _share(self, level: Level) -> float:
        """Share of a level's voxels that is compared: a slice has too few of them to leave any out."""
        voxels = self._num_voxels / level.shrink ** (2 if self._flat else 3)
        return min(1.0 if self._flat else level.share, _MOST_SAMPLES / voxels)

    def _normal(self, grid: Grid) -> Grid:
        """The grid in the scaled world."""
        z, y, x = (s / self._scale_mm for s in grid.spacing_mm)
        origin = (np.asarray(grid.origin_mm) - self._middle_mm) / self._scale_mm
        return Grid(grid.shape_zyx, (z, y, x), (origin[0], origin[1], origin[2]), grid.direction)

    def _to_normal(self, transform: Transform) -> Transform:
        matrix = transform.matrix_mm.copy()
        matrix[:3, 3] = (transform.apply(self._middle_mm) - self._middle_mm) / self._scale_mm
        return Transform(matrix)

    def _from_normal(self, transform: Transform) -> Transform:
        matrix = transform.matrix_mm.copy()
        linear, shift = matrix[:3, :3], matrix[:3, 3] * self._scale_mm
        matrix[:3, 3] = self._middle_mm + shift - linear @ self._middle_mm
        return Transform(matrix, self._middle_mm)
