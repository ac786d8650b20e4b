"""Hold the features of both volumes with the objects that measure and refine answers."""

from __future__ import annotations

import os

from comir_hpc.config.register import RegisterSettings
from comir_hpc.register.gauss_newton import CubicPair, DescribedSimilarity, GaussNewtonRefiner
from comir_hpc.register.refine import Refiner, Refines
from comir_hpc.register.similarity import Similarity
from comir_hpc.representations.features import Features, one_channel
from comir_hpc.representations.measures import Measure
from comir_hpc.space.grid import FloatArray

_FEW_POINTS = 1000  # points of the specimen at which distances between transforms are measured


class Pair:
    """Features of both volumes, with the objects that compare and refine them.

    Parameters
    ----------
    fixed, moving : Features
        Features of the two volumes.
    measure : Measure
        How they are compared.
    settings : RegisterSettings
        Threads and the seed of the optimiser's samples.
    by_steps : bool
        Whether answers are refined by Gauss-Newton steps over all voxels, and not by SimpleITK's optimiser on samples
        of them. Weak agreement asks for it: where the general model's maps correlate by 0.3, samples led the halves of
        a specimen 20 mm apart.
    """

    def __init__(
        self,
        fixed: Features,
        moving: Features,
        measure: Measure,
        settings: RegisterSettings,
        *,
        by_steps: bool = False,
    ) -> None:
        self.fixed, self.moving, self.measure = fixed, moving, measure
        self.threads = settings.threads or len(os.sched_getaffinity(0))
        self.similarity, self.refiner = _judges(fixed, moving, measure, settings.seed, self.threads, by_steps)
        self.points_mm: FloatArray = self.similarity.some_points_mm(_FEW_POINTS)
        self.side_mm = self.similarity.side_mm(self.points_mm)


def _judges(
    fixed: Features, moving: Features, measure: Measure, seed: int, threads: int, by_steps: bool
) -> tuple[Similarity, Refines]:
    """Make what measures and what refines answers, as the features ask for."""
    if fixed.describe is not None:
        cubic = CubicPair(fixed, moving)
        return DescribedSimilarity(fixed, moving, cubic), GaussNewtonRefiner(cubic)
    if by_steps:
        return Similarity(fixed, moving), GaussNewtonRefiner(CubicPair(fixed, moving))
    refiner = Refiner(*one_channel(fixed, moving), measure=measure, seed=seed, threads=threads)
    return Similarity(fixed, moving), refiner
