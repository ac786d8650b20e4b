"""Match keypoints of two slices: SIFT of scikit-image, in every channel of the representations.

The CoMIR paper registers its 2D representations in this way. Lowe, "Distinctive image features from scale-invariant
keypoints", IJCV 2004.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from comir_hpc.register.coarse import CoarseFeatures
from comir_hpc.register.keypoints.matches import Matches, best_pairs
from comir_hpc.representations.criteria import Array32
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import FloatArray

_MOST_PIXELS = 384  # along the longest side of the fixed specimen: SIFT's scale space has twice as many
_FEWEST_PIXELS = 12  # along a side: SIFT's smallest image
_APART_VOX = 3.0  # keypoints nearer than that are no rivals in the ratio test
_TAILS = (0.5, 99.5)  # percentiles that become 0 and 1, since SIFT's thresholds are those of such an image


@dataclass(frozen=True, eq=False)
class SliceKeypoints:
    """Keypoints of one slice.

    Attributes
    ----------
    points_mm : (N, 3)
        World points (x, y, z), in mm.
    angles : (N,)
        Direction of the main gradient, from x to y, in radians.
    descriptors : (N, 128) float32
        SIFT descriptors, of length 1.
    channels : (N,)
        Channel that each was found in.
    """

    points_mm: FloatArray
    angles: FloatArray
    descriptors: Array32
    channels: FloatArray


def slice_spacing_mm(fixed: Features, finest_mm: float) -> float:
    """Choose the side of a pixel: the finest of both slices, unless that makes too many of them."""
    index = np.argwhere(fixed.mask)
    longest = float(((np.ptp(index, axis=0) + 1) * fixed.grid.spacing_mm)[1:].max())
    return max(finest_mm, longest / _MOST_PIXELS)


def matched_slices(fixed: CoarseFeatures, moving: CoarseFeatures, count: int, ratio: float) -> Matches:
    """Find at most `count` keypoints of each slice, and match those of equal channels.

    Parameters
    ----------
    fixed, moving : CoarseFeatures
        Both slices, flattened into the plane z = 0, on square pixels of one size, with the same channels.
    count : int
        Largest number of keypoints of each slice, the coarsest ones.
    ratio : float
        Ratio of a match (`best_pairs`).
    """
    one, other = slice_keypoints(fixed, count), slice_keypoints(moving, count)
    likeness = (one.descriptors @ other.descriptors.T).astype(np.float64)
    likeness[one.channels[:, None] != other.channels[None]] = -np.inf
    rows, columns = best_pairs(likeness, other.points_mm, _APART_VOX * fixed.spacing_mm, ratio).T
    turns = other.angles[columns] - one.angles[rows]
    return Matches(
        one.points_mm[rows], other.points_mm[columns], _about_z(turns), likeness[rows, columns],
        len(one.points_mm), len(other.points_mm),
    )  # fmt: skip


def slice_keypoints(side: CoarseFeatures, count: int) -> SliceKeypoints:
    """Find and describe the keypoints of all channels of a slice."""
    import skimage.feature  # takes 0.3 s: only slices need it

    sift_of: Any = skimage.feature.SIFT  # scikit-image ships no types

    origin_mm, rows_mm, columns_mm, images = _seen_from_above(side)
    if min(images.shape[1:]) < _FEWEST_PIXELS:
        images = images[:0]
    found: list[SliceKeypoints] = []
    sizes: list[FloatArray] = []
    for channel, image in enumerate(images):
        sift = sift_of()
        try:
            sift.detect_and_extract(image)
        except RuntimeError:  # scikit-image's way to say that it found none
            continue
        points = origin_mm + sift.positions[:, :1] * rows_mm + sift.positions[:, 1:] * columns_mm
        # The angle is that of a vector (row, column), from rows to columns.
        pointing = np.outer(np.cos(sift.orientations), rows_mm) + np.outer(
            np.sin(sift.orientations), columns_mm
        )
        descriptors = sift.descriptors.astype(np.float32)
        descriptors /= np.maximum(np.linalg.norm(descriptors, axis=1, keepdims=True), 1e-12)
        sizes.append(sift.sigmas)
        found.append(
            SliceKeypoints(
                points,
                np.arctan2(pointing[:, 1], pointing[:, 0]),
                descriptors,
                np.full(len(points), float(channel)),
            )
        )
    if not found:
        return SliceKeypoints(np.zeros((0, 3)), np.zeros(0), np.zeros((0, 128), np.float32), np.zeros(0))
    order = np.argsort(-np.concatenate(sizes), kind="stable")[:count]
    return SliceKeypoints(
        np.concatenate([one.points_mm for one in found])[order],
        np.concatenate([one.angles for one in found])[order],
        np.concatenate([one.descriptors for one in found])[order],
        np.concatenate([one.channels for one in found])[order],
    )


def _seen_from_above(side: CoarseFeatures) -> tuple[FloatArray, FloatArray, FloatArray, Array32]:
    """Give the first pixel's place, the steps along rows and columns, and images (C, y, x) that are not mirrored.

    A grid may be flipped. SIFT does not know a mirrored structure again, so rows are then read in the other order.
    """
    images = (side.values * side.weights)[:, 0]
    origin_mm, rows_mm, columns_mm = side.origin_mm, side.frame[:, 1], side.frame[:, 2]
    if np.cross(columns_mm, rows_mm)[2] < 0:
        origin_mm, rows_mm = origin_mm + (images.shape[1] - 1) * rows_mm, -rows_mm
        images = images[:, ::-1]
    inside = side.values[:, side.weights > 0.5]
    low, high = np.percentile(inside, _TAILS)
    return origin_mm, rows_mm, columns_mm, np.clip((images - low) / max(high - low, 1e-12), 0, 1)


def _about_z(angles: FloatArray) -> FloatArray:
    """Make rotations (N, 3, 3) about z, in xyz order, that carry x towards y by positive angles in radians."""
    turned: FloatArray = np.broadcast_to(np.eye(3), (len(angles), 3, 3)).copy()
    turned[:, 0, 0] = turned[:, 1, 1] = np.cos(angles)
    turned[:, 1, 0] = np.sin(angles)
    turned[:, 0, 1] = -turned[:, 1, 0]
    return turned
