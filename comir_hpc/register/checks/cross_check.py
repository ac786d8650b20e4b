"""Cross-check an answer: two halves of the specimen, registered separately, have to give the same.

A right answer is right for every part of the specimen, so that each half alone leads back to it. A wrong answer is an
agreement of the whole by chance, and its halves end at different places nearby. The distance between the answers of
the two halves needs no scale of its own: it works for correlation and for mutual information. It is also an estimate of
the error.
"""

from __future__ import annotations

import numpy as np

from comir_hpc.errors import RegistrationError
from comir_hpc.register.refine import Level, Refines
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import FloatArray
from comir_hpc.transforms.affine import Affine as Transform


def halves_distance_mm(
    refiner: Refines, fixed: Features, transform: Transform, levels: tuple[Level, ...], points_mm: FloatArray
) -> float:
    """Measure the mean distance in mm between the places to which two halves send fixed points (N, 3).

    The specimen is cut across each axis in turn (across two for a slice), and the mean is taken. It is infinite if a
    half cannot be registered at all.
    """
    # Cut through the centre of mass, so that both halves hold about as much specimen.
    centre = fixed.grid.index_zyx(fixed.centroid_mm)
    distances = []
    for axis in fixed.grid.axes:
        length = fixed.grid.shape_zyx[axis]
        shape = [1, 1, 1]
        shape[axis] = length
        lower = (np.arange(length) < centre[axis]).reshape(shape)
        try:
            ends = [
                refiner.refine(transform, levels, within=fixed.mask & half).transform
                for half in (lower, ~lower)
            ]
        except RegistrationError:
            return float("inf")
        distances.append(float(ends[0].distance_mm(ends[1], points_mm).mean()))
    return float(np.mean(distances))
