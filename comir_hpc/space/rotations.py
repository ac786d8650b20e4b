"""Make and measure rotations of space: quaternions, angles, and even grids over all of SO(3).

Every matrix acts on column vectors (z, y, x), so that row i and column i belong to array axis i. The direction of a
turn is that of world axes: +90 degrees about z carries x onto y. Derivations: docs/theory.md, sections 2 and 5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from comir_hpc.errors import ConfigError

FloatArray = NDArray[np.float64]

AXES = "zyx"

# Constants of the super-Fibonacci spiral: sqrt(2), and the real root of psi^4 = psi + 4.
_PHI = 1.4142135623730951
_PSI = 1.5337511687552043


def reverse_axes(matrix: ArrayLike) -> FloatArray:
    """Rewrite linear maps (..., 3, 3) from zyx to xyz order, or back: the operation is its own inverse."""
    return np.asarray(matrix, dtype=np.float64)[..., ::-1, ::-1].copy()


def from_quaternions(quaternions: ArrayLike) -> FloatArray:
    """Turn quaternions into rotation matrices in zyx order.

    Parameters
    ----------
    quaternions : (..., 4)
        Quaternions (w, x, y, z) of rotations in xyz space, right-handed, of any length but zero.

    Returns
    -------
    (..., 3, 3) float64
    """
    q = np.asarray(quaternions, dtype=np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return reverse_axes(np.stack([np.stack(row, axis=-1) for row in rows], axis=-2))


def to_quaternions(matrices: ArrayLike) -> FloatArray:
    """Turn rotation matrices in zyx order into unit quaternions (w, x, y, z), (..., 4), of arbitrary sign.

    A quaternion is the eigenvector of Bar-Itzhack's symmetric matrix. This is stable at every angle, which the formula
    by the trace is not.
    """
    m = reverse_axes(matrices)
    trace = np.trace(m, axis1=-2, axis2=-1)[..., None, None]
    vector = np.stack(
        [m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], axis=-1
    )
    symmetric = np.empty((*m.shape[:-2], 4, 4))
    symmetric[..., :1, :1] = trace
    symmetric[..., 0, 1:] = symmetric[..., 1:, 0] = vector
    symmetric[..., 1:, 1:] = m + np.swapaxes(m, -1, -2) - trace * np.eye(3)
    return np.asarray(np.linalg.eigh(symmetric)[1][..., -1], dtype=np.float64)


def random_rotation(rng: np.random.Generator) -> FloatArray:
    """Draw a rotation uniformly from SO(3) (Haar measure); (3, 3) float64 in zyx order."""
    # A normal vector has no preferred direction in four dimensions: its direction is uniform on the sphere of
    # unit quaternions, which covers SO(3) evenly.
    return from_quaternions(rng.standard_normal(4))


def rotation_by(axis: str | ArrayLike, degrees: float) -> FloatArray:
    """Make the rotation about an axis by an angle.

    Parameters
    ----------
    axis : "z", "y", "x" or (3,)
        Axis by its name, or as a vector (z, y, x) of any length but zero.
    degrees : float
        Angle in degrees, right-handed in world order: +90 about z carries x onto y.

    Returns
    -------
    (3, 3) float64 in zyx order.

    Raises
    ------
    ConfigError
        If the axis is unknown or has no direction.
    """
    if isinstance(axis, str):
        if axis not in tuple(AXES):
            raise ConfigError(f"unknown axis {axis!r}; expected z, y, x or a vector (z, y, x)")
        axis = np.eye(3)[AXES.index(axis)]
    direction = np.asarray(axis, dtype=np.float64)
    length = float(np.linalg.norm(direction))
    if direction.shape != (3,) or not length > 0:
        raise ConfigError(f"{axis} is no axis; expected a vector (z, y, x) that is not zero")
    half = np.radians(degrees) / 2
    return from_quaternions([np.cos(half), *(np.sin(half) * direction[::-1] / length)])


def angle_deg(rotation: ArrayLike) -> FloatArray:
    """Return the angles, degrees in [0, 180], of rotations (..., 3, 3) in either axis order; shape (...)."""
    m = np.asarray(rotation, dtype=np.float64)
    # The arc cosine of the trace loses half of its digits near 0 and 180 degrees. The arc tangent of sine and cosine
    # loses none.
    sine = np.linalg.norm(m - np.swapaxes(m, -1, -2), axis=(-2, -1)) / np.sqrt(2)
    cosine = np.trace(m, axis1=-2, axis2=-1) - 1
    return np.asarray(np.degrees(np.arctan2(sine, cosine)), dtype=np.float64)


def so3_grid(count: int) -> FloatArray:
    """Spread any number of rotations evenly over SO(3).

    They lie on the super-Fibonacci spiral of Alexa (CVPR 2022) and are always the same. `covering_radius_deg` measures
    how dense they are.

    Parameters
    ----------
    count : int
        Number of rotations, at least 1.

    Returns
    -------
    (count, 3, 3) float64 in zyx order.

    Raises
    ------
    ConfigError
        If `count` is smaller than 1.
    """
    _require_rotations(count)
    s = np.arange(count) + 0.5
    inner, outer = np.sqrt(s / count), np.sqrt(1 - s / count)
    alpha, beta = 2 * np.pi * s / _PHI, 2 * np.pi * s / _PSI
    quaternions = [inner * np.sin(alpha), inner * np.cos(alpha), outer * np.sin(beta), outer * np.cos(beta)]
    return from_quaternions(np.stack(quaternions, axis=-1))


def so2_grid(count: int) -> FloatArray:
    """Make rotations about z by `count` evenly spread angles, the first of them 0: all turns of a single slice.

    Parameters, result and errors are those of `so3_grid`.
    """
    _require_rotations(count)
    half = np.pi * np.arange(count) / count
    zeros = np.zeros(count)
    return from_quaternions(np.stack([np.cos(half), zeros, zeros, np.sin(half)], axis=-1))


def _require_rotations(count: int) -> None:
    if count < 1:
        raise ConfigError(f"a grid of {count} rotations was asked for; expected at least 1")


def covering_radius_deg(rotations: ArrayLike) -> float:
    """Return the largest angle, degrees, from any rotation of SO(3) to the nearest of the given ones.

    It is computed exactly and not sampled. As unit quaternions of both signs, the rotations are points on a sphere. The
    facet of their convex hull that is nearest to the origin is the base of the widest empty cap.

    Parameters
    ----------
    rotations : (n, 3, 3)
        Rotations in either axis order. 10 000 of them take seconds.
    """
    from scipy.spatial import ConvexHull

    quaternions = to_quaternions(rotations)
    # Fewer than four independent quaternions do not enclose the origin, and their hull has no volume.
    if np.linalg.matrix_rank(quaternions, tol=1e-9) < 4:
        return 180.0  # some quaternion is at right angles to all of them, hence half a turn away from each
    hull = ConvexHull(np.concatenate([quaternions, -quaternions]))
    return float(np.degrees(2 * np.arccos(np.clip(-hull.equations[:, -1].max(), -1.0, 1.0))))
