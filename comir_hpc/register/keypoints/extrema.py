"""Find and describe keypoints of a volume: extrema of differences of Gaussians, described by spheres around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.register.coarse import CoarseFeatures
from comir_hpc.register.keypoints.matches import Matches, best_pairs
from comir_hpc.register.keypoints.spheres import invariants, spheres, turned_likeness
from comir_hpc.representations.criteria import Array32
from comir_hpc.space.grid import FloatArray

_SIGMAS_VOX = (1.0, 1.6, 2.5)  # scales at which extrema are looked for
_WIDER = 1.6  # the other Gaussian of a difference
_NEIGHBOURS = np.arange(27).reshape(3, 3, 3) != 13
_CLEARLY = 1e-4  # of values with a spread of 1
_INSIDE = 0.5  # weight of the mask at a keypoint
_RADII_VOX = (1.5, 3.0, 4.5, 6.0, 8.0)  # of the spheres
_NEAREST = 5  # descriptors that are compared under all rotations, of each keypoint
_APART_VOX = 3.0  # keypoints nearer than that are no rivals in the ratio test


@dataclass(frozen=True, eq=False)
class Keypoints:
    """Keypoints of one volume.

    Attributes
    ----------
    points_mm : (N, 3)
        World points (x, y, z), in mm.
    coefficients : (N, K, B) float32
        Spherical harmonics of the values around them, on K spheres of all channels; of length 1 for each point.
    """

    points_mm: FloatArray
    coefficients: Array32


def matched(fixed: CoarseFeatures, moving: CoarseFeatures, count: int, ratio: float) -> Matches:
    """Find at most `count` keypoints of each volume, and match them.

    Parameters
    ----------
    fixed, moving : CoarseFeatures
        Both volumes on cubic voxels of one size, with the same channels.
    count : int
        Largest number of keypoints of each volume, the strongest ones.
    ratio : float
        Ratio of a match (`best_pairs`).
    """
    one, other = keypoints(fixed, count), keypoints(moving, count)
    numbers = len(one.points_mm), len(other.points_mm)
    if not min(numbers):
        return Matches(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3, 3)), np.zeros(0), *numbers)
    alike = invariants(one.coefficients) @ invariants(other.coefficients).T
    pairs = _nearest(alike)
    found, rotations = turned_likeness(one.coefficients, other.coefficients, pairs)
    likeness = np.full(alike.shape, -np.inf)
    likeness[tuple(pairs.T)] = found
    place = np.zeros(alike.shape, dtype=np.int64)
    place[tuple(pairs.T)] = np.arange(len(pairs))
    kept = best_pairs(likeness, other.points_mm, _APART_VOX * fixed.spacing_mm, ratio)
    rows, columns = kept.T
    return Matches(
        one.points_mm[rows], other.points_mm[columns], rotations[place[rows, columns]], likeness[rows, columns],
        *numbers,
    )  # fmt: skip


def keypoints(volume: CoarseFeatures, count: int) -> Keypoints:
    """Find and describe the strongest keypoints of a volume on cubic voxels."""
    values = volume.values * volume.weights
    index = _extrema(values, volume.weights, count)
    around = np.concatenate([radius * volume.spacing_mm * spheres().directions_xyz for radius in _RADII_VOX])
    points = volume.origin_mm + index @ volume.frame.T
    places = (points[:, None] + around - volume.origin_mm) @ np.linalg.inv(volume.frame).T
    sampled, held = volume.at(places.reshape(-1, 3))
    num_spheres, num_directions = len(_RADII_VOX), len(spheres().directions_xyz)
    seen = (sampled * held).reshape(len(values), len(index), num_spheres, num_directions)
    coefficients = np.einsum("cnsp,pb->ncsb", seen, spheres().analysis.astype(np.float32))
    coefficients = coefficients.reshape(len(index), len(values) * num_spheres, -1)
    length = np.linalg.norm(coefficients, axis=(1, 2), keepdims=True)
    return Keypoints(points, np.asarray(coefficients / np.maximum(length, 1e-12), dtype=np.float32))


def _extrema(values: Array32, weights: Array32, count: int) -> NDArray[np.int64]:
    """Find the strongest extrema (N, 3) of differences of Gaussians in any channel, at any scale."""
    places, strengths = [], []
    for sigma in _SIGMAS_VOX:
        for channel in values:
            difference = ndimage.gaussian_filter(channel, sigma) - ndimage.gaussian_filter(
                channel, _WIDER * sigma
            )
            size = np.abs(difference)
            # A maximum is larger than its neighbours, and a minimum smaller. A plateau has neither, but rounding.
            above = ndimage.maximum_filter(difference, footprint=_NEIGHBOURS) + _CLEARLY
            below = ndimage.minimum_filter(difference, footprint=_NEIGHBOURS) - _CLEARLY
            peak = (difference > np.maximum(above, 0)) | (difference < np.minimum(below, 0))
            index = np.argwhere(peak & (weights > _INSIDE))
            places.append(index)
            strengths.append(size[tuple(index.T)])
    index, strength = np.concatenate(places), np.concatenate(strengths)
    order = np.argsort(-strength, kind="stable")
    # One place may be an extremum of several channels and scales.
    _, first = np.unique(index[order], axis=0, return_index=True)
    return np.asarray(index[order][np.sort(first)][:count], dtype=np.int64)


def _nearest(alike: Array32) -> NDArray[np.int64]:
    """List the pairs (N, 2) of which one is among the nearest few of the other."""
    chosen = np.zeros(alike.shape, dtype=np.bool_)
    for axis in (0, 1):
        number = min(_NEAREST, alike.shape[axis])
        nearest = np.argpartition(-alike, number - 1, axis=axis).take(range(number), axis=axis)
        np.put_along_axis(chosen, nearest, True, axis=axis)
    return np.argwhere(chosen)
