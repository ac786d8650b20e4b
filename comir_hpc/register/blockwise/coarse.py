"""The coarse solution that blocks start from: an affine map, and before it what bends, where something does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comir_hpc.errors import RegistrationError
from comir_hpc.register.deform.warping import Array
from comir_hpc.runs.result import Result
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.composite import Composite
from comir_hpc.transforms.protocol import PointMap


@dataclass(frozen=True, eq=False)
class Coarse:
    """The answer of a registration.

    Attributes
    ----------
    affine : Affine
        What is applied last, from displaced fixed points to moving points.
    bend : PointMap or None
        What displaces fixed points before; None where nothing does.
    digest : str
        Digest of the file's content.
    """

    affine: Affine
    bend: PointMap | None
    digest: str

    @classmethod
    def of_result(cls, folder: Path, result: Result, fixed: Grid) -> Coarse:
        """Read the transform of a registration.

        Raises
        ------
        RegistrationError
            If its file is missing or damaged, or is of another form than `register` writes.
        """
        # Here, so that the chain of imports stays short: files know the forms of many tools.
        from comir_hpc.transforms.files import content_digest, read_transform

        path = folder / result.transform_file
        transform = read_transform(path)
        *bent, last = transform.parts
        if not isinstance(last, Affine) or any(isinstance(part, Affine) for part in bent):
            kinds = ", ".join(type(part).__name__ for part in transform.parts)
            raise RegistrationError(
                f"{path} is made of {kinds}; expected what bends and then one affine part, as register writes it"
            )
        digest = content_digest(path, transform, fixed)
        return cls(last, Composite(tuple(bent)) if bent else None, digest)

    def moved_mm(self, points_mm: FloatArray) -> FloatArray:
        """Moving points (..., 3) of fixed points (..., 3)."""
        return self.affine.apply(points_mm if self.bend is None else self.bend.apply(points_mm))

    def moving_mm(self, grid: Grid) -> FloatArray:
        """Moving points (z, y, x, 3) of the voxel centres of a grid in the fixed world."""
        if self.bend is None:
            return self.affine.apply_to_grid(grid)
        return self.affine.apply(self.bend.apply_to_grid(grid))

    def displacement_mm(self, grid: Grid, after_mm: Array | None = None) -> Array:
        """Displacement (3, z, y, x) along the axes of a grid in mm, before the affine part.

        Parameters
        ----------
        after_mm : (3, z, y, x), optional
            Displacement by which the points of the grid have been moved before; it is added.
        """
        if self.bend is None:
            return np.zeros((3, *grid.shape_zyx), np.float32) if after_mm is None else after_mm
        points = grid.world_mm(np.moveaxis(np.indices(grid.shape_zyx), 0, -1))
        turned = np.asarray(grid.direction, dtype=np.float64)
        if after_mm is None:
            moved = self.bend.apply_to_grid(grid)
        else:
            moved = self.bend.apply(points + np.moveaxis(after_mm[::-1].astype(np.float64), 0, -1) @ turned.T)
        # World vectors (x, y, z) to components along the axes z, y, x.
        along = ((moved - points) @ turned)[..., ::-1]
        return np.ascontiguousarray(np.moveaxis(along, -1, 0), dtype=np.float32)
