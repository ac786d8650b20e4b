"""Choose the rotations of long specimens: rods, cores and nerves, many times as long as they are thick.

If most of such a specimen shall overlap, its axis has to lie on the other one's. A grid over all of SO(3) has hardly a
rotation that does that, and the cube in which a rod can be turned freely is nearly empty. So the rotations that carry
one axis onto the other, either way round, are tried with all turns about it.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from comir_hpc.representations.features import Features
from comir_hpc.space.grid import FloatArray

_LONG = 5.0  # a specimen is long if it spreads this many times as far along its axis as along the next one
_MOST_TURNS = 180
_MOST_POINTS = 100_000


def is_long(features: Features) -> bool:
    """Say whether a specimen is many times as long as it is thick; a single slice never is."""
    return not features.grid.planar and _spread(features)[0] >= _LONG


def axial_rotations(fixed: Features, moving: Features, count: int) -> FloatArray | None:
    """Make the world rotations (K, 3, 3) that lay one long specimen on the other; None if one is not long.

    Parameters
    ----------
    fixed, moving : Features
        Features of the two volumes.
    count : int
        Number of rotations at most.
    """
    if not (is_long(fixed) and is_long(moving)):
        return None
    start, end = _spread(fixed)[1], _spread(moving)[1]
    turns = max(1, min(count // 2, _MOST_TURNS))
    about = Rotation.from_rotvec(np.outer(2 * np.pi * np.arange(turns) / turns, start))
    # An axis has no sign: nothing says which end of a rod is which.
    onto = [Rotation.align_vectors(sign * end[None], start[None])[0] for sign in (1.0, -1.0)]
    return np.concatenate([(one * about).as_matrix() for one in onto])


def _spread(features: Features) -> tuple[float, FloatArray]:
    """Compare the spread along the main axis with that along the next one, and find the main axis (x, y, z)."""
    index = np.argwhere(features.mask)
    points = features.grid.world_mm(index[:: max(1, len(index) // _MOST_POINTS)])
    # Half a voxel is added, so that a specimen of one voxel across has a thickness.
    covariance = np.cov(points.T) + np.eye(3) * features.grid.finest_mm**2 / 12
    values, vectors = np.linalg.eigh(covariance)
    return float(np.sqrt(values[2] / values[1])), vectors[:, 2]
