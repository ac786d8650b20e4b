"""The affine transform: a matrix between two worlds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from comir_hpc.errors import RegistrationError
from comir_hpc.space.grid import FloatArray
from comir_hpc.transforms.protocol import PointMap

if TYPE_CHECKING:
    import SimpleITK as sitk

# The smallest of the three scalings over the largest one. No specimen is squashed a thousandfold: below this, the
# matrix flattens space, and only rounding keeps its determinant from zero.
_FLATTEST = 1e-3


@dataclass(frozen=True, eq=False)
class Affine(PointMap):
    """An affine map from fixed to moving world points.

    Parameters
    ----------
    matrix_mm : (4, 4)
        Acts on homogeneous LPS points (x, y, z, 1) in mm.
    centre_mm : (3,)
        Centre (x, y, z) that exported files name. It does not change the map, only how `translation_mm` reads.

    Raises
    ------
    RegistrationError
        If the matrix is not a finite, invertible affine one. A matrix that squashes one direction a thousand times more
        than another counts as not invertible: a volume would become the same everywhere along that direction.
    """

    matrix_mm: FloatArray
    centre_mm: FloatArray = field(default_factory=lambda: np.zeros(3))

    def __post_init__(self) -> None:
        # Copies, made read-only below: the caller may go on to change its own arrays.
        matrix = np.array(self.matrix_mm, dtype=np.float64)
        centre = np.array(self.centre_mm, dtype=np.float64)
        if matrix.shape != (4, 4) or centre.shape != (3,):
            raise RegistrationError(
                f"a transform of shape {matrix.shape} about a centre of shape {centre.shape}; expected (4, 4), (3,)"
            )
        if not (np.isfinite(matrix).all() and np.isfinite(centre).all()):
            raise RegistrationError(f"transform {matrix.tolist()} is not finite")
        if not np.allclose(matrix[3], (0, 0, 0, 1)):
            raise RegistrationError(
                f"transform {matrix.tolist()} is not an invertible affine map: its last row must be 0, 0, 0, 1"
            )
        _require_invertible(matrix[:3, :3])
        matrix.setflags(write=False)
        centre.setflags(write=False)
        object.__setattr__(self, "matrix_mm", matrix)
        object.__setattr__(self, "centre_mm", centre)

    @classmethod
    def identity(cls) -> Affine:
        """Return the map that moves nothing."""
        return cls(np.eye(4))

    @classmethod
    def rigid(cls, rotation_xyz: ArrayLike, translation_mm: ArrayLike, centre_mm: ArrayLike) -> Affine:
        """Return ``p -> R (p - centre) + centre + translation``.

        Parameters
        ----------
        rotation_xyz : (3, 3)
            Matrix that turns world vectors (x, y, z).
        translation_mm, centre_mm : (3,)
            Shift of the centre, and the centre itself, as (x, y, z) in mm.
        """
        rotation = np.asarray(rotation_xyz, dtype=np.float64)
        centre = np.asarray(centre_mm, dtype=np.float64)
        matrix = np.eye(4)
        matrix[:3, :3] = rotation
        matrix[:3, 3] = centre + np.asarray(translation_mm, dtype=np.float64) - rotation @ centre
        return cls(matrix, centre)

    def apply(self, points_mm: ArrayLike) -> FloatArray:
        """Return the moving-space points (..., 3) of fixed-space points (..., 3), LPS (x, y, z) in mm."""
        points = np.asarray(points_mm, dtype=np.float64)
        moved: FloatArray = points @ self.matrix_mm[:3, :3].T + self.matrix_mm[:3, 3]
        return moved

    def inverse(self) -> Affine:
        """Return the map from moving to fixed points, about the image of the centre."""
        inverted = np.asarray(np.linalg.inv(self.matrix_mm), dtype=np.float64)
        return Affine(inverted, self.apply(self.centre_mm))

    def compose(self, first: Affine) -> Affine:
        """Return the map that applies `first`, then this one."""
        return Affine(self.matrix_mm @ first.matrix_mm, first.centre_mm)

    def about(self, centre_mm: ArrayLike) -> Affine:
        """Return the same map, written about another centre (x, y, z) in mm."""
        return Affine(self.matrix_mm, np.asarray(centre_mm, dtype=np.float64))

    @property
    def rotation_xyz(self) -> FloatArray:
        """Nearest rotation (3, 3) to the linear part, acting on world vectors (x, y, z)."""
        # Of all orthogonal matrices, U V^T is the nearest to the linear part. If that is a reflection, the direction
        # that is scaled least is turned round.
        left, _, right = np.linalg.svd(self.matrix_mm[:3, :3])
        sign = np.sign(np.linalg.det(left @ right))
        rotation: FloatArray = left @ np.diag([1.0, 1.0, sign]) @ right
        return rotation

    @property
    def rotation_deg(self) -> float:
        """Angle of `rotation_xyz` in degrees, 0 to 180."""
        rotation = self.rotation_xyz
        # An arc cosine alone loses half of the digits near 0 and near 180 degrees.
        sine = np.linalg.norm(rotation - rotation.T) / np.sqrt(2)
        return float(np.degrees(np.arctan2(sine, np.trace(rotation) - 1)))

    @property
    def translation_mm(self) -> FloatArray:
        """How far the centre is moved, (x, y, z) in mm."""
        return self.apply(self.centre_mm) - self.centre_mm

    @property
    def determinant(self) -> float:
        """Factor by which volumes grow; negative where the map is a reflection."""
        return float(np.linalg.det(self.matrix_mm[:3, :3]))

    @property
    def is_rigid(self) -> bool:
        """Whether the linear part is a rotation: no entry differs by more than about 1e-6."""
        linear = self.matrix_mm[:3, :3]
        return bool(np.allclose(linear, self.rotation_xyz, atol=1e-6))

    def to_sitk(self, *, flat: bool = False) -> sitk.AffineTransform:
        """Return SimpleITK's form of the map, about the same centre.

        Parameters
        ----------
        flat : bool
            Whether the transform is one of two dimensions: it acts in the plane z = 0 of the world, which the map
            keeps.
        """
        import SimpleITK as sitk

        axes = 2 if flat else 3
        affine = sitk.AffineTransform(axes)
        affine.SetCenter(self.centre_mm[:axes].tolist())
        affine.SetMatrix(self.matrix_mm[:axes, :axes].ravel().tolist())
        affine.SetTranslation(self.translation_mm[:axes].tolist())
        return affine

    def distance_mm(self, other: Affine, points_mm: ArrayLike) -> FloatArray:
        """Return the distances (...,) in mm between where the two maps send fixed points (..., 3)."""
        distance: FloatArray = np.linalg.norm(self.apply(points_mm) - other.apply(points_mm), axis=-1)
        return distance


def _require_invertible(linear: FloatArray) -> None:
    scalings = np.linalg.svd(linear, compute_uv=False)
    if scalings[2] > _FLATTEST * scalings[0]:
        return
    flattened = 3 - int((scalings > _FLATTEST * scalings[0]).sum())
    raise RegistrationError(
        f"transform {np.round(linear, 6).tolist()} is not an invertible affine map: it flattens {flattened} of the 3 "
        f"dimensions (its scalings are {', '.join(f'{s:.3g}' for s in scalings)}); register again, or write it again"
    )
