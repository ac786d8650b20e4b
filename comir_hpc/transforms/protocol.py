"""What every transform can do: the one thing that the rest of the package may ask of it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from comir_hpc.errors import RegistrationError
from comir_hpc.space.grid import FloatArray, Grid


class PointMap(Protocol):
    """A map from points of the fixed world to points of the moving world.

    Worlds are LPS (x, y, z) in mm. A class that inherits from this one has to define `apply` only. It should define
    `inverse` where there is one. It must not change after it was made.
    """

    def apply(self, points_mm: ArrayLike) -> FloatArray:
        """Return the moving-space points (..., 3) of fixed-space points (..., 3), LPS (x, y, z) in mm."""
        ...

    def inverse(self) -> PointMap:
        """Return the map from moving to fixed points.

        Raises
        ------
        RegistrationError
            If the map has no inverse in closed form.
        """
        raise RegistrationError(f"this transform ({type(self).__name__}) has no inverse in closed form")

    @property
    def parts(self) -> tuple[PointMap, ...]:
        """Simpler maps that do the same, one after the other, in the order in which they are applied."""
        return (self,)

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions that were made when the transform was read, for the user to see."""
        return ()

    def apply_to_grid(self, grid: Grid) -> FloatArray:
        """Return the moving-space points (z, y, x, 3) of all voxel centres of a fixed grid.

        A class may define it anew where whole grids can be done faster than single points.
        """
        voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape_zyx), indexing="ij"), axis=-1)
        return self.apply(grid.world_mm(voxels))
