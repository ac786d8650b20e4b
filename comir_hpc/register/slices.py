"""Choose where a pair is compared: two volumes in the world as it is, two single slices flattened into one plane.

A slice says nothing about motion out of its plane. So the plane of the fixed slice is carried onto that of the moving
one by the smallest rotation that does so (none if they are parallel). What is searched is the turn about the normal
and the shift in the plane: three numbers instead of six. Everything after this module sees slices in the plane z = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from comir_hpc.errors import RegistrationError
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import FloatArray, Grid, Matrix
from comir_hpc.transforms.affine import Affine as Transform

_MOST_TILT_DEG = (
    1.0  # angle by which a start may leave the plane of a slice: more is meant, and cannot be followed
)


@dataclass(frozen=True, eq=False)
class SlicePlane:
    """Rigid maps from the world to the place where each volume of a pair is compared.

    Attributes
    ----------
    fixed, moving : Transform
        Map of world points of each volume to that place. It is the identity for volumes. For slices, a point of the
        slice comes to lie at z = 0. If the two planes are parallel, points that lie on top of each other in the world
        also do so there.
    planar : bool
        Whether they are maps of slices.
    """

    fixed: Transform
    moving: Transform
    planar: bool = False

    @classmethod
    def from_grids(cls, fixed: Grid, moving: Grid) -> SlicePlane:
        """Find the place of comparison for two volumes, or for two slices."""
        if not fixed.planar:
            return cls(Transform.identity(), Transform.identity())
        axes = _axes_of(fixed)
        normal = _normal(moving)
        # There are two ways to turn one plane onto the other. The shorter one is taken: after the longer one, a slice
        # would be seen from behind, hence mirrored.
        tilt = _shortest_turn(axes[:, 2], -normal if normal @ axes[:, 2] < 0 else normal)
        middle, turned = fixed.centre_mm, tilt @ axes
        # The point of the moving plane that is nearest to the fixed slice's middle comes to lie on that middle.
        nearest = middle + turned[:, 2] * (turned[:, 2] @ (np.asarray(moving.origin_mm) - middle))
        flat_middle = axes.T @ (middle - np.asarray(fixed.origin_mm))
        return cls(
            _rigid(axes.T, np.asarray(fixed.origin_mm), np.zeros(3)),
            _rigid(turned.T, nearest, flat_middle),
            planar=True,
        )

    @property
    def tilt_deg(self) -> float:
        """Angle between the planes of two slices in degrees; 0 for volumes."""
        return self.moving.inverse().compose(self.fixed).rotation_deg

    def flattened(self, fixed: Features, moving: Features) -> tuple[Features, Features]:
        """Bring the features of both volumes to the place of comparison; slices are flattened into z = 0."""
        return _flattened(fixed, self.fixed), _flattened(moving, self.moving)

    def world(self, transform: Transform) -> Transform:
        """Convert a transform between the places of comparison into one between world points, fixed to moving."""
        back = self.moving.inverse().compose(transform).compose(self.fixed)
        return back.about(self.fixed.inverse().apply(transform.centre_mm))

    def compared(self, transform: Transform) -> Transform:
        """Convert a transform between world points, fixed to moving, into one between the places of comparison.

        Raises
        ------
        RegistrationError
            If it carries one slice out of the plane of the other.
        """
        inner = self.moving.compose(transform).compose(self.fixed.inverse())
        tilt = float(np.degrees(np.arcsin(min(1.0, float(np.linalg.norm(inner.rotation_xyz[2, :2]))))))
        if self.planar and tilt > _MOST_TILT_DEG:
            raise RegistrationError(
                f"the start carries one slice out of the plane of the other, by {tilt:.1f} degrees; expected a "
                "transform that keeps the plane"
            )
        return inner.about(self.fixed.apply(transform.centre_mm))

    def world_rotations(self, rotations_xyz: FloatArray) -> FloatArray:
        """Convert rotations (K, 3, 3) between the places of comparison into world rotations, fixed to moving."""
        turned: FloatArray = self.moving.rotation_xyz.T @ rotations_xyz @ self.fixed.rotation_xyz
        return turned

    def world_points_mm(self, points_mm: FloatArray) -> FloatArray:
        """Convert fixed points (..., 3) of the place of comparison into world points, in mm."""
        return self.fixed.inverse().apply(points_mm)


def _flattened(features: Features, frame: Transform) -> Features:
    if not features.grid.planar:
        return features
    grid = features.grid
    direction = frame.rotation_xyz @ np.asarray(grid.direction)
    # A header's rounding may leave the slice a little tilted: it is made exactly flat.
    direction[2, :2] = direction[:2, 2] = 0
    direction[2, 2] = np.sign(direction[2, 2])
    x, y, _ = frame.apply(grid.origin_mm)
    rows: list[tuple[float, ...]] = [tuple(row) for row in direction.tolist()]
    flattened: Matrix = (rows[0], rows[1], rows[2])  # type: ignore[assignment]
    return replace(features, grid=Grid(grid.shape_zyx, grid.spacing_mm, (float(x), float(y), 0.0), flattened))


def _normal(grid: Grid) -> FloatArray:
    normal: FloatArray = np.asarray(grid.direction, dtype=np.float64)[:, 2]
    return normal / np.linalg.norm(normal)


def _axes_of(grid: Grid) -> FloatArray:
    """Find right-handed world axes of a slice, the columns of (3, 3): along its rows, in its plane, and its normal."""
    normal = _normal(grid)
    along = np.asarray(grid.direction, dtype=np.float64)[:, 0]
    along = along - normal * (along @ normal)
    along /= np.linalg.norm(along)
    return np.column_stack([along, np.cross(normal, along), normal])


def _shortest_turn(start: FloatArray, stop: FloatArray) -> FloatArray:
    """Find the rotation (3, 3) by the smallest angle, at most 90 degrees, that carries one unit vector onto another."""
    axis = np.cross(start, stop)
    # Headers round directions. Planes as close as this (0.06 degrees) are meant to be parallel.
    if np.linalg.norm(axis) < 1e-3:
        return np.eye(3)
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turn: FloatArray = np.eye(3) + cross + cross @ cross / (1 + start @ stop)
    return turn


def _rigid(rotation_xyz: FloatArray, from_mm: FloatArray, to_mm: FloatArray) -> Transform:
    """Make the rotation about a point that is then carried to another point."""
    return Transform.rigid(rotation_xyz, to_mm - from_mm, from_mm).about(np.zeros(3))
