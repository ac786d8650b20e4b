"""B-splines that SimpleITK optimises on the maps, before the coarse answer.

The distance between the control points is the smoothness length. A spline with twice that distance is found first, on
coarser images, and then the fine one, which is applied before it. The metric is the measure's own: correlation of maps,
mutual information of intensities. SimpleITK's metrics compare one channel, so several channels are mixed into one
(`one_channel`).

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

# Shrink factor, smoothing in voxels, and distance of the control points over the finest one, of each level.
_LEVELS = ((4, 2.0, 2), (2, 1.0, 1))
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
    """Find the B-splines, in the fixed world, that are applied before the coarse answer, as one transform.

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
    inside = itk_image(within, fixed.grid)
    # ITK applies the transform first that was added last.
    so_far = sitk.CompositeTransform([itk_transform(affine)])
    splines = []
    for shrink, sigma_vox, coarser in _LEVELS:
        method = _method(fixed, moving, measure, shrink, sigma_vox, seed, threads)
        method.SetMetricFixedMask(inside)
        method.SetMovingInitialTransform(so_far)
        image = itk_image(fixed.values[0], fixed.grid)
        mesh = [max(1, round(e / (spacing_mm * coarser))) for e in fixed.grid.extent_mm[::-1]]
        spline = sitk.BSplineTransformInitializer(image, mesh, _ORDER)
        method.SetInitialTransform(spline, inPlace=True)
        try:
            method.Execute(image, itk_image(moving.values[0], moving.grid))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RegistrationError(f"the optimiser of the B-spline stopped: {reason}") from error
        splines.append(spline)
        so_far = sitk.CompositeTransform([itk_transform(affine), *splines])
    return sitk.CompositeTransform(splines)


def _method(
    fixed: Features,
    moving: Features,
    measure: Measure,
    shrink: int,
    sigma_vox: float,
    seed: int,
    threads: int,
) -> sitk.ImageRegistrationMethod:
    grid = fixed.grid
    method = sitk.ImageRegistrationMethod()
    measure.choose_metric(method)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetMetricSamplingStrategy(method.RANDOM)
    share = min(1.0, _MOST_SAMPLES / (math.prod(grid.shape_zyx) / shrink**3))
    method.SetMetricSamplingPercentage(share, seed=seed % 2**31 + 1)
    method.SetShrinkFactorsPerLevel([shrink])
    method.SetSmoothingSigmasPerLevel([sigma_vox * grid.finest_mm])
    method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(True)
    method.SetOptimizerAsLBFGSB(gradientConvergenceTolerance=1e-7, numberOfIterations=_ITERATIONS)
    method.SetNumberOfThreads(threads)
    if moving.known is not None:
        method.SetMetricMovingMask(itk_image(moving.known, moving.grid))
    return method
