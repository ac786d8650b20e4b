"""Measure how well two volumes agree under a transform, in one way for every candidate and every method."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.representations.features import Features
from comir_hpc.representations.measures import Agreement
from comir_hpc.space.grid import FloatArray
from comir_hpc.transforms.affine import Affine as Transform

_MOST_POINTS = 200_000
_CLASSES = 32


class Similarity:
    """Measure one pair of volumes under any number of transforms, always on the same fixed voxels.

    Parameters
    ----------
    fixed, moving : Features
        Features of the two volumes, with the same number of channels.
    """

    def __init__(self, fixed: Features, moving: Features) -> None:
        index = np.argwhere(fixed.mask)
        every = -(-len(index) // _MOST_POINTS)
        # An even stride could hit the same columns in every row of voxels, since sides are often even: it is made odd.
        index = index[:: every + (every > 1 and every % 2 == 0)]
        self.points_mm = fixed.grid.world_mm(index)
        self._flat = fixed.grid.planar
        self._values = fixed.values[(slice(None), *index.T)]
        self._moving = moving
        self._mask = moving.mask.astype(np.float32)
        sizes = [_size_mm(side) for side in (fixed, moving)]
        self._smaller_share = min(sizes) / sizes[0]
        values = [side.values[0][side.mask] for side in (fixed, moving)]
        self._ranges = [tuple(np.percentile(v, (0.5, 99.5)).tolist()) for v in values]

    def some_points_mm(self, count: int) -> FloatArray:
        """Choose about `count` of the fixed points, (N, 3) in mm, to measure distances between transforms."""
        return self.points_mm[:: max(1, len(self.points_mm) // count)]

    def side_mm(self, points_mm: FloatArray) -> float:
        """Measure the mean side, in mm, of the box around fixed points (N, 3); for a slice without z."""
        sides = np.ptp(points_mm, axis=0)
        return float(sides[: 2 if self._flat else 3].mean())

    def at(self, transform: Transform) -> Agreement:
        """Measure the agreement under a transform from fixed to moving points."""
        index = self._moving.grid.index_zyx(transform.apply(self.points_mm)).T
        if self._flat:
            index[0] = 0  # rounding must not move a point off the only slice there is
        joint = ndimage.map_coordinates(self._mask, index, order=1, mode="constant") > 0.5
        overlap = float(joint.mean()) / self._smaller_share
        if joint.sum() < 8:
            return Agreement(0.0, 0.0, float(overlap))
        place = index[:, joint]
        fixed = self._values[:, joint].astype(np.float64)
        moving = np.stack([ndimage.map_coordinates(v, place, order=1) for v in self._moving.values])
        return Agreement(
            correlation=_correlation(fixed, moving.astype(np.float64)),
            information=self._information(fixed[0], moving[0]),
            overlap=min(1.0, float(overlap)),
        )

    def _information(self, fixed: FloatArray, moving: NDArray[np.float32]) -> float:
        classes = []
        for values, (low, high) in zip((fixed, moving), self._ranges, strict=True):
            scaled = (values - low) / max(high - low, 1e-12) * _CLASSES
            classes.append(np.clip(scaled.astype(np.int64), 0, _CLASSES - 1))
        counts = np.bincount(classes[0] * _CLASSES + classes[1], minlength=_CLASSES**2)
        joint = counts.reshape(_CLASSES, _CLASSES) / counts.sum()
        both = _entropy(joint)
        if both == 0:
            return 0.0
        return (_entropy(joint.sum(axis=1)) + _entropy(joint.sum(axis=0))) / both - 1


def _size_mm(side: Features) -> float:
    """Measure the volume of the mask in mm^3, or the area in mm^2 of a single slice, whose thickness means nothing."""
    voxel = np.prod([side.grid.spacing_mm[axis] for axis in side.grid.axes])
    return float(side.mask.sum(dtype=np.float64) * voxel)


def _correlation(fixed: FloatArray, moving: FloatArray) -> float:
    fixed = fixed - fixed.mean(axis=1, keepdims=True)
    moving = moving - moving.mean(axis=1, keepdims=True)
    scale = float(np.sqrt((fixed**2).sum() * (moving**2).sum()))
    return float((fixed * moving).sum()) / scale if scale > 0 else 0.0


def _entropy(shares: FloatArray) -> float:
    held = shares[shares > 0]
    return float(-(held * np.log(held)).sum())
