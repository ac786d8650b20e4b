"""Displacements on a lattice in the fixed world: ITK's form of them, folds, the inverse and its residual.

The lattice has the axes of the grid of the comparison, and voxels of the same size or a whole number of times larger.
Between its points a displacement is trilinear, here as in ITK. Outside of it nothing is displaced, and so it is on its
faces.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.register.deform.velocity import Velocity, spacings
from comir_hpc.register.deform.warping import Array, carried, indices, sample
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.transforms.itk import ItkTransform, itk_image
from comir_hpc.transforms.jacobian import folded, least_determinant

_SMOOTHINGS = 20  # attempts to smooth a velocity until its flow does not fold on the lattice
_INVERSIONS = 50  # steps of the iteration that inverts a displacement without a velocity
_CLOSE_VOX = 1e-3  # a change, in voxels of the lattice, that ends it


@dataclass(frozen=True, eq=False)
class Lattice:
    """A displacement of the fixed world.

    Attributes
    ----------
    grid : Grid
        Grid of the points at which the displacement is known.
    displacement_mm, backward_mm : (3, z, y, x) float32
        The displacement and the inverse map's, along the z, y and x axes of the grid, in mm.
    smoothings : int
        How often the velocity was smoothed until nothing folded.
    """

    grid: Grid
    displacement_mm: Array
    backward_mm: Array
    smoothings: int = 0

    @property
    def inverse(self) -> Lattice:
        """The inverse map."""
        return Lattice(self.grid, self.backward_mm, self.displacement_mm)

    def itk(self) -> sitk.DisplacementFieldTransform:
        """Give ITK's form: vectors (x, y, z) in mm."""
        return sitk.DisplacementFieldTransform(itk_image(np.moveaxis(self.vectors_mm, -1, 0), self.grid))

    @cached_property
    def vectors_mm(self) -> FloatArray:
        """Displacement of every point of the lattice, (z, y, x, 3), as world vectors (x, y, z) in mm."""
        return self._world(np.moveaxis(self.displacement_mm, 0, -1))

    @cached_property
    def determinant(self) -> FloatArray:
        """Least determinant of the Jacobian about every point of the lattice, (z, y, x); see `least_determinant`."""
        place = np.moveaxis(np.indices(self.grid.shape_zyx), 0, -1)
        return least_determinant(self.grid.world_mm(place) + self.vectors_mm, self.grid)

    def figures(self, fixed: Features) -> dict[str, Any]:
        """Measure the deformation over the specimen, as keys of result.json."""
        mask = fixed.mask.astype(np.float32)[None]
        inside = carried(mask, fixed.grid, self.grid, outside="zeros")[0] > 0.5
        if not inside.any():  # a specimen thinner than the lattice
            inside = np.ones_like(inside)
        determinant = self.determinant[inside]
        count = folded(self.determinant, inside)
        return {
            "lattice": self.grid.as_dict(),
            "displacement_mm": _spread(np.linalg.norm(self.vectors_mm, axis=-1)[inside]),
            "determinant": {
                "least": float(determinant.min()),
                "p01": float(np.percentile(determinant, 1)),
                "p99": float(np.percentile(determinant, 99)),
                "largest": float(determinant.max()),
            },
            "folded_points": count,
            "folded_share": count / int(inside.sum()),
            "inverse_residual_mm": _spread(self._residual_mm(inside)),
            "smoothings": self.smoothings,
        }

    def _residual_mm(self, inside: NDArray[np.bool_]) -> FloatArray:
        """Measure how far a point is from where it was after it was carried there and back, (N,) in mm."""
        moved_mm = self.displacement_mm[:, inside]
        moved = indices(self.grid.shape_zyx)[:, inside] + moved_mm / spacings(self.grid)[..., 0, 0]
        off_mm = moved_mm + sample(self.backward_mm, moved)
        length: FloatArray = np.linalg.norm(off_mm.astype(np.float64), axis=0)
        return length

    def _world(self, along_axes: Array) -> FloatArray:
        # Columns of the direction belong to x, y, z.
        vectors: FloatArray = (
            along_axes[..., ::-1].astype(np.float64) @ np.asarray(self.grid.direction, dtype=np.float64).T
        )
        return vectors


def from_velocity(velocity: Velocity) -> Lattice:
    """Make the displacement of a velocity; it does not fold.

    The flow of a velocity does not fold, but between the points of a lattice its trilinear form may. Then the velocity
    is smoothed a little until it does not.
    """
    count = 0
    while True:
        back = Velocity(-velocity.values_mm, velocity.grid)
        found = Lattice(velocity.grid, velocity.displacement_mm(), back.displacement_mm(), count)
        if not folded(found.determinant) + folded(found.inverse.determinant) or count == _SMOOTHINGS:
            return found
        smoothed = np.stack([ndimage.gaussian_filter(v, 1.0) for v in velocity.values_mm])
        velocity, count = Velocity(smoothed, velocity.grid), count + 1


def sampled(transform: ItkTransform, grid: Grid) -> Lattice:
    """Sample a displacement on a grid; its inverse is found by iteration."""
    points = grid.world_mm(np.moveaxis(np.indices(grid.shape_zyx), 0, -1))
    moved = (transform.apply_to_grid(grid) - points) @ np.asarray(grid.direction, dtype=np.float64)
    displacement = np.ascontiguousarray(np.moveaxis(moved[..., ::-1], -1, 0), dtype=np.float32)
    return Lattice(grid, displacement, inverted(displacement, grid))


def inverted(displacement_mm: Array, grid: Grid) -> Array:
    """Find the displacement (3, z, y, x) of the inverse map by fixed-point iteration."""
    place, spacing = indices(grid.shape_zyx), spacings(grid)
    found = -displacement_mm
    for _ in range(_INVERSIONS):
        better = -sample(displacement_mm, place + found / spacing)
        change = float(np.abs((better - found) / spacing).mean())
        found = better
        if change < _CLOSE_VOX:
            break
    return found


def _spread(values: FloatArray) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "p95": float(np.percentile(values, 95)),
        "largest": float(values.max()),
    }
