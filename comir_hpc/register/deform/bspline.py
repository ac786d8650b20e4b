"""A B-spline that SimpleITK optimises on the maps, in units of voxels, after the coarse answer.

The distance between the control points is the smoothness length. Coarse to fine, the mesh is refined together with the
images. The metric is the measure's own: correlation of maps, mutual information of intensities. SimpleITK's metrics
compare one channel, so several channels are mixed into one (`one_channel`).

Nothing keeps a B-spline from folding but the distance of its control points. Folds are counted afterwards.
"""

from __future__ import annotations

import math

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from comir_hpc.errors import RegistrationError
from comir_hpc.representations.features import Features
from comir_hpc.representations.measures import Measure
from comir_hpc.space.grid import Grid
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.itk import itk_image, itk_transform

_SHRINK, _SIGMA_VOX = (4, 2), (2.0, 1.0)  # of each level
_MESH = (1, 2)  # times that the mesh of a level is finer than the first one's
_ITERATIONS = 40  # of each level
_MOST_SAMPLES = 100_000
_ORDER = 3


def find_bspline(
    fixed: Features,
    moving: Features,
    affine: Affine,
    measure: Measure,
    spacing_mm: float,
    within: NDArray[np.bool_],
    *,
    seed: int,
    threads: int,
) -> sitk.Transform:
    """Find the B-spline, in the fixed world, that is applied before the coarse answer.

    Parameters
    ----------
    fixed, moving : Features
        Features of one channel each.
    affine : Affine
        The coarse answer, from fixed to moving points.
    measure : Measure
        Chooses the metric.
    spacing_mm : float
        Distance between the control points of the finest mesh, in mm.
    within : (z, y, x) bool
        Fixed voxels that are compared.
    seed : int
        Seed of the random places at which voxels are compared.
    threads : int
        Number of threads that SimpleITK uses.

    Raises
    ------
    RegistrationError
        If the optimiser cannot go on.
    """
    grid = fixed.grid
    first = [max(1, round(extent / (spacing_mm * _MESH[-1]))) for extent in grid.extent_mm[::-1]]
    image = itk_image(fixed.values[0], grid)
    spline = sitk.BSplineTransformInitializer(image, first, _ORDER)
    method = sitk.ImageRegistrationMethod()
    measure.choose_metric(method)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetMetricSamplingStrategy(method.RANDOM)
    shares = [min(1.0, _MOST_SAMPLES / (math.prod(grid.shape_zyx) / shrink**3)) for shrink in _SHRINK]
    method.SetMetricSamplingPercentagePerLevel(shares, seed=seed % 2**31 + 1)
    method.SetShrinkFactorsPerLevel(list(_SHRINK))
    method.SetSmoothingSigmasPerLevel([sigma * grid.finest_mm for sigma in _SIGMA_VOX])
    method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(True)
    method.SetOptimizerAsLBFGSB(gradientConvergenceTolerance=1e-7, numberOfIterations=_ITERATIONS)
    method.SetMetricFixedMask(itk_image(within, grid))
    if moving.known is not None:
        method.SetMetricMovingMask(itk_image(moving.known, moving.grid))
    # ITK applies the transform that it optimises first, and then the moving initial one.
    method.SetMovingInitialTransform(itk_transform(affine))
    method.SetInitialTransformAsBSpline(spline, inPlace=True, scaleFactors=list(_MESH))
    method.SetNumberOfThreads(threads)
    try:
        method.Execute(image, itk_image(moving.values[0], moving.grid))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RegistrationError(f"the optimiser of the B-spline stopped: {reason}") from error
    return spline


def control_points(grid: Grid, spacing_mm: float) -> int:
    """Count the control points of the finest mesh over a grid."""
    return math.prod(max(1, round(e / spacing_mm)) + _ORDER for e in grid.extent_mm)
