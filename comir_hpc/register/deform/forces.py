"""Compare two sets of maps voxel by voxel, and say which way every voxel has to move for them to agree.

The fixed map is explained by the moving one, locally: about every voxel, in a window, ``fixed = a * moving + b`` is
fitted. What remains is the residual, and its square, averaged over the window, is ``variance * (1 - correlation^2)``.
So the sum of the squared residuals, each divided by the fixed map's local deviation, is one less the squared local
correlation. Its derivative is ``a`` times the slope of the moving map. Where the two have nothing to do with each
other, ``a`` is near zero, and nothing pulls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from comir_hpc.register.deform.warping import Array

_PASSES = 2  # means over boxes, one after the other, that stand for a Gaussian window
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


class LocalCorrelation:
    """Compare a fixed map with moving ones in windows.

    Parameters
    ----------
    fixed : (c, z, y, x) float32
        Maps of the fixed volume.
    window_vox : float
        Deviation of the window, in voxels.
    signed : bool
        Whether only a positive correlation counts, as between learned maps. Intensities of two modalities may run
        against each other.
    """

    def __init__(self, fixed: Array, window_vox: float, *, signed: bool) -> None:
        self._fixed, self._signed = fixed, signed
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
        both = self._mean(weights * f * m) * inverse - mean_f * mean_m
        if self._signed:
            both = np.maximum(both, 0)
        quiet_f, quiet_m = (np.float32(_QUIET * np.average(v, weights=weights)) for v in (var_f, var_m))
        slope = both / (var_m + quiet_m + np.float32(1e-12))
        scale = 1 / np.sqrt(var_f + quiet_f + np.float32(1e-12))
        return slope, (f - mean_f - slope * (m - mean_m)) * scale, scale

    def _mean(self, values: Array) -> Array:
        for _ in range(_PASSES):
            values = ndimage.uniform_filter(values, self._side, mode="constant")
        return values
