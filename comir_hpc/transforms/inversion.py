"""The inverse of a transform that has none in closed form, as a field of displacements on the moving grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from comir_hpc.errors import RegistrationError
from comir_hpc.host.memory import available_bytes, in_words
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.transforms.composite import as_affine
from comir_hpc.transforms.itk import ItkTransform, itk_image
from comir_hpc.transforms.protocol import PointMap

_STEPS = 60
_CLOSE_MM = 1e-4  # steps end when no point is farther than this from where it should be
_BYTES = 8 * 3 * 8  # for each voxel of both grids: three numbers in float64, eight times at once
_CHECKED = 20_000  # points, at most, at which the inverse is held against the transform itself
_MARGIN = 0.1  # of the fixed grid's sides that is added around it where the transform is sampled


@dataclass(frozen=True, eq=False)
class Inverse:
    """An inverse, and how well it is one.

    The figures are of points of the moving grid that come from inside the fixed one. An inverse in closed form is
    exact, and keeps the defaults.

    Attributes
    ----------
    transform : PointMap
        Map from moving to fixed points.
    residual_mm, worst_mm : float
        Mean and largest distance between a moving point and where it comes to by the inverse and then the transform.
        Zero where the inverse is one in closed form.
    covered : float
        Share of the moving grid whose points come from inside the fixed grid. Only these were measured.
    """

    transform: PointMap
    residual_mm: float = 0.0
    worst_mm: float = 0.0
    covered: float = 1.0


def inverse_of(transform: PointMap, fixed: Grid | None, moving: Grid | None) -> Inverse:
    """Invert a transform: in closed form if it is linear, else as a field on the moving grid, by fixed-point steps.

    Raises
    ------
    RegistrationError
        If it bends space and a grid is not known, the field does not fit into memory, or the steps do not end because
        the transform folds space.
    """
    whole = as_affine(transform)
    if whole is not None:
        return Inverse(whole.inverse())
    if fixed is None or moving is None:
        raise RegistrationError(
            "this transform bends space: its inverse is a field on the moving grid; name both volumes with --fixed "
            "FIXED and --moving MOVING"
        )
    needed, free = _BYTES * sum(int(np.prod(grid.shape_zyx)) for grid in (fixed, moving)), available_bytes()
    if needed > free:
        raise RegistrationError(
            f"the inverse needs {in_words(needed)} of memory, {in_words(free)} are free; use a larger machine, or a "
            "moving volume of a coarser level"
        )
    sampled = _Sampled(transform, fixed)
    voxels = np.stack(np.meshgrid(*map(np.arange, moving.shape_zyx), indexing="ij"), axis=-1)
    targets = moving.world_mm(voxels).reshape(-1, 3)
    found = _solved(sampled, targets)
    inside = _inside(fixed, found)
    shifts = (found - targets).reshape(*moving.shape_zyx, 3)
    image = itk_image(np.moveaxis(shifts, -1, 0), moving)
    inverse = ItkTransform(sitk.DisplacementFieldTransform(image))
    # Outside the fixed grid a field of displacements says nothing, so nothing there can be held against it.
    chosen = np.flatnonzero(inside)
    if not len(chosen):
        raise RegistrationError(
            "no point of the moving volume comes from inside the fixed one: are --fixed and --moving exchanged?"
        )
    chosen = chosen[:: max(1, len(chosen) // _CHECKED)]
    missed = np.linalg.norm(transform.apply(found[chosen]) - targets[chosen], axis=1)
    return Inverse(inverse, float(missed.mean()), float(missed.max()), float(inside.mean()))


class _Sampled:
    """A transform sampled on a grid a little larger than the fixed one, to be applied to many points at once."""

    def __init__(self, transform: PointMap, fixed: Grid) -> None:
        margin = [max(2, round(_MARGIN * n)) if n > 1 else 0 for n in fixed.shape_zyx]
        self.grid = fixed.crop(fixed.box.grown(margin))
        voxels = np.stack(np.meshgrid(*map(np.arange, self.grid.shape_zyx), indexing="ij"), axis=-1)
        points = self.grid.world_mm(voxels)
        shifts = np.moveaxis(transform.apply_to_grid(self.grid) - points, -1, 0)
        self._shifts = np.ascontiguousarray(shifts)
        # The nearest matrix: what is left of the displacement is small, and the steps go the shortest way.
        flat = np.c_[points.reshape(-1, 3), np.ones(points.size // 3)][:: max(1, points.size // 30_000)]
        moved = (points + np.moveaxis(shifts, 0, -1)).reshape(-1, 3)[:: max(1, points.size // 30_000)]
        fitted, *_ = np.linalg.lstsq(flat, moved, rcond=None)
        self.linear = np.asarray(fitted[:3].T, dtype=np.float64)
        self.offset = np.asarray(fitted[3], dtype=np.float64)

    def apply(self, points_mm: FloatArray) -> FloatArray:
        """Return the moving points (N, 3) of fixed points (N, 3); outside of the grid its border goes on."""
        index = self.grid.index_zyx(points_mm).T
        shifts = [ndimage.map_coordinates(one, index, order=1, mode="nearest") for one in self._shifts]
        moved: FloatArray = points_mm + np.stack(shifts, axis=-1)
        return moved


def _solved(sampled: _Sampled, targets_mm: FloatArray) -> FloatArray:
    """Find the fixed points (N, 3) that are sent to moving points (N, 3)."""
    back = np.linalg.inv(sampled.linear)
    found: FloatArray = (targets_mm - sampled.offset) @ back.T
    active = np.arange(len(targets_mm))
    for _ in range(_STEPS):
        missed = targets_mm[active] - sampled.apply(found[active])
        far = np.linalg.norm(missed, axis=1) > _CLOSE_MM
        active = active[far]
        if not len(active):
            break
        found[active] += missed[far] @ back.T
    return found


def _inside(grid: Grid, points_mm: FloatArray) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    index = grid.index_zyx(points_mm)
    inside = ((index >= -0.5) & (index <= np.asarray(grid.shape_zyx) - 0.5)).all(axis=1)
    return np.asarray(inside, dtype=np.bool_)
