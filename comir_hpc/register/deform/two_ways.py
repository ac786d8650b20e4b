"""Ask whether two ways to a deformation, which compare different things, lead to the same one.

One way compares maps, the other intensities. What both find is in the volumes; what only one finds is its own error.
Let each be off by an error of its own: then the two are apart by about 1.4 times that error. Where they are as far
apart as they reach, the error is as large as the bend, and space is better left as it is.

Measured, as the distance over the mean length: pairs that bend nothing 1.07 (embedded), 1.27 (avg152 T1/T2) and 1.44
(T1w/EPI), and on the first two each way takes the affine answer further from the truth. Bent by up to 8 voxels: 0.34
(embedded) and 0.67 (avg152), where the bend halves the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from comir_hpc.register.deform.lattice import Lattice
from comir_hpc.register.deform.warping import carried
from comir_hpc.representations.features import Features

_APART = 0.8  # largest distance of the two, as a share of their mean length


@dataclass(frozen=True)
class TwoWays:
    """Mean lengths of two displacements over the specimen, and their mean distance, in mm.

    Attributes
    ----------
    maps_mm, intensities_mm : float
        Mean length of the displacement found on the maps, and of that found on the intensities.
    apart_mm : float
        Mean distance of the two.
    """

    maps_mm: float
    intensities_mm: float
    apart_mm: float

    @classmethod
    def compared(cls, maps: Lattice, intensities: Lattice, fixed: Features) -> TwoWays:
        """Measure two displacements over the specimen."""
        one, other = (
            carried(found.displacement_mm, found.grid, fixed.grid)[:, fixed.mask]
            for found in (maps, intensities)
        )
        return cls(*(float(np.linalg.norm(v, axis=0).mean()) for v in (one, other, one - other)))

    @property
    def refusal(self) -> str | None:
        """Why the deformation is not kept, as a sentence; None if the two ways agree."""
        if self.apart_mm <= _APART * (self.maps_mm + self.intensities_mm) / 2:
            return None
        return (
            f"the maps and the intensities do not agree on a bend: they ask for {self.maps_mm:.2g} and "
            f"{self.intensities_mm:.2g} mm on average, and are {self.apart_mm:.2g} mm apart"
        )
