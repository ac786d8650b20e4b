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

_PASSES = 2  # means over boxes, one after the other, that stand for a Gaussian window
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
        Deviation of the window, in voxels.
    """

    def __init__(self, fixed: Array, window_vox: float) -> None:
        self._fixed = fixed
        # Two passes over boxes of n voxels have the deviation sqrt(2 (n^2 - 1) / 12).
        self._side = max(3, 2 * round((np.sqrt(6 * window_vox**2 + 1) - 1) / 2) + 1)

    def at(self, moving: Array, weights: Array, *, derived: bool = True) -> Comparison:
        """Compare with moving maps (c, z, y, x), with the weight (z, y, x) of every voxel."""
        share = self._mean(weights)
        inverse = np.where(share > 1e-3, 1 / np.maximum(share, 1e-3), 0).astype(np.float32)
        shape = weights.shape
        cost = np.zeros(shape, dtype=np.float32)
        pull, stiffness = np.zeros((3, *shape), dtype=np.float32), np.zeros((6, *shape), dtype=np.float32)
        for one, other in zip(self._fixed, moving, strict=True):
            slope, residual, scale = self._explained(one, other, weights, inverse)
            cost += weights * residual**2
            if derived:
                ahead = [g * (slope * scale) for g in np.gradient(other)]
                for axis, gradient in enumerate(ahead):
                    pull[axis] += weights * gradient * residual
                for number, (i, j) in enumerate(((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))):
                    stiffness[number] += weights * ahead[i] * ahead[j]
        return Comparison(cost / np.float32(len(self._fixed)), pull, stiffness, weights)

    def _explained(
        self, fixed: Array, moving: Array, weights: Array, inverse: Array
    ) -> tuple[Array, Array, Array]:
        """Fit the fixed map: the factor of the moving one, what remains over the deviation, and one over that."""
        centre_f, centre_m = (float(np.average(v, weights=weights)) for v in (fixed, moving))
        f, m = fixed - np.float32(centre_f), moving - np.float32(centre_m)
        mean_f, mean_m = self._mean(weights * f) * inverse, self._mean(weights * m) * inverse
        var_f = np.maximum(self._mean(weights * f * f) * inverse - mean_f**2, 0)
        var_m = np.maximum(self._mean(weights * m * m) * inverse - mean_m**2, 0)
        both = np.maximum(self._mean(weights * f * m) * inverse - mean_f * mean_m, 0)
        quiet_f, quiet_m = (np.float32(_QUIET * np.average(v, weights=weights)) for v in (var_f, var_m))
        slope = both / (var_m + quiet_m + np.float32(1e-12))
        scale = 1 / np.sqrt(var_f + quiet_f + np.float32(1e-12))
        return slope, (f - mean_f - slope * (m - mean_m)) * scale, scale

    def _mean(self, values: Array) -> Array:
        for _ in range(_PASSES):
            values = ndimage.uniform_filter(values, self._side, mode="constant")
        return values
