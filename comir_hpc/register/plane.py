"""Where a pair is compared: two volumes in the world as it is, two single slices laid flat in one plane.

A slice says nothing about motions out of its plane. So the plane of the fixed slice is carried onto that of the moving
one by the smallest rotation that does (none if they are parallel), and what is searched is the turn about the normal
and the shift in the plane: three numbers instead of six. Everything after this module sees slices in the plane z = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from comir_hpc.geometry import FloatArray, Grid, Matrix
from comir_hpc.register.features import Features
from comir_hpc.transforms import Transform


@dataclass(frozen=True, eq=False)
class Frame:
    """Rigid maps from the world to where each side of a pair is compared.

    Attributes
    ----------
    fixed, moving : Transform
        Identity for volumes. For slices a point of the slice comes to lie at z = 0; where the two planes are parallel,
        points that lie on top of each other in the world do so there.
    """

    fixed: Transform
    moving: Transform

    @classmethod
    def of(cls, fixed: Grid, moving: Grid) -> Frame:
        """Frame of two volumes, or of two slices."""
        if not fixed.planar:
            return cls(Transform.identity(), Transform.identity())
        axes = _axes_of(fixed)
        normal = _normal(moving)
        # Seen from behind, a slice would be mirrored: of the two ways to turn the planes together the shorter one.
        tilt = _shortest_turn(axes[:, 2], -normal if normal @ axes[:, 2] < 0 else normal)
        middle, turned = fixed.centre_mm, tilt @ axes
        # The moving plane's point nearest to the fixed slice's middle is what lies on that.
        nearest = middle + turned[:, 2] * (turned[:, 2] @ (np.asarray(moving.origin_mm) - middle))
        flat_middle = axes.T @ (middle - np.asarray(fixed.origin_mm))
        return cls(
            _rigid(axes.T, np.asarray(fixed.origin_mm), np.zeros(3)), _rigid(turned.T, nearest, flat_middle)
        )

    @property
    def tilt_deg(self) -> float:
        """Angle between the planes of two slices; 0 for volumes."""
        return self.moving.inverse().compose(self.fixed).rotation_deg

    def laid(self, fixed: Features, moving: Features) -> tuple[Features, Features]:
        """The two sides where they are compared."""
        return _laid(fixed, self.fixed), _laid(moving, self.moving)

    def world(self, transform: Transform) -> Transform:
        """A transform between the places of comparison as one between world points, fixed to moving."""
        back = self.moving.inverse().compose(transform).compose(self.fixed)
        return back.about(self.fixed.inverse().apply(transform.centre_mm))

    def world_rotations(self, rotations_xyz: FloatArray) -> FloatArray:
        """Rotations (K, 3, 3) between the places of comparison as world rotations, fixed to moving."""
        turned: FloatArray = self.moving.rotation_xyz.T @ rotations_xyz @ self.fixed.rotation_xyz
        return turned

    def world_points_mm(self, points_mm: FloatArray) -> FloatArray:
        """Fixed points (..., 3) of the place of comparison in the world."""
        return self.fixed.inverse().apply(points_mm)


def _laid(features: Features, frame: Transform) -> Features:
    if not features.grid.planar:
        return features
    grid = features.grid
    direction = frame.rotation_xyz @ np.asarray(grid.direction)
    # Exactly flat, where the header's rounding left them a little tilted.
    direction[2, :2] = direction[:2, 2] = 0
    direction[2, 2] = np.sign(direction[2, 2])
    x, y, _ = frame.apply(grid.origin_mm)
    rows: list[tuple[float, ...]] = [tuple(row) for row in direction.tolist()]
    laid: Matrix = (rows[0], rows[1], rows[2])  # type: ignore[assignment]
    return replace(features, grid=Grid(grid.shape_zyx, grid.spacing_mm, (float(x), float(y), 0.0), laid))


def _normal(grid: Grid) -> FloatArray:
    normal: FloatArray = np.asarray(grid.direction, dtype=np.float64)[:, 2]
    return normal / np.linalg.norm(normal)


def _axes_of(grid: Grid) -> FloatArray:
    """Right-handed world axes (3, 3) of a slice: along its rows, in its plane, and its normal; the columns."""
    normal = _normal(grid)
    along = np.asarray(grid.direction, dtype=np.float64)[:, 0]
    along = along - normal * (along @ normal)
    along /= np.linalg.norm(along)
    return np.column_stack([along, np.cross(normal, along), normal])


def _shortest_turn(start: FloatArray, stop: FloatArray) -> FloatArray:
    """Rotation (3, 3) by the smallest angle, 90 degrees at most, that carries one unit vector onto another."""
    axis = np.cross(start, stop)
    # Headers round directions: planes this close (0.06 degrees) are meant to be parallel.
    if np.linalg.norm(axis) < 1e-3:
        return np.eye(3)
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turn: FloatArray = np.eye(3) + cross + cross @ cross / (1 + start @ stop)
    return turn


def _rigid(rotation_xyz: FloatArray, from_mm: FloatArray, to_mm: FloatArray) -> Transform:
    """Rotation about a point that is carried to another."""
    return Transform.rigid(rotation_xyz, to_mm - from_mm, from_mm).about(np.zeros(3))
