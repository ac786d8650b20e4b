"""A cross-check: two halves of the specimen, registered apart, have to say the same.

A right answer is right for every part of the specimen, so each half alone leads back to it. A wrong one is a chance
agreement of the whole, and its halves fall into different chance agreements nearby. The distance between what the two
halves say needs no scale of its own: it serves for correlation and for mutual information, and is an estimate of
the error besides.
"""

from __future__ import annotations

import numpy as np

from comir_hpc.errors import RegistrationError
from comir_hpc.geometry import FloatArray
from comir_hpc.register.features import Features
from comir_hpc.register.refine import Level, Refiner
from comir_hpc.transforms import Transform


def halves_distance_mm(
    refiner: Refiner, fixed: Features, transform: Transform, levels: tuple[Level, ...], points_mm: FloatArray
) -> float:
    """Mean distance between where the two halves send fixed points (N, 3), over cuts across each axis (a slice: two).

    Infinite if a half cannot be registered at all.
    """
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
