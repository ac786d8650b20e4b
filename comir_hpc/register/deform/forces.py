"""Compare two sets of maps voxel by voxel, and say which way every voxel has to move for them to agree.

The fixed map is explained by the moving one, locally: about every voxel, in a window, ``fixed = a * moving + b`` is
fitted. What remains is the residual, and its square, averaged over the window, is ``variance * (1 - correlation^2)``.
So the sum of the squared residuals, each divided by the fixed map's local deviation, is one less the squared local
correlation. Its derivative is ``a`` times the slope of the moving map. Where the two have nothing to do with each
other, ``a`` is near zero, and nothing pulls; nor does anything where they run against each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from comir_hpc.register.deform.warping import Array

_CLASSES = 48  # classes of moving values that each get one fixed value
_QUIET = 0.02  # share of the mean variance that is added to every local one: a flat place has no correlation


@dataclass(frozen=True, eq=False)
class Comparison:
    """What one comparison found at every voxel.

    Attributes
    ----------
    cost : (z, y, x) float32
        One less the squared local correlation, averaged over channels; 0 where nothing is compared.
    pull : (3, z, y, x) float32
        Product of slope and residual, summed over channels.
    stiffness : (6, z, y, x) float32
        Products of two slopes, summed over channels: zz, yy, xx, zy, zx, yx.
    weights : (z, y, x) float32
        Weights of the voxels.
    """

    cost: Array
    pull: Array
    stiffness: Array
    weights: Array


def as_fixed(fixed: Array, moving: Array, weights: Array) -> Array:
    """Give moving values the fixed volume's: the mean fixed value of the places that show the same moving value.

    Two modalities need not run the same way, and where one falls the other may rise. After this they do, for all places
    together. A correlation that may have either sign at every place was tried first: it fell below that of the known
    answer while the error grew.

    Parameters
    ----------
    fixed, moving : (c, z, y, x)
        Values of both volumes, as they lie now.
    weights : (z, y, x)
        Weights of the voxels.
    """
    found = np.empty_like(moving)
    held = weights > 0
    for number, (one, other) in enumerate(zip(fixed, moving, strict=True)):
        low, high = np.percentile(other[held], (0.5, 99.5)) if held.any() else (0.0, 0.0)
        if not high > low:
            found[number] = other
            continue
        classes = np.clip((other - low) / (high - low) * _CLASSES, 0, _CLASSES - 1).astype(np.int64)
        share = np.bincount(classes[held], weights=weights[held], minlength=_CLASSES)
        total = np.bincount(classes[held], weights=(weights * one)[held], minlength=_CLASSES)
        # Neighbouring classes are averaged, so that a rare value does not follow a few voxels.
        share, total = (ndimage.gaussian_filter1d(v, 1.0, mode="nearest") for v in (share, total))
        means = total / np.maximum(share, 1e-9 * share.max())
        middles = low + (np.arange(_CLASSES) + 0.5) * (high - low) / _CLASSES
        filled = share > 1e-4 * share.sum()
        found[number] = np.interp(other, middles[filled], means[filled])
    return found


class LocalCorrelation:
    """Compare a fixed map with moving ones in windows.

    Parameters
    ----------
    fixed : (c, z, y, x) float32
        Maps of the fixed volume.
    window_vox : float
        Deviation of the window along each axis, in voxels: it is a box.
    """

    def __init__(self, fixed: Array, window_vox: float) -> None:
        self._fixed = fixed
        # A box of n voxels has the deviation sqrt((n^2 - 1) / 12).
        self._side = max(3, 2 * round((np.sqrt(12 * window_vox**2 + 1) - 1) / 2) + 1)
        self._weights: Array | None = None
        self._inverse = np.zeros(0, dtype=np.float32)
        self._centred: list[_Centred] = []

    def at(self, moving: Array, weights: Array, *, derived: bool = True) -> Comparison:
        """Compare with moving maps (c, z, y, x), with the weight (z, y, x) of every voxel."""
        self._look_at(weights)
        shape = weights.shape
        cost = np.zeros(shape, dtype=np.float32)
        pull, stiffness = np.zeros((3, *shape), dtype=np.float32), np.zeros((6, *shape), dtype=np.float32)
        for one, other in zip(self._centred, moving, strict=True):
            slope, residual = self._explained(one, other, weights)
            cost += weights * residual**2
            if derived:
                ahead = [g * (slope * one.scale) for g in np.gradient(other)]
                for axis, gradient in enumerate(ahead):
                    pull[axis] += weights * gradient * residual
                for number, (i, j) in enumerate(((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))):
                    stiffness[number] += weights * ahead[i] * ahead[j]
        return Comparison(cost / np.float32(len(self._fixed)), pull, stiffness, weights)

    def _look_at(self, weights: Array) -> None:
        """Measure the fixed map in every window; the weights seldom change, so that is kept."""
        if self._weights is not None and np.array_equal(weights, self._weights):
            return
        share = self._mean(weights)
        self._weights = weights
        self._inverse = np.where(share > 1e-3, 1 / np.maximum(share, 1e-3), 0).astype(np.float32)
        self._centred = []
        for fixed in self._fixed:
            values = fixed - np.float32(np.average(fixed, weights=weights))
            mean = self._mean(weights * values) * self._inverse
            variance = np.maximum(self._mean(weights * values * values) * self._inverse - mean**2, 0)
            quiet = np.float32(_QUIET * np.average(variance, weights=weights) + 1e-12)
            scale = np.asarray(1 / np.sqrt(variance + quiet), dtype=np.float32)
            self._centred.append(_Centred(values, mean, scale))

    def _explained(self, fixed: _Centred, moving: Array, weights: Array) -> tuple[Array, Array]:
        """Fit the fixed map: the factor of the moving one, and what remains over the deviation."""
        m = moving - np.float32(np.average(moving, weights=weights))
        mean = self._mean(weights * m) * self._inverse
        variance = np.maximum(self._mean(weights * m * m) * self._inverse - mean**2, 0)
        both = self._mean(weights * fixed.values * m) * self._inverse - fixed.mean * mean
        quiet = np.float32(_QUIET * np.average(variance, weights=weights) + 1e-12)
        slope = np.maximum(both, 0) / (variance + quiet)
        return slope, (fixed.values - fixed.mean - slope * (m - mean)) * fixed.scale

    def _mean(self, values: Array) -> Array:
        return np.asarray(ndimage.uniform_filter(values, self._side, mode="constant"), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class _Centred:
    """One fixed map: its values about their mean, the mean in every window, and one over the deviation there."""

    values: Array
    mean: Array
    scale: Array
