"""The grids of a pair of volumes, and the worlds of other tools as matrices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from comir_hpc.errors import RegistrationError
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.transforms.affine import Affine

RAS_FROM_LPS: FloatArray = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Matrix (4, 4) from LPS to RAS points, and back: it is its own inverse."""


@dataclass(frozen=True)
class GridPair:
    """Grids of the two volumes that a transform lies between.

    Attributes
    ----------
    fixed, moving : Grid or None
        Grid of each volume; None where it is not known.
    """

    fixed: Grid | None = None
    moving: Grid | None = None

    @property
    def swapped(self) -> GridPair:
        """Grids of the inverse transform."""
        return GridPair(self.moving, self.fixed)

    def both(self, purpose: str) -> tuple[Grid, Grid]:
        """Return both grids.

        Parameters
        ----------
        purpose : str
            What needs them, as the beginning of a sentence.

        Raises
        ------
        RegistrationError
            If one is not known; the message has the options that name it.
        """
        if self.fixed is None or self.moving is None:
            options = [f"--{n} {n.upper()}" for n in ("fixed", "moving") if getattr(self, n) is None]
            raise RegistrationError(
                f"{purpose} depends on the grids of both volumes; name the volumes, as in `comir-hpc export` with "
                f"{' and '.join(options)}"
            )
        return self.fixed, self.moving


def ras_from_index(grid: Grid) -> FloatArray:
    """Return the 4 x 4 matrix from voxel index (x, y, z, 1) to NIfTI's world, RAS in mm."""
    # The columns in reverse: an index of ours is (z, y, x).
    return RAS_FROM_LPS @ grid.matrix_mm[:, [2, 1, 0, 3]]


def matrix_in_ras(transform: Affine) -> FloatArray:
    """Return the matrix (4, 4) that does in RAS what a transform does in LPS."""
    return RAS_FROM_LPS @ transform.matrix_mm @ RAS_FROM_LPS


def from_ras(matrix_ras: FloatArray) -> Affine:
    """Return the transform that does in LPS what a matrix (4, 4) does in RAS.

    Raises
    ------
    RegistrationError
        If the matrix is no invertible affine map.
    """
    return Affine(RAS_FROM_LPS @ matrix_ras @ RAS_FROM_LPS)


def inverted(matrix: FloatArray) -> FloatArray:
    """Return the inverse of a matrix (4, 4) of a file.

    Raises
    ------
    RegistrationError
        If it has none.
    """
    try:
        return np.asarray(np.linalg.inv(matrix), dtype=np.float64)
    except np.linalg.LinAlgError as error:
        raise RegistrationError(
            f"matrix {np.round(matrix, 6).tolist()} has no inverse: it flattens space; write it again"
        ) from error
