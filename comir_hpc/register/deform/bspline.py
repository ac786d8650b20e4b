"""A B-spline that SimpleITK optimises on the maps, before the coarse answer.

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
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.itk import itk_image, itk_transform

_SHRINK, _SIGMA_VOX = (4, 2), (2.0, 1.0)  # of each level
_MESH = (1, 2)  # times that the mesh of a level is finer than the first one's
_FEWEST_VOXELS = 18  # along the shortest side of a level
_TRIALS = 8  # lengths that are tried for one step
_ITERATIONS = 25  # of each level
_MOST_SAMPLES = 40_000
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
    image = itk_image(fixed.values[0], fixed.grid)
    coarsest = spacing_mm * _MESH[-1]
    mesh = [max(1, round(extent / coarsest)) for extent in fixed.grid.extent_mm[::-1]]
    spline = sitk.BSplineTransformInitializer(image, mesh, _ORDER)
    method = _method(fixed, moving, measure, seed, threads)
    method.SetMetricFixedMask(itk_image(within, fixed.grid))
    # ITK applies the transform that it optimises first, and then the moving initial one.
    method.SetMovingInitialTransform(itk_transform(affine))
    method.SetInitialTransformAsBSpline(spline, inPlace=True, scaleFactors=list(_MESH))
    try:
        method.Execute(image, itk_image(moving.values[0], moving.grid))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RegistrationError(f"the optimiser of the B-spline stopped: {reason}") from error
    return spline


def _method(
    fixed: Features, moving: Features, measure: Measure, seed: int, threads: int
) -> sitk.ImageRegistrationMethod:
    grid = fixed.grid
    method = sitk.ImageRegistrationMethod()
    measure.choose_metric(method)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetMetricSamplingStrategy(method.RANDOM)
    # On a small volume every level is finer: an optimiser of a thousand control points needs more voxels than that.
    shrinks = [min(shrink, max(1, min(grid.shape_zyx) // _FEWEST_VOXELS)) for shrink in _SHRINK]
    shares = [min(1.0, _MOST_SAMPLES * shrink**3 / math.prod(grid.shape_zyx)) for shrink in shrinks]
    method.SetMetricSamplingPercentagePerLevel(shares, seed=seed % 2**31 + 1)
    method.SetShrinkFactorsPerLevel(shrinks)
    method.SetSmoothingSigmasPerLevel([sigma * grid.finest_mm for sigma in _SIGMA_VOX])
    method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(True)
    # LBFGSB, the other one, cannot go on after the mesh was refined: it keeps the first one's scales (SimpleITK 2.5).
    method.SetOptimizerAsLBFGS2(
        solutionAccuracy=1e-6, numberOfIterations=_ITERATIONS, lineSearchMaximumEvaluations=_TRIALS
    )
    method.SetNumberOfThreads(threads)
    if moving.known is not None:
        method.SetMetricMovingMask(itk_image(moving.known, moving.grid))
    return method
