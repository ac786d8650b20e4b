"""Pairs with a known bend: the families of `comir_hpc.data.families`, with a smooth deformation made onto each.

The moving volume is bent, turned a little and shifted, and before that laid onto the fixed one by the known transform
between the two files, in its header: what is measured here is the bend, and not the search. The known answer maps fixed
points to moving ones in closed form: first the motion, then the bend. The bend is noise, smoothed by a Gaussian and
scaled to its largest displacement. scipy makes and interpolates it, on purpose: the known answer must not share the
errors of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from comir_hpc.data.embedded import write_nifti
from comir_hpc.data.families import Pair, specimen
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform

SMOOTH_SHARE = 0.1
"""Deviation of the Gaussian that smooths the bend, as a share of the specimen's mean side."""
LARGEST_VOX = {"none": 0.0, "four": 4.0, "eight": 8.0}
"""Largest displacement of the bend by level, in voxels of the fixed volume."""

_TURN_DEG, _SHIFT_SHARE = 4.0, 0.02  # largest motion before the bend
_INVERSE_STEPS = 20


@dataclass(frozen=True)
class Bend:
    """A smooth displacement on a grid of the moving world: `field_mm` (z, y, x, 3), as (x, y, z) in mm."""

    grid: Grid
    field_mm: NDArray[np.float64]

    def apply(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Displace points (..., 3)."""
        index = np.moveaxis(self.grid.index_zyx(points_mm), -1, 0)
        moved = [
            ndimage.map_coordinates(self.field_mm[..., axis], index, order=1, mode="nearest")
            for axis in range(3)
        ]
        return np.asarray(points_mm + np.stack(moved, axis=-1))


@dataclass(frozen=True)
class BentCase:
    """One bent pair: both files, the points of the fixed specimen, and the parts of the known answer."""

    fixed: Path
    moving: Path
    points_mm: NDArray[np.float64]
    linear: Transform
    bend: Bend
    voxel_mm: float

    @property
    def true_mm(self) -> NDArray[np.float64]:
        """Moving points that the fixed points belong to."""
        return self.bend.apply(self.linear.apply(self.points_mm))


def bent(family: Pair, level: str, seed: int, folder: Path) -> BentCase:
    """Write the moving volume of a family as a second scanner sees it, moved and bent."""
    values, grid = family.moving
    grid = _laid(grid, family.answer.transform)
    rng = np.random.default_rng([list(LARGEST_VOX).index(level), seed, len(family.name)])
    inside = specimen(values)
    middle = grid.world_mm(ndimage.center_of_mass(inside))
    side = float(np.ptp(grid.world_mm(np.argwhere(inside)), axis=0).mean())
    voxel = min(family.fixed[1].spacing_mm)
    motion = Transform.identity()
    if level != "none":
        turn = rng.standard_normal(3)
        turn *= np.radians(rng.uniform(0, _TURN_DEG)) / np.linalg.norm(turn)
        shift = rng.standard_normal(3)
        shift *= rng.uniform(0, _SHIFT_SHARE) * side / np.linalg.norm(shift)
        motion = Transform.rigid(Rotation.from_rotvec(turn).as_matrix(), shift, middle)
    bend = Bend(grid, _field(rng, grid, SMOOTH_SHARE * side, LARGEST_VOX[level] * voxel))
    # Where a place of the bent volume was before: the bend is inverted by iteration, and the motion in closed form.
    places = grid.world_mm(np.moveaxis(np.indices(grid.shape_zyx), 0, -1))
    before = places.copy()
    for _ in range(_INVERSE_STEPS if level != "none" else 0):
        before += places - bend.apply(before)
    index = grid.index_zyx(motion.inverse().apply(before))
    moved = ndimage.map_coordinates(values, np.moveaxis(index, -1, 0), order=1)
    path = folder / "moving.nii.gz"
    write_nifti(path, moved.astype(np.float32), grid)
    return BentCase(family.files[0], path, family.inside_mm, motion, bend, voxel)


def _laid(grid: Grid, truth: Transform | None) -> Grid:
    """Move a grid so that the truth between the two files becomes the identity; only rigid ones can be undone so."""
    if truth is None or not truth.is_rigid:
        raise SystemExit(
            "the truth of this family is not rigid, so a header cannot undo it; choose another family"
        )
    back = truth.inverse()
    direction = back.rotation_xyz @ np.asarray(grid.direction)
    origin = back.apply(grid.origin_mm)
    return Grid(
        grid.shape_zyx, grid.spacing_mm, tuple(origin.tolist()), tuple(map(tuple, direction.tolist()))
    )


def _field(rng: np.random.Generator, grid: Grid, sigma_mm: float, largest_mm: float) -> NDArray[np.float64]:
    sigma = [sigma_mm / s for s in grid.spacing_mm]
    noise = [
        ndimage.gaussian_filter(rng.standard_normal(grid.shape_zyx), sigma, mode="wrap") for _ in range(3)
    ]
    field = np.stack(noise, axis=-1)
    return field * (largest_mm / np.sqrt((field**2).sum(axis=-1)).max()) if largest_mm else 0 * field
