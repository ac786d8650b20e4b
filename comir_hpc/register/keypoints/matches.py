"""Match keypoints of two volumes: which of them look alike, and how one is turned against the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from comir_hpc.space.grid import FloatArray


@dataclass(frozen=True, eq=False)
class Matches:
    """Pairs of keypoints that look alike.

    Attributes
    ----------
    fixed_mm, moving_mm : (M, 3)
        World points (x, y, z) of the keypoints, in mm.
    rotations_xyz : (M, 3, 3)
        Rotation, from fixed to moving, under which each pair looks most alike.
    likeness : (M,)
        How alike each pair is, 1 for equal descriptors.
    num_fixed, num_moving : int
        Number of keypoints of both volumes that were compared.
    """

    fixed_mm: FloatArray
    moving_mm: FloatArray
    rotations_xyz: FloatArray
    likeness: FloatArray
    num_fixed: int
    num_moving: int

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.likeness)


def best_pairs(
    likeness: FloatArray, moving_mm: FloatArray, apart_mm: float, ratio: float
) -> NDArray[np.int64]:
    """Choose the pairs, (M, 2), that are each other's nearest, and pass the ratio test.

    Parameters
    ----------
    likeness : (F, M)
        How alike any two keypoints are, at most 1; -inf where they were not compared.
    moving_mm : (M, 3)
        World points of the moving keypoints. The next best has to be elsewhere: a keypoint beside the best one, found
        at another scale, is no rival.
    apart_mm : float
        Distance from which a keypoint is elsewhere, in mm.
    ratio : float
        Largest distance to the nearest descriptor, over that to the next one elsewhere (Lowe's ratio test).
    """
    if not likeness.size:
        return np.zeros((0, 2), dtype=np.int64)
    best = likeness.argmax(axis=1)
    rows = np.arange(len(likeness))
    mutual = likeness.argmax(axis=0)[best] == rows
    near = np.linalg.norm(moving_mm[best][:, None] - moving_mm[None], axis=-1) < apart_mm
    rival = np.where(near, -np.inf, likeness).max(axis=1)
    # The squared distance of two unit vectors is 2 (1 - likeness). A keypoint without a rival passes.
    clear = 1 - likeness[rows, best] <= ratio**2 * (1 - rival)
    kept = rows[mutual & clear & np.isfinite(likeness[rows, best])]
    return np.stack([kept, best[kept]], axis=1)
